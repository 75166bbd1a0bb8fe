"""Small tables for training, in which late events depend on the first event of a stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from models.spec.model import ModelSpec, parse_spec

if TYPE_CHECKING:
    from models.training.loop import Loop

HOUR_MS = 3_600_000


def latch_frame(streams: int = 24, seed: int = 0) -> pl.DataFrame:
    """Streams whose `mark` repeats their first `flag` in every event, beside random `noise`."""
    random = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for stream in range(streams):
        flag = bool(random.integers(2))
        steps = int(random.integers(20, 41))
        rows += [
            {
                "id": f"s{stream:02d}",
                "at": step * HOUR_MS + stream,
                "noise": float(random.normal()),
                "flag": flag and step == 0,
                "mark": 1.0 if flag else -1.0,
                "kind": "ab"[int(random.integers(2))],
            }
            for step in range(steps)
        ]
    order = random.permutation(len(rows))
    return pl.DataFrame([rows[index] for index in order])


LSTM: dict[str, Any] = {"kind": "lstm", "units": 8}


HEADS: dict[str, dict[str, Any]] = {
    "up": {"kind": "classification", "name": "up", "target": "mark", "above": 0.0},
    "next": {"kind": "forecast", "name": "next", "targets": ["noise"]},
    "odd": {"kind": "anomaly", "name": "odd", "targets": ["noise", "kind"]},
}


def latch_spec(
    *,
    dropout: float = 0.1,
    recurrent: dict[str, Any] = LSTM,
    heads: Iterable[str] = HEADS,
    **training: Any,
) -> ModelSpec:
    """Reads noise and flag, never the mark itself, and forecasts the mark's sign.

    Args:
        heads: names of its heads; one alone is traced in two thirds of the time of all.
    """
    return parse_spec(
        {
            "name": "latch",
            "events": {
                "fields": [
                    {"kind": "timestamp", "name": "at"},
                    {"kind": "numeric", "name": "noise"},
                    {"kind": "boolean", "name": "flag"},
                    {"kind": "numeric", "name": "mark", "mean": 0.0, "std": 1.0},
                    {"kind": "categorical", "name": "kind", "embedding": 2},
                ]
            },
            "layers": [
                recurrent,
                {"kind": "dropout", "rate": dropout},
            ],
            "heads": [HEADS[name] for name in heads],
            "training": {
                "stream": "id",
                "validate_from": "1970-01-01T16:00:00Z",
                "test_from": "1970-01-01T22:00:00Z",
                "epochs": 4,
                "patience": 4,
                "window_steps": 4,
                "segment_windows": 2,
                "batch_streams": 8,
                "learning_rate": 0.01,
                **training,
            },
        }
    )


def states_of_one_run(loop: Loop) -> NDArray[np.float32]:
    """The state at the end of each segment, from one run over its stream so far.

    All runs are one padded batch.
    """
    segments = loop.plan.segments
    starts = []
    for segment in segments:
        first = segment
        while first.before is not None:
            first = segments[first.before]
        starts.append(first.start)
    lengths = np.array([s.stop - start for start, s in zip(starts, segments, strict=True)])
    rows = np.zeros((len(segments), lengths.max(), loop.plan.rows.shape[1]), np.float32)
    for run, start, length in zip(rows, starts, lengths, strict=True):
        run[:length] = loop.plan.rows[start : start + length]
    state = np.zeros((len(segments), loop.network.state_size), np.float32)
    return loop.network.forward(rows, lengths.astype(np.int32), state).state.numpy()


def both_ways_frame(streams: int = 63, seed: int = 4) -> pl.DataFrame:
    """Streams of one to nine events, whose label `up` is the flag that the last event carries."""
    random = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for stream in range(streams):
        steps = 1 + stream % 9
        flags = random.integers(2, size=steps).astype(bool)
        rows += [
            {
                "id": f"s{stream:02d}",
                "at": (10 * stream + step) * HOUR_MS,
                "noise": float(random.normal()),
                "flag": bool(flag),
                "up": bool(flags[-1]),
            }
            for step, flag in enumerate(flags)
        ]
    return pl.DataFrame(rows)


def both_ways_spec(
    blocks: dict[str, int] | None = None, epochs: int = 30, layers: int = 2
) -> ModelSpec:
    """A bidirectional network for them; a third of the streams each train, validate and test."""
    return parse_spec(
        {
            "name": "tagger",
            "events": {
                "fields": [
                    {"kind": "timestamp", "name": "at"},
                    {"kind": "numeric", "name": "noise"},
                    {"kind": "boolean", "name": "flag"},
                ]
            },
            "layers": [
                {"kind": "bidirectional", "units": 4},
                {"kind": "bidirectional", "cell": "gru", "units": 3, "merge": "sum"},
            ][:layers],
            "heads": [{"kind": "label", "name": "up"}],
            "blocks": blocks,
            "training": {
                "stream": "id",
                "validate_from": "1970-01-09T18:00:00Z",
                "test_from": "1970-01-18T12:00:00Z",
                "epochs": epochs,
                "patience": epochs,
                "window_steps": 9,
                "segment_windows": 1,
                # all streams in one window: one shape to compile
                "batch_streams": 32,
                "learning_rate": 0.05,
                "average_decay": 0.5,
            },
        }
    )


def train_nothing(patch: pytest.MonkeyPatch) -> None:
    """Replace the epochs of trainings, which take seconds to compile: weights stay initial."""
    from models.training.loop import Loop

    patch.setattr(Loop, "train_epoch", lambda loop, epoch: iter([0.0]))
    patch.setattr(Loop, "validate", lambda loop: {"loss": 0.0})
