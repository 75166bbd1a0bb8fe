"""Names of imported layers and outputs, as close to Keras' as a specification allows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import keras

_MAX_CHARACTERS = 56


def unique_layer_name(used: set[str], keras_name: str) -> str:
    """A valid, unused name of a layer that resembles the Keras name; added to `used`."""
    name = re.sub(r"[^a-z0-9_]+", "_", keras_name.lower()).strip("_")[:_MAX_CHARACTERS] or "layer"
    return _unique(used, name if name[0].isalpha() else f"layer_{name}")


def unique_output_name(used: set[str], keras_name: str) -> str:
    """The name of an output: Keras' own, if it is valid and unused; added to `used`."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", keras_name).strip("_-")[:_MAX_CHARACTERS] or "output"
    return _unique(used, name if name[0].isalpha() else f"output_{name}")


def output_names(graph: Any, sequences: int) -> list[str]:
    """The name of each output of a Keras model.

    That is its key if the outputs are a dictionary, else the name of its layer; or `output`, if it
    is the only one that is not a state and its layer has only an automatic name.

    Args:
        graph: the functional model.
        sequences: how many of its outputs are not states.
    """
    structure = graph._outputs_struct
    keys: dict[int, list[str]] = {}
    if isinstance(structure, Mapping):
        for key, tensor in structure.items():
            if isinstance(tensor, keras.KerasTensor):
                keys.setdefault(id(tensor), []).append(str(key))
    names = []
    for tensor in graph.outputs:
        operation = tensor._keras_history.operation
        own = keys.get(id(tensor))
        if own:
            names.append(own.pop(0))
        elif sequences == 1 and _is_automatic(operation):
            names.append("output")
        else:
            names.append(str(operation.name))
    return names


def _is_automatic(operation: Any) -> bool:
    """Whether Keras named it, by its class and a number."""
    stem = re.sub(r"_\d+$", "", operation.name)
    return stem.replace("_", "") == type(operation).__name__.lower()


def _unique(used: set[str], name: str) -> str:
    free, number = name, 1
    while free in used:
        number += 1
        free = f"{name}_{number}"
    used.add(free)
    return free
