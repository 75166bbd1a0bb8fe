"""`python -m examples.rivers.comparison`: the network beside trees on the days from 2014.

Trains two more ensembles from other seeds, unless `build/examples/rivers` has them, tunes trees on
earlier days, and prints Markdown tables. `docs/explanation/examples.md` has the rule and the
result. Needs LightGBM: pip install lightgbm==4.7.0. Intervals are 95%, by resampling calendar
months with all catchments, since days and catchments share their weather; differences are paired.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

import models
from examples.command import BUILT
from examples.rivers.data import (
    CATCHMENT,
    CLASSES,
    DAY,
    LABEL,
    SPEC,
    TEST,
    VALIDATE,
    codes,
    flow_class,
    river_days,
)
from examples.rivers.trees import tree_features, tune_trees
from models.artifact.artifact import Artifact, load_artifact
from models.artifact.manifest import MANIFEST_NAME
from models.decoding.losses import score_classes
from models.errors import ArtifactError, ModelsError
from models.onnx.library import open_session
from models.onnx.messages import LENGTHS, OUTPUTS, ROWS, STATES, STATES_AFTER
from models.spec.spec_file import read_spec
from models.training.data import streams_of
from models.training.evaluate import run_network
from models.training.trainer import train

Floats = NDArray[np.float64]

PRETRAINED = Path(models.__file__).parent / "pretrained" / "rivers"
SEEDS = (4, 7)
"""First seeds of the further ensembles; the included one has 1 to 3."""
RESET_EVERY = 100
"""Of the row that shows what the carried state is worth."""
BATCH = 64
"""Streams of a call whose processor time is measured."""
DRAWS = 2000


def main() -> None:
    """Train what is missing, predict, print."""
    frame = river_days().with_columns(flow_class(pl.col("discharge")).alias("today"))
    artifact = load_artifact(PRETRAINED)
    network = "three stacked LSTMs, averaged"
    predicted = {network: probabilities(artifact, frame)}
    for seed in SEEDS:
        predicted[f"the same from seed {seed}"] = probabilities(ensemble(frame, seed), frame)
    predicted[f"the same, reset every {RESET_EVERY} days"] = probabilities(
        artifact, frame, RESET_EVERY
    )
    trees = tune_trees(frame)
    features = tree_features(frame, trees.lags)
    name = f"trees on {trees.lags} days and aggregates of a year"
    predicted[name] = trees.probabilities(features)
    predicted["shares by class of the day, and month"] = shares(frame, pl.col("today"))
    predicted["shares by catchment and month"] = shares(frame, pl.col(CATCHMENT))
    print("\n" + table(frame, predicted))
    print(parts_table(frame, predicted[network], predicted[name]))
    print(f"\nCPU of an event: network {network_us(artifact):.1f} us, trees", end=" ")
    print(f"{cpu_us(lambda: trees.probabilities(features[:BATCH])):.1f} us")
    print(f"state of a stream: {4 * artifact.network_state.float_size:,} bytes")


def ensemble(frame: pl.DataFrame, seed: int) -> Artifact:
    """The specification trained with other seeds, unless it is there."""
    path = BUILT / "rivers" / f"seed-{seed}"
    if not (path / MANIFEST_NAME).exists():
        spec = read_spec(SPEC)
        if spec.training is None:
            raise ModelsError(f"{SPEC}: expected `training`")
        training = spec.training.model_copy(update={"seed": seed})
        train(spec.model_copy(update={"training": training}), frame, path, source="rivers")
    return load_artifact(path)


def probabilities(
    artifact: Artifact, frame: pl.DataFrame, reset_every: int | None = None
) -> Floats:
    """Of every day, as the service computes them in chunks, [rows, classes]."""
    spec = artifact.spec.model_copy(update={"reset_every": reset_every})
    streams = streams_of(spec, frame)
    outputs = run_network(spec, artifact.weights, streams, chunk=256)
    predicted = np.empty((frame.height, len(CLASSES)))
    predicted[streams.table_rows] = artifact.outputs.by_name(outputs)[LABEL]
    return predicted


def shares(frame: pl.DataFrame, by: pl.Expr) -> Floats:
    """How often each class was before `VALIDATE`, by month and something else, [rows, classes]."""
    groups = frame.select(by.rank("dense").fill_null(0).cast(pl.Int64) * 12, pl.col(DAY).dt.month())
    group = groups.sum_horizontal().to_numpy()
    label = codes(frame)
    fitted = (label >= 0) & (frame[DAY] < VALIDATE).to_numpy()
    counts = np.ones((group.max() + 1, len(CLASSES)))
    np.add.at(counts, (group[fitted], label[fitted]), 1)
    return np.asarray((counts / counts.sum(axis=1, keepdims=True))[group])


class Months:
    """The losses of labelled days from `TEST`, and how their mean varies by month."""

    def __init__(self, frame: pl.DataFrame, chosen: pl.Expr | None = None) -> None:
        scored = pl.col(LABEL).is_not_null() & (pl.col(DAY) >= TEST)
        rows = scored if chosen is None else scored & chosen
        self.rows = np.flatnonzero(frame.select(rows).to_series())
        self._truth = codes(frame)[self.rows].astype(np.float64)
        months = frame[DAY].dt.truncate("1mo").to_numpy()[self.rows]
        kinds, month = np.unique(months, return_inverse=True)
        drawn = np.random.default_rng(0).integers(len(kinds), size=(DRAWS, len(kinds)))
        self._month, self._drawn, self._days = month, drawn, np.bincount(month)

    def losses(self, predicted: Floats) -> Floats:
        """Log loss of every day, in nats."""
        return score_classes(predicted[self.rows], self._truth).losses["log_loss"]

    def text(self, losses: Floats, sign: str = "") -> str:
        """Mean and interval."""
        sums = np.bincount(self._month, losses)
        means = sums[self._drawn].sum(axis=1) / self._days[self._drawn].sum(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        return f"{losses.mean():{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"


def table(frame: pl.DataFrame, predicted: Mapping[str, Floats]) -> str:
    """Every method on all days, the first beside the others."""
    months = Months(frame)
    losses = {name: months.losses(each) for name, each in predicted.items()}
    first = next(iter(losses.values()))
    lines = [f"| {len(months.rows):,} days | log loss | minus the first |", "| --- | --- | --- |"]
    for name, own in losses.items():
        more = "" if own is first else months.text(own - first, "+")
        lines.append(f"| {name} | {months.text(own)} | {more} |")
    return "\n".join([*lines, ""])


def parts_table(frame: pl.DataFrame, network: Floats, trees: Floats) -> str:
    """Where the network wins and loses: kinds of days, and every catchment."""
    month, today = pl.col(DAY).dt.month(), pl.col("today")
    stays = today == pl.col(LABEL)
    parts = {"the class stays": stays, "the class changes": ~stays}
    for months, name in ((12, "winter"), (3, "spring"), (6, "summer"), (9, "autumn")):
        parts[name] = month.is_in([months, months % 12 + 1, (months + 1) % 12 + 1])
    for code in frame[CATCHMENT].unique().sort():
        parts[code] = pl.col(CATCHMENT) == code
    lines = ["| days | number | network | trees minus network |", "| --- | --- | --- | --- |"]
    for name, chosen in parts.items():
        part = Months(frame, chosen)
        own, theirs = part.losses(network), part.losses(trees)
        more = part.text(theirs - own, "+")
        lines.append(f"| {name} | {len(own):,} | {own.mean():.4f} | {more} |")
    return "\n".join(lines)


def network_us(artifact: Artifact) -> float:
    """Processor time of ONNX Runtime for a step from the carried state."""
    graph, where = artifact.graphs.data, str(artifact.path)
    if graph is None:
        raise ArtifactError(f"{where}: no graph can represent it")
    session = open_session(graph, 1, where)
    feeds = {
        ROWS: np.zeros((BATCH, 1, artifact.spec.input_features), np.float32),
        LENGTHS: np.ones(BATCH, np.int32),
        STATES: np.zeros((BATCH, artifact.network_state.float_size), np.float32),
    }
    return cpu_us(lambda: session.run([OUTPUTS, STATES_AFTER], feeds))


def cpu_us(call: Callable[[], object], calls: int = 100) -> float:
    """Processor time of a call for one of `BATCH` events, the least of five measurements."""
    call()
    measured = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(calls):
            call()
        measured.append((time.process_time() - start) / calls / BATCH * 1e6)
    return min(measured)


if __name__ == "__main__":
    main()
