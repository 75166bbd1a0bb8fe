"""Reads a Keras model file without running code that it contains.

The reader is chosen as Keras chooses it, by the file extension. The configuration is checked before
Keras builds anything: every object in it must be a supported layer, or a part of one, so that code
(Lambda layers, functions), other classes and layers that read files are rejected by name. Only then
does Keras load the model from the same file, in safe mode and without compiling.

SavedModel folders of Keras 2 hold `keras_metadata.pb`, the configuration of the model and its
layers, beside TensorFlow's graph and checkpoint. Configuration and weights are written as an HDF5
file, which Keras 3 reads; the graph, which is a program, is neither loaded nor run. The
checkpoint's object graph says which variables belong to a layer; in the HDF5 file they are in the
order in which Keras stores them, trainable ones first. Folders without that file, as `model.export`
and TensorFlow write them, hold no configuration and are rejected.

`models.importing.isolation` limits what a hostile file can do to the process that reads it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph
from tensorflow.python.keras.protobuf.saved_metadata_pb2 import SavedMetadata

from models.errors import ImportedModelError
from models.importing.isolation import METADATA_NAME
from models.importing.keras_layers import (
    NOT_LOADED,
    OPERATION,
    OWN_CLASS,
    REASONS,
    SUPPORTED,
    reason_unsupported,
)

MAX_CONFIG_BYTES = 16 * 2**20

CHECKPOINT_NAME = "variables/variables"
_MODELS = ("Sequential", "Functional", "Model")
_TENSORS = ("__keras_tensor__", "__tensor__", "__numpy__", "__slice__", "__ellipsis__")
"""Classes that represent a tensor or a slice among a layer's arguments: a name, or numbers."""
_OPERATIONS = {
    f"keras.src.ops.{name}": importlib.import_module(f"keras.src.ops.{name}")
    for name in ("math", "nn", "numpy")
}
"""Modules of operations that are not layers, such as `x[...]` and the masks that Keras computes."""
_MATHS = (
    *("activations", "attention", "convolutional", "merging", "normalization", "pooling"),
    *("regularization", "reshaping", "rnn"),
)
"""Packages of Keras whose layers compute, and read no file."""
_QUANTISATION = ("AbsMaxQuantizer", "Int8QuantizationConfig")
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


def read_keras_model(path: Path, code: Path | None = None) -> Any:
    """Load a `.keras` or `.h5` file, or a SavedModel folder of Keras 2.

    Args:
        path: the file or folder; no other process may write to it.
        code: a Python file with the model's own classes and functions, which is run.

    Raises:
        ImportedModelError: it is not a Keras model, it contains code, or Keras cannot load it.
        MemoryError: the process reached its memory limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = {} if code is None else load_code(code)
        return _read(path, Path(folder) / "model.h5", own)


def load_code(code: Path) -> dict[str, Any]:
    """Run a Python file, beside which it can import others; its classes and functions by name.

    The names are those by which Keras stores them, also without
    `keras.saving.register_keras_serializable`.

    Raises:
        ImportedModelError: it cannot be run.
    """
    name = f"carry_model_code_{code.stem}"
    spec = importlib.util.spec_from_file_location(name, code)
    if spec is None or spec.loader is None:
        raise ImportedModelError(f"--code {code}: expected a Python file, MODEL.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(code.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the code may raise any
        raise ImportedModelError(f"--code {code}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(code.parent))
    own = {each for each in vars(module).values() if _is_usable(each, name)}
    return {keras.saving.get_registered_name(each): each for each in own}


def _is_usable(value: Any, module: str) -> bool:
    """Whether a model may use it: a class that Keras stores, or a function of the file itself."""
    if inspect.isclass(value):
        return hasattr(value, "get_config") and not value.__module__.startswith("keras.")
    return inspect.isfunction(value) and value.__module__ == module


def _read(path: Path, rewritten: Path, own: Mapping[str, Any]) -> Any:
    """Check and load a model; files of Keras 2 are rewritten for Keras 3."""
    try:
        if path.is_dir():
            saved_model_to_hdf5(path, rewritten)
            path = rewritten
        config = _read_config(path)
        if _modernise(config):
            if path != rewritten:
                shutil.copyfile(path, rewritten)
                path = rewritten
            with h5py.File(path, "r+") as file:
                file.attrs["model_config"] = json.dumps(config)
        kind = config.get("class_name")
        if kind not in _MODELS and config.get("registered_name") not in own:
            raise ImportedModelError(
                f"expected a Sequential or functional model, got {kind!r}, a custom class, "
                f"{NOT_LOADED}"
            )
        # the model is loaded uncompiled; those nested in it are compiled as they were
        foreign = list(_foreign({**config, "compile_config": None}, own))
    except (OSError, KeyError, ValueError, TypeError, RecursionError, zipfile.BadZipFile) as error:
        raise ImportedModelError(
            "expected a whole Keras model with its configuration, as model.save('model.keras') "
            f"writes it (save_weights does not), got {error}"
        ) from error
    if foreign:
        raise ImportedModelError("the model has unsupported layers:\n" + "\n".join(foreign))
    try:
        return keras.saving.load_model(path, own, compile=False, safe_mode=True)
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


def _foreign(config: Any, own: Mapping[str, Any], name: str = "") -> Iterator[str]:
    """Describe each object of the configuration that is not supported, and so may not be built."""
    if isinstance(config, list):
        for item in config:
            yield from _foreign(item, own, name)
    if not isinstance(config, dict):
        return
    inner = config.get("config")
    if isinstance(inner, dict):
        name = str(inner.get("name") or name)
    kind = config.get("class_name")
    if kind is not None and not _is_own(config, own):
        reason = _why_foreign(str(kind), config.get("module"), config.get("registered_name"))
        if reason:
            yield f"  {kind} {name!r}: {reason}"
            return
    for value in config.values():
        yield from _foreign(value, own, name)


def _why_foreign(kind: str, module: Any, registered: Any) -> str:
    """Why an object must not be built; "" if it may."""
    if module is not None and str(module).partition(".")[0] != "keras":
        return f"it comes from {str(module)!r}, {NOT_LOADED}"
    if ">" in str(registered) or ">" in kind:
        return OWN_CLASS
    parts = (getattr(part, kind, None) for part in _PARTS)
    operation = getattr(_OPERATIONS.get(str(module)), kind, None)
    if isinstance(operation, type) and issubclass(operation, keras.Operation):
        return ""
    if kind in (*_MODELS, *_TENSORS, *_QUANTISATION) or any(
        isinstance(part, type) for part in parts
    ):
        return ""
    if str(module).startswith("keras.src.ops."):
        return OPERATION
    layer = getattr(keras.layers, kind, None)
    package = getattr(layer, "__module__", "").removeprefix("keras.src.layers.").partition(".")[0]
    if layer in SUPPORTED or (isinstance(layer, type) and package in _MATHS):
        return ""
    return reason_unsupported(kind) if isinstance(layer, type) or kind in REASONS else OWN_CLASS


def _is_own(config: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether an object is a class or function of the model's code, or a `Lambda` of one."""
    kind, content = config.get("class_name"), config.get("config")
    if kind == "function":
        return isinstance(content, str) and content in own
    if kind == "Lambda" and own and isinstance(content, dict):
        function = content.get("function")
        return isinstance(function, dict) and _is_own(function, own)
    return config.get("registered_name") in own


