"""Reads a Keras model file without running code that it contains.

The reader is chosen as Keras chooses it, by the file extension. The configuration is checked before
Keras builds anything. Every object in it must be a class of Keras that only computes; code (Lambda
layers, functions), other classes and layers that read files are rejected by name, together with
every other unsupported layer. Only then does Keras load the model from the same file, in safe mode
and without compiling.

`models.importing.isolation` limits what a hostile file can do to the process that reads it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
from keras.src.ops import numpy as operations

from models.errors import ImportedModelError
from models.importing.keras_layers import is_known
from models.importing.reasons import (
    NOT_LOADED,
    OPERATION,
    OWN_CLASS,
    has_reason,
    reason_unsupported,
)

MAX_CONFIG_BYTES = 16 * 2**20

_MODELS = ("Sequential", "Functional", "Model")
_TENSORS = ("__keras_tensor__", "__tensor__", "__numpy__", "__slice__", "__ellipsis__")
"""Classes that represent a tensor or a slice among a layer's arguments: a name, or numbers."""
_OPERATIONS = "keras.src.ops.numpy"
"""Module of operations that are not layers, such as `x[...]` and the masks that Keras computes."""
_LAYERS = tuple(
    f"keras.src.layers.{package}."
    for package in (
        "activations",
        "attention",
        "convolutional",
        "core",
        "merging",
        "normalization",
        "pooling",
        "preprocessing.normalization",
        "preprocessing.rescaling",
        "regularization",
        "reshaping",
        "rnn",
    )
)
"""Packages of layers that only compute; except Lambda, which is in `core`."""
_INNER = ("layer", "backward_layer", "cell", "cells")
"""Members of a layer's configuration that are layers."""
_PARTS = (
    keras.constraints,
    keras.dtype_policies,
    keras.initializers,
    keras.losses,
    keras.metrics,
    keras.optimizers,
    keras.optimizers.schedules,
    keras.regularizers,
)
"""Namespaces of objects that configure a layer or a compiled model."""


