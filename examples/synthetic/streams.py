"""Streams of known kinds, small enough to train on in a minute or two.

    random-walk  each value is the last one plus noise: no forecast beats the last value by much
    season       an autoregression around a daily season with the stream's own phase
    regimes      a fast and a slow oscillation, and which of them lasts for a random time
    label        a label of each event: whether the sum of the last few values is above zero

Rows are in order of time, all streams together; the specification leaves every training option to
its default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]

START_MS = 1_735_689_600_000
"""2025-01-01T00:00:00Z."""
STEP_MS = 3_600_000
SEASON_STEPS = 24
"""Steps of a day."""


def noise(random: np.random.Generator, events: int) -> Floats:
    """Independent normal values."""
    return random.normal(size=events)


def random_walk(random: np.random.Generator, events: int) -> Floats:
    """A sum of independent normal steps."""
    return np.asarray(10 * random.normal() + np.cumsum(random.normal(size=events)))


def season(random: np.random.Generator, events: int) -> Floats:
    """0.7 of the last deviation from a sine of one day, plus noise."""
    phase = random.uniform(0, 2 * np.pi)
    level = 3 * np.sin(2 * np.pi * np.arange(events) / SEASON_STEPS + phase)
    deviation = np.zeros(events)
    for at in range(1, events):
        deviation[at] = 0.7 * deviation[at - 1] + random.normal(scale=0.5)
    return np.asarray(level + deviation)


def regimes(random: np.random.Generator, events: int) -> Floats:
    """Oscillations with a period of 6 or 24 steps, each regime for 40 on average."""
    values, angle, fast = np.zeros(events), random.uniform(0, 2 * np.pi), False
    for at in range(events):
        fast ^= random.random() < 1 / 40
        angle += 2 * np.pi / (6 if fast else 24)
        values[at] = np.sin(angle) + random.normal(scale=0.1)
    return values


SERIES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "random-walk": random_walk,
    "season": season,
    "regimes": regimes,
}
LABEL = "label"
KINDS = (*SERIES, LABEL)
SUMMED_EVENTS = 6


def synthetic_frame(kind: str, streams: int = 20, events: int = 500, seed: int = 1) -> pl.DataFrame:
    """A table of one kind: `id`, `at` (RFC 3339), `value`, and for labels `high`."""
    random = np.random.default_rng(seed)
    parts = []
    for stream in range(streams):
        values = SERIES.get(kind, noise)(random, events).round(4)
        part = pl.DataFrame(
            {
                "id": [f"s{stream:02d}"] * events,
                "at": START_MS + STEP_MS * np.arange(events) + 1000 * stream,
                "value": values,
            }
        )
        if kind == LABEL:
            sums = np.convolve(values, np.ones(SUMMED_EVENTS))[:events]
            part = part.with_columns(high=pl.Series(sums > 0))
        parts.append(part)
    moment = pl.from_epoch("at", time_unit="ms").dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    return pl.concat(parts).sort("at").with_columns(at=moment)


def synthetic_spec(kind: str) -> dict[str, Any]:
    """The specification of one kind, as in a `SPEC.yaml`."""
    head: dict[str, Any] = {
        "kind": "forecast",
        "name": "next",
        "targets": ["value"],
        "quantiles": [0.1, 0.5, 0.9],
    }
    if kind == LABEL:
        head = {"kind": "label", "name": "high"}
    return {
        "name": kind,
        "events": {
            "fields": [
                {"kind": "timestamp", "name": "at"},
                {"kind": "numeric", "name": "value"},
            ]
        },
        "layers": [
            {"kind": "lstm", "name": "memory", "units": 32},
            {"kind": "concatenate", "inputs": ["memory", "features"]},
        ],
        "heads": [head],
        "training": {"stream": "id"},
    }