def saved_model_to_hdf5(folder: Path, file: Path) -> None:
    """Write the model of a SavedModel folder as Keras writes an HDF5 file.

    Args:
        folder: with `keras_metadata.pb` and `variables`; no other process may write to it.
        file: the file to make.

    Raises:
        ValueError: the folder holds no whole Keras model.
    """
    metadata = _metadata((folder / METADATA_NAME).read_bytes())
    if "root" not in metadata:
        raise ValueError(f"{METADATA_NAME} without the model's own configuration")
    try:
        layers = list(_layers(folder / CHECKPOINT_NAME, metadata))
    except (tf.errors.OpError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(f"variables that cannot be read: {error}") from error
    root = metadata["root"]
    config = {"class_name": root.get("class_name"), "config": root.get("config")}
    with h5py.File(file, "w") as target:
        target.attrs["model_config"] = json.dumps(_plain(config))
        target.attrs["keras_version"], target.attrs["backend"] = "2.0.0", "tensorflow"
        group = target.create_group("model_weights")
        group.attrs["keras_version"], group.attrs["backend"] = "2.0.0", "tensorflow"
        group.attrs["layer_names"] = [name.encode() for name, _ in layers]
        for name, variables in layers:
            own = group.create_group(name)
            places = [f"{index}" for index in range(len(variables))]
            own.attrs["weight_names"] = [place.encode() for place in places]
            for place, values in zip(places, variables, strict=True):
                own[place] = values


def _metadata(data: bytes) -> dict[str, dict[str, Any]]:
    """The metadata of each object by its path in the model."""
    message = SavedMetadata()
    try:
        message.ParseFromString(data)
    except Exception as error:
        raise ValueError(f"{METADATA_NAME} that is not a protocol buffer: {error}") from error
    objects = {}
    for node in message.nodes:
        content = json.loads(node.metadata)
        if isinstance(content, dict):
            objects[node.node_path] = content
    return objects


def _layers(
    checkpoint: Path, metadata: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, list[NDArray[Any]]]]:
    """Name and variables of each layer of the model that has variables."""
    reader = tf.train.load_checkpoint(str(checkpoint))
    graph = TrackableObjectGraph()
    graph.ParseFromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    paths: dict[int, list[str]] = {}
    for child in graph.nodes[0].children:
        if child.local_name.startswith("layer"):
            paths.setdefault(child.node_id, []).append(f"root.{child.local_name}")
    for node_id, own_paths in paths.items():
        children = {child.local_name: child.node_id for child in graph.nodes[node_id].children}
        lists = [
            [child.node_id for child in graph.nodes[children[name]].children]
            for name in ("trainable_variables", "variables")
            if name in children
        ]
        variables = list(dict.fromkeys(variable for ids in lists for variable in ids))
        if not variables:
            continue
        names = [metadata[path]["name"] for path in own_paths if path in metadata]
        if not names:
            raise KeyError(own_paths[0])
        yield (
            str(names[0]),
            [
                np.asarray(reader.get_tensor(graph.nodes[variable].attributes[0].checkpoint_key))
                for variable in variables
            ],
        )


def _plain(value: Any) -> Any:
    """JSON as Keras 2 writes it into HDF5 files: tuples and shapes are lists."""
    if isinstance(value, dict):
        if value.get("class_name") in ("__tuple__", "TensorShape"):
            return [_plain(item) for item in value.get("items") or []]
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
