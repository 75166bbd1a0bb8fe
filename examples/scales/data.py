"""Meters of different scales: hourly readings with a daily shape, generated.

All meters follow the same dynamics: a daily shape of their own, autocorrelated noise, a slow drift
of the level, and now and then a step to another level. They differ in scale by five orders
of magnitude. Equal arguments give equal tables.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]

HOURS = 24
HOUR_MS = 3_600_000
START_MS = 1_767_225_600_000
"""2026-01-01T00:00:00Z."""
STEP_PROBABILITY = 1 / 400


def meters(seed: int, *, count: int = 40, days: int = 50, name: str = "meter") -> pl.DataFrame:
    """All events, meter by meter: `meter`, `time` and `load`.

    Args:
        seed: of the meters.
        count: meters.
        days: of 24 events.
        name: prefix of the meters' names.
    """
    random = np.random.default_rng(seed)
    steps = HOURS * days
    times = START_MS + HOUR_MS * np.arange(steps)
    parts = []
    for number in range(count):
        load = _shape(random, steps) + _noise(random, steps) + _level(random, steps)
        scale = 10.0 ** random.uniform(-1, 4)
        offset = scale * random.uniform(5, 20)
        columns = {"meter": f"{name}-{number:02d}", "time": times, "load": offset + scale * load}
        parts.append(pl.DataFrame(columns))
    return pl.concat(parts)


def _shape(random: np.random.Generator, steps: int) -> Floats:
    """A day that repeats: two peaks of the meter's own hours and heights."""
    hour = np.arange(steps) % HOURS
    day = np.zeros(steps)
    for _ in range(2):
        peak, width = random.uniform(0, HOURS), random.uniform(1.5, 4)
        distance = np.abs((hour - peak + HOURS / 2) % HOURS - HOURS / 2)
        day += random.uniform(1, 3) * np.exp(-0.5 * np.square(distance / width))
    return day


def _noise(random: np.random.Generator, steps: int) -> Floats:
    noise, value = np.zeros(steps), 0.0
    for at, shock in enumerate(random.normal(size=steps)):
        value = 0.8 * value + 0.3 * float(shock)
        noise[at] = value
    return noise


def _level(random: np.random.Generator, steps: int) -> Floats:
    drift = np.cumsum(random.normal(size=steps)) * 0.02
    jumps = random.normal(size=steps) * 3 * (random.random(steps) < STEP_PROBABILITY)
    return np.asarray(drift + np.cumsum(jumps))
