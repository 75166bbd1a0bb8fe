"""Models of Keras 2: SavedModel folders and HDF5 files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.errors import ImportedModelError
from models.importing.keras_file import saved_model_to_hdf5
from models.importing.packaging import import_keras_model
from models.networks.build import StepNetwork
from tests.models.importing.saving import import_here

KERAS_2 = Path(__file__).parent / "saved_model" / "keras2"
"""Written by `saved_model/recipe.py`, with the outputs of Keras 2 beside it."""


def check_outputs(artifact: Artifact) -> None:
    """The outputs are those of Keras 2, in chunks of three events."""
    network = StepNetwork(artifact.spec)
    network.set_weights(artifact.weights)
    expected = np.load(KERAS_2.with_suffix(".npz"))
    state, outputs = np.zeros((2, network.state_size), np.float32), []
    for rows in np.split(expected["rows"], 3, axis=1):
        values, state = network.step(rows, np.array([3, 3], np.int32), state)
        outputs.append(values)
    named = artifact.outputs.by_name(np.concatenate(outputs, axis=1))
    np.testing.assert_allclose(named["Level"], expected["level"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(named["last"][:, -1], expected["last"], rtol=1e-5, atol=1e-5)


def test_a_saved_model_of_keras_2_equals_its_outputs(tmp_path: Path) -> None:
    artifact = import_here(KERAS_2, tmp_path / "out").artifact
    assert artifact.spec.name == "keras2"
    assert [layer.name for layer in artifact.spec.layers][2:4] == ["cells_1", "cells_2"]
    check_outputs(artifact)


def test_an_hdf5_file_of_keras_2_equals_its_outputs(tmp_path: Path) -> None:
    path = tmp_path / "old.h5"
    saved_model_to_hdf5(KERAS_2, path)
    before = path.read_bytes()
    check_outputs(import_here(path, tmp_path / "out").artifact)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("keras_metadata.pb", b"\xff", "keras_metadata.pb that is not a protocol buffer"),
        ("keras_metadata.pb", b"", "without the model's own configuration"),
        ("variables/variables.index", b"", "variables that cannot be read"),
    ],
)
def test_a_damaged_saved_model_is_rejected(
    tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(KERAS_2, folder)
    (folder / name).write_bytes(data)
    with pytest.raises(ImportedModelError, match=words):
        import_here(folder, tmp_path / "out")


def test_a_folder_without_a_configuration_is_rejected_with_an_alternative(tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(KERAS_2, folder)
    (folder / "keras_metadata.pb").unlink()
    with pytest.raises(ImportedModelError, match=r"model\.save\('model\.keras'\), or export"):
        import_keras_model(folder, tmp_path / "out")


def test_a_linked_variable_file_is_rejected(tmp_path: Path) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    shutil.copytree(KERAS_2, folder)
    index = folder / "variables" / "variables.index"
    index.rename(secret)
    index.symlink_to(secret)
    with pytest.raises(ImportedModelError, match="cannot be read"):
        import_keras_model(folder, tmp_path / "out")
