"""The table on which baselines are fitted, and their predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.decoding.losses import Floats, Scored
from models.spec.model import ModelSpec
from models.training.data import Streams
from models.training.labels import Labels
from models.training.trees import TimeBudget, Trees, tree_features


@dataclass(frozen=True)
class Table:
    """The encoded streams on which baselines are fitted and scored.

    Attributes:
        spec: the fitted spec.
        streams: the data.
        rows: float32 [rows, F], encoded.
        train, validate, test: int64, rows that the head predicts or labels. For a label head
            they are the rows that have a label; for any other each has a predecessor.
        labels: of all rows.
        deviations: as `models.training.scores.deviations_of` gives them for the head's targets.
    """

    spec: ModelSpec
    streams: Streams
    rows: NDArray[np.float32]
    train: NDArray[np.int64]
    validate: NDArray[np.int64]
    test: NDArray[np.int64]
    labels: Labels = field(default_factory=dict)
    deviations: Mapping[str, Floats] = field(default_factory=dict)

    @cached_property
    def stream_of(self) -> NDArray[np.int64]:
        """The stream's index of every row."""
        sizes = [stop - start for start, stop in self.streams.spans]
        return np.repeat(np.arange(len(sizes)), sizes)

    def encoded(self, name: str) -> Floats:
        """A field's encoded values at every row, NaN if absent."""
        at = [column.name for column in self.spec.columns].index(name)
        values = self.rows[:, at].astype(np.float64)
        return np.where(self.streams.columns.present[name], values, np.nan)

    def features(self, events: int, categorical: bool) -> tuple[NDArray[np.float32], list[bool]]:
        """The last events at every row, for trees: see `tree_features`."""
        return tree_features(self.spec, self.rows, self.streams.spans, events, categorical)

    def tune_trees(self, kind: str, truth: Floats, budget: TimeBudget) -> Trees:
        """Trees that predict a target [rows], tuned on the validation events."""
        return Trees.tune(kind, self.features, truth, self.train, self.validate, budget=budget)

    def last_known(self, series: Floats) -> Floats:
        """The latest value of each stream up to each row that is not absent; NaN before any."""
        frame = pl.DataFrame({"s": self.stream_of, "x": series})
        filled = pl.col("x").fill_nan(None).forward_fill().over("s")
        latest = frame.select(filled)["x"]
        return latest.fill_null(float("nan")).to_numpy().astype(np.float64)

    def running(self, series: Floats, half_life: float | None) -> Floats:
        """Running mean of each stream up to each row, without absent values; NaN before any."""
        frame = pl.DataFrame({"s": self.stream_of, "x": series}).with_columns(
            pl.col("x").fill_nan(None)
        )
        if half_life is None:
            count = pl.col("x").is_not_null().cum_sum()
            mean = pl.col("x").fill_null(0.0).cum_sum() / count
        else:
            mean = pl.col("x").ewm_mean(half_life=half_life, ignore_nulls=True).forward_fill()
        means = frame.select(mean.over("s").alias("mean"))["mean"]
        return means.fill_null(float("nan")).to_numpy().astype(np.float64)


@dataclass(frozen=True)
class Baseline:
    """One baseline for one head, scored on the test events.

    Attributes:
        name: what the report calls it.
        scored: its losses on the test events.
        settings: what was chosen on the validation events.
    """

    name: str
    scored: Scored
    settings: dict[str, Any]


def gaussian_nats(error: Floats, log_deviation: Floats) -> Floats:
    """-log of a Gaussian's density; 0 if there is no value, as in the anomaly head."""
    nats = 0.5 * np.log(2 * np.pi) + log_deviation
    nats = nats + 0.5 * np.square(error * np.exp(-log_deviation))
    return np.where(np.isnan(error), 0.0, nats)


def rows_around(table: Table, before: int, after: int) -> NDArray[np.float32]:
    """Every row with those around it in its stream, NaN beyond its ends: [rows, F * offsets].

    The earliest comes first.
    """
    spans = table.streams.spans
    age = np.concatenate([np.arange(stop - start) for start, stop in spans])
    remaining = np.concatenate([np.arange(stop - start)[::-1] for start, stop in spans])
    columns = []
    for offset in range(-before, after + 1):
        shifted = np.roll(table.rows, -offset, axis=0)
        shifted[(age < -offset) | (remaining < offset)] = np.nan
        columns.append(shifted)
    return np.concatenate(columns, axis=1)
