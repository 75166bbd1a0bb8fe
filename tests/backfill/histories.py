"""Synthetic histories: events of many streams in several files, in bounded memory.

The lengths of streams follow a power law; every stream has an event. An event's time is the one of
its number, moved back a little, so that streams are interleaved and not quite in order, and all
files together are in the order of time, as a team's daily exports are. Each file depends on the
seed and its number alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from tests.support.oracle import contracting_weights

STREAM: Final = "machine"
KINDS: Final = ("start", "stop", "load", "idle", "test")
START_MS: Final = 1_704_067_200_000  # 2024-01-01
YEAR_MS: Final = 365 * 86_400_000
LATE_GAPS: Final = 0.3
"""Events are late by up to this share of the mean time between two events of a stream."""

ROW_GROUP: Final = 122_880

MODEL: Final[dict[str, Any]] = {
    "name": "machines",
    "events": {
        "fields": [
            {"kind": "timestamp", "name": "at", "gap_mean": 10.0, "gap_std": 2.0},
            {"kind": "numeric", "name": "power", "mean": 0.0, "std": 1.0},
            {"kind": "numeric", "name": "heat", "mean": 0.0, "std": 1.0, "optional": True},
            {"kind": "boolean", "name": "remote"},
            {"kind": "categorical", "name": "kind", "embedding": 4, "vocabulary": list(KINDS)},
        ],
    },
    "heads": [{"kind": "forecast", "name": "next", "targets": ["power"]}],
    "training": {
        "stream": STREAM,
        "validate_from": "2024-11-01T00:00:00Z",
        "test_from": "2024-12-01T00:00:00Z",
    },
}
"""The specification of a model of these events, without its layers."""


def write_model(folder: Path, units: int = 64) -> Artifact:
    """Write a model of the events, two stacked LSTMs with random weights."""
    layers = [{"kind": "lstm", "units": units}] * 2
    spec = parse_spec({**MODEL, "layers": layers})
    return write_artifact(folder, spec, contracting_weights(spec, 1))


@dataclass(frozen=True)
class History:
    """What a history has.

    Attributes:
        events: of all streams, without duplicates.
        streams: at most as many as the first file has events.
        files: of equal size.
        exponent: the weight of the n-th stream is 1 / n**exponent.
        skew: share of all events that the first stream has; 0 for that of the power law.
        bad: share of events that no reader of the model accepts.
        duplicates: share of events that follow a second time.
        seed: of everything.
    """

    events: int = 50_000_000
    streams: int = 200_000
    files: int = 25
    exponent: float = 0.8
    skew: float = 0.0
    bad: float = 0.0
    duplicates: float = 0.0
    seed: int = 1

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """The share of each stream, float64 [S]."""
        weights = 1.0 / np.arange(1, self.streams + 1) ** self.exponent
        if self.skew:
            weights[0] = self.skew / (1 - self.skew) * weights[1:].sum()
        return np.asarray(weights / weights.sum())

    @cached_property
    def _names(self) -> pl.Series:
        return pl.Series(STREAM, [f"m{number:07d}" for number in range(self.streams)])

    def frames(self) -> Iterator[pl.DataFrame]:
        """Yield the events of each file."""
        bounds = np.linspace(0, self.events, self.files + 1).astype(np.int64).tolist()
        for number in range(self.files):
            yield self._frame(number, bounds[number], bounds[number + 1])

    def _frame(self, number: int, first: int, stop: int) -> pl.DataFrame:
        random, count = np.random.default_rng([self.seed, number]), stop - first
        streams = np.searchsorted(np.cumsum(self.weights), random.random(count))
        streams = np.minimum(streams, self.streams - 1)
        if number == 0:
            streams[: self.streams] = random.permutation(self.streams)[:count]
        times = START_MS + (np.arange(first, stop) * (YEAR_MS / self.events)).astype(np.int64)
        late_ms = int(LATE_GAPS * YEAR_MS * self.streams / self.events) + 1
        power = random.standard_normal(count).astype(np.float32)
        frame = pl.DataFrame(
            {
                "at": pl.Series(times - random.integers(0, late_ms, count)).cast(
                    pl.Datetime("ms", "UTC")
                ),
                STREAM: self._names.gather(streams),
                "power": pl.Series(power).cast(pl.Float64).round(4),
                "heat": pl.Series(random.integers(-300, 300, count) / 100).set(
                    pl.Series(random.random(count) < 0.05), None
                ),
                "remote": pl.Series(random.random(count) < 0.3),
                "kind": pl.Series(KINDS).gather(random.integers(0, len(KINDS), count)),
                "offset": pl.Series(np.arange(first, stop)),
            }
        )
        if self.bad:
            is_bad = pl.Series(random.random(count) < self.bad)
            frame = frame.with_columns(power=frame["power"].set(is_bad, None))
        if self.duplicates:
            copies = np.repeat(np.arange(count), 1 + (random.random(count) < self.duplicates))
            frame = frame[copies]
        return frame

    def write(self, folder: Path, kind: str = "parquet") -> list[Path]:
        """Write the files into a new folder, as `parquet` or `csv`."""
        folder.mkdir(parents=True)
        paths = []
        for number, frame in enumerate(self.frames()):
            path = folder / f"events-{number:04d}.{kind}"
            if kind == "csv":
                frame.write_csv(path, datetime_format="%Y-%m-%dT%H:%M:%S%.3fZ")
            else:
                frame.write_parquet(path, compression="zstd", row_group_size=ROW_GROUP)
            paths.append(path)
        return paths
