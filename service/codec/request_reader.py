"""Reader of request bodies: from bytes to the values of the pipeline, for one model.

Every transport reads its bodies here: rows in JSON, in the usual form, by simdjson; everything else
by `decoding` into the types of `body_types`; and the steps by `steps`. All that does not depend on
a stream's state is checked. This module does not access the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from models.artifact.artifact import Artifact
from models.events.columns import EventColumns
from models.events.reader import EventReader
from models.spec.stream_name import is_stream_name
from service.codec.body_types import (
    AliasBody,
    ChunkBody,
    ForecastBody,
    FrameBody,
    ItemBody,
    SequenceBody,
    StateBody,
    build_body_types,
    known_future_schema,
)
from service.codec.decoding import (
    decode,
    decode_element,
    detach_error,
    invalid,
    load_document,
    load_json,
)
from service.codec.field_rules import parse_if_match, stream_name
from service.codec.frames import Frame, read_envelope, stream_of_item
from service.codec.json_rows import FRAME_MEMBERS, JsonRowsDecoder, RowsChunk
from service.codec.media import Media
from service.codec.settings import ModelLimits, RequestSettings
from service.codec.steps import StepsReader, check_count, member_place, read_columns
from service.core.delivery import chunk_digest, new_nonce
from service.core.errors import (
    CarryError,
    ChunksUnsupported,
    FinalUnsupported,
    InvalidInput,
)
from service.core.values import (
    Chunk,
    ForecastRequest,
    Precondition,
    SequenceInput,
    Steps,
    StreamKey,
)


class RequestReader:
    """Reads the requests for one model.

    Args:
        nonce: returns the random bytes of a chunk without a position.

    Attributes:
        limits: those of this model.
        steps: reads the steps of chunks and sequences.
        json_rows: reads rows in JSON; not the codes of categories in them.
        types: of the bodies.
    """

    def __init__(
        self,
        artifact: Artifact,
        settings: RequestSettings,
        nonce: Callable[[], bytes] = new_nonce,
    ):
        spec = artifact.spec
        self.limits = limits = ModelLimits.of(settings, spec.chunk_limit)
        self._nonce = nonce
        self._name = spec.name
        self._schema = spec.events
        self._is_whole = spec.chunking == "whole"
        self._has_blocks = spec.blocks is not None
        events = None
        if self._schema is not None:
            events = EventReader(self._schema, marks_resets=True)
        future = known_future_schema(spec)
        self._future = None if future is None else EventReader(future)
        self.steps = StepsReader(spec, events)
        self.json_rows = JsonRowsDecoder(spec.input_features, limits.chunk.steps)
        self.types = {
            media: build_body_types(spec, limits, media, events, self._future) for media in Media
        }
        self._state_bytes = {
            # a number takes at most 9 bytes, the header of a list 5
            part.name: 16 + (9 + 5) * part.size
            for part in artifact.state.parts
        }

    def key(self, stream: str) -> StreamKey:
        """The key of a stream of the model."""
        return StreamKey(self._name, stream)

    def check_accepts_chunks(self) -> None:
        """Reject chunks for a model that needs whole sequences.

        Raises:
            ChunksUnsupported
        """
        if self._is_whole:
            raise ChunksUnsupported(
                f"model {self._name!r} reads its sequences from both ends: expected whole ones, "
                "sent to its address /predict",
                expected="/predict",
            )

    def chunk(
        self, body: bytes, media: Media, key: StreamKey, precondition: Precondition | None = None
    ) -> Chunk:
        """The one chunk of a body.

        Raises:
            ChunksUnsupported, FinalUnsupported, ResetsUnsupported, MalformedBody, InvalidInput,
                ChunkTooLong: with the fact `stream`.
        """
        try:
            if media is Media.JSON and not self._is_whole:
                rows = self.json_rows.decode(body)
                if rows is not None:
                    if self.steps.has_codes:
                        self.steps.check_codes(rows.steps)
                    return self.build_chunk(
                        rows.position, rows.epoch, rows.steps, key, precondition
                    )
            self.check_accepts_chunks()
            document = load_json(body) if media is Media.JSON else body
            decoded = decode_element(media, document, self.types[media].chunk)
            return self._chunk_of(decoded, "", key, precondition)
        except CarryError as error:
            with_stream(key.stream, error)
            raise

    def frame(self, body: bytes, media: Media, stream: str | None) -> Frame:
        """The chunk of a live socket's frame, or its error.

        Args:
            stream: that of the socket; None if each frame names its own.
        """
        try:
            self.check_accepts_chunks()
            decoded: FrameBody | RowsChunk | None = None
            if media is Media.JSON:
                decoded = self.json_rows.decode(body, FRAME_MEMBERS)
            if decoded is None:
                decoded = decode(media, body, self.types[media].frame)
        except CarryError as error:
            frame_id, name = read_envelope(media, body)
            name = stream or name
            return Frame(frame_id, name, item_error(error, name))
        name = decoded.stream
        try:
            if stream is None:
                if name is None:
                    raise invalid("stream", "a string", "none")
                stream = stream_name(name)
            elif name is not None:
                raise invalid("stream", "none, since the address names the stream", repr(name))
            if isinstance(decoded, FrameBody):
                return Frame(decoded.id, stream, self._chunk_of_item(decoded, "", stream))
            if self.steps.has_codes:
                self.steps.check_codes(decoded.steps)
            key, steps = self.key(stream), decoded.steps
            chunk = self.build_chunk(decoded.position, decoded.epoch, steps, key, None)
            return Frame(decoded.id, stream, chunk)
        except CarryError as error:
            return Frame(decoded.id, stream, item_error(error, stream))

    def items(self, body: bytes, media: Media) -> list[Chunk | CarryError]:
        """The chunks of a request for many streams, or the error of each.

        An item's error has the fact `stream` if the item names one.

        Raises:
            MalformedBody, InvalidInput: the body as a whole is not a request.
            ChunksUnsupported
        """
        self.check_accepts_chunks()
        if media is Media.JSON:
            rows = self.json_rows.decode_items(body, self.limits.items)
            if rows is not None and not self.steps.has_codes:
                return [
                    self.build_chunk(
                        item.position, item.epoch, item.steps, self.key(item.stream or ""), None
                    )
                    for item in rows
                ]
        types, document = self.types[media], load_document(media, body)
        try:
            decoded = decode_element(media, document, types.items).chunks
        except CarryError:
            # perhaps an item alone is invalid
            elements = decode_element(media, document, types.undecoded_items).chunks
            return [
                self._undecoded_item(element, media, f"chunks[{at}]")
                for at, element in enumerate(elements)
            ]
        return self._chunks_of_many(decoded) or [
            self._item(item, f"chunks[{at}]") for at, item in enumerate(decoded)
        ]

    def _chunks_of_many(self, items: Sequence[ItemBody]) -> list[Chunk | CarryError] | None:
        """The chunks of valid items without options, read together; None if one is not."""
        for item in items:
            if (
                item.resets is not None
                or item.false_alarms_per_day is not None
                or item.if_match is not None
                or item.final
                or item.dry_run
                or not is_stream_name(item.stream)
            ):
                return None
        steps = self.steps.read_many(items, self.limits.chunk)
        if steps is None:
            return None
        return [
            self.build_chunk(item.position, item.epoch, own, self.key(item.stream), None)
            for item, own in zip(items, steps, strict=True)
        ]

    def _undecoded_item(self, element: Any, media: Media, inside: str) -> Chunk | CarryError:
        try:
            item = decode_element(media, element, self.types[media].item, inside)
        except CarryError as error:
            return item_error(error, stream_of_item(media, element))
        return self._item(item, inside)

    def _item(self, item: ItemBody, inside: str) -> Chunk | CarryError:
        stream: str | None = None
        try:
            stream = stream_name(item.stream, f"{inside}.stream")
            return self._chunk_of_item(item, inside, stream)
        except CarryError as error:
            return item_error(error, stream)

    def _chunk_of_item(self, item: ItemBody | FrameBody, inside: str, stream: str) -> Chunk:
        precondition = None
        if item.if_match is not None:
            at = member_place(inside, "if_match")
            precondition = parse_if_match(item.if_match, at, bare=True)
        return self._chunk_of(item, inside, self.key(stream), precondition)

    def sequences(self, body: bytes, media: Media) -> list[SequenceInput]:
        """The sequences of a predict request.

        Raises:
            MalformedBody, InvalidInput, ChunkTooLong
        """
        bodies = decode(media, body, self.types[media].predict).sequences
        steps = self.steps.read_many(bodies, self.limits.sequence) or [
            self.steps.read(sequence, f"sequences[{at}]", self.limits.sequence)
            for at, sequence in enumerate(bodies)
        ]
        read = [
            self._sequence(sequence, own, f"sequences[{at}]")
            for at, (sequence, own) in enumerate(zip(bodies, steps, strict=True))
        ]
        self.check_total(read)
        return read

    def _sequence(self, body: SequenceBody, steps: Steps, inside: str) -> SequenceInput:
        if body.resets is not None or body.false_alarms_per_day is not None:
            steps = self.steps.add_options(
                steps, inside, body.resets, body.false_alarms_per_day, is_chunk=False
            )
        return SequenceInput(steps, body.state_token)

    def check_total(self, sequences: Sequence[SequenceInput]) -> None:
        """Reject a request with no sequence, or with more steps than all may have together.

        Raises:
            InvalidInput, ChunkTooLong
        """
        steps = sum([sequence.steps.length for sequence in sequences])
        check_count(steps, "sequences", self.limits.predict)

    def forecast_request(self, body: bytes, media: Media, stream: str) -> ForecastRequest:
        """The forecast that a body asks for, of a model with a decoder.

        Raises:
            MalformedBody, InvalidInput: with the fact `stream`.
        """
        try:
            decoded = decode(media, body, self.types[media].forecast)
            max_samples = self.limits.samples
            if decoded.samples > max_samples:
                raise InvalidInput(
                    f"samples: expected at most {max_samples}, got {decoded.samples}",
                    at="samples",
                    expected=max_samples,
                    got=decoded.samples,
                )
            return ForecastRequest(
                decoded.horizon,
                decoded.samples,
                decoded.seed,
                self._future_columns(decoded),
                decoded.position,
            )
        except CarryError as error:
            with_stream(stream, error)
            raise

    def _future_columns(self, body: ForecastBody) -> EventColumns | None:
        if body.future is None or self._future is None:
            return None
        if len(body.future) != body.horizon:
            expected = f"{body.horizon} steps, as many as `horizon`"
            raise InvalidInput(
                f"future: expected {expected}, got {len(body.future)}",
                at="future",
                expected=body.horizon,
                got=len(body.future),
            )
        return read_columns(self._future, body.future, "future").columns

    def state(self, body: bytes, media: Media) -> StateBody:
        """A state to restore.

        Raises:
            MalformedBody, InvalidInput
        """
        decoded = decode(media, body, self.types[media].state)
        if media is Media.MSGPACK:
            decoded.state = {name: self._part(name, raw) for name, raw in decoded.state.items()}
        return decoded

    def _part(self, name: str, raw: msgspec.Raw) -> Any:
        """The values of a part of a state in MessagePack, where a byte can be an object."""
        max_bytes, size = self._state_bytes.get(name), len(memoryview(raw))
        if max_bytes is None:
            # reported with all other unknown parts
            return None
        if size > max_bytes:
            raise invalid(f"state.{name}", f"at most {max_bytes} bytes", f"{size} bytes")
        return decode_element(Media.MSGPACK, raw, Any, f"state.{name}")

    def alias(self, body: bytes, media: Media) -> AliasBody:
        """A change of the aliases.

        Raises:
            MalformedBody, InvalidInput
        """
        change = decode(media, body, AliasBody)
        if (change.version is None) != (change.action == "rollback"):
            expected = "a version" if change.version is None else "none for a rollback"
            raise invalid(
                "version", expected, "nothing" if change.version is None else change.version
            )
        if (change.share is None) != (change.action != "canary"):
            expected = "the share of a canary" if change.share is None else "none without a canary"
            raise invalid("share", expected, "nothing" if change.share is None else change.share)
        return change

    def _chunk_of(
        self,
        body: ChunkBody,
        inside: str,
        key: StreamKey,
        precondition: Precondition | None,
    ) -> Chunk:
        """The chunk of a decoded body.

        Args:
            inside: where the chunk is in its request, as `chunks[2]`; empty for the body itself.

        Raises:
            FinalUnsupported, ResetsUnsupported, InvalidInput, ChunkTooLong
        """
        if body.final:
            self._check_final(member_place(inside, "final"))
        steps = self.steps.read(body, inside, self.limits.chunk, 0 if body.final else 1)
        if body.resets is not None or body.false_alarms_per_day is not None or steps.resets:
            steps = self.steps.add_options(
                steps, inside, body.resets, body.false_alarms_per_day, is_chunk=True
            )
        return self.build_chunk(
            body.position,
            body.epoch,
            steps,
            key,
            precondition,
            final=body.final,
            dry_run=body.dry_run,
        )

    def _check_final(self, at: str) -> None:
        """Reject a final chunk if the model does not support it.

        Raises:
            FinalUnsupported
        """
        if not self._has_blocks:
            raise FinalUnsupported(
                f"{at}: expected none, since model {self._name!r} has no `blocks` and "
                "answers every event at once",
                at=at,
                expected="no `final`",
            )

    def build_chunk(
        self,
        position: int | None,
        epoch: str | None,
        steps: Steps,
        key: StreamKey,
        precondition: Precondition | None,
        *,
        final: bool = False,
        starts_over: bool = False,
        dry_run: bool = False,
    ) -> Chunk:
        """Build a chunk.

        Args:
            position: index of its first event; None to append.
            epoch: expected epoch of the stream, 16 hex digits.
        """
        nonce = self._nonce() if position is None else b""
        return Chunk(
            key,
            steps,
            chunk_digest(self._schema, steps, nonce, final=final),
            position,
            None if epoch is None else bytes.fromhex(epoch),
            precondition,
            final,
            starts_over,
            dry_run,
        )


def item_error(error: CarryError, stream: str | None) -> CarryError:
    """The error as the outcome of an item or a frame; a thousand may be in memory at a time."""
    error = detach_error(error)
    return error if stream is None else with_stream(stream, error)


def with_stream(stream: str, error: CarryError) -> CarryError:
    """Add the stream to the facts of an error."""
    error.facts = {**error.facts, "stream": stream}
    return error
