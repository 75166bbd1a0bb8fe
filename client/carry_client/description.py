"""Description of a served model, read from `GET /v1/models/{model}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from carry_client.types import Json

_KINDS: Final = {
    ("boolean",): "boolean",
    ("integer", "string"): "timestamp",
    ("number",): "numeric",
    ("number", "string"): "timestamp",
    ("string",): "categorical",
}
_RESERVED_LABELS: Final = ("<unknown>", "<absent>")
_RESET: Final = "reset"


class Field(NamedTuple):
    """One field of an event.

    Attributes:
        kind: `numeric`, `categorical`, `boolean` or `timestamp`.
        example: a value that the schema gives as an example, or None.
        labels: known categories of a categorical field.
    """

    name: str
    kind: str
    is_optional: bool
    example: Json
    labels: tuple[str, ...]


class Output(NamedTuple):
    """One output.

    Attributes:
        shape: of one step.
        is_per_chunk: one value for the whole chunk, instead of one for each step.
        labels: names along the last axis, such as levels or categories; may be empty.
        categories: by code those that the values name; empty if the values are numbers.
    """

    name: str
    shape: tuple[int, ...]
    is_per_chunk: bool
    labels: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()

    def column_names(self) -> list[str]:
        """A name for each number of a step: `delay[0.5]` by its label, `x[1]` by its place.

        Axes of length one are left out.
        """
        axes = [[str(at) if size > 1 else "" for at in range(size)] for size in self.shape]
        if axes and len(self.labels) == len(axes[-1]):
            axes[-1] = list(self.labels)
        places = [", ".join(filter(None, index)) for index in product(*axes)]
        return [f"{self.name}[{place}]" if place else self.name for place in places]


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A served model.

    Attributes:
        version: the first 12 digits of its fingerprint.
        codes: for each column of a row of `inputs`, how many codes it has; 0 for a number.
        fields: of an event, in the order of the schema; None for a model without events.
        is_cut_invariant: outputs do not depend on how events are cut into chunks.
    """

    name: str
    version: str
    runtimes: tuple[str, ...]
    codes: tuple[int, ...]
    fields: tuple[Field, ...] | None
    outputs: tuple[Output, ...]
    is_cut_invariant: bool
    max_body_bytes: int
    max_chunk_steps: int
    max_predict_steps: int
    max_items: int = 1000

    @property
    def width(self) -> int:
        """Numbers of all outputs at one step."""
        return sum(prod(output.shape) for output in self.outputs)

    def pack(self, outputs: Mapping[str, object], steps: int) -> NDArray[np.float32]:
        """The outputs of T steps side by side, float32 [T, O].

        An output of the whole chunk is repeated in each row.

        Raises:
            ValueError: an output is missing or unknown, or has another shape.
        """
        if set(outputs) != {output.name for output in self.outputs}:
            expected = sorted(output.name for output in self.outputs)
            raise ValueError(f"expected the outputs {expected}, got {sorted(outputs)}")
        rows = np.empty((steps, self.width), np.float32)
        column = 0
        for output in self.outputs:
            try:
                values = np.asarray(outputs[output.name])
                if output.categories:
                    codes = {name: code for code, name in enumerate(output.categories)}
                    values = np.vectorize(codes.__getitem__, otypes="f")(values)
                values = values.astype(np.float32)
            except (KeyError, TypeError, ValueError) as error:
                kind = "known categories" if output.categories else "numbers"
                raise ValueError(f"output {output.name!r}: expected {kind}") from error
            shape = output.shape if output.is_per_chunk else (steps, *output.shape)
            if values.shape != shape:
                raise ValueError(
                    f"output {output.name!r}: expected shape {list(shape)}, "
                    f"got {list(values.shape)}"
                )
            size = prod(output.shape)
            rows[:, column : column + size] = values.reshape(-1, size)
            column += size
        return rows


def read_description(description: object) -> ModelDescription:
    """The description out of its document; ValueError if it is invalid."""
    document: Any = description
    try:
        categories = {
            column["field"]: tuple(column["labels"])
            for column in document["columns"]
            if column.get("labels")
        }
        labels = {
            name: tuple(label for label in known if label not in _RESERVED_LABELS)
            for name, known in categories.items()
        }
        limits = document["limits"]
        return ModelDescription(
            name=str(document["name"]),
            version=str(document["version"]),
            runtimes=tuple(document["runtimes"]),
            codes=tuple(int(column.get("codes", 0)) for column in document["columns"]),
            fields=_fields(document["events"], labels, document["columns"]),
            outputs=tuple(
                Output(
                    name,
                    tuple(output["shape"]),
                    output["per"] == "chunk",
                    tuple(output.get("labels", ())),
                    categories.get(output.get("categories_of"), ()),
                )
                for name, output in document["outputs"].items()
            ),
            is_cut_invariant=document["chunking"] == "invisible",
            max_body_bytes=int(limits["max_body_bytes"]),
            max_chunk_steps=int(limits["max_chunk_steps"]),
            max_predict_steps=int(limits["max_predict_steps"]),
            max_items=int(limits.get("max_items", 1000)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"the model's description cannot be read: {type(error).__name__}: {error}"
        ) from error


def _fields(
    schema: Any, labels: Mapping[str, tuple[str, ...]], columns: Any
) -> tuple[Field, ...] | None:
    if schema is None:
        return None
    required = schema.get("required", ())
    # without a column it is no field, but the member of an event that resets the state
    is_mark = all(column.get("field") != _RESET for column in columns)
    return tuple(
        Field(
            name,
            _kind(value),
            name not in required,
            next(iter(value.get("examples", ())), None),
            labels.get(name, ()),
        )
        for name, value in schema["properties"].items()
        if name != _RESET or not is_mark
    )


def _kind(value: Mapping[str, Any]) -> str:
    """The kind of field that a property describes; a null type only says that it is optional."""
    alternatives = list(_alternatives(value))
    if any("enum" in each for each in alternatives):  # the forms of a boolean with `coerce`
        return "boolean"
    return _KINDS[tuple(sorted({str(each["type"]) for each in alternatives} - {"null"}))]


def _alternatives(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "anyOf" not in value:
        yield value
    for each in value.get("anyOf", ()):
        yield from _alternatives(each)
