"""Networks that look ahead in their chunk: allowed heads, and the chunks of their scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import polars as pl
import pytest

pytest.importorskip("tensorflow")

from models.errors import SpecError
from models.events.calendar import DAY_MS
from models.spec.layout import output_spec
from models.spec.model import ModelSpec, parse_spec
from models.training import label_baselines
from models.training.data import fitted_spec, streams_of
from models.training.evaluate import run_chunks
from models.training.label_baselines import BASE, BOTH, LAST_EVENTS
from models.training.labels import labels_of
from models.training.plan import plan_of
from models.training.train_frame import train_frame
from models.training.trainer import train
from tests.support.training import HOUR_MS

STEPS = 4
LABEL = {"kind": "label", "name": "up"}
STATE_PASSING = [
    {"kind": "lstm", "name": "below", "units": 8},
    {"kind": "lstm", "name": "above", "units": 8, "starts_from": "below"},
]
CHUNK_ATTENTION = [
    {"kind": "lstm", "name": "below", "units": 8},
    {"kind": "attention", "name": "above", "over": "chunk", "units": 8},
]


def frame(streams: int = 120) -> pl.DataFrame:
    """Streams of four events; every event's label is the flag of the last one."""
    random = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for stream in range(streams):
        flag = bool(random.integers(2))
        rows += [
            {
                "id": f"s{stream:03d}",
                "at": (stream * STEPS + step) * HOUR_MS,
                "noise": float(random.normal()),
                "flag": flag if step == STEPS - 1 else bool(random.integers(2)),
                "up": flag,
            }
            for step in range(STEPS)
        ]
    return pl.DataFrame(rows)


def spec(
    *heads: dict[str, Any], window_steps: int = STEPS, layers: list[dict[str, Any]] = STATE_PASSING
) -> ModelSpec:
    """A stack whose upper layer starts from where the lower one ended in the same chunk."""
    return parse_spec(
        {
            "name": "ahead",
            "events": {
                "fields": [
                    {"kind": "timestamp", "name": "at"},
                    {"kind": "numeric", "name": "noise"},
                    {"kind": "boolean", "name": "flag"},
                ]
            },
            "layers": layers,
            "heads": heads,
            "training": {
                "stream": "id",
                "validate_from": "1970-01-13T08:00:00Z",
                "test_from": "1970-01-16T16:00:00Z",
                "epochs": 12,
                "patience": 3,
                "window_steps": window_steps,
                "segment_windows": 1,
                "batch_streams": 8,
                "learning_rate": 0.03,
                "average_decay": 0.8,
            },
        }
    )


@pytest.mark.parametrize(
    "head",
    [
        {"kind": "forecast", "name": "next", "targets": ["noise"]},
        {"kind": "classification", "name": "next", "target": "flag"},
    ],
)
def test_next_event_heads_on_lookahead_layers_are_rejected(tmp_path, head) -> None:
    with pytest.raises(SpecError, match="'next' predicts the next event, and layer 'above'"):
        train_frame(spec(head, LABEL), frame(), tmp_path / "model", quiet=True)
    below = spec({**head, "input": "below"}, LABEL)
    streams = streams_of(below, frame())
    validate, test = 12 * DAY_MS + 8 * HOUR_MS, 15 * DAY_MS + 16 * HOUR_MS
    fitted = fitted_spec(below, streams, validate)
    plan = plan_of(fitted, streams, labels_of(below, streams.frame), validate, test)
    assert plan.trained.any()


def test_attention_over_the_chunk_learns_the_informative_event(tmp_path) -> None:
    """One value for all four events, whose label is the flag of the one loud event."""
    random = np.random.default_rng(2)
    data = frame().sort("id", "at")
    loud = np.zeros((len(data) // STEPS, STEPS), bool)
    loud[np.arange(len(loud)), random.integers(0, STEPS, len(loud))] = True
    flags = data["flag"].to_numpy().reshape(loud.shape)
    data = data.with_columns(
        noise=loud.ravel().astype(float), up=np.repeat((flags & loud).any(axis=1), STEPS)
    )
    plain = spec(LABEL, layers=CHUNK_ATTENTION).model_dump()
    longer = {**plain["training"], "epochs": 40, "patience": 40}
    result = train(parse_spec({**plain, "training": longer}), data, tmp_path / "model", quiet=True)
    losses = [record["validation"]["up"] for record in result.history]
    assert losses[0] > 0.5
    assert min(losses) < 0.2
    assert output_spec(result.artifact.spec).outputs[0].per == "chunk"


def test_later_events_of_the_chunk_are_learned_and_given_to_the_baselines(
    tmp_path, monkeypatch
) -> None:
    few = label_baselines.Grid((0,), (STEPS,), (7,), (5,), 0.2, 40)
    monkeypatch.setattr(label_baselines, "SINGLE", few)
    monkeypatch.setattr(label_baselines, "SEVERAL", few)
    data = frame()
    artifact = train_frame(spec(LABEL), data, tmp_path / "model", quiet=True)
    report = orjson.loads((tmp_path / "model" / "report.json").read_bytes())
    scores = report["heads"]["up"]["scores"]
    loss = {name: score["log_loss"]["value"] for name, score in scores.items()}
    assert loss["model"] < 0.3
    assert loss[BOTH] < 0.3
    # The last of the four events determines the label; the others say nothing about it.
    assert loss[BASE] > 0.6
    assert loss[LAST_EVENTS] > 0.4
    # Whatever chunks are asked for, such a network gets those of its training.
    streams = streams_of(artifact.spec, data)
    first, second = (run_chunks(artifact, streams, chunk=most, seed=most) for most in (1, 3))
    np.testing.assert_array_equal(first, second)
