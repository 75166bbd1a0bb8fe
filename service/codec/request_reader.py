"""Reader of request bodies: from bytes to the values of the pipeline, for one model.

The fast decoder reads what is certainly valid, the strict validator the rest. Both check all that
does not depend on a stream's state. This module does not access the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from models.events.columns import EventColumns, columns_from_events
from service.codec.body_types import (
    ForecastBody,
    ForkBody,
    ItemBody,
    StateBody,
    known_future_schema,
)
from service.codec.duplicates import count_parts, find_duplicates
from service.codec.fast_decoder import FastDecoder
from service.codec.media import Encoded, Media, encoded_list, encoded_object, loads
from service.codec.settings import RequestSettings
from service.codec.strict_validator import StrictValidator, validate_body
from service.codec.validation_errors import BODY, Origin
from service.core.delivery import chunk_digest, new_nonce
from service.core.errors import CarryError, ChunksUnsupported, InvalidInput
from service.core.values import (
    Chunk,
    ForecastRequest,
    Precondition,
    SequenceInput,
    Steps,
    StreamKey,
)
from service.pipeline.served_model import ServedModel
from service.transports.v1.request_fields import parse_if_match, stream_name


class PlacedChunk(Protocol):
    """Where a chunk belongs in its stream, as a body or another transport says it."""

    @property
    def position(self) -> int | None:
        """Index of the first event; None to append."""

    @property
    def epoch(self) -> str | None:
        """Expected epoch of the stream, 16 hex digits."""


class RequestReader:
    """Reads the requests for one model.

    Args:
        nonce: returns the random bytes of a chunk without a position.

    Attributes:
        fast: decodes valid bodies.
        strict: validates all other bodies.
        limits: limits of the API for this model.
    """

    def __init__(
        self, served: ServedModel, limits: RequestSettings, nonce: Callable[[], bytes] = new_nonce
    ):
        limits = limits.of_model(served.chunk_limit)
        self.served = served
        self.fast = FastDecoder(served, limits)
        self.strict = StrictValidator(served, limits)
        self.limits = limits
        self._nonce = nonce
        self._name = served.name
        self._schema = served.events
        self._whole = served.artifact.spec.chunking == "whole"

    def key(self, stream: str) -> StreamKey:
        """The key of a stream of the model."""
        return StreamKey(self._name, stream)

    def check_accepts_chunks(self) -> None:
        """Reject chunks for a model that needs whole sequences.

        Raises:
            ChunksUnsupported
        """
        if self._whole:
            raise ChunksUnsupported(
                f"model {self._name!r} reads its sequences from both ends: expected whole ones, "
                "sent to its address /predict",
                expected="/predict",
            )

    def chunk(
        self,
        body: bytes,
        media: Media,
        stream: str,
        precondition: Precondition | None,
        origin: Origin = BODY,
    ) -> Chunk:
        """The one chunk of a body.

        Raises:
            ChunksUnsupported, FinalUnsupported, ResetsUnsupported, MalformedBody, InvalidInput,
                ChunkTooLong: with the fact `stream`.
        """
        key = self.key(stream)
        decoded = self.decode_chunk(body, media, key, precondition)
        if decoded is not None:
            return decoded
        try:
            self.check_accepts_chunks()
            validated = self.strict.validate(self.strict.types[media].chunk, media, body, origin)
            steps = self.strict.chunk_steps(validated, "")
        except CarryError as error:
            raise with_stream(stream, error) from error
        return self.build_chunk(
            validated, steps, key, precondition, final=validated.final, dry_run=validated.dry_run
        )

    def decode_chunk(
        self,
        body: bytes,
        media: Media,
        key: StreamKey,
        precondition: Precondition | None = None,
    ) -> Chunk | None:
        """The one chunk of a body, if the fast decoder reads it; otherwise None."""
        if self._whole:
            return None
        decoded = self.fast.decode_chunk(media, body)
        return None if decoded is None else self.build_chunk(*decoded, key, precondition)

    def part_of_steps(
        self, media: Media, name: str, elements: Sequence[Encoded], origin: Origin
    ) -> Steps:
        """Read consecutive elements of a list of events or rows.

        Args:
            name: `events` or `inputs`.
            origin: place of the chunk or sequence, and index of the first element.

        Raises:
            MalformedBody, InvalidInput
        """
        body = encoded_object(media, {name: encoded_list(media, elements)})
        decoded = self.fast.decode_chunk(media, body)
        if decoded is not None:
            return decoded[1]
        kind = self.strict.types[media].sequence
        return self.strict.part_steps(self.strict.validate(kind, media, body, origin), origin)

    def items(self, body: bytes, media: Media, first: int = 0) -> list[Chunk | CarryError]:
        """The chunks of a request for many streams, or what is wrong with each.

        Args:
            first: index in the request of the body's first item.

        An item's error has the fact `stream` if the item names one.

        Raises:
            MalformedBody, InvalidInput: the body as a whole is not a request.
            ChunksUnsupported
        """
        self.check_accepts_chunks()
        decoded = self.fast.decode_items(media, body)
        if decoded is not None and all(item.if_match is None for item, _ in decoded):
            return [
                self.build_chunk(item, steps, self.key(item.stream), None)
                for item, steps in decoded
            ]
        kind, origin = self.strict.types[media].many, Origin(first=first)
        self._check_count("chunks", count_parts(media, body))
        try:
            many = self.strict.validate(kind, media, body, origin, allow_duplicates=True)
            values: list[Any] = list(many.chunks)
        except InvalidInput as error:
            values = self._item_values(body, media, error)
        self._check_count("chunks", len(values))
        items = [
            self._item(value, media, f"chunks[{at}]") for at, value in enumerate(values, first)
        ]
        if any(isinstance(item, Chunk) for item in items):
            for at, duplicate in find_duplicates(media, body, "chunks", origin).items():
                items[at] = _with_item_stream(duplicate, items[at])
        return items

    def _check_count(self, name: str, count: int) -> None:
        """Reject more items or sequences than a request may have."""
        if count > self.limits.max_items:
            raise too_many_elements(name, self.limits.max_items, count)

    def _item_values(self, body: bytes, media: Media, error: InvalidInput) -> list[Any]:
        """The parsed items, if the error is in an item and not in the body as a whole."""
        values = loads(media, body)
        if not isinstance(values, dict) or not isinstance(values.get("chunks"), list):
            raise error
        if len(values) > 1:
            raise error
        items: list[Any] = values["chunks"]
        return items

    def _item(self, value: Any, media: Media, inside: str) -> Chunk | CarryError:
        stream: str | None = None
        try:
            name = value.stream if isinstance(value, ItemBody) else _name_in(value)
            if name is not None:
                stream = stream_name(name, f"{inside}.stream")
            if not isinstance(value, ItemBody):
                kind = self.strict.types[media].item
                value = self.strict.validate_value(kind, media, value, inside)
            precondition = None
            if value.if_match is not None:
                precondition = parse_if_match(value.if_match, f"{inside}.if_match", bare=True)
            steps = self.strict.chunk_steps(value, inside)
            key = self.key(value.stream)
            return self.build_chunk(
                value, steps, key, precondition, final=value.final, dry_run=value.dry_run
            )
        except CarryError as error:
            return item_error(error, stream)

    def sequences(self, body: bytes, media: Media, first: int = 0) -> list[SequenceInput]:
        """The sequences of a predict request.

        Args:
            first: index in the request of the body's first sequence.

        Raises:
            MalformedBody, InvalidInput, ChunkTooLong
        """
        decoded = self.fast.decode_sequences(media, body)
        if decoded is not None:
            return decoded
        self._check_count("sequences", count_parts(media, body))
        kind = self.strict.types[media].predict
        sequences = self.strict.validate(kind, media, body, Origin(first=first)).sequences
        self._check_count("sequences", len(sequences))
        return self.strict.all_sequences(sequences, first)

    def forecast_request(self, body: bytes, media: Media, stream: str) -> ForecastRequest:
        """The forecast that a body asks for.

        Raises:
            ForecastUnsupported, MalformedBody, InvalidInput: with the fact `stream`.
        """
        try:
            return self.build_forecast_request(
                self.strict.validate(self.forecast_body_type(media), media, body)
            )
        except CarryError as error:
            raise with_stream(stream, error) from error

    def state(self, body: bytes, media: Media) -> StateBody:
        """A state to restore.

        Raises:
            MalformedBody, InvalidInput
        """
        return validate_body(StateBody, media, body)

    def fork(self, body: bytes, media: Media) -> ForkBody:
        """The name of the new stream of a fork.

        Raises:
            MalformedBody, InvalidInput
        """
        return validate_body(ForkBody, media, body)

    def forecast_body_type(self, media: Media) -> type[ForecastBody]:
        """The type that validates the body of a forecast.

        Raises:
            ForecastUnsupported
        """
        self.served.require_decoder()
        kind = self.strict.types[media].forecast
        if kind is None:
            raise TypeError("expected a body type of a model with a decoder")
        return kind

    def build_forecast_request(self, body: ForecastBody) -> ForecastRequest:
        """Build the forecast request of a validated body.

        Raises:
            InvalidInput
        """
        most = self.limits.max_forecast_samples
        if body.samples > most:
            raise InvalidInput(
                f"samples: expected at most {most}, got {body.samples}",
                at="samples",
                expected=most,
                got=body.samples,
            )
        return ForecastRequest(
            body.horizon, body.samples, body.seed, self._future(body), body.position
        )

    def _future(self, body: ForecastBody) -> EventColumns | None:
        schema = known_future_schema(self.served)
        if body.future is None or schema is None:
            return None
        if len(body.future) != body.horizon:
            expected = f"{body.horizon} steps, as many as `horizon`"
            raise InvalidInput(
                f"future: expected {expected}, got {len(body.future)}",
                at="future",
                expected=body.horizon,
                got=len(body.future),
            )
        return columns_from_events(schema, body.future)

    def build_chunk(
        self,
        body: PlacedChunk,
        steps: Steps,
        key: StreamKey,
        precondition: Precondition | None,
        *,
        final: bool = False,
        dry_run: bool = False,
    ) -> Chunk:
        """Build the chunk of a body and its steps."""
        nonce = self._nonce() if body.position is None else b""
        return Chunk(
            key,
            steps,
            chunk_digest(self._schema, steps, nonce, final=final),
            body.position,
            None if body.epoch is None else bytes.fromhex(body.epoch),
            precondition,
            final,
            dry_run=dry_run,
        )


def too_many_elements(at: str, most: int, got: int | str) -> InvalidInput:
    """The error for a list with too many elements."""
    return InvalidInput(
        f"{at}: expected at most {most} items, got {got}", at=at, expected=most, got=got
    )


def item_error(error: CarryError, stream: str | None) -> CarryError:
    """The error as the outcome of an item, without its traceback and causes: a thousand may be in
    memory at a time, and each would keep the item's values."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error if stream is None else with_stream(stream, error)


def _with_item_stream(error: CarryError, item: Chunk | CarryError) -> CarryError:
    """Add the stream of an item to its error."""
    stream = item.key.stream if isinstance(item, Chunk) else item.facts.get("stream")
    return error if stream is None else with_stream(stream, error)


def _name_in(value: Any) -> str | None:
    name = value.get("stream") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def with_stream(stream: str, error: CarryError) -> CarryError:
    """Add the stream to the facts of an error."""
    error.facts = {**error.facts, "stream": stream}
    return error
