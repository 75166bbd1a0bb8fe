"""The share of normal events with a small tail probability, against what the probability says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.training.tail_shares import tail_lines, tail_shares, tail_warnings


def shares_of(*streams: NDArray[np.float64]) -> dict[str, Any]:
    ends = np.cumsum([len(own) for own in streams])
    rows = np.split(np.arange(ends[-1]), ends[:-1])
    named = [(f"s{at}", own) for at, own in enumerate(rows)]
    found = tail_shares(np.concatenate(streams), named)
    assert found is not None
    return found


def uniform(seed: int, events: int = 4000) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random(events)


def test_uniform_probabilities_are_what_they_say() -> None:
    found = shares_of(*map(uniform, range(20)))
    assert (found["events"], found["streams"]) == (80_000, 20)
    for each in found["levels"]:
        low, high = each["interval"]
        assert low < each["level"] < high
        assert high / low < 2.5
        assert each["far_above"] == 0.0
    assert tail_warnings(found) == []
    assert "of 80,000 normal events; median stream 0.0" in tail_lines(found)[0]


@pytest.mark.parametrize(("factor", "word"), [(0.25, "small"), (8.0, "large")])
def test_probabilities_that_are_too_small_or_large_are_warned_of(factor: float, word: str) -> None:
    found = shares_of(*(uniform(seed) * factor for seed in range(20)))
    (percent,) = [each for each in found["levels"] if each["level"] == 0.01]
    assert percent["share"] == pytest.approx(0.01 / factor, rel=0.3)
    warnings = tail_warnings(found)
    assert f"is too {word}" in warnings[0]
    assert "below 0.01 (" in warnings[0]


def test_a_stream_that_is_far_above_is_named_where_the_pooled_share_is_right() -> None:
    """Half of one stream in twenty makes up for the others, which have almost none."""
    streams = [0.02 + 0.98 * uniform(seed) for seed in range(19)]
    streams.insert(7, uniform(30) * 0.05)
    found = shares_of(*streams)
    percent = found["levels"][0]
    assert percent["share"] == pytest.approx(0.01, rel=0.1)
    assert percent["median"] == 0.0
    assert percent["far_above"] == pytest.approx(1 / 20)
    assert percent["worst"][0]["stream"] == "s7"
    assert percent["worst"][0]["share"] == pytest.approx(0.2, rel=0.1)
    (warning,) = (text for text in tail_warnings(found) if "below 0.01" in text)
    assert "5% of the streams" in warning
    assert "s7, 19 times as many" in warning


def test_a_stream_is_far_above_only_by_a_large_and_certain_factor() -> None:
    """One of 30 events is little evidence, and twice the level is not far."""
    short, long = np.ones(30), np.ones(50_000)
    short[4], long[::50] = 0.0, 0.0
    assert shares_of(short, uniform(1), uniform(2))["levels"][0]["far_above"] == 0.0
    assert shares_of(long, uniform(1), uniform(2))["levels"][0]["far_above"] == 0.0


def test_groups_of_small_probabilities_widen_the_interval() -> None:
    """As many events below the level, alone or in groups of 20, of 400 and 20 independent ones."""
    alone, grouped = np.ones(40_000), np.ones(40_000)
    random = np.random.default_rng(8)
    alone[random.choice(40_000, 400, replace=False)] = 0.0
    for start in random.choice(2_000, 20, replace=False):
        grouped[start * 20 : start * 20 + 20] = 0.0
    widths = []
    for own in (alone, grouped):
        low, high = shares_of(own)["levels"][0]["interval"]
        assert low < 0.01 < high
        widths.append(high - low)
    assert 2 < widths[1] / widths[0] < 9


def test_no_event_below_a_level_excludes_it_only_if_there_are_enough() -> None:
    few, many = (shares_of(np.ones(events))["levels"][1]["interval"] for events in (500, 50_000))
    assert few[0] == 0.0
    assert few[1] > 0.001 > many[1]


def test_there_are_no_shares_without_an_event() -> None:
    assert tail_shares(np.ones(3), [("a", np.zeros(0, np.int64))]) is None
