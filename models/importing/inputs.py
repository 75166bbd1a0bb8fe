"""The inputs of a Keras model as the columns of one row.

A Keras model may have several inputs: sequences [batch, steps, features], one value or code per
step [batch, steps], and initial states. The sequences become the columns of the packaged model's
rows, side by side in the order of the model's inputs. A layer that reads some of the columns reads
a `slice` layer; a column that an `Embedding` reads holds codes.

What a slice begins at is known at the end only, since an embedded column is as wide as its
embedding; so slices are named at once and written by `layers`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ImportedModelError
from models.importing.converted import UnsupportedLayerError
from models.importing.naming import unique_layer_name
from models.importing.states import Value, state_inputs
from models.spec.layers import FEATURES

EXPECTED = (
    "expected inputs of shape [batch, steps, features], or [batch, steps] for codes that an "
    "Embedding reads"
)


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One input of the Keras model.

    Attributes:
        columns: the columns of a row that it reads; None if it holds a state.
        dtype: its Keras dtype.
        rank: its number of axes.
    """

    columns: range | None
    dtype: str
    rank: int


@dataclass(slots=True)
class InputColumns:
    """The columns of a row, those that hold codes, and the parts that layers read."""

    names: set[str]
    inputs: list[ModelInput] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    steps: int | None = None
    masked: bool = False
    """Whether codes of 0 are padding in training."""
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
            owner = f"input {tensor.name!r}"
            if index in states:
                columns.inputs.append(ModelInput(None, str(tensor.dtype), len(shape)))
                columns.values.append(Value("", shape, owner, state_input=index))
                continue
            if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] is None):
                raise ImportedModelError(f"{EXPECTED}, got {shapes}")
            own = range(start, start + (shape[2] if len(shape) == 3 else 1))
            start = own.stop
            columns.inputs.append(ModelInput(own, str(tensor.dtype), len(shape)))
            columns.values.append(Value("", shape, owner, columns=own))
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

    @property
    def codes(self) -> dict[int, int]:
        """Column -> number of codes, of those that an `Embedding` reads."""
        return {column: len(table) for column, (_, table) in self._tables.items()}

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
                reader = self._tables[both[0]][0]
                lines.append(
                    f"{reader}: the model reads its column as a number too; give the codes to the "
                    "model as a separate input"
                )
            for own in self.inputs:
                whole = own.columns is not None and own.columns.start <= start < own.columns.stop
                if whole and not both and not own.dtype.startswith("float"):
                    lines.append(
                        f"the model: expected float32 numbers, or codes that an Embedding reads, "
                        f"got an input of {own.dtype}"
                    )
        return list(dict.fromkeys(lines))

    def layers(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The `slice` layers, and the new names of those that are all the features."""
        ends = np.cumsum([0, *(self._width(column) for column in range(self.count))])
        layers, renamed = [], {}
        for (start, stop), name in self._parts.items():
            if (start, stop) == (0, self.count):
                renamed[name] = FEATURES
                continue
            begin, end = int(ends[start]), int(ends[stop])
            layers.append(
                {"kind": "slice", "name": name, "inputs": [FEATURES], "start": begin, "stop": end}
            )
        return layers, renamed

    def embeddings(self) -> tuple[list[dict[str, int]], dict[str, NDArray[np.float32]]]:
        """The section `embeddings` of the `ModelSpec`, and its weights."""
        section = [
            {"column": column, "codes": len(table), "units": table.shape[1]}
            for column, (_, table) in sorted(self._tables.items())
        ]
        weights = {f"embedding.feature_{c}": table for c, (_, table) in self._tables.items()}
        return section, weights

    def notes(self, names: list[str]) -> list[str]:
        """What the user should know about the rows.

        Args:
            names: of the model's inputs.
        """
        sequences = [(n, own) for n, own in zip(names, self.inputs, strict=True) if own.columns]
        notes = []
        if len(sequences) > 1:
            listed = ", ".join(
                f"{name!r} {_describe(own.columns)}" for name, own in sequences if own.columns
            )
            notes.append(f"the inputs are columns of one row of {self.count}: {listed}")
        for column, (reader, table) in sorted(self._tables.items()):
            notes.append(
                f"feature_{column} holds codes 0 to {len(table) - 1}, which {reader} reads; a row "
                "with another value is rejected"
            )
        return notes

    def _width(self, column: int) -> int:
        return self._tables[column][1].shape[1] if column in self._tables else 1

    def _part(self, start: int, stop: int, name: str) -> str:
        if (start, stop) not in self._parts:
            own = name.removeprefix("input ").strip("'")
            self._parts[start, stop] = unique_layer_name(self.names, own)
        return self._parts[start, stop]


def _describe(columns: range) -> str:
    if len(columns) == 1:
        return f"[{columns.start}]"
    return f"[{columns.start} to {columns.stop - 1}]"
