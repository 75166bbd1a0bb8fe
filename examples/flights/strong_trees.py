"""`python -m examples.flights.strong_trees`: gradient-boosted trees, tuned as far as we can.

The report's trees see what any spec gives them. These are made by hand for the departures: the
last K of them with their delay, gap, minute of the day and destination as plain numbers, the
weekday, origin, carrier and weather of the last one; their number chosen by October. Prints each
beside the shipped model on November and December; intervals are 95%, by resampling days, of the
trees minus the model. Takes some minutes a line.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier

import models
from models.artifact.artifact import load_artifact
from models.decoding.losses import auc, score_binary
from models.events.calendar import zone_table
from models.pretrained.departures import WEATHER, flight_events
from models.spec.layout import output_spec
from models.spec.model import schema_of
from models.training.data import split_of, streams_of
from models.training.evaluate import run_chunks, scored_rows
from models.training.scores import DRAWS, DayDraws, interval

SETTINGS = ((5, 31), (20, 63))
"""Events looked back on, and leaves of a tree."""
MOST_TREES = 1000
STEP = 20
LATE_MINUTES = 15


def columns(frame: pl.DataFrame, events: int) -> NDArray[np.float64]:
    """The trees' features at every departure, [rows, features]; NaN before a stream begins."""
    local = pl.col("departed").dt.convert_time_zone("America/New_York")
    gap = pl.col("departed").diff().over("stream").dt.total_seconds().fill_null(0)
    numbered = [
        pl.col(name).cast(pl.Categorical).to_physical().cast(pl.Float64).alias(name)
        for name in ("destination", "origin", "carrier")
    ]
    frame = frame.with_columns(
        *numbered,
        minute=local.dt.hour().cast(pl.Float64) * 60 + local.dt.minute(),
        weekday=local.dt.weekday().cast(pl.Float64),
        gap=gap.cast(pl.Float64).log1p(),
    )
    back = [
        pl.col(name).shift(lag).over("stream").cast(pl.Float64).alias(f"{name}_{lag}")
        for lag in range(events)
        for name in ("dep_delay", "gap", "minute", "destination")
    ]
    last = [pl.col(name).cast(pl.Float64) for name in ("weekday", "origin", "carrier", *WEATHER)]
    return frame.select(*back, *last).to_numpy()


def main() -> None:
    """Fit, choose, compare, print."""
    artifact = load_artifact(Path(models.__file__).parent / "pretrained" / "flights")
    frame = flight_events()
    streams = streams_of(artifact.spec, frame, "flights")
    schema, split = schema_of(artifact.spec), split_of(artifact.spec)
    validate_ms, test_ms = split.validate, split.test
    train = scored_rows(streams, None, validate_ms)
    validate = scored_rows(streams, validate_ms, test_ms)
    test = scored_rows(streams, test_ms)
    late = (frame["dep_delay"].to_numpy() > LATE_MINUTES).astype(np.float64)

    outputs = output_spec(artifact.spec).by_name(run_chunks(artifact, streams, chunk=64, seed=0))
    model = outputs["late"][test - 1].astype(np.float64)
    loss = score_binary(model, late[test]).losses["log_loss"]
    moments = streams.moments_ms[test]
    local_days = zone_table(schema.timezone).days(moments)
    days = DayDraws.make(local_days, DRAWS, 0)
    print(f"model: log loss {loss.mean():.4f}, AUC {auc(model, late[test]):.4f}", flush=True)
    for events, leaves in SETTINGS:
        features = columns(frame, events)
        trees = HistGradientBoostingClassifier(
            max_iter=MOST_TREES,
            early_stopping=False,
            learning_rate=0.05,
            max_leaf_nodes=leaves,
            min_samples_leaf=100,
        ).fit(features[train - 1], late[train])
        stages = islice(trees.staged_predict_proba(features[validate - 1]), STEP - 1, None, STEP)
        by_stage = [
            score_binary(stage[:, 1], late[validate]).losses["log_loss"].mean() for stage in stages
        ]
        count = STEP * (int(np.argmin(by_stage)) + 1)
        last_stage = islice(trees.staged_predict_proba(features[test - 1]), count - 1, count)
        probability = next(last_stage)[:, 1]
        own = score_binary(probability, late[test]).losses["log_loss"]
        less, more = interval(days.means(own) - days.means(loss))
        below, above = interval(days.aucs(probability, late[test]) - days.aucs(model, late[test]))
        print(
            f"last {events} events, {count} trees of {leaves} leaves: log loss {own.mean():.4f}, "
            f"minus model {own.mean() - loss.mean():+.4f} ({less:+.4f} to {more:+.4f}); "
            f"AUC {auc(probability, late[test]):.4f} ({below:+.4f} to {above:+.4f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
