"""A model with alarms that have a record, and events that open and close one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.core.values import FloatRows
from service.engine.runtimes.loading import open_runtimes
from service.pipeline.served_model import ServedModel
from tests.support.detection import sensor_model


def alarm_model(folder: Path) -> Artifact:
    """The model `sensors`, whose alarms close after three usual events."""
    alarm = {"close_above": 0.05, "hold_events": 3, "backoff_nats": 1.0}
    return sensor_model(folder / "sensors", units=4, alarm=alarm, outputs=["share", "deviation"])


def served_by_onnx(artifact: Artifact, history: HistorySpec | None = None) -> ServedModel:
    """A model on ONNX Runtime, for detection, which the oracle does not have."""
    runtime = open_runtimes("onnxruntime", [artifact], 1)[0]
    return ServedModel(artifact, runtime, history=history)


def noise(count: int, seed: int = 3) -> FloatRows:
    """Normal events of the model `sensors`."""
    return np.random.default_rng(seed).normal(0, 0.5, (count, 6)).astype(np.float32)


def raised(count: int, by: float = 12.0, seed: int = 4) -> FloatRows:
    """Events at another level."""
    rows = noise(count, seed)
    rows[:, -1] += by
    return rows
