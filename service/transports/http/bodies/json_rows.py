"""Rows of numbers in JSON, parsed by simdjson straight into one array: no object for each number.

The part of the fast decoder for the usual chunk: `inputs`, with `position` and `epoch` or without.
simdjson flattens any list, so the shape is checked here: as many lists as rows, each as wide as
the model's rows, and no list within a row.

A parser keeps its memory, so longer texts are left to others. Use from one thread.
"""

from __future__ import annotations

from itertools import chain, permutations
from typing import Final, NamedTuple

import numpy as np
import simdjson

from service.core.values import FloatRows
from service.transports.http.field_rules import is_optional_epoch, is_optional_position

MAX_BYTES: Final = 256 * 1024

_F4: Final = np.dtype("<f4")
_F8: Final = np.dtype(np.float64)
_INPUTS: Final = b'"inputs"'
_NEAR_BEGIN: Final = 96
"""`inputs` is searched in this many bytes, which tells rows from events."""

_MEMBERS: Final = frozenset(
    names
    for names in chain.from_iterable(
        permutations(("inputs", "position", "epoch"), count) for count in (1, 2, 3)
    )
    if "inputs" in names
)
_LARGEST_SQUARES: Final = 1e76
"""A sum of squares below this has no member that overflows float32."""

_PARSER_ERRORS: Final = (ValueError, TypeError, KeyError, RuntimeError)
"""What simdjson raises, about the text and about what it is asked for."""


class RowsChunk(NamedTuple):
    """A chunk of rows.

    Attributes:
        rows: float32 [T, F], finite.
    """

    rows: FloatRows
    position: int | None
    epoch: str | None


class JsonRowsDecoder:
    """Decodes the chunks of rows of one model.

    Args:
        features: F, numbers in a row.
        max_rows: most rows in one text.
    """

    def __init__(self, features: int, max_rows: int):
        self._features = features
        self._max_rows = max_rows
        self._parser = simdjson.Parser()

    def decode_chunk(self, body: bytes) -> RowsChunk | None:
        """The chunk of a body; None if it is not a valid chunk of rows in the usual form."""
        # simdjson would skip a byte order mark
        is_usual = body[:1] == b"{" and body.find(_INPUTS, 0, _NEAR_BEGIN) > 0
        if not is_usual or len(body) > MAX_BYTES:
            return None
        try:
            members = self._parser.parse(body)
            if not isinstance(members, simdjson.Object):
                return None
            # no duplicate member is in any of these
            names = tuple(members)
            if names not in _MEMBERS:
                return None
            position = members["position"] if "position" in names else None
            epoch = members["epoch"] if "epoch" in names else None
            if not is_optional_position(position) or not is_optional_epoch(epoch):
                return None
            rows = self._array(members["inputs"], body)
        except _PARSER_ERRORS:
            return None
        return None if rows is None else RowsChunk(rows, position, epoch)

    def _array(self, value: object, text: bytes) -> FloatRows | None:
        if not isinstance(value, simdjson.Array):
            return None
        count = len(value)
        # the other members were checked and hold no such bracket
        if not 0 < count <= self._max_rows or text.count(b"[") != count + 1:
            return None
        if set(map(len, value)) != {self._features}:  # type: ignore[arg-type]
            return None
        numbers = np.frombuffer(value.as_buffer(of_type="d"), _F8)
        if numbers.size != count * self._features:
            return None
        with np.errstate(over="ignore"):
            if not numbers.dot(numbers) < _LARGEST_SQUARES:
                return None
        return numbers.astype(_F4).reshape(count, self._features)
