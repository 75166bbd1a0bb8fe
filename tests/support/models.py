"""A small model of many kinds of layers and heads, and random weights for any spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import models
from models.spec.layout import weight_shapes
from models.spec.model import ModelSpec, parse_spec
from tests.support.events import FULL_SCHEMA

PRETRAINED = Path(models.__file__).parent / "pretrained"
"""The models that `make run` serves."""

SMALL: dict[str, Any] = {
    "name": "small",
    "description": "A small model.",
    "events": FULL_SCHEMA.model_dump(mode="json"),
    "layers": [
        {"kind": "lstm", "units": 3, "dropout": 0.1, "recurrent_dropout": 0.2},
        {"kind": "dropout", "rate": 0.3},
        {"kind": "layer_normalization"},
        {"kind": "gru", "units": 4, "inputs": ["features"]},
        {"kind": "concatenate", "inputs": ["layer_normalization_1", "gru_1"]},
        {"kind": "dense", "units": 5, "activation": "relu"},
    ],
    "heads": [
        {"kind": "sequence", "name": "hidden", "input": "lstm_1"},
        {"kind": "dense", "name": "next", "units": 1, "targets": ["load"]},
        {"kind": "forecast", "name": "range", "targets": ["load", "delay"]},
        {"kind": "classification", "name": "late_load", "target": "load", "above": 15.0},
        {"kind": "classification", "name": "carrier", "target": "carrier"},
        {"kind": "anomaly", "name": "surprise", "targets": ["load", "carrier", "heavy"]},
    ],
    "training": {
        "stream": "tail",
        "validate_from": "2013-09-01T00:00:00Z",
        "test_from": "2013-11-01T00:00:00Z",
    },
}
"""As in a `SPEC.yaml`: names and inputs are resolved by the parser."""


def small_spec() -> ModelSpec:
    """The spec of `SMALL`, fitted."""
    return parse_spec(SMALL)


def random_weights(spec: ModelSpec, seed: int = 7) -> dict[str, NDArray[np.float32]]:
    """Distinct weights for every name and shape that the spec asks for."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.5, shape).astype(np.float32)
        for name, shape in weight_shapes(spec).items()
    }
