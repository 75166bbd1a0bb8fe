"""Keras models on disk, for the tests of importing them."""

from __future__ import annotations

import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

from models.artifact.weights import weights_bytes
from models.errors import ImportedModelError
from models.importing.isolation import KerasOptions
from models.importing.keras_conversion import convert_keras
from models.importing.packaging import ImportReport, package, slug
from tests.models.importing import own_layers

OWN_CODE = KerasOptions(code=str(Path(own_layers.__file__)))


def save_model(model: keras.Model, path: Path, seed: int = 17) -> Path:
    """Save a model with weights that are all different and not small; returns its path."""
    random = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.name in ("mean", "variance", "count"):
            continue  # of a Normalization, which has read them already
        if weight.dtype == "int8" or weight.name.endswith("_scale"):
            continue  # quantised weights
        shape = tuple(weight.shape)
        values = random.uniform(-0.4, 0.4, shape)
        if weight.path.endswith(("gamma", "moving_variance")):
            values = values + 1
        weight.assign(values)
    return write_model(model, path)


def write_model(model: keras.Model, path: Path) -> Path:
    """Save a model as it is; returns its path."""
    with warnings.catch_warnings():  # of the HDF5 format, and of NumPy's protocol that Keras uses
        warnings.simplefilter("ignore")
        model.save(path)
    return path


def import_here(
    path: Path,
    out: Path,
    name: str | None = None,
    reset_every: int | None = None,
    options: KerasOptions = OWN_CODE,
) -> ImportReport:
    """As `import_keras_model`, in this process: a process for each test would take seconds."""
    conversion, weights, graph = convert_keras(path, name or slug(path.stem), options)
    converted = conversion, weights_bytes(weights), graph
    return package(path, converted, out, reset_every=reset_every)


def import_model(
    model: keras.Model,
    folder: Path,
    seed: int = 17,
    reset_every: int | None = None,
    options: KerasOptions = OWN_CODE,
) -> ImportReport:
    """Import a model and return the report; the artifact is `folder / "out"`."""
    path = save_model(model, folder / "My Model.keras", seed)
    return import_here(path, folder / "out", None, reset_every, options)


def import_error(model: keras.Model, folder: Path, options: KerasOptions = OWN_CODE) -> str:
    """The error of a rejected import; checks that nothing was written."""
    with pytest.raises(ImportedModelError) as caught:
        import_model(model, folder, options=options)
    assert not (folder / "out").exists()
    return str(caught.value)
