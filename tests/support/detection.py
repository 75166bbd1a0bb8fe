"""A model with detection, with random weights, fitted to noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.writing import write_artifact
from models.detection.fit import Stream, fit_detection
from models.spec.layout import anomaly_size, detection_of
from models.spec.model import ModelSpec, parse_spec
from tests.support.models import random_weights

TIME = {"kind": "timestamp", "name": "time", "gap_mean": 900.0, "gap_std": 1.0}


def target_names(targets: int) -> list[str]:
    """The numeric fields of the sensors."""
    return ["value", *(f"value_{n}" for n in range(1, targets))]


def sensor_model(folder: Path, units: int = 32, targets: int = 1, **detection: Any) -> Artifact:
    """Two LSTMs with an anomaly head and detection, named `sensors`."""
    names = target_names(targets)
    numeric = [{"kind": "numeric", "name": name, "mean": 0.0, "std": 1.0} for name in names]
    spec = parse_spec(
        {
            "name": "sensors",
            "events": {"fields": [TIME, *numeric]},
            "layers": [{"kind": "lstm", "units": units}, {"kind": "lstm", "units": units}],
            "heads": [{"kind": "anomaly", "name": "surprise", "targets": names}],
            "detection": {"head": "surprise", **detection},
        }
    )
    write_artifact(folder, fitted_to_noise(spec), random_weights(spec))
    return load_artifact(folder)


def fitted_to_noise(spec: ModelSpec) -> ModelSpec:
    """A spec whose detection is fitted to normal noise, of which the forecast is right."""
    detection, head, _ = detection_of(spec)
    random = np.random.default_rng(1)
    rows = random.normal(0, 1, (4, 2000, spec.input_features)).astype(np.float32)
    parameters = np.zeros((2000, anomaly_size(spec, head)), np.float32)
    streams = [Stream(each, parameters, np.ones(2000, np.bool_), 20.0) for each in rows]
    fit = fit_detection(spec, streams)
    return spec.model_copy(update={"detection": detection.model_copy(update={"fit": fit})})
