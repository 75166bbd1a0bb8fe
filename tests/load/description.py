"""What a service says of its model, read without any of the project's own code.

Whatever a load needs is in `GET /v1/models/{model}`: the columns of `inputs` and which of them
are codes, the event schema, the shape of each output, and the limits on a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.load.scenarios import LoadError

_KINDS = {"number": "numeric", "string": "categorical", "boolean": "boolean"}


class Field(NamedTuple):
    """One field of an event.

    Attributes:
        kind: `numeric`, `categorical`, `boolean` or `timestamp`.
        typical: a value that the schema gives as an example, or None.
        labels: categories that a categorical knows.
    """

    name: str
    kind: str
    optional: bool
    typical: Any
    labels: tuple[str, ...]


class Output(NamedTuple):
    """One output: its shape at one step, and whether it has one value per step."""

    name: str
    shape: tuple[int, ...]
    per_step: bool


@dataclass(frozen=True, slots=True)
class Description:
    """A served model.

    Attributes:
        codes: for each column of a row of `inputs`, how many codes it has; 0 for a number.
        fields: of an event, in the order of the schema; None where the model takes no events.
        invisible: outputs do not depend on how events were cut into chunks.
    """

    name: str
    version: str
    runtimes: tuple[str, ...]
    codes: tuple[int, ...]
    fields: tuple[Field, ...] | None
    outputs: tuple[Output, ...]
    invisible: bool
    max_body_bytes: int
    max_chunk_steps: int
    max_predict_steps: int

    def pack(self, outputs: Mapping[str, Any], steps: int) -> NDArray[np.float64]:
        """The outputs of T events side by side, float64 [T, O]; only those of every step.

        Raises:
            ValueError: an output is missing, is unknown, has another shape, or is not finite.
        """
        if set(outputs) != {output.name for output in self.outputs}:
            raise ValueError(
                f"expected the outputs {sorted(output.name for output in self.outputs)}, "
                f"got {sorted(outputs)}"
            )
        columns = []
        for output in self.outputs:
            try:
                values = np.asarray(outputs[output.name], np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"output {output.name!r}: expected numbers") from error
            if not np.isfinite(values).all():
                raise ValueError(f"output {output.name!r}: expected finite numbers")
            if not output.per_step:
                continue
            if values.shape != (steps, *output.shape):
                raise ValueError(
                    f"output {output.name!r}: expected shape {[steps, *output.shape]}, "
                    f"got {list(values.shape)}"
                )
            columns.append(values.reshape(steps, prod(output.shape)))
        return np.concatenate(columns, axis=1) if columns else np.empty((steps, 0))


def read_description(document: Any) -> Description:
    """The description out of the body of `GET /v1/models/{model}`; LoadError if it is none."""
    try:
        labels = {
            column["field"]: tuple(
                label for label in column["labels"] if label not in ("<unknown>", "<absent>")
            )
            for column in document["columns"]
            if column.get("labels")
        }
        limits = document["limits"]
        return Description(
            name=document["name"],
            version=document["version"],
            runtimes=tuple(document["runtimes"]),
            codes=tuple(int(column.get("codes", 0)) for column in document["columns"]),
            fields=_fields(document["events"], labels),
            outputs=tuple(
                Output(name, tuple(output["shape"]), output["per"] == "step")
                for name, output in document["outputs"].items()
            ),
            invisible=document["chunking"] == "invisible",
            max_body_bytes=int(limits["max_body_bytes"]),
            max_chunk_steps=int(limits["max_chunk_steps"]),
            max_predict_steps=int(limits["max_predict_steps"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(
            f"the model's description cannot be read ({type(error).__name__}: {error})"
        ) from error


def _fields(schema: Any, labels: Mapping[str, tuple[str, ...]]) -> tuple[Field, ...] | None:
    if schema is None:
        return None
    required = schema.get("required", ())
    return tuple(
        Field(
            name,
            _kind(value),
            name not in required,
            next(iter(value.get("examples", ())), None),
            labels.get(name, ()),
        )
        for name, value in schema["properties"].items()
    )


def _kind(value: Mapping[str, Any]) -> str:
    alternatives = list(_alternatives(value))
    if any(given.get("format") == "date-time" for given in alternatives):
        return "timestamp"
    (kind,) = {str(given["type"]) for given in alternatives if given["type"] != "null"}
    return _KINDS[kind]


def _alternatives(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "anyOf" not in value:
        yield value
    for given in value.get("anyOf", ()):
        yield from _alternatives(given)
