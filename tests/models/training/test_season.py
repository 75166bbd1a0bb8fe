"""The season of recorded series is found exactly if it is clear; without a clear one, none is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from models.spec.model import ModelSpec, parse_spec
from models.training.data import streams_of
from models.training.defaults import resolve_season, season_warning
from models.training.season import find_season
from tests.support.training import HOUR_MS

Floats = NDArray[np.float64]


def seasonal(season: int, events: int, noise: float, seed: Sequence[int] = (0,)) -> Floats:
    """A smooth season with two harmonics and a phase of its own."""
    random = np.random.default_rng(seed)
    phase = 2 * np.pi * (np.arange(events) / season + random.random())
    shape = np.sin(phase) + 0.5 * np.sin(2 * phase + random.uniform(0, 6))
    return shape + noise * random.normal(size=events)


@pytest.mark.parametrize(
    ("season", "events"), [(7, 150), (24, 24 * 12), (48, 3000), (96, 2000), (288, 288 * 8)]
)
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_a_season_is_found_exactly_whatever_the_phases(season, events, noise):
    for seed in range(5):
        streams = [seasonal(season, events, noise, (seed, stream)) for stream in range(8)]
        assert find_season(streams) == season


@pytest.mark.parametrize("season", [24, 2016, 4000])
def test_one_stream_with_a_sharp_pattern_is_enough(season):
    pattern = np.random.default_rng(season).exponential(size=season)
    values = np.tile(pattern, 5) * np.random.default_rng(0).normal(1, 0.2, 5 * season)
    assert find_season([values]) == season
    assert find_season([values], longest=season - 1) is None


def test_the_alternation_of_two_values_is_a_season_of_two_events():
    assert find_season([np.tile([1.0, 5.0], 50)]) == 2


def test_missing_values_outliers_and_a_trend_do_not_hide_a_season():
    random = np.random.default_rng(0)
    values = seasonal(24, 2000, 0.2)
    values[random.random(2000) < 0.3] = np.nan
    values[100:180] = np.nan
    values[random.integers(0, 2000, 10)] = 1e9
    assert find_season([values]) == 24
    assert find_season([seasonal(24, 2000, 0.2) + np.arange(2000) * 0.01]) == 24
    assert find_season([seasonal(24, 2000, 0.2) + 0.05 * random.normal(size=2000).cumsum()]) == 24


@pytest.mark.parametrize(("weekend", "season"), [(0.0, 24), (0.2, 24), (0.6, 168)])
def test_a_week_is_found_only_if_it_is_clearly_better_than_a_day(weekend, season):
    for seed in range(5):
        streams = []
        for stream in range(4):
            values = seasonal(24, 8 * 168, 0.3, (seed, stream))
            is_weekend = np.arange(len(values)) // 24 % 7 >= 5
            streams.append(np.where(is_weekend, (1 - 0.8 * weekend) * values - weekend, values))
        assert find_season(streams) == season


def test_most_series_decide():
    with_season = [seasonal(24, 500, 0.2, (stream,)) for stream in range(6)]
    without = [np.random.default_rng(stream).normal(size=500) for stream in range(5)]
    assert find_season([*with_season, *without]) == 24
    assert find_season([*with_season[:4], *without]) is None
    few = np.random.default_rng(0).normal(size=27)
    few[[0, -1]] = 4.0
    assert find_season([*with_season[:2], few]) == 24
    constant = [np.full(500, 3.0), np.full(500, np.nan), np.empty(0)]
    assert find_season([*with_season, *without, *constant]) == 24


def test_a_season_that_has_ended_is_none():
    noise = np.random.default_rng(0).normal(size=400)
    assert find_season([np.append(seasonal(24, 800, 0.1), noise)]) is None


def test_a_likely_length_is_preferred_to_its_neighbours_only():
    streams = [seasonal(290, 290 * 9, 0.2)]
    assert find_season(streams, likely=[288, 2016]) == 288
    assert find_season(streams, likely=[250]) == find_season(streams)
    sharp = np.tile(np.random.default_rng(0).exponential(size=290), 9)
    assert find_season([sharp], likely=[288]) == 290


def _autoregressive(random: np.random.Generator, events: int) -> Floats:
    values = np.zeros(events)
    for at, noise in enumerate(random.normal(size=events - 1), 1):
        values[at] = 0.95 * values[at - 1] + noise
    return values


WITHOUT: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "random walk": lambda random, events: random.normal(size=events).cumsum(),
    "smooth random walk": lambda random, events: random.normal(size=events).cumsum().cumsum(),
    "white noise": lambda random, events: random.normal(size=events),
    "heavy tails": lambda random, events: random.lognormal(0, 2, events),
    "autoregressive": _autoregressive,
    "trend": lambda random, events: np.arange(events) + random.normal(size=events),
    "counter": lambda random, events: random.poisson(3, events).cumsum().astype(float),
    "steps": lambda random, events: np.repeat(random.normal(size=events), 50)[:events],
    "irregular season": lambda random, events: np.sin(random.exponential(0.5, events).cumsum()),
    "random events": lambda random, events: (random.random(events) < 0.1).astype(float),
}


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("events", [300, 1500])
def test_series_without_a_season_have_none(kind, events):
    found = [
        find_season([WITHOUT[kind](np.random.default_rng(seed), events)]) for seed in range(50)
    ]
    assert found == [None] * 50


def test_fewer_than_four_seasons_are_too_few():
    assert find_season([seasonal(24, 4 * 24, 0.05)], likely=[25]) == 24
    assert find_season([seasonal(24, 4 * 24 - 1, 0.05)]) is None
    assert find_season([]) is None
    assert find_season([np.array([1.0, 2.0, 1.0])]) is None


def spec_of(
    fields: Sequence[str] = ("x",),
    session_gap_s: int | None = None,
    transform: str = "none",
    **detection: Any,
) -> ModelSpec:
    numeric = [
        {"kind": "numeric", "name": name, "optional": True, "transform": transform}
        for name in fields
    ]
    return parse_spec(
        {
            "name": "t",
            "events": {"fields": [{"kind": "timestamp", "name": "at"}, *numeric]},
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [{"kind": "anomaly", "name": "odd", "targets": fields}],
            "detection": {"head": "odd", **detection},
            "session_gap_s": session_gap_s,
            "training": {"stream": "id"},
        }
    )


def season_of(
    spec: ModelSpec, values: Floats, before: int, step_ms: int = HOUR_MS, streams: int = 3
) -> dict[str, Any]:
    """What is derived of streams with the same values in every field, and is in the spec."""
    columns = {
        "id": np.repeat(np.arange(streams).astype(str), len(values)),
        "at": np.tile(np.arange(len(values)) * step_ms, streams),
    }
    names = [field.name for field in spec.events.fields if field.kind == "numeric"]
    frame = pl.DataFrame({**columns, **{name: np.tile(values, streams) for name in names}})
    table = streams_of(spec, frame.with_columns(pl.col(names).fill_nan(None)))
    resolved, derived = resolve_season(spec, table, before * step_ms)
    options = (
        {} if resolved.detection is None else {"season_events": resolved.detection.season_events}
    )
    assert derived in ({}, options)
    return derived


def test_the_season_is_that_of_the_events_before_validation():
    values = 50 + np.append(seasonal(24, 480, 0.2), seasonal(35, 700, 0.2))
    values[::7] = np.nan
    assert season_of(spec_of(), values, before=480) == {"season_events": 24}
    assert season_of(spec_of(), values, before=60) == {"season_events": None}
    assert season_of(spec_of(), values, before=0) == {"season_events": None}


@pytest.mark.parametrize("season", [None, 12])
def test_a_season_of_the_specification_is_kept(season):
    assert season_of(spec_of(season_events=season), seasonal(24, 480, 0.2), before=480) == {}


def test_a_model_without_detection_has_no_season():
    spec = spec_of().model_copy(update={"detection": None})
    assert season_of(spec, seasonal(24, 480, 0.2), before=480) == {}


def test_the_season_is_that_of_the_transformed_values():
    random = np.random.default_rng(0)
    values = np.exp(5 + 1.5 * seasonal(24, 960, 0.1) + random.normal(size=960))
    for transform, season in (("none", None), ("signed_log1p", 24)):
        assert season_of(spec_of(transform=transform), values, 960) == {"season_events": season}
    values[::24] *= 1e250
    assert season_of(spec_of(transform="signed_log1p"), values, 960) == {"season_events": 24}


def test_the_day_and_the_week_of_the_timestamps_are_likely():
    values = seasonal(290, 290 * 6, 0.2)
    assert season_of(spec_of(), values, 290 * 6, step_ms=300_000) == {"season_events": 288}
    assert season_of(spec_of(), values, 290 * 6, step_ms=2_100_000) == {"season_events": 288}
    assert season_of(spec_of(), values, 290 * 6, step_ms=1_000)["season_events"] > 288


def test_a_session_is_a_series_of_its_own():
    values = np.tile(seasonal(24, 80, 0.1), 20)
    at = np.arange(len(values)) * HOUR_MS + np.arange(len(values)) // 80 * 10 * HOUR_MS
    frame = pl.DataFrame({"id": "a", "at": at, "x": values})
    for gap_s, season in ((None, 80), (36_000, None)):
        spec = spec_of(session_gap_s=gap_s)
        found, _ = resolve_season(spec, streams_of(spec, frame), int(at[-1]))
        assert found.detection is not None
        assert found.detection.season_events == season


def test_the_state_of_a_derived_season_is_bounded():
    names = [f"x{number}" for number in range(200)]
    values = seasonal(96, 96 * 5, 0.1)
    few, many = (season_of(spec_of(names[:n]), values, 96 * 5, streams=1) for n in (150, 200))
    assert (few, many) == ({"season_events": 96}, {"season_events": None})


def test_a_season_that_no_stream_repeats_causes_a_warning():
    frame = pl.DataFrame({"id": ["a"] * 48 + ["b"] * 12, "x": seasonal(12, 60, 0.1)})
    frame = frame.with_columns(at=pl.int_range(pl.len()).over("id") * HOUR_MS)
    for season, before, warns in ((40, 48, False), (40, 41, False), (40, 40, True), (48, 48, True)):
        spec = spec_of(season_events=season)
        warning = season_warning(spec, streams_of(spec, frame), before * HOUR_MS)
        assert (warning is not None) == warns
        assert warning is None or f"no stream has more than {before} events" in warning
    sessions = spec_of(season_events=20, session_gap_s=3600 * 12)
    gap = pl.when(pl.col("at") >= 20 * HOUR_MS).then(24 * HOUR_MS).otherwise(0)
    table = streams_of(sessions, frame.head(40).with_columns(pl.col("at") + gap))
    assert season_warning(sessions, table, 10**12) is not None
    assert season_warning(spec_of(season_events=None), table, 10**12) is None
