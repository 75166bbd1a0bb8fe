"""Rows of numbers in JSON, parsed by simdjson straight into one array: no object for each number.

Reads two things, each only where it is plainly good: a list of rows, and the body of one chunk with
`inputs` and nothing unusual. What is not is None, without a reason, and is then read by others.
simdjson takes any list apart, so the shape is checked here: as many lists as rows, each as wide as
the model's rows, and no list within a row.

A parser keeps its memory, so longer texts are not for here. Use from one thread.
"""

from __future__ import annotations

import re
from itertools import chain, permutations
from typing import Final, NamedTuple

import numpy as np
import simdjson
from typing_extensions import TypeIs

from service.core.values import FloatRows
from service.transports.http.bodies.body_types import MAX_POSITION

MAX_BYTES: Final = 256 * 1024

_F4: Final = np.dtype("<f4")
_F8: Final = np.dtype(np.float64)
_INPUTS: Final = b'"inputs"'
_NEAR_BEGIN: Final = 96
"""Within so many bytes `inputs` is looked for, which tells rows from events."""

_MEMBERS: Final = frozenset(
    found
    for found in chain.from_iterable(
        permutations(("inputs", "position", "epoch"), count) for count in (1, 2, 3)
    )
    if "inputs" in found
)
_EPOCH: Final = re.compile(r"[0-9a-f]{16}")
_LARGEST_SQUARES: Final = 1e76
"""A sum of squares below this has no member that overflows float32."""

_REFUSALS: Final = (ValueError, TypeError, KeyError, RuntimeError)
"""What simdjson raises, about the text and about what it is asked for."""


class RowsBody(NamedTuple):
    """The body of a chunk.

    Attributes:
        rows: float32 [T, F], finite.
    """

    rows: FloatRows
    position: int | None
    epoch: str | None


class JsonRows:
    """Reads the rows of one model.

    Args:
        wide: F, numbers in a row.
        most: rows in one text.
    """

    def __init__(self, wide: int, most: int):
        self._wide = wide
        self._most = most
        self._parser = simdjson.Parser()

    def chunk(self, body: bytes) -> RowsBody | None:
        """The body of a chunk: `inputs`, with `position` and `epoch` or without."""
        # What does not begin so may begin with a mark that simdjson passes over.
        is_usual = body[:1] == b"{" and body.find(_INPUTS, 0, _NEAR_BEGIN) > 0
        if not is_usual or len(body) > MAX_BYTES:
            return None
        try:
            members = self._parser.parse(body)
            if not isinstance(members, simdjson.Object):
                return None
            # A member given twice is in none of these.
            names = tuple(members)
            if names not in _MEMBERS:
                return None
            position = members["position"] if "position" in names else None
            epoch = members["epoch"] if "epoch" in names else None
            if not _is_position(position) or not _is_epoch(epoch):
                return None
            rows = self._array(members["inputs"], body)
        except _REFUSALS:
            return None
        return None if rows is None else RowsBody(rows, position, epoch)

    def _array(self, found: object, text: bytes) -> FloatRows | None:
        if not isinstance(found, simdjson.Array):
            return None
        count = len(found)
        # Nothing else in the text has such a bracket: it is a list of rows, or a body whose other
        # members were checked.
        if not 0 < count <= self._most or text.count(b"[") != count + 1:
            return None
        if set(map(len, found)) != {self._wide}:  # type: ignore[arg-type]
            return None
        numbers = np.frombuffer(found.as_buffer(of_type="d"), _F8)
        if numbers.size != count * self._wide:
            return None
        with np.errstate(over="ignore"):
            if not numbers.dot(numbers) < _LARGEST_SQUARES:
                return None
        return numbers.astype(_F4).reshape(count, self._wide)


def _is_position(value: object) -> TypeIs[int | None]:
    # not a bool, which is an int too
    return value is None or (type(value) is int and 0 <= value <= MAX_POSITION)


def _is_epoch(value: object) -> TypeIs[str | None]:
    return value is None or (type(value) is str and _EPOCH.fullmatch(value) is not None)
