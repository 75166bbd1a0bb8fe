"""Reading a Keras model's file without running what it may hold.

The configuration is looked at before Keras builds anything: code (Lambda layers, classes
outside Keras) is refused by name, together with every other layer whose class cannot be
carried. Only then does Keras load the model, in its safe mode and without compiling.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras

from models.errors import ImportedModelError
from models.importing.layers import is_known, why_not

_MODELS = ("Sequential", "Functional", "Model")
_UNUSED = ("compile_config", "build_config")
"""Parts of a configuration that are not read when a model is loaded uncompiled."""


def read_keras_model(path: Path) -> Any:
    """Load a `.keras` or `.h5` file.

    Raises:
        ImportedModelError: there is no such file, it is neither, it holds code, or Keras
            cannot load it.
    """
    config = _read_config(path)
    if config.get("class_name") not in _MODELS:
        raise ImportedModelError(
            f"{path}: expected a Sequential or functional model, got {config.get('class_name')!r}"
        )
    foreign = list(_foreign(config))
    unknown = list(_unknown(config))
    if foreign or not all(hasattr(keras.layers, kind) for kind, _ in unknown):
        refused = [f"{kind} {name!r}: {why_not(kind)}" for kind, name in unknown]
        named = {line.partition(":")[0] for line in refused}
        refused += [line for line in foreign if line.partition(":")[0] not in named]
        raise ImportedModelError(
            f"{path}: the model holds what cannot be carried:\n"
            + "\n".join(f"  {line}" for line in refused)
        )
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise ImportedModelError(f"{path}: Keras cannot load it: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))
        elif h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                config = json.loads(file.attrs["model_config"])
        elif not path.is_file():
            raise ImportedModelError(f"{path}: expected a .keras or .h5 file, there is none")
        else:
            raise ImportedModelError(f"{path}: expected a .keras or .h5 file, it is neither")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ImportedModelError(
            f"{path}: expected a whole Keras model with its configuration, got {error}"
        ) from error
    if not isinstance(config, dict):
        raise ImportedModelError(f"{path}: expected a configuration that is an object")
    return config


def _foreign(config: Any, name: str = "") -> Iterator[str]:
    """Each object of the configuration that is, or would import, code outside Keras."""
    if isinstance(config, list):
        for item in config:
            yield from _foreign(item, name)
    if not isinstance(config, dict):
        return
    inner = config.get("config")
    kind = config.get("class_name")
    if isinstance(inner, dict):
        name = str(inner.get("name") or name)
    if kind == "Lambda":
        yield f"Lambda {name!r}: {why_not('Lambda')}"
        return
    module = config.get("module")
    if kind is not None and module is not None and str(module).partition(".")[0] != "keras":
        yield f"{kind} {name!r}: it comes from {module!r}, which is not loaded"
        return
    if (
        kind is not None
        and module is None
        and str(config.get("registered_name") or "").find(">") > 0
    ):
        yield f"{kind} {name!r}: it is a class of its own, which is not loaded"
        return
    for key, value in config.items():
        if key not in _UNUSED:
            yield from _foreign(value, name)


def _unknown(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Class and name of every layer whose class cannot be carried, nested models included."""
    inner = config.get("config")
    entries = inner.get("layers", []) if isinstance(inner, dict) else inner
    for entry in entries if isinstance(entries, list) else []:
        kind, own = str(entry.get("class_name")), entry.get("config")
        if kind in _MODELS:
            yield from _unknown(entry)
        elif not is_known(kind):
            name = own.get("name") if isinstance(own, dict) else None
            yield kind, str(name or entry.get("name"))
