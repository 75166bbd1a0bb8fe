"""Plainly good bodies, from bytes to steps in one pass: the fast way in, beside the strict one.

The usual chunk in JSON is read by `json_rows`. For all else each model has its types for msgspec,
whose decoders check while they parse, in C: members, numbers, widths, lengths. All the rows of
a body then become one float32 buffer. What is read here is read by the strict types of `bodies.py`
as the same values; what is wrong is never said here. Where the answer is None, the strict types
are to be asked: they make the error, or find the body good after all.

A decoder silently keeps the last of duplicate members. To detect them, the members that it found,
and in JSON the texts, are counted and compared with the body: in JSON each is a pair of quotation
marks, in MessagePack the header of a map gives its length. A duplicate, a null or a quotation mark
within a text can only increase the count of the body; only where it is larger is the body searched.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from models.errors import DataError
from models.events.encode import check_rows
from models.events.reader import EventReader
from service.core.values import Feed, FloatRows, Steps
from service.pipeline.served_model import ServedModel
from service.transports.http.bodies.body_types import MAX_POSITION
from service.transports.http.bodies.duplicates import HEADER_BYTES, find_duplicate, packed_length
from service.transports.http.bodies.json_rows import JsonRows, RowsBody
from service.transports.http.limits import ApiLimits
from service.transports.http.media import Media
from service.transports.http.request_fields import is_stream_name

_F4 = np.dtype("<f4")
_QUOTE = np.uint8(ord('"'))


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


class _NotPlainError(Exception):
    """The strict types are to be asked."""


_NOT_PLAIN = (_NotPlainError, msgspec.MsgspecError, DataError, OverflowError, ValueError)


class _Decoders(NamedTuple):
    chunk: Any
    item: Any
    many: Any
    predict: Any


class _Read(NamedTuple):
    """The steps of a chunk or sequence, and its number of members and texts, events included."""

    steps: Steps
    members: int
    texts: int


class _PackedChunk(msgspec.Struct):
    """The events of a body in MessagePack, undecoded."""

    events: list[msgspec.Raw] | None = None


class _Parts(msgspec.Struct):
    """The chunks or sequences of a body, undecoded."""

    chunks: list[msgspec.Raw] = []
    sequences: list[msgspec.Raw] = []


_PACKED_CHUNK = msgspec.msgpack.Decoder(_PackedChunk)
_PACKED_PARTS = msgspec.msgpack.Decoder(_Parts)
_JSON_PARTS = msgspec.json.Decoder(_Parts)


def count_parts(media: Media, body: bytes) -> int:
    """Count the chunks or sequences of a body; 0 if it cannot be parsed."""
    decoder: Any = _JSON_PARTS if media is Media.JSON else _PACKED_PARTS
    try:
        found: _Parts = decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return 0
    return len(found.chunks) + len(found.sequences)


class PlainBodies:
    """Reads the bodies of one model, as far as they are plainly good."""

    def __init__(self, served: ServedModel, limits: ApiLimits):
        self._columns = served.artifact.spec.columns
        self._wide = len(self._columns)
        self._row_bytes = _F4.itemsize * self._wide
        self._coded = any(column.codes is not None for column in self._columns)
        self._reader = None if served.events is None else EventReader(served.events)
        self._max_predict_steps = limits.max_predict_steps
        self._longest_sequence = served.chunk_limit or limits.max_predict_steps
        self._json_rows = JsonRows(self._wide, limits.max_chunk_steps)
        self._decoders = {media: self._made(media, limits) for media in Media}

    def chunk(self, media: Media, body: bytes) -> tuple[PlainChunk | RowsBody, Steps] | None:
        """The one chunk of a body, or None."""
        try:
            if media is Media.JSON and (rows := self._json_rows.chunk(body)) is not None:
                return rows, self._given(rows.rows)
            found: PlainChunk = self._decoders[media].chunk.decode(body)
            read = self._one(found)
            members = read.members + (found.position is not None) + (found.epoch is not None)
            texts = read.texts + (found.epoch is not None)
            _check_no_duplicates(media, body, members, texts, [(body, found.events is not None)])
            return found, read.steps
        except _NOT_PLAIN:
            return None

    def items(self, media: Media, body: bytes) -> list[tuple[PlainItem, Steps]] | None:
        """The chunks of a body for many streams, all of them good, or None."""
        try:
            found: list[PlainItem] = self._decoders[media].many.decode(body).chunks
            if None in [is_stream_name(item.stream) for item in found]:
                return None
            return list(zip(found, self._parts(media, body, found), strict=True))
        except _NOT_PLAIN:
            return None

    def sequences(self, media: Media, body: bytes) -> list[Steps] | None:
        """The whole sequences of a body, or None."""
        try:
            found: list[PlainSteps] = self._decoders[media].predict.decode(body).sequences
            steps = self._parts(media, body, found)
        except _NOT_PLAIN:
            return None
        lengths = [sequence.length for sequence in steps]
        too_long = sum(lengths) > self._max_predict_steps or max(lengths) > self._longest_sequence
        return None if too_long else steps

    def _parts(self, media: Media, body: bytes, found: Sequence[PlainSteps]) -> list[Steps]:
        """The steps of each chunk or sequence of a body."""
        read = self._all(found)
        members, texts = 1, 0
        for part, of_part in zip(found, read, strict=True):
            members += of_part.members
            texts += of_part.texts
            if isinstance(part, PlainItem):
                members += 1 + (part.position is not None)
                texts += 1
                for text in (part.epoch, part.if_match):
                    if text is not None:
                        members, texts = members + 1, texts + 1
        packed: list[tuple[bytes | msgspec.Raw, bool]] = []
        if media is Media.MSGPACK:
            undecoded = _PACKED_PARTS.decode(body)
            raws = [*undecoded.chunks, *undecoded.sequences]
            packed = [(body, False)]
            packed += zip(raws, [part.events is not None for part in found], strict=True)
        _check_no_duplicates(media, body, members, texts, packed)
        return [of_part.steps for of_part in read]

    def _one(self, body: PlainSteps) -> _Read:
        if body.inputs is None:
            return self._events(body)
        rows = self._rows(_packed(body))
        return _Read(Steps(Feed.INPUTS, len(rows), None, rows), 1, 0)

    def _given(self, rows: FloatRows) -> Steps:
        """As `_one`, of rows that were read already."""
        if self._coded:
            check_rows(self._columns, rows)
        return Steps(Feed.INPUTS, len(rows), None, rows)

    def _all(self, bodies: Sequence[PlainSteps]) -> list[_Read]:
        """The steps of each body. All their rows are views of one buffer, checked at once."""
        packed = [_packed(body) for body in bodies if body.inputs is not None]
        rows = self._rows(b"".join(packed))
        lengths = iter([divmod(len(given), self._row_bytes) for given in packed])
        end = 0
        found: list[_Read] = []
        for body in bodies:
            if body.inputs is None:
                found.append(self._events(body))
                continue
            length, rest = next(lengths)
            if rest:
                raise _NotPlainError
            start, end = end, end + length
            found.append(_Read(Steps(Feed.INPUTS, length, None, rows[start:end]), 1, 0))
        return found

    def _rows(self, packed: bytes) -> FloatRows:
        rows = np.frombuffer(packed, _F4).reshape(-1, self._wide)
        # half the time of `all()`
        if np.count_nonzero(np.isfinite(rows)) != rows.size:
            raise _NotPlainError
        if self._coded:
            check_rows(self._columns, rows)
        return rows

    def _events(self, body: PlainSteps) -> _Read:
        if self._reader is None or body.events is None:
            raise _NotPlainError
        read = self._reader.read(body.events)
        if read is None:
            raise _NotPlainError
        steps = Steps(Feed.EVENTS, read.columns.steps, read.columns)
        return _Read(steps, 1 + read.members, read.texts)

    def _made(self, media: Media, limits: ApiLimits) -> _Decoders:
        wide, most = self._wide, limits.max_chunk_steps
        if media is Media.JSON:
            row: Any = Annotated[list[float], Meta(min_length=wide, max_length=wide)]
            inputs: Any = Annotated[list[row], Meta(min_length=1, max_length=most)]
        else:
            row_bytes = self._row_bytes
            inputs = Annotated[bytes, Meta(min_length=row_bytes, max_length=row_bytes * most)]
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
            decoder(item),
            decoder(_struct(msgspec.Struct, [("chunks", items)])),
            decoder(_struct(msgspec.Struct, [("sequences", sequences)])),
        )


def _check_no_duplicates(
    media: Media,
    body: bytes,
    members: int,
    texts: int,
    packed: Iterable[tuple[bytes | msgspec.Raw, bool]],
) -> None:
    """Leave a body with duplicate members to the strict types.

    Args:
        members: number of members that the decoder found and that are not null.
        texts: how many of them are text.
        packed: the maps of a MessagePack body, without its events, and whether each has events.
    """
    if media is Media.MSGPACK:
        has_no_duplicates = sum([_count_packed_members(*part) for part in packed]) == members
    else:
        # NumPy counts five times as fast as bytes do.
        quotes = np.count_nonzero(np.frombuffer(body, np.uint8) == _QUOTE)
        has_no_duplicates = quotes == 2 * (members + texts)
    if not has_no_duplicates and find_duplicate(media, body) is not None:
        raise _NotPlainError


def _count_packed_members(value: bytes | msgspec.Raw, has_events: bool) -> int:
    """Count the members of a MessagePack map, including those of its events."""
    members = _map_length(bytes(value)[:HEADER_BYTES])
    if has_events:
        events = _PACKED_CHUNK.decode(value).events or ()
        members += sum([_map_length(bytes(event)[:HEADER_BYTES]) for event in events])
    return members


@lru_cache(maxsize=4096)
def _map_length(header: bytes) -> int:
    counted = packed_length(header)
    if counted is None:
        raise _NotPlainError
    return counted[0]


def _struct(base: type[msgspec.Struct], members: list[Any]) -> type[msgspec.Struct]:
    # Nothing in a body refers back to it, so that there are no cycles to collect.
    return msgspec.defstruct(
        "Plain", members, bases=(base,), forbid_unknown_fields=True, kw_only=True, gc=False
    )


def _packed(body: PlainSteps) -> bytes:
    """The inputs as float32, little-endian, row by row.

    Raises:
        OverflowError: a number does not fit.
    """
    inputs: bytes | list[list[float]] = body.inputs
    if body.events is not None:
        raise _NotPlainError
    if isinstance(inputs, bytes):
        return inputs
    return _float32(inputs)


def _float32(rows: list[list[float]]) -> bytes:
    count = len(rows) * len(rows[0])
    return struct.pack(f"<{count}f", *chain.from_iterable(rows))
