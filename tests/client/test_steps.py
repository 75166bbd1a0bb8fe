"""Events and rows from every kind of source become the same body."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from carry_client.steps import body_member, cut, is_sliceable, length, sort_frame, to_steps
from carry_client.wire import encode_body

ZONE = timezone(timedelta(hours=-5))
TIMES = [datetime(2013, 1, 1, 5, 17, second, 999_999, tzinfo=ZONE) for second in (0, 1)]
EVENTS: list[dict[str, Any]] = [
    {"at": TIMES[0], "delay": 2.5, "carrier": "UA", "count": 3, "heavy": True},
    {"at": TIMES[1], "delay": None, "carrier": "B6", "count": 4, "heavy": False},
]
WIRE = [
    {"at": 1357035420999, "delay": 2.5, "carrier": "UA", "count": 3, "heavy": True},
    {"at": 1357035421999, "carrier": "B6", "count": 4, "heavy": False},
]
COLUMNS: dict[str, list[Any]] = {name: [event[name] for event in EVENTS] for name in EVENTS[0]}
ARRAYS = {
    "at": np.array([1357035420999, 1357035421999], "datetime64[ms]"),
    "delay": np.array([2.5, np.nan]),
    "carrier": np.array(["UA", "B6"]),
    "count": np.array([3, 4]),
    "heavy": np.array([True, False]),
}
SOURCES = {
    "events": EVENTS,
    "columns": COLUMNS,
    "arrays": ARRAYS,
    "polars": pl.DataFrame(COLUMNS),
    "pandas": pd.DataFrame(COLUMNS),
    "nullable pandas": pd.DataFrame(COLUMNS).convert_dtypes(),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_kind_of_events_gives_the_same_body(source: Any) -> None:
    assert to_steps(source) == WIRE
    assert is_sliceable(source)
    assert length(source) == 2
    assert to_steps(cut(source, 1, 9)) == WIRE[1:]
    for event in to_steps(source):
        assert {type(value) for value in event.values()} <= {int, float, str, bool}


def test_missing_time_is_left_out() -> None:
    frame = pd.DataFrame({"at": pd.to_datetime(["2013-01-01T00:00Z", None])})
    assert to_steps(frame) == [{"at": 1356998400000}, {}]
    assert to_steps({"at": np.array(["2013-01-01", "NaT"], "datetime64[s]")})[1] == {}


def test_not_a_number_in_an_event_is_left_to_the_service() -> None:
    (event,) = to_steps([{"delay": np.float32("nan")}])
    assert np.isnan(event["delay"])


def test_array_is_rows_of_float32() -> None:
    rows = to_steps(np.array([[1, 2], [3, 4.1]]))
    assert isinstance(rows, np.ndarray)
    assert rows.dtype == np.float32
    assert body_member(rows, "msgpack") == {"inputs": rows.astype("<f4").tobytes()}
    assert body_member(rows, "json") == {"inputs": rows.tolist()}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{"at": datetime(2013, 1, 1)}], "at: expected a time with a zone"),
        (pl.DataFrame({"at": [datetime(2013, 1, 1)]}), "at: expected a time with a zone"),
        ({"a": [1], "b": [1, 2]}, "expected columns of one length"),
        (np.zeros(3), r"expected rows of shape \[T, F\], got shape \[3\]"),
        ([3], "expected an event"),
        (3, "expected a list of events"),
        ("text", "expected an event"),
    ],
)
def test_what_is_no_event_is_rejected(source: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        to_steps(source)


def test_list_of_blocks_is_not_a_list_of_events() -> None:
    assert not is_sliceable([pl.DataFrame(COLUMNS)])
    assert not is_sliceable(iter(EVENTS))


@pytest.mark.parametrize("kind", [pl.DataFrame, pd.DataFrame])
def test_frame_is_sorted_with_equal_times_in_their_order(kind: Any) -> None:
    frame = kind({"at": [3, 1, 2, 1], "place": [0, 1, 2, 3]})
    assert [event["place"] for event in to_steps(sort_frame(frame, "at"))] == [1, 3, 2, 0]
    with pytest.raises(TypeError, match="expected a DataFrame to sort by 'at', got list"):
        sort_frame([{"at": 1}], "at")


MISTAKES = {
    "one event": (EVENTS[0], "at: expected a column, .* one event is sent as a list"),
    "text": ({"carrier": "UA"}, "carrier: expected a column, .* got 'UA'"),
    "unnamed columns": (pd.DataFrame([[1, 2]]), "expected columns with the names of fields, got 0"),
    "equal columns": (
        pd.DataFrame([[1, 2]], columns=["a", "a"]),
        "different names, got .*'a', 'a'",
    ),
    "series": (pd.Series([1]), "expected a list of events, .* got Series"),
}


@pytest.mark.parametrize(("source", "words"), MISTAKES.values(), ids=MISTAKES)
def test_invalid_tables_are_rejected_with_the_reason(source: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        to_steps(source)


UNENCODABLE = {
    "decimal": (Decimal("1.5"), "msgpack"),
    "date": (date(2013, 1, 1), "json"),
    "set": ({1}, "msgpack"),
    "large": (2**70, "msgpack"),
    "infinite": (float("inf"), "json"),
}


@pytest.mark.parametrize(("value", "encoding"), UNENCODABLE.values(), ids=UNENCODABLE)
def test_a_value_that_cannot_be_encoded_is_reported_with_its_place(
    value: object, encoding: Any
) -> None:
    body = {"position": 0, "events": [{"delay": 1e300}, {"delay": None, "kind": value}]}
    with pytest.raises((TypeError, ValueError)) as raised:
        encode_body(encoding, body)
    assert str(raised.value).startswith("events[1].kind: expected a number, string, ")
    assert repr(value) in str(raised.value)
