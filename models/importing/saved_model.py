"""Converts the SavedModel folder of a Keras 2 model to an HDF5 file, which Keras 3 reads.

Keras 2 wrote `keras_metadata.pb`, the configuration of the model and its layers, beside
TensorFlow's graph and checkpoint. Only configuration and weights are read: the graph, which is a
program, is neither loaded nor run. The checkpoint's object graph says which variables belong to a
layer; in the HDF5 file they are in the order in which Keras stores them, trainable ones first.

Folders without that file, as `model.export` and TensorFlow write them, hold no configuration and
are rejected.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph
from tensorflow.python.keras.protobuf.saved_metadata_pb2 import SavedMetadata

from models.importing.isolation import METADATA_NAME

CHECKPOINT_NAME = "variables/variables"
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_ROOT = "root"


def saved_model_to_hdf5(folder: Path, file: Path) -> None:
    """Write the model of a SavedModel folder as Keras writes an HDF5 file.

    Args:
        folder: with `keras_metadata.pb` and `variables`; no other process may write to it.
        file: the file to make.

    Raises:
        ValueError: the folder holds no whole Keras model.
    """
    metadata = _metadata((folder / METADATA_NAME).read_bytes())
    if _ROOT not in metadata:
        raise ValueError(f"{METADATA_NAME} without the model's own configuration")
    try:
        layers = list(_layers(folder / CHECKPOINT_NAME, metadata))
    except (tf.errors.OpError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(f"variables that cannot be read: {error}") from error
    root = metadata[_ROOT]
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
    graph.ParseFromString(reader.get_tensor(_OBJECT_GRAPH))
    paths: dict[int, list[str]] = {}
    for child in graph.nodes[0].children:
        if child.local_name.startswith("layer"):
            paths.setdefault(child.node_id, []).append(f"{_ROOT}.{child.local_name}")
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
