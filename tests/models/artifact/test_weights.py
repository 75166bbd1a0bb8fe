"""Weights: storage, and validation against the spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from models.artifact.writing import write_artifact
from models.errors import ArtifactError
from tests.models.artifact.artifacts import SPEC, WEIGHTS, check_rejection, manifest_of, seal


def test_weights_in_another_memory_order_are_stored_correctly(tmp_path: Path) -> None:
    turned = {name: np.asfortranarray(array) for name, array in WEIGHTS.items()}

    artifact = write_artifact(tmp_path / "a", SPEC, turned)

    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(artifact.weights[name], array)


def without(name: str) -> dict[str, Any]:
    return {key: array for key, array in WEIGHTS.items() if key != name}


def nan_in(name: str) -> Any:
    array = WEIGHTS[name].copy()
    array.flat[-1] = np.nan
    return array


MISFITS = {
    "missing": (without("gru_1.bias"), "missing ['gru_1.bias'], unknown []"),
    "unknown": ({**WEIGHTS, "x": np.zeros(1, np.float32)}, "missing [], unknown ['x']"),
    "shape": (
        {**WEIGHTS, "lstm_1.bias": np.zeros(13, np.float32)},
        "weight 'lstm_1.bias': expected float32 [12], got float32 [13]",
    ),
    "transposed": (
        {**WEIGHTS, "dense_1.kernel": np.ascontiguousarray(WEIGHTS["dense_1.kernel"].T)},
        "weight 'dense_1.kernel': expected float32 [7, 5], got float32 [5, 7]",
    ),
    "dtype": (
        {**WEIGHTS, "lstm_1.bias": np.zeros(12)},
        "weight 'lstm_1.bias': expected float32 [12], got float64 [12]",
    ),
    "nan": (
        {**WEIGHTS, "gru_1.kernel": nan_in("gru_1.kernel")},
        "weight 'gru_1.kernel': expected finite",
    ),
}


@pytest.mark.parametrize(("weights", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_weights_of_another_spec_are_neither_written_nor_loaded(
    artifact_dir: Path, tmp_path: Path, weights: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError) as caught:
        write_artifact(tmp_path / "b", SPEC, weights)
    assert message in str(caught.value)
    assert not (tmp_path / "b").exists()

    (artifact_dir / "weights.safetensors").write_bytes(safetensors.numpy.save(weights))
    seal(artifact_dir, manifest_of(artifact_dir))
    check_rejection(artifact_dir, "weights.safetensors", message)


def test_invalid_safetensors_are_rejected(artifact_dir: Path) -> None:
    for content in (b"", b"\x08\0\0\0\0\0\0\0{}", b"\xff" * 64):
        (artifact_dir / "weights.safetensors").write_bytes(content)
        seal(artifact_dir, manifest_of(artifact_dir))
        check_rejection(artifact_dir, "weights.safetensors")


def test_changed_weights_fail_the_fingerprint(artifact_dir: Path) -> None:
    swapped = {
        **WEIGHTS,
        "lstm_1.kernel": WEIGHTS["gru_1.kernel"],
        "gru_1.kernel": WEIGHTS["lstm_1.kernel"],
    }
    (artifact_dir / "weights.safetensors").write_bytes(safetensors.numpy.save(swapped))
    seal(artifact_dir, manifest_of(artifact_dir))

    check_rejection(artifact_dir, "`fingerprint`")
