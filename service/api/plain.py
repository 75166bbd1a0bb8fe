"""Plainly good bodies, from bytes to steps in one pass: the fast way in, beside the strict one.

Each model has its types for msgspec, whose decoders check while they parse, in C: members,
numbers, widths, lengths. All the rows of a body then become one float32 buffer. What is read
here is read by the strict types of `bodies.py` as the same values; what is wrong is never said
here. Where the answer is None, the strict types are to be asked: they make the error, or find the
body good after all.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from models.errors import DataError
from models.events.encode import check_rows
from models.events.reader import EventReader
from service.api.bodies import MAX_POSITION
from service.api.limits import ApiLimits
from service.api.media import Media
from service.api.reading import is_stream_name
from service.domain import Feed, FloatRows, Steps
from service.served import ServedModel

_F4 = np.dtype("<f4")


class PlainSteps(msgspec.Struct):
    """Events or rows; what is absent is None."""

    inputs: Any
    events: Any


class PlainChunk(PlainSteps):
    """A chunk's body."""

    position: int | None
    epoch: str | None


class PlainItem(PlainChunk):
    """A chunk in a body for many streams."""

    stream: str
    if_match: str | None


class _Decoders(NamedTuple):
    chunk: Any
    many: Any
    predict: Any


class PlainBodies:
    """Reads the bodies of one model, as far as they are plainly good."""

    def __init__(self, served: ServedModel, limits: ApiLimits):
        self._columns = served.artifact.spec.columns
        self._coded = any(column.codes is not None for column in self._columns)
        self._reader = None if served.events is None else EventReader(served.events)
        self._max_predict_steps = limits.max_predict_steps
        self._decoders = {media: self._made(media, limits) for media in Media}

    def chunk(self, media: Media, body: bytes) -> tuple[PlainChunk, Steps] | None:
        """The one chunk of a body, or None."""
        try:
            found: PlainChunk = self._decoders[media].chunk.decode(body)
        except (msgspec.MsgspecError, ValueError):
            return None
        steps = self._steps([found])
        return None if steps is None else (found, steps[0])

    def items(self, media: Media, body: bytes) -> list[tuple[PlainItem, Steps]] | None:
        """The chunks of a body for many streams, all of them good, or None."""
        try:
            found: list[PlainItem] = self._decoders[media].many.decode(body).chunks
        except (msgspec.MsgspecError, ValueError):
            return None
        if not all(is_stream_name(item.stream) for item in found):
            return None
        steps = self._steps(found)
        return None if steps is None else list(zip(found, steps, strict=True))

    def sequences(self, media: Media, body: bytes) -> list[Steps] | None:
        """The whole sequences of a body, or None."""
        try:
            found: list[PlainSteps] = self._decoders[media].predict.decode(body).sequences
        except (msgspec.MsgspecError, ValueError):
            return None
        steps = self._steps(found)
        if steps is None or sum(each.length for each in steps) > self._max_predict_steps:
            return None
        return steps

    def _steps(self, bodies: Sequence[PlainSteps]) -> list[Steps] | None:
        try:
            packed = [_packed(body.inputs) for body in bodies if body.inputs is not None]
        except OverflowError:
            # a number beyond float32
            return None
        rows = self._rows(packed) if packed else []
        if rows is None:
            return None
        found, next_rows = [], iter(rows)
        for body in bodies:
            steps = self._events(body) if body.inputs is None else _inputs(body, next(next_rows))
            if steps is None:
                return None
            found.append(steps)
        return found

    def _rows(self, packed: Sequence[bytes]) -> list[FloatRows] | None:
        """The rows of each of several bodies, views of one buffer; None where any is wrong."""
        wide = len(self._columns)
        lengths, rest = zip(*[divmod(len(given), 4 * wide) for given in packed], strict=True)
        if any(rest):
            return None
        values = np.frombuffer(packed[0] if len(packed) == 1 else b"".join(packed), _F4)
        # half the time of `all()`
        if np.count_nonzero(np.isfinite(values)) != values.size:
            return None
        rows = values.reshape(-1, wide)
        if self._coded:
            try:
                check_rows(self._columns, rows)
            except DataError:
                return None
        if len(packed) == 1:
            return [rows]
        ends = list(accumulate(lengths))
        return [rows[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def _events(self, body: PlainSteps) -> Steps | None:
        if self._reader is None or body.events is None:
            return None
        columns = self._reader.columns(body.events)
        return None if columns is None else Steps(Feed.EVENTS, columns.steps, columns=columns)

    def _made(self, media: Media, limits: ApiLimits) -> _Decoders:
        wide, most = len(self._columns), limits.max_chunk_steps
        if media is Media.JSON:
            row: Any = Annotated[list[float], Meta(min_length=wide, max_length=wide)]
            inputs: Any = Annotated[list[row], Meta(min_length=1, max_length=most)]
        else:
            inputs = Annotated[bytes, Meta(min_length=4 * wide, max_length=4 * wide * most)]
        events: Any = None
        if self._reader is not None:
            event: Any = self._reader.event
            events = Annotated[list[event], Meta(min_length=1, max_length=most)] | None
        steps: list[Any] = [("inputs", inputs | None, None), ("events", events, None)]
        chunk = [
            *steps,
            ("position", Annotated[int, Meta(ge=0, le=MAX_POSITION)] | None, None),
            ("epoch", Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")] | None, None),
        ]
        item = _struct(PlainItem, [*chunk, ("stream", str), ("if_match", str | None, None)])
        items = Annotated[list[item], Meta(max_length=limits.max_items)]  # type: ignore[valid-type]
        sequence = _struct(PlainSteps, steps)
        sequences = Annotated[
            list[sequence],  # type: ignore[valid-type]
            Meta(min_length=1, max_length=limits.max_items),
        ]
        decoder: Any = msgspec.json.Decoder if media is Media.JSON else msgspec.msgpack.Decoder
        return _Decoders(
            decoder(_struct(PlainChunk, chunk)),
            decoder(_struct(msgspec.Struct, [("chunks", items)])),
            decoder(_struct(msgspec.Struct, [("sequences", sequences)])),
        )


def _struct(base: type[msgspec.Struct], members: list[Any]) -> type[msgspec.Struct]:
    # Nothing in a body refers back to it, so that there are no cycles to collect.
    return msgspec.defstruct(
        "Plain", members, bases=(base,), forbid_unknown_fields=True, kw_only=True, gc=False
    )


def _packed(inputs: bytes | list[list[float]]) -> bytes:
    """float32, little-endian, row by row.

    Raises:
        OverflowError: a number does not fit.
    """
    if isinstance(inputs, bytes):
        return inputs
    count = len(inputs) * len(inputs[0])
    return struct.pack(f"<{count}f", *chain.from_iterable(inputs))


def _inputs(body: PlainSteps, rows: FloatRows) -> Steps | None:
    return None if body.events is not None else Steps(Feed.INPUTS, len(rows), None, rows)
