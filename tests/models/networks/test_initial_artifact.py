"""`initialise_artifact`: the same seed, the same model; unfitted schemas are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.artifact.artifact import load_artifact
from models.errors import SpecError
from models.networks.initial_artifact import initialise_artifact
from models.spec.model import ModelSpec, parse_spec


def raw_model(units: int = 4) -> ModelSpec:
    return parse_spec(
        {
            "name": "m",
            "features": 3,
            "layers": [{"kind": "lstm", "units": units}, {"kind": "gru", "units": 2}],
            "heads": [{"kind": "dense", "name": "y", "units": 2}],
        }
    )


def test_same_seed_gives_the_same_fingerprint(tmp_path: Path) -> None:
    first = initialise_artifact(raw_model(), tmp_path / "a", 3)
    second = initialise_artifact(raw_model(), tmp_path / "b", 3)
    other = initialise_artifact(raw_model(), tmp_path / "c", 4)
    assert first.fingerprint == second.fingerprint == load_artifact(tmp_path / "a").fingerprint
    assert other.fingerprint != first.fingerprint
    assert first.manifest["training"] == {"initialised": {"seed": 3}}


def test_adding_a_layer_keeps_the_initial_weights_of_the_others(tmp_path: Path) -> None:
    spec = raw_model()
    more = spec.model_dump() | {
        "layers": [
            *spec.model_dump()["layers"],
            {"kind": "dense", "units": 2, "name": "top", "inputs": ["gru_1"]},
        ]
    }
    one = initialise_artifact(spec, tmp_path / "a", 3).weights
    two = initialise_artifact(parse_spec(more), tmp_path / "b", 3).weights
    for name, value in one.items():
        np.testing.assert_array_equal(two[name], value)


def test_all_unfitted_statistics_are_named(tmp_path: Path) -> None:
    spec = parse_spec(
        {
            "name": "m",
            "events": {
                "fields": [
                    {"kind": "numeric", "name": "delay", "mean": 1.0},
                    {"kind": "numeric", "name": "distance", "mean": 1.0, "std": 2.0},
                    {"kind": "categorical", "name": "carrier"},
                    {"kind": "timestamp", "name": "at"},
                    {"kind": "boolean", "name": "late"},
                ]
            },
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [{"kind": "sequence", "name": "y"}],
        }
    )
    with pytest.raises(SpecError) as caught:
        initialise_artifact(spec, tmp_path / "a", 1)
    error = str(caught.value)
    assert "delay (std), carrier (vocabulary), at (gap_mean, gap_std);" in error
    assert not (tmp_path / "a").exists()
