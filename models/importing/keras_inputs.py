"""The inputs of a Keras model as the columns of one row, and the names of what it becomes.

A Keras model may have several inputs: sequences [batch, steps, features], one value or code per
step [batch, steps], and initial states. The sequences become the columns of the packaged model's
rows, side by side in the order of the model's inputs. A layer that reads some of the columns reads
a `slice` layer; a column that an `Embedding` reads holds codes.

What a slice begins at is known at the end only, since an embedded column is as wide as its
embedding; so slices are named at once and written by `layers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from models.errors import ImportedModelError
from models.importing.keras_layers import UnsupportedLayerError
from models.importing.keras_values import Value, state_inputs
from models.spec.layers import FEATURES

EXPECTED = (
    "expected inputs of shape [batch, steps, features], or [batch, steps] for codes that an "
    "Embedding reads"
)
_MAX_CHARACTERS = 56


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One input of the Keras model.

    Attributes:
        name: its name.
        columns: the columns of a row that it reads; None if it holds a state.
        dtype: its Keras dtype.
        rank: its number of axes.
    """

    name: str
    columns: range | None
    dtype: str
    rank: int


@dataclass(slots=True)
class InputColumns:
    """The columns of a row, those that hold codes, and the parts that layers read.

    Attributes:
        names: names that layers have.
        inputs: the inputs of the Keras model, in their order.
        values: the same as tensors.
        steps: the number of steps that they fix, or None.
        masked: whether codes of 0 are padding in training.
    """

    names: set[str]
    inputs: list[ModelInput] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    steps: int | None = None
    masked: bool = False
    _tables: dict[int, tuple[str, NDArray[np.float32]]] = field(default_factory=dict)
    _parts: dict[tuple[int, int], str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Any, names: set[str]) -> InputColumns:
        """The inputs of a graph.

        Args:
            names: names that layers have already.

        Raises:
            ImportedModelError: an input of another shape, or none that is a sequence.
        """
        columns, states, start = cls(names), state_inputs(graph), 0
        shapes = [tuple(tensor.shape) for tensor in graph.inputs]
        for index, (tensor, shape) in enumerate(zip(graph.inputs, shapes, strict=True)):
            own = None
            if index not in states:
                if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] is None):
                    raise ImportedModelError(f"{EXPECTED}, got {shapes}")
                own = range(start, start + (shape[2] if len(shape) == 3 else 1))
                start = own.stop
            state = index if own is None else None
            owner = f"input {tensor.name!r}"
            columns.inputs.append(ModelInput(tensor.name, own, str(tensor.dtype), len(shape)))
            columns.values.append(Value("", shape, owner, columns=own, state_input=state))
        steps = {value.shape[1] for value in columns.values if value.columns} - {None}
        if start == 0 or len(steps) > 1:
            raise ImportedModelError(
                f"{EXPECTED}; a row of events has one value of each at every step, got {shapes}"
            )
        columns.steps = next(iter(steps), None)
        return columns

    @property
    def count(self) -> int:
        """F, the number of columns."""
        return max(own.columns.stop for own in self.inputs if own.columns)

    def read(self, value: Value) -> str:
        """The layer of the `ModelSpec` that has a value."""
        if value.columns is None:
            return value.name
        if len(value.shape) != 3:
            raise UnsupportedLayerError(
                f"it reads {value.owner} of shape {list(value.shape)}; {EXPECTED}. One number per "
                "step has a features axis: keras.Input((steps, 1)), or Reshape((-1, 1)) behind "
                "it; what stays the same for a stream goes into every event"
            )
        return self._part(value.columns.start, value.columns.stop, value.owner)

    def embed(self, value: Value, layer: Any) -> str:
        """The layer of the `ModelSpec` that has the embedding of a value.

        Raises:
            UnsupportedLayerError: the value is not one column of codes of its own.
        """
        if value.columns is None or len(value.columns) > 1 or len(value.shape) != 2:
            raise UnsupportedLayerError(
                f"it reads {value.owner} of shape {list(value.shape)}; expected codes of shape "
                "[batch, steps]: an input of the model, or a column x[..., 0] of one"
            )
        (column,), table = value.columns, np.array(layer.embeddings.numpy(), np.float32)
        if column in self._tables:
            raise UnsupportedLayerError(
                f"it reads a column that {self._tables[column][0]} reads already; expected one "
                "Embedding for each column: give the codes to the model as two inputs"
            )
        self._tables[column] = (f"Embedding {layer.name!r}", table)
        self.masked = self.masked or layer.mask_zero
        return self._part(column, column + 1, layer.name)

    def problems(self) -> list[str]:
        """Columns that the model reads both as codes and as numbers, or of integers, as lines."""
        lines = []
        for start, stop in self._parts:
            both = [column for column in range(start, stop) if column in self._tables]
            if both and stop - start > 1:
                lines.append(
                    f"{self._tables[both[0]][0]}: the model reads its column as a number too; give "
                    "the codes to the model as a separate input"
                )
            (whole,) = (own for own in self.inputs if own.columns and start in own.columns)
            if not both and not whole.dtype.startswith("float"):
                lines.append(
                    f"the model: expected float32 numbers, or codes that an Embedding reads, "
                    f"got an input of {whole.dtype}"
                )
        return list(dict.fromkeys(lines))

    def layers(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The `slice` layers, and the new names of those that are all the features."""
        widths = [
            self._tables[c][1].shape[1] if c in self._tables else 1 for c in range(self.count)
        ]
        ends, layers, renamed = np.cumsum([0, *widths]).tolist(), [], {}
        for (start, stop), name in self._parts.items():
            if (start, stop) == (0, self.count):
                renamed[name] = FEATURES
                continue
            place = {"start": ends[start], "stop": ends[stop]}
            layers.append({"kind": "slice", "name": name, "inputs": [FEATURES], **place})
        return layers, renamed

    def embeddings(self) -> tuple[list[dict[str, int]], dict[str, NDArray[np.float32]]]:
        """The section `embeddings` of the `ModelSpec`, and its weights."""
        section = [
            {"column": column, "codes": len(table), "units": table.shape[1]}
            for column, (_, table) in sorted(self._tables.items())
        ]
        weights = {f"embedding.feature_{c}": table for c, (_, table) in self._tables.items()}
        return section, weights

    def notes(self) -> list[str]:
        """What the user should know about the rows."""
        listed, notes = [], []
        for own in self.inputs:
            if own.columns:
                first, last = own.columns[0], own.columns[-1]
                listed.append(f"{own.name!r} [{first}" + ("]" if first == last else f" to {last}]"))
        if len(listed) > 1:
            notes.append(f"the inputs are columns of one row of {self.count}: {', '.join(listed)}")
        for column, (reader, table) in sorted(self._tables.items()):
            notes.append(
                f"feature_{column} holds codes 0 to {len(table) - 1}, which {reader} reads; a row "
                "with another value is rejected"
            )
        return notes

    def _part(self, start: int, stop: int, name: str) -> str:
        if (start, stop) not in self._parts:
            own = name.removeprefix("input ").strip("'")
            self._parts[start, stop] = unique_layer_name(self.names, own)
        return self._parts[start, stop]


def unique_layer_name(used: set[str], keras_name: str) -> str:
    """A valid, unused name of a layer that resembles the Keras name; added to `used`."""
    return _unique(used, re.sub(r"[^a-z0-9_]+", "_", keras_name.lower()).strip("_"), "layer")


def unique_output_name(used: set[str], keras_name: str) -> str:
    """The name of an output: Keras' own, if it is valid and unused; added to `used`."""
    return _unique(used, re.sub(r"[^A-Za-z0-9_-]+", "_", keras_name).strip("_-"), "output")


def _unique(used: set[str], name: str, default: str) -> str:
    name = name[:_MAX_CHARACTERS] or default
    name = free = name if name[0].isalpha() else f"{default}_{name}"
    number = 1
    while free in used:
        number += 1
        free = f"{name}_{number}"
    used.add(free)
    return free


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
    for key, tensor in structure.items() if isinstance(structure, Mapping) else ():
        if isinstance(tensor, keras.KerasTensor):
            keys.setdefault(id(tensor), []).append(str(key))
    names = []
    for tensor in graph.outputs:
        operation = tensor._keras_history.operation
        stem = re.sub(r"_\d+$", "", operation.name)  # of a name that Keras gave
        is_automatic = stem.replace("_", "") == type(operation).__name__.lower()
        if own := keys.get(id(tensor)):
            names.append(own.pop(0))
        else:
            names.append("output" if sequences == 1 and is_automatic else str(operation.name))
    return names
