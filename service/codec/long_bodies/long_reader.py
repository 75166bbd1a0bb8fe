"""Reader of long bodies: yields the event loop while it reads, and never holds a parsed whole.

A body of `LONG_BYTES` or more is split first (`splitting`), so that one with more members, steps or
items than a request may have is rejected before an object is made of any. The rest is read a few
elements at a time by the readers of short bodies, with the same results and the same errors. Other
tasks run in between, and the first error ends the reading.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.events.columns import EventColumns, concatenate_field
from models.spec.state import StatePart
from service.codec.body_types import ForkBody, StateBody, StepsBody, StrictBody
from service.codec.limits import LONG_BYTES
from service.codec.long_bodies.admission import Checkpoint
from service.codec.long_bodies.splitting import (
    MORE,
    Elements,
    ObjectLimits,
    SplitObject,
    group_by_size,
    invalid,
    member_place,
    split_object,
)
from service.codec.media import (
    Encoded,
    Media,
    encoded_list,
    encoded_object,
    loads,
    malformed,
)
from service.codec.request_reader import (
    RequestReader,
    item_error,
    too_many_elements,
    with_stream,
)
from service.codec.strict_validator import validate_body
from service.codec.validation_errors import BODY, Origin
from service.core.errors import (
    CarryError,
    DeadlineExceeded,
    MalformedBody,
)
from service.core.values import Chunk, Feed, ForecastRequest, Precondition, SequenceInput, Steps
from service.transports.v1.request_fields import parse_if_match, stream_name

BLOCK_BYTES: Final = 16 * 1024
"""Elements are decoded in blocks of about this size; in MessagePack of four times the size, which
take as long."""

B = TypeVar("B", bound=StrictBody)
S = TypeVar("S", bound=StepsBody)

_EMPTY: Final = {Media.JSON: b"[]", Media.MSGPACK: b"\x90"}
_EMPTY_OBJECT: Final = {Media.JSON: b"{}", Media.MSGPACK: b"\x80"}
_ONE: Final = {Media.JSON: b"1", Media.MSGPACK: b"\x01"}
_NO_BYTES: Final = b"\xc4\x00"
_IS_BYTES: Final = (0xC4, 0xC5, 0xC6)
_LONG: Final = ("resets", "state_token")
"""Members of a chunk or sequence that may be long: a list whose elements are counted, a string."""
MAX_EVENT_BYTES: Final = 2**20
"""Largest event of a long body."""


class LongReader:
    """Reads long requests for one model; the methods correspond to those of `RequestReader`."""

    def __init__(self, reader: RequestReader):
        self._reader = reader

    async def chunk(
        self,
        body: bytes,
        media: Media,
        checkpoint: Checkpoint,
        stream: str,
        precondition: Precondition | None,
    ) -> Chunk:
        """The one chunk of a body."""
        try:
            split = await self.split_chunk(body, media, (), checkpoint)
        except CarryError as error:
            raise with_stream(stream, error) from error
        return await self.chunk_of(split, media, checkpoint, stream, precondition, ())

    async def split_chunk(
        self, body: Encoded, media: Media, envelope: Sequence[str], checkpoint: Checkpoint
    ) -> SplitObject:
        """The body of a chunk, split.

        Args:
            envelope: members that it may have besides.
        """
        self._reader.check_accepts_chunks()
        limits = self._limits(self._reader.strict.types[media].chunk, media)
        limits = limits._replace(members=[*limits.members, *envelope])
        return await self._split_object(memoryview(body), media, limits, "", checkpoint, _LONG)

    async def chunk_of(
        self,
        split: SplitObject,
        media: Media,
        checkpoint: Checkpoint,
        stream: str,
        precondition: Precondition | None,
        envelope: Sequence[str],
    ) -> Chunk:
        """The chunk of a body that `split_chunk` split, without its envelope."""
        reader = self._reader
        try:
            kind, origin = reader.strict.types[media].chunk, Origin(beside=envelope)
            chunk, steps = await self._steps_of(split, media, kind, origin, checkpoint)
        except CarryError as error:
            raise with_stream(stream, error) from error
        key = reader.key(stream)
        return reader.build_chunk(
            chunk, steps, key, precondition, final=chunk.final, dry_run=chunk.dry_run
        )

    async def items(
        self, body: bytes, media: Media, checkpoint: Checkpoint
    ) -> list[Chunk | CarryError]:
        """The chunk, or the error, of each item of a request for many streams."""
        self._reader.check_accepts_chunks()
        kind = self._reader.strict.types[media].many
        items = await self._parts(body, media, kind, "chunks", checkpoint)
        chunks: list[Chunk | CarryError] = []
        for group in _blocks(media, items):
            await checkpoint()
            if len(group[0]) >= LONG_BYTES:
                inside = f"chunks[{len(chunks)}]"
                chunks.append(await self._item(group[0], media, inside, checkpoint))
            else:
                some = encoded_object(media, {"chunks": encoded_list(media, group)})
                chunks += self._reader.items(some, media, len(chunks))
        return chunks

    async def sequences(
        self, body: bytes, media: Media, checkpoint: Checkpoint
    ) -> list[SequenceInput]:
        """The sequences of a predict request."""
        strict = self._reader.strict
        types = strict.types[media]
        parts = await self._parts(body, media, types.predict, "sequences", checkpoint)
        sequences: list[SequenceInput] = []
        steps = 0
        for group in _blocks(media, parts):
            await checkpoint()
            first = len(sequences)
            if len(group[0]) >= LONG_BYTES:
                inside = f"sequences[{first}]"
                validated, read = await self._steps(
                    group[0], media, types.sequence, inside, checkpoint
                )
                sequences.append(SequenceInput(read, strict.token(validated, inside)))
            else:
                some = encoded_object(media, {"sequences": encoded_list(media, group)})
                sequences += self._reader.sequences(some, media, first)
            steps += sum(sequence.steps.length for sequence in sequences[first:])
            strict.check_total(steps)
        return sequences or strict.all_sequences([])

    async def forecast_request(
        self, body: bytes, media: Media, checkpoint: Checkpoint, stream: str
    ) -> ForecastRequest:
        """The forecast that a body asks for."""
        reader = self._reader
        try:
            strict, kind = reader.strict, reader.forecast_body_type(media)
            most = reader.served.require_decoder().max_horizon
            limits = ObjectLimits(
                list(kind.model_fields),
                ["future"],
                most,
                lambda at: too_many_elements(at, most, MORE),
            )
            split = await self._split_object(body, media, limits, "", checkpoint)
            forecast = self._validate_rest(kind, media, split, BODY)
            if "future" in split.lists:
                future: list[dict[str, Any]] = []
                for group in _blocks(media, split.lists["future"]):
                    await checkpoint()
                    at = f"future[{len(future)}]"
                    await self._check_event(group[0], media, strict.future_fields, at, checkpoint)
                    steps = encoded_list(media, group)
                    part = encoded_object(media, {"horizon": _ONE[media], "future": steps})
                    origin = Origin(first=len(future))
                    future += strict.validate(kind, media, part, origin).future or []
                forecast.future = future
            return reader.build_forecast_request(forecast)
        except CarryError as error:
            raise with_stream(stream, error) from error

    async def state(self, body: bytes, media: Media, checkpoint: Checkpoint) -> StateBody:
        """A state to restore."""
        parts = {part.name: part for part in self._reader.served.state.parts}
        names = list(StateBody.model_fields)
        split = await self._split_object(
            body,
            media,
            ObjectLimits(names, [], len(parts), _no_list),
            "",
            checkpoint,
            long=("state",),
        )
        state = split.members.get("state", memoryview(b""))
        if len(state) < LONG_BYTES:
            return validate_body(StateBody, media, encoded_object(media, split.members))
        rest: dict[str, Encoded] = {**split.members, "state": _EMPTY_OBJECT[media]}
        restored = validate_body(StateBody, media, encoded_object(media, rest))
        most = sum(part.size for part in parts.values())
        limits = ObjectLimits(list(parts), [], most, _no_list)
        state_parts = await self._split_object(
            state, media, limits, "state", checkpoint, long=parts
        )
        for name, value in state_parts.members.items():
            await checkpoint()
            # Unknown parts are reported later, by the state layout.
            part = parts.get(name)
            restored.state[name] = None if part is None else _part_values(media, part, value)
        return restored

    async def fork(self, body: bytes, media: Media, checkpoint: Checkpoint) -> ForkBody:
        """The name of the new stream."""
        limits = ObjectLimits(list(ForkBody.model_fields), [], 1, _no_list)
        split = await self._split_object(body, media, limits, "", checkpoint)
        return validate_body(ForkBody, media, encoded_object(media, split.members))

    async def _parts(
        self, body: bytes, media: Media, kind: type[StrictBody], name: str, checkpoint: Checkpoint
    ) -> Elements:
        """The items or sequences of a request."""
        most = self._reader.limits.max_items
        limits = ObjectLimits(
            list(kind.model_fields), [name], most, lambda at: too_many_elements(at, most, MORE)
        )
        split = await self._split_object(body, media, limits, "", checkpoint)
        self._validate_rest(kind, media, split, BODY)
        return split.lists[name]

    async def _item(
        self, item: memoryview, media: Media, inside: str, checkpoint: Checkpoint
    ) -> Chunk | CarryError:
        """The chunk of a long item, or its error."""
        reader = self._reader
        stream: str | None = None
        try:
            kind = reader.strict.types[media].item
            limits = self._limits(kind, media)
            split = await self._split_object(item, media, limits, inside, checkpoint, _LONG)
            stream = _stream_of(split, media, f"{inside}.stream")
            origin = Origin(inside)
            validated, steps = await self._steps_of(split, media, kind, origin, checkpoint)
            precondition = None
            if validated.if_match is not None:
                precondition = parse_if_match(validated.if_match, f"{inside}.if_match", bare=True)
            key = reader.key(validated.stream)
            return reader.build_chunk(
                validated,
                steps,
                key,
                precondition,
                final=validated.final,
                dry_run=validated.dry_run,
            )
        except (MalformedBody, DeadlineExceeded):
            raise
        except CarryError as error:
            return item_error(error, stream)

    async def _steps(
        self, body: memoryview, media: Media, kind: type[S], inside: str, checkpoint: Checkpoint
    ) -> tuple[S, Steps]:
        """The body of a chunk or sequence without its list, and its steps."""
        limits = self._limits(kind, media)
        split = await self._split_object(body, media, limits, inside, checkpoint, _LONG)
        return await self._steps_of(split, media, kind, Origin(inside), checkpoint)

    def _limits(self, kind: type[StepsBody], media: Media) -> ObjectLimits:
        limit = self._reader.strict.limit_of(kind)
        feeds = ["events"] if media is Media.MSGPACK else ["events", "inputs"]
        # as many resets as steps
        most = 2 * limit.steps
        return ObjectLimits(
            list(kind.model_fields), feeds, most, lambda at: limit.exceeded(at, MORE)
        )

    async def _steps_of(
        self,
        split: SplitObject,
        media: Media,
        kind: type[S],
        origin: Origin,
        checkpoint: Checkpoint,
    ) -> tuple[S, Steps]:
        strict, inside = self._reader.strict, origin.inside
        rows = split.members.get("inputs")
        packed = rows is not None and media is Media.MSGPACK and rows[0] in _IS_BYTES
        if packed:
            split.members["inputs"] = memoryview(_NO_BYTES)
        validated = self._validate_rest(kind, media, split, origin)
        if packed and rows is not None:
            validated.inputs = msgspec.msgpack.decode(rows, type=bytes)
        filled = [name for name, elements in split.lists.items() if elements]
        if (validated.events is None) == (validated.inputs is None) or not filled:
            return validated, strict.body_steps(validated, inside)
        [name] = filled
        limit = strict.limit_of(kind)
        if len(split.lists[name]) > limit.steps:
            raise limit.exceeded(member_place(inside, name), MORE)
        strict.check_final(validated, inside)
        parts: list[Steps] = []
        done = 0
        for group in _blocks(media, split.lists[name]):
            await checkpoint()
            at = f"{member_place(inside, name)}[{done}]"
            if name == "events":
                await self._check_event(group[0], media, strict.event_fields, at, checkpoint)
            else:
                self._check_row(group, at)
            try:
                part_of = Origin(inside, done)
                parts.append(self._reader.part_of_steps(media, name, group, part_of))
            except MalformedBody as error:
                raise malformed(media, f"it cannot be parsed at {at}") from error
            done += len(group)
        return validated, strict.add_options(
            validated, await _concatenate(parts, checkpoint), inside
        )

    async def _split_object(
        self,
        document: bytes | memoryview,
        media: Media,
        limits: ObjectLimits,
        inside: str,
        checkpoint: Checkpoint,
        long: Collection[str] = (),
    ) -> SplitObject:
        """Split an object, and reject long members.

        Args:
            long: members that may be long, besides rows in MessagePack.
        """
        split = await split_object(document, media, limits, inside, checkpoint)
        for name, value in split.members.items():
            packed = name == "inputs" and media is Media.MSGPACK and value[0] in _IS_BYTES
            if len(value) < LONG_BYTES or name in long or packed:
                continue
            expected = f"a value of less than {LONG_BYTES} bytes"
            if name not in limits.members:
                expected = f"one of the members {', '.join(limits.members)}"
            elif name in limits.lists:
                expected = "a list"
            raise invalid(member_place(inside, name), expected, f"{len(value)} bytes")
        return split

    def _validate_rest(self, kind: type[B], media: Media, split: SplitObject, origin: Origin) -> B:
        """Validate an object with empty lists in place of those that were split."""
        lists = dict.fromkeys(split.lists, memoryview(_EMPTY[media]))
        document = encoded_object(media, {**split.members, **lists})
        return self._reader.strict.validate(kind, media, document, origin)

    async def _check_event(
        self,
        event: memoryview,
        media: Media,
        fields: Sequence[str],
        at: str,
        checkpoint: Checkpoint,
    ) -> None:
        """Reject a long event with more bytes, members or values than any valid event has."""
        if len(event) < LONG_BYTES:
            return
        if len(event) > MAX_EVENT_BYTES:
            raise invalid(at, f"an event of at most {MAX_EVENT_BYTES} bytes", f"{len(event)} bytes")
        await self._split_object(
            event, media, ObjectLimits(fields, [], 1, _no_list), at, checkpoint
        )

    def _check_row(self, group: Sequence[memoryview], at: str) -> None:
        """Reject a long row of the wrong width, or with values that are not numbers."""
        if len(group[0]) < LONG_BYTES:
            return
        text = bytes(group[0]).lstrip(b" \t\r\n")
        values = text.count(b",") + 1
        if text[:1] == b"[" and values != self._reader.served.input_features:
            raise self._reader.strict.wrong_width(at, str(values))
        if text[:1] == b"{" or text.count(b"[") > 1:
            raise invalid(at, "a list of numbers", "objects or lists")


def _stream_of(split: SplitObject, media: Media, at: str) -> str | None:
    """The stream that an item names; None if it names none."""
    value = split.members.get("stream")
    name = None if value is None else loads(media, bytes(value))
    return stream_name(name, at) if isinstance(name, str) else None


def _blocks(media: Media, elements: Elements) -> Iterator[list[memoryview]]:
    """Consecutive elements in blocks; an element of `LONG_BYTES` or more is alone."""
    size = BLOCK_BYTES if media is Media.JSON else 4 * BLOCK_BYTES
    size = min(size, LONG_BYTES)
    return group_by_size(media, elements, size)


def _no_list(at: str) -> CarryError:
    return invalid(at, "fewer values", MORE)


def _part_values(media: Media, part: StatePart, value: memoryview) -> Any:
    """The nested lists of a part of the state, which have its shape."""
    kind: Any = float | int
    for size in reversed(part.shape):
        kind = Annotated[list[kind], msgspec.Meta(min_length=size, max_length=size)]
    text = bytes(value)
    fits = media is Media.MSGPACK or text.count(b",") == max(0, part.size - 1)
    try:
        if not fits:
            raise msgspec.ValidationError("another number of values")
        decode = msgspec.msgpack.decode if media is Media.MSGPACK else msgspec.json.decode
        return decode(text, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        expected = f"numbers in the shape {list(part.shape)} for part {part.name!r}"
        raise invalid("state", expected, str(error)) from error


async def _concatenate(parts: Sequence[Steps], checkpoint: Checkpoint) -> Steps:
    """Concatenate consecutive steps."""
    length = 0
    resets: list[int] = []
    for part in parts:
        resets += [length + reset for reset in part.resets]
        length += part.length
    rows = [part.rows for part in parts if part.rows is not None]
    if rows:
        return Steps(Feed.INPUTS, length, rows=np.concatenate(rows), resets=tuple(resets))
    columns = [part.columns for part in parts if part.columns is not None]
    together = columns[0]
    if len(columns) > 1:
        present: dict[str, NDArray[np.bool_]] = {}
        values: dict[str, NDArray[Any]] = {}
        for name in together.values:
            await checkpoint()
            present[name], values[name] = concatenate_field(columns, name)
        together = EventColumns(length, present, values)
    return Steps(Feed.EVENTS, length, columns=together, resets=tuple(resets))
