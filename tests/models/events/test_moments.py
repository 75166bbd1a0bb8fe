"""Vectorized parsing of timestamps, compared with the validator of the event type."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.events.parse import (
    MAX_TIMESTAMP_MS,
    MIN_TIMESTAMP_MS,
    _parts,
    epoch_ms,
    parse_uniform_strings,
    timestamp_ms,
    timestamp_validator,
)


def one_by_one(moments: list[str | int]) -> list[int] | None:
    try:
        return [timestamp_ms(timestamp_validator().validate_python(each)) for each in moments]
    except ValidationError:
        return None


def assert_agrees(moments: list[str | int]) -> None:
    found, wanted = epoch_ms(moments), one_by_one(moments)
    if wanted is None:
        assert found is None
    else:
        assert found is not None
        assert found.dtype == np.int64
        assert found.tolist() == wanted


def _number(low: int, high: int, digits: int) -> st.SearchStrategy[str]:
    likely = st.integers(low, high)
    return st.one_of(*[likely] * 9, st.integers(0, 10**digits - 1)).map(
        lambda number: f"{number:0{digits}}"
    )


FRACTIONS = st.integers(0, 10).flatmap(
    lambda digits: st.just("") if digits == 0 else st.from_regex(rf"\.[0-9]{{{digits}}}\Z")
)
OFFSETS = st.one_of(
    st.sampled_from(["Z", "z", "", "+0000", "-00:00", "+23:59", "-23:59", "+24:00", "+00:60"]),
    st.builds("{}{}:{}".format, st.sampled_from("+-"), _number(0, 23, 2), _number(0, 59, 2)),
)
LOCALS = st.builds(
    "{}-{}-{}{}{}:{}:{}".format,
    _number(1899, 2200, 4),
    _number(1, 12, 2),
    _number(1, 31, 2),
    st.sampled_from("TTTTt _"),
    _number(0, 23, 2),
    _number(0, 59, 2),
    _number(0, 59, 2),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(LOCALS, min_size=1, max_size=4), FRACTIONS, st.lists(OFFSETS, min_size=1))
def test_vectorized_parsing_equals_scalar_parsing(
    local: list[str], fraction: str, offsets: list[str]
) -> None:
    assert_agrees([f"{text}{fraction}{offsets[0]}" for text in local])
    assert_agrees(
        [f"{text}{fraction}{offsets[at % len(offsets)]}" for at, text in enumerate(local)]
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.builds("{}{}{}".format, LOCALS, FRACTIONS, OFFSETS),
            st.integers(MIN_TIMESTAMP_MS, MAX_TIMESTAMP_MS - 1),
        ),
        max_size=4,
    )
)
def test_mixed_timestamps_equal_scalar_parsing(moments: list[str | int]) -> None:
    assert_agrees(moments)


@pytest.mark.parametrize(
    "moments",
    [
        ["2013-01-01T05:17:00-05:0", "02013-01-01T05:17:00-05:00"],
        ["2013-01-01T05:17:00Z\n2013-01-01T05:17:00Z"],
        ["2013-01-01T05:17:00Z\n", "2013-01-01T05:17:00Z"],
        ["2013-01-01T05:17:00Z", ""],
        ["2013-01-01T05:17:00Z", "2013-01-01T05:17:00.5Z"],
        ["2013-01-01T05:17:00+01:00", "2013-01-01T05:17:00-01:00"],
        ["1900-01-01T00:00:00+00:01"],
        ["1899-12-31T23:59:00-00:01"],
        ["2200-01-01T00:00:00+00:01"],
        ["2199-12-31T23:59:59.999Z"],
        ["2199-12-31T23:59:59.999-00:01"],
        ["1969-12-31T23:59:59.9999999Z"],
        ["0000-01-01T00:00:00Z"],
        ["٢٠١٣-01-01T05:17:00Z"],
        ["2013-01-01T05:17:00+24:00"],
        ["2013-01-01T05:17:00-00:60"],
        ["2013-01-01T05:17:00+23:59", "2013-01-01T05:17:00+99:99"],
        ["1969-12-31T23:59:59.999999999Z", "1900-01-01T00:00:00.000999999Z"],
        ["\ud800"],
    ],
)
def test_boundary_timestamps_equal_scalar_parsing(moments: list[str | int]) -> None:
    assert_agrees(moments)


def test_long_texts_are_not_cached() -> None:
    before = _parts.cache_info().misses

    assert epoch_ms(["2013-01-01T05:17:00Z" + "x" * 16]) is None
    assert _parts.cache_info().misses == before


@pytest.mark.parametrize(
    "ending", ["Z", "+02:00", "-05:30", ".5Z", ".123Z", ".123456+00:00", ".123456789-05:00"]
)
def test_common_formats_are_parsed_vectorized(ending: str) -> None:
    strings = [f"2013-01-01T05:17:0{second}{ending}" for second in range(3)]

    found = parse_uniform_strings(strings)

    assert found is not None
    assert found.tolist() == one_by_one(list(strings))
