"""Hostile Keras model files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
from keras import layers as kl

from tests.models.importing.saving import save_model, write_model

Edit = Callable[[dict[str, Any]], None]


def recurrent() -> keras.Model:
    """An importable model with the layers `cell` and `out`."""
    return keras.Sequential(
        [kl.Input((None, 3)), kl.LSTM(3, return_sequences=True, name="cell"), kl.Dense(2)]
    )


def save_edited(path: Path, edit: Edit) -> Path:
    """Save the model `recurrent` with another configuration; returns its path.

    Args:
        edit: changes the configuration of the LSTM layer, in place.
    """
    original = save_model(recurrent(), path.with_name(f"given{path.suffix}"))
    if path.suffix == ".keras":
        with zipfile.ZipFile(original) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, _edited(data, edit) if name == "config.json" else data)
        return path
    original.rename(path)
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = _edited(file.attrs["model_config"], edit).decode()
    return path


def _edited(data: bytes | str, edit: Edit) -> bytes:
    config = json.loads(data)
    (layer,) = [e for e in config["config"]["layers"] if e["config"].get("name") == "cell"]
    edit(layer)
    return json.dumps(config).encode()


def two_models(path: Path, code: kl.Lambda) -> Path:
    """HDF5 of a model with code, and behind it a ZIP archive with the configuration of another."""
    model = keras.Sequential([kl.Input((None, 3)), code, kl.LSTM(3, return_sequences=True)])
    write_model(model, path)
    harmless = save_model(recurrent(), path.with_name("harmless.keras"))
    with zipfile.ZipFile(harmless) as good, zipfile.ZipFile(path, "a") as behind:
        behind.writestr("config.json", good.read("config.json"))
    return path
