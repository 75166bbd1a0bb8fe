"""Sensors with labelled anomalies: a generator, since labelled recordings are rarely free.

Each sensor has its own level, scale, daily and weekly shape, and autocorrelated noise.
Anomalies are in the last two fifths of the time only. They are of two disjoint sets of kinds:
detection was developed on the first, and the second is held out.

    development   spike, level, noise, stuck
    held_out      drift, amplitude, frequency, shift

Equal arguments give equal tables. `python -m examples.sensors.data DIR` writes the events of
100 sensors in 50 days as `events.csv`, and the same with their labels as `labelled.csv`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kinds = Literal["development", "held_out"]

KINDS: dict[Kinds, tuple[str, ...]] = {
    "development": ("spike", "level", "noise", "stuck"),
    "held_out": ("drift", "amplitude", "frequency", "shift"),
}
SEEDS: dict[Kinds, int] = {"development": 1, "held_out": 2}
LENGTHS = {
    "spike": (1, 2),
    "level": (12, 96),
    "noise": (12, 96),
    "stuck": (24, 96),
    "drift": (48, 192),
    "amplitude": (96, 288),
    "frequency": (96, 192),
    "shift": (48, 192),
}
"""Least and most events of an anomaly, the latter exclusive."""
DAY_STEPS = 96
STEP_MS = 900_000
START_MS = 1_767_225_600_000
"""2026-01-01T00:00:00Z."""
CLEAN = 0.6
"""Share of the time that has no anomalies, from the start."""


def sensors(kinds: Kinds, *, count: int = 40, days: int = 100, each: int = 2) -> pl.DataFrame:
    """All events, sensor by sensor.

    Args:
        kinds: of the anomalies.
        count: sensors.
        days: of 96 events.
        each: anomalies of a sensor.

    Returns:
        `sensor`, `time`, `value`, and `anomaly`: whether the event is part of one.
    """
    random = np.random.default_rng(SEEDS[kinds])
    steps = days * DAY_STEPS
    times = pl.Series(START_MS + STEP_MS * np.arange(steps)).cast(pl.Datetime("ms", "UTC"))
    frames = []
    for sensor in range(count):
        values, anomalous = _sensor(random, KINDS[kinds], steps, each)
        name = pl.lit(f"{kinds}-{sensor:03d}").alias("sensor")
        frame = pl.DataFrame({"time": times, "value": values, "anomaly": anomalous})
        frames.append(frame.select(name, "time", "value", "anomaly"))
    return pl.concat(frames)


class _Parts(NamedTuple):
    """Components of a sensor's values, [steps] each; anomalies change them in place."""

    amplitude: Floats
    phase: Floats
    noise: Floats
    offset: Floats


def _sensor(
    random: np.random.Generator, kinds: tuple[str, ...], steps: int, each: int
) -> tuple[Floats, NDArray[np.bool_]]:
    noise = random.uniform(0.05, 0.5)
    parts = _Parts(np.ones(steps), np.zeros(steps), np.full(steps, noise), np.zeros(steps))
    own_phase, second = random.uniform(0, 2 * np.pi), random.uniform(0, 0.6)
    weekly = random.uniform(0, 0.3)
    anomalous, stuck = np.zeros(steps, np.bool_), []
    for number in range(each):
        kind = kinds[random.integers(len(kinds))]
        place = (number + random.uniform(0.1, 0.6)) / each
        start = int(steps * (CLEAN + (1 - CLEAN) * place))
        window = slice(start, start + int(random.integers(*LENGTHS[kind])))
        anomalous[window] = True
        if kind == "stuck":
            stuck.append(window)
        else:
            _disturb(random, kind, parts, window, max(noise, 0.2))
    angle = 2 * np.pi * np.arange(steps) / DAY_STEPS + own_phase + parts.phase
    shape = np.sin(angle) + second * np.sin(2 * angle + 1) + weekly * np.sin(angle / 7)
    deviation = np.zeros(steps)
    shocks = 0.6 * parts.noise * random.standard_normal(steps)
    for step in range(1, steps):
        deviation[step] = 0.8 * deviation[step - 1] + shocks[step]
    values = parts.amplitude * shape + deviation + parts.offset
    for window in stuck:
        values[window] = values[window.start - 1]
    return values * 10 ** random.uniform(-1, 1) + random.uniform(-20, 20), anomalous


def _disturb(
    random: np.random.Generator, kind: str, parts: _Parts, window: slice, unit: float
) -> None:
    strength, sign = random.uniform(3, 8), random.choice([-1, 1])
    length = window.stop - window.start
    match kind:
        case "spike":
            parts.offset[window] += sign * strength * unit
        case "level":
            parts.offset[window] += sign * strength * unit * 0.6
        case "noise":
            parts.noise[window] *= strength
        case "drift":
            parts.offset[window] += sign * strength * unit * np.linspace(0, 1, length)
        case "amplitude":
            parts.amplitude[window] *= random.choice([0.2, 2.2])
        case "frequency":
            turns = random.choice([1, 2])
            parts.phase[window] += 2 * np.pi * turns * np.linspace(0, 1, length)
        case "shift":
            parts.phase[window] += np.pi * random.uniform(0.5, 1)
        case _:
            raise ValueError(f"expected a kind of anomaly, got {kind!r}")


def write_sensors(folder: Path, *, count: int = 100, days: int = 50) -> None:
    """Write `events.csv` and `labelled.csv` of sensors with development kinds."""
    folder.mkdir(parents=True, exist_ok=True)
    labelled = sensors("development", count=count, days=days).with_columns(
        pl.col("sensor").str.replace("development", "sensor"),
        pl.col("time").dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
        pl.col("value").round(4),
    )
    labelled.drop("anomaly").write_csv(folder / "events.csv")
    labelled.write_csv(folder / "labelled.csv")


if __name__ == "__main__":
    write_sensors(Path(sys.argv[1]))
