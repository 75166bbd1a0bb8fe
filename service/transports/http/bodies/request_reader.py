"""From bytes to the values of the pipeline, for one model.

A body becomes chunks, sequences or what a forecast is asked for, checked as far as it can be
without a stream. Nothing is looked up in a store here and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from models.events.columns import EventColumns, columns_from_events
from service.core.delivery import chunk_digest, new_nonce
from service.core.errors import CarryError, ChunksUnsupported, InvalidInput
from service.core.values import Chunk, ForecastRequest, Precondition, Steps, StreamKey
from service.pipeline.served_model import ServedModel
from service.transports.http.bodies.body_types import (
    ChunkBody,
    ForecastBody,
    ItemBody,
    ModelBodies,
    coming_schema,
    validate,
)
from service.transports.http.bodies.duplicates import find_duplicates
from service.transports.http.bodies.fast_decoder import PlainBodies, PlainChunk, count_parts
from service.transports.http.bodies.json_rows import RowsBody
from service.transports.http.bodies.strict_validator import StrictSteps
from service.transports.http.bodies.validation_errors import Origin
from service.transports.http.limits import ApiLimits
from service.transports.http.media import Encoded, Media, encoded_list, encoded_object, loads
from service.transports.http.replies.schemas import ForkBody, StateBody
from service.transports.http.request_fields import parse_if_match, stream_name


class RequestReader:
    """Reads the requests for one model.

    Args:
        nonce: gives the random bytes of an append.

    Attributes:
        bodies: the strict types of its bodies.
        strict: reads the steps of bodies that these accept.
        limits: limits of the API.
    """

    def __init__(
        self, served: ServedModel, limits: ApiLimits, nonce: Callable[[], bytes] = new_nonce
    ):
        limits = limits.of_model(served.chunk_limit)
        self.bodies = ModelBodies(served, limits)
        self.served = served
        self._plain = PlainBodies(served, limits)
        self.strict = StrictSteps(served, limits)
        self.limits = limits
        self._nonce = nonce
        self._name = served.name
        self._schema = served.events
        self._whole = served.artifact.spec.chunking == "whole"

    def check_takes_chunks(self) -> None:
        """Refuse what a model without streams has no use for.

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
        self, body: bytes, media: Media, stream: str, precondition: Precondition | None
    ) -> Chunk:
        """The one chunk of a body.

        Raises:
            ChunksUnsupported, FinalUnsupported, MalformedBody, InvalidInput, ChunkTooLong: with
                the fact `stream`.
        """
        plain = self.plain_chunk(body, media, stream, precondition)
        if plain is not None:
            return plain
        try:
            self.check_takes_chunks()
            found = self.bodies.validate(self.bodies.types[media].chunk, media, body)
            steps = self.strict.of_chunk(found, "")
        except CarryError as error:
            raise with_stream(stream, error) from error
        return self.build_chunk(found, steps, stream, precondition, final=found.final)

    def plain_chunk(
        self,
        body: bytes,
        media: Media,
        stream: str,
        precondition: Precondition | None = None,
    ) -> Chunk | None:
        """The one chunk of a body that is plainly good; None where `chunk` has to say."""
        if self._whole:
            return None
        plain = self._plain.chunk(media, body)
        return None if plain is None else self.build_chunk(*plain, stream, precondition)

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
        plain = self._plain.chunk(media, body)
        if plain is not None:
            return plain[1]
        found = self.bodies.validate(self.bodies.types[media].sequence, media, body, origin)
        return self.strict.of_part(found, origin)

    def items(self, body: bytes, media: Media, first: int = 0) -> list[Chunk | CarryError]:
        """The chunks of a request for many streams, or what is wrong with each.

        Args:
            first: index in the request of the body's first item.

        An item's error has the fact `stream` where the item names one.

        Raises:
            MalformedBody, InvalidInput: the body as a whole is not a request.
            ChunksUnsupported
        """
        self.check_takes_chunks()
        plain = self._plain.items(media, body)
        if plain is not None and all(item.if_match is None for item, _ in plain):
            return [self.build_chunk(item, steps, item.stream, None) for item, steps in plain]
        types, origin = self.bodies.types[media], Origin(first=first)
        self._check_count("chunks", count_parts(media, body))
        try:
            many = self.bodies.validate(types.many, media, body, origin, duplicates=True)
            found: list[Any] = list(many.chunks)
        except InvalidInput as error:
            found = self._item_values(body, media, error)
        self._check_count("chunks", len(found))
        items = [self._item(value, media, f"chunks[{at}]") for at, value in enumerate(found, first)]
        if any(isinstance(item, Chunk) for item in items):
            for at, duplicate in find_duplicates(media, body, "chunks", origin).items():
                items[at] = _with_item_stream(duplicate, items[at])
        return items

    def _check_count(self, name: str, count: int) -> None:
        """Reject more items or sequences than a request may have."""
        if count > self.limits.max_items:
            raise too_many_elements(name, self.limits.max_items, count)

    def _item_values(self, body: bytes, media: Media, error: InvalidInput) -> list[Any]:
        """The items as plain values, where it is not the body as a whole that is wrong."""
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
                value = self.bodies.validate_part(
                    self.bodies.types[media].item, media, value, inside
                )
            precondition = None
            if value.if_match is not None:
                precondition = parse_if_match(value.if_match, f"{inside}.if_match", bare=True)
            steps = self.strict.of_chunk(value, inside)
            return self.build_chunk(value, steps, value.stream, precondition, final=value.final)
        except CarryError as error:
            return item_error(error, stream)

    def sequences(self, body: bytes, media: Media, first: int = 0) -> list[Steps]:
        """The whole sequences of a predict request.

        Args:
            first: index in the request of the body's first sequence.

        Raises:
            MalformedBody, InvalidInput, ChunkTooLong
        """
        plain = self._plain.sequences(media, body)
        if plain is not None:
            return plain
        self._check_count("sequences", count_parts(media, body))
        kind = self.bodies.types[media].predict
        found = self.bodies.validate(kind, media, body, Origin(first=first)).sequences
        self._check_count("sequences", len(found))
        return self.strict.of_sequences(found, first)

    def forecast_request(self, body: bytes, media: Media, stream: str) -> ForecastRequest:
        """How a body asks a decoder to look ahead.

        Raises:
            ForecastUnsupported, MalformedBody, InvalidInput: with the fact `stream`.
        """
        try:
            return self.build_forecast_request(
                self.bodies.validate(self.forecast_body_type(media), media, body)
            )
        except CarryError as error:
            raise with_stream(stream, error) from error

    def state(self, body: bytes, media: Media) -> StateBody:
        """A state to restore.

        Raises:
            MalformedBody, InvalidInput
        """
        return validate(StateBody, media, body)

    def fork(self, body: bytes, media: Media) -> ForkBody:
        """The name of the new stream of a fork.

        Raises:
            MalformedBody, InvalidInput
        """
        return validate(ForkBody, media, body)

    def forecast_body_type(self, media: Media) -> type[ForecastBody]:
        """The type that validates the body of a forecast.

        Raises:
            ForecastUnsupported
        """
        self.served.require_decoder()
        kind = self.bodies.types[media].forecast
        if kind is None:
            raise TypeError("expected a body type of a model with a decoder")
        return kind

    def build_forecast_request(self, found: ForecastBody) -> ForecastRequest:
        """Build the forecast request of a validated body.

        Raises:
            InvalidInput
        """
        most = self.limits.max_forecast_samples
        if found.samples > most:
            raise InvalidInput(
                f"samples: expected at most {most}, got {found.samples}",
                at="samples",
                expected=most,
                got=found.samples,
            )
        return ForecastRequest(
            found.horizon, found.samples, found.seed, self._future(found), found.position
        )

    def _future(self, body: ForecastBody) -> EventColumns | None:
        schema = coming_schema(self.served)
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
        body: ChunkBody | PlainChunk | RowsBody,
        steps: Steps,
        stream: str,
        precondition: Precondition | None,
        *,
        final: bool = False,
    ) -> Chunk:
        """Build the chunk of a body and its steps."""
        nonce = self._nonce() if body.position is None else b""
        return Chunk(
            StreamKey(self._name, stream),
            steps,
            chunk_digest(self._schema, steps, nonce, final=final),
            body.position,
            None if body.epoch is None else bytes.fromhex(body.epoch),
            precondition,
            final,
        )


def too_many_elements(at: str, most: int, got: int | str) -> InvalidInput:
    """The error for a list with too many elements."""
    return InvalidInput(
        f"{at}: expected at most {most} items, got {got}", at=at, expected=most, got=got
    )


def item_error(error: CarryError, stream: str | None) -> CarryError:
    """The error as the outcome of an item, without its traceback and causes: a thousand may be held
    at a time, and each would keep the item's values in memory."""
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