def read_keras_model(path: Path) -> Any:
    """Load a `.keras` or `.h5` file, or a SavedModel folder of Keras 2.

    Args:
        path: the file or folder; no other process may write to it.

    Raises:
        ImportedModelError: it is not a Keras model, it contains code, or Keras cannot load it.
        MemoryError: the process reached its memory limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _read(path, Path(folder) / "model.h5")


def _read(path: Path, rewritten: Path) -> Any:
    """Check and load a model; files of Keras 2 are rewritten for Keras 3."""
    try:
        if path.is_dir():
            from models.importing.saved_model import saved_model_to_hdf5

            saved_model_to_hdf5(path, rewritten)
            path = rewritten
        config = _read_config(path)
        if _modernise(config):
            if path != rewritten:
                shutil.copyfile(path, rewritten)
                path = rewritten
            with h5py.File(path, "r+") as file:
                file.attrs["model_config"] = json.dumps(config)
        if config.get("class_name") not in _MODELS:
            raise ImportedModelError(
                f"expected a Sequential or functional model, got {config.get('class_name')!r}, a "
                f"custom class, {NOT_LOADED}"
            )
        # the model is loaded uncompiled; those nested in it are compiled as they were
        foreign = dict(_foreign({**config, "compile_config": None}))
        unknown = dict(_unknown(config))
    except (OSError, KeyError, ValueError, TypeError, RecursionError, zipfile.BadZipFile) as error:
        raise ImportedModelError(
            "expected a whole Keras model with its configuration, as model.save('model.keras') "
            f"writes it (save_weights does not), got {error}"
        ) from error
    if foreign:
        lines = (f"  {layer}: {reason}" for layer, reason in {**unknown, **foreign}.items())
        raise ImportedModelError("the model has unsupported layers:\n" + "\n".join(lines))
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except MemoryError:
        raise
    except Exception as error:
        way = ""
        if path == rewritten:
            way = "; build this model of Keras 2 again with Keras 3, and give it the weights"
        raise ImportedModelError(f"Keras cannot load it: {error}{way}") from error


def _read_config(path: Path) -> dict[str, Any]:
    """Read the configuration, with the reader that Keras chooses for the extension."""
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("config.json").file_size
            if size > MAX_CONFIG_BYTES:
                raise ValueError(f"a configuration of {size} bytes, more than {MAX_CONFIG_BYTES}")
            config = json.loads(archive.read("config.json"))
    else:
        with h5py.File(path, "r") as file:
            config = json.loads(file.attrs["model_config"])
    if not isinstance(config, dict):
        raise ValueError("a configuration that is not an object")
    return config


def _modernise(config: Any) -> bool:
    """Write what Keras 2 wrote otherwise as Keras 3 reads it.

    Options that Keras 3 does not know are removed if they have no effect, and layers inside others
    get the module by which Keras 3 finds them.

    Returns:
        Whether anything was changed.
    """
    changed = False
    if isinstance(config, dict):
        own = config.get("config")
        if isinstance(own, dict) and own.get("time_major") is False:
            del own["time_major"]
            changed = True
        for name in _INNER:
            inner = config.get(name)
            for layer in inner if isinstance(inner, list) else [inner]:
                if isinstance(layer, dict) and "class_name" in layer and "module" not in layer:
                    layer |= {"module": "keras.layers", "registered_name": None}
                    changed = True
    children = config.values() if isinstance(config, dict) else config
    if isinstance(config, dict | list):
        for child in children:
            changed = _modernise(child) or changed
    return changed


def _foreign(config: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Each object of the configuration that is not known to be harmless to build, and why."""
    if isinstance(config, list):
        for item in config:
            yield from _foreign(item, name)
    if not isinstance(config, dict):
        return
    inner = config.get("config")
    if isinstance(inner, dict):
        name = str(inner.get("name") or name)
    kind = config.get("class_name")
    if kind is not None:
        reason = _why_foreign(str(kind), config.get("module"), config.get("registered_name"))
        if reason:
            yield f"{kind} {name!r}", reason
            return
    for value in config.values():
        yield from _foreign(value, name)


def _why_foreign(kind: str, module: Any, registered: Any) -> str:
    """Why an object must not be built; "" if it may."""
    if module is not None and str(module).partition(".")[0] != "keras":
        return f"it comes from {str(module)!r}, {NOT_LOADED}"
    if ">" in str(registered) or ">" in kind:
        return OWN_CLASS
    parts = (getattr(part, kind, None) for part in _PARTS)
    operation = getattr(operations, kind, None) if module == _OPERATIONS else None
    if isinstance(operation, type) and issubclass(operation, keras.Operation):
        return ""
    if kind in (*_MODELS, *_TENSORS) or any(isinstance(part, type) for part in parts):
        return ""
    if str(module).startswith("keras.src.ops."):
        return OPERATION
    layer = getattr(keras.layers, kind, None)
    if not isinstance(layer, type):
        return reason_unsupported(kind) if has_reason(kind) else OWN_CLASS
    harmless = kind != "Lambda" and f"{layer.__module__}.".startswith(_LAYERS)
    return "" if harmless else reason_unsupported(kind)


def _unknown(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every layer whose class is not supported, nested models included, and why."""
    inner = config.get("config")
    entries = inner.get("layers", []) if isinstance(inner, dict) else inner
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            raise ValueError(f"a layer that is not an object: {str(entry)[:60]!r}")
        kind, own = str(entry.get("class_name")), entry.get("config")
        if kind in _MODELS:
            yield from _unknown(entry)
        elif entry.get("module") != _OPERATIONS and not is_known(kind):
            name = own.get("name") if isinstance(own, dict) else None
            yield f"{kind} {str(name or entry.get('name'))!r}", reason_unsupported(kind)
