"""Strict validator: from the bytes of a body to values, or the error that says what is wrong where.

It accepts every valid body, and it alone makes the errors: the fast decoder before it only decides
what is certainly valid. Errors name the place in the request, also for a part of a long body that
is validated on its own.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from msgspec.structs import replace
from pydantic import ValidationError

from models.errors import DataError
from models.events.columns import columns_from_events
from models.events.encode import check_rows
from models.events.parse import RESET, can_mark_resets
from service.codec.body_types import (
    ChunkBody,
    ForecastBody,
    ItemBody,
    ManyBody,
    SequenceBody,
    StepsBody,
    StrictBody,
    build_body_types,
    known_future_schema,
)
from service.codec.duplicates import find_duplicate
from service.codec.media import Media, loads, malformed
from service.codec.settings import RequestSettings
from service.codec.validation_errors import (
    BODY,
    Origin,
    Place,
    invalid_body,
    shown,
)
from service.core.errors import ChunkTooLong, FinalUnsupported, InvalidInput, ResetsUnsupported
from service.core.values import Feed, FloatRows, SequenceInput, Steps
from service.pipeline.served_model import ServedModel, invalid_data

NAMED_COLUMNS = 8
"""How many columns an error names before it says `...`."""

B = TypeVar("B", bound=StrictBody)


class Limit(NamedTuple):
    """A limit on steps, and what clients and operators know it as."""

    steps: int
    name: str

    def exceeded(self, at: str, got: int | str) -> ChunkTooLong:
        """The error for more steps than the limit."""
        return ChunkTooLong(
            f"{at}: expected at most {self.steps} steps ({self.name}), got {got}",
            at=at,
            expected=self.steps,
            got=got,
        )


@dataclass(frozen=True, slots=True)
class _Members:
    """The members that errors name, by place, in a body of one type.

    Attributes:
        body: those of the body itself.
        inner: those of a chunk or sequence within it.
        event: those of an event, or of the known future covariates of a step.
    """

    body: Sequence[str]
    inner: Sequence[str] = ()
    event: Sequence[str] = ()

    def __call__(self, at: Place) -> Sequence[str]:
        if "events" in at or "future" in at:
            return self.event
        return self.inner if at else self.body


def validate_body(
    kind: type[B],
    media: Media,
    body: bytes,
    origin: Origin = BODY,
    *,
    members: _Members | None = None,
    allow_duplicates: bool = False,
) -> B:
    """Validate a body, or a part of one.

    Args:
        origin: place of the part in the request.
        members: those that errors name; by default those of the type.
        allow_duplicates: leaves it to the caller to reject duplicate members.

    Raises:
        MalformedBody, InvalidInput
    """
    try:
        if media is Media.JSON:
            validated = kind.model_validate_json(body)
        else:
            validated = kind.model_validate(loads(media, body))
    except ValidationError as error:
        known = members or _Members(list(kind.model_fields))
        raise invalid_body(error, media, known, origin) from error
    try:
        duplicate = None if allow_duplicates else find_duplicate(media, body, origin)
    except RecursionError as error:
        # in Python 3.11 at a depth that the other decoders accept
        raise malformed(media, str(error)) from error
    if duplicate is not None:
        raise duplicate
    return validated


class StrictValidator:
    """Validates the bodies of one model and reads their steps.

    Args:
        limits: those of the model.

    Attributes:
        types: the types of its bodies.
        event_fields: names of the fields of an event.
        future_fields: names of the known future covariates of a step.
    """

    def __init__(self, served: ServedModel, limits: RequestSettings):
        self.types = {media: build_body_types(served, limits, media) for media in Media}
        self._served = served
        self._columns = served.artifact.spec.columns
        self._most_chunk = Limit(limits.max_chunk_steps, "max_chunk_steps")
        self._most_predict = most = Limit(limits.max_predict_steps, "max_predict_steps")
        limit = served.chunk_limit
        self._most_sequence = most if limit is None else min(most, Limit(limit, "max_chunk_steps"))
        future = known_future_schema(served)
        self.event_fields = [field.name for field in served.events.fields] if served.events else []
        self._marks = served.events is not None and can_mark_resets(served.events)
        if self._marks:
            self.event_fields.append(RESET)
        self.future_fields = [field.name for field in future.fields] if future else []

    def validate(
        self,
        kind: type[B],
        media: Media,
        body: bytes,
        origin: Origin = BODY,
        *,
        allow_duplicates: bool = False,
    ) -> B:
        """Validate a body of this model; see `validate_body`.

        Raises:
            MalformedBody, InvalidInput
        """
        members = self._members(kind)
        return validate_body(
            kind, media, body, origin, members=members, allow_duplicates=allow_duplicates
        )

    def validate_value(self, kind: type[B], media: Media, value: Any, inside: str) -> B:
        """Validate a part of a body that is parsed already.

        Args:
            inside: place of the part, with which the places in errors begin.

        Raises:
            InvalidInput
        """
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            raise invalid_body(error, media, self._members(kind), Origin(inside)) from error

    def _members(self, kind: type[StrictBody]) -> _Members:
        fields = self.future_fields if issubclass(kind, ForecastBody) else self.event_fields
        inner = ItemBody if issubclass(kind, ManyBody) else SequenceBody
        return _Members(list(kind.model_fields), list(inner.model_fields), fields)

    def chunk_steps(self, body: ChunkBody, inside: str) -> Steps:
        """The steps of a chunk; a final one may have none.

        Args:
            inside: where the chunk is in its body, as `chunks[2]`; empty for the body itself.

        Raises:
            FinalUnsupported, ResetsUnsupported, InvalidInput, ChunkTooLong
        """
        self.check_final(body, inside)
        least = 0 if body.final else 1
        steps = self._read(body, Origin(inside), self._most_chunk, least)
        return self.add_options(body, steps, inside)

    def sequence_steps(self, body: StepsBody, inside: str) -> Steps:
        """The steps of one sequence.

        Raises:
            InvalidInput, ChunkTooLong
        """
        return self.add_options(body, self._read(body, Origin(inside), self._most_sequence), inside)

    def all_sequences(self, bodies: Sequence[SequenceBody], first: int = 0) -> list[SequenceInput]:
        """The sequences of a request.

        Args:
            first: index in the request of the first sequence.

        Raises:
            InvalidInput, ChunkTooLong
        """
        places = [f"sequences[{at}]" for at in range(first, first + len(bodies))]
        steps = [
            self.sequence_steps(body, inside) for body, inside in zip(bodies, places, strict=True)
        ]
        self.check_total(sum(sequence.length for sequence in steps))
        return [
            SequenceInput(own, self.token(body, inside))
            for own, body, inside in zip(steps, bodies, places, strict=True)
        ]

    def token(self, body: SequenceBody, inside: str) -> bytes | None:
        """The bytes of a sequence's state token.

        Raises:
            InvalidInput: it is not base64.
        """
        token: str | bytes | None = body.state_token
        if not isinstance(token, str):
            return token
        decoded = decode_token(token)
        if decoded is None:
            at, expected = f"{inside}.state_token", "a token in base64, as it was returned"
            raise InvalidInput(f"{at}: expected {expected}", at=at, expected=expected)
        return decoded

    def body_steps(self, body: StepsBody, inside: str) -> Steps:
        """The steps of a chunk or of a sequence, depending on the type of the body."""
        if isinstance(body, ChunkBody):
            return self.chunk_steps(body, inside)
        return self.sequence_steps(body, inside)

    def part_steps(self, body: StepsBody, origin: Origin) -> Steps:
        """Consecutive steps of a chunk or sequence.

        Raises:
            InvalidInput
        """
        return self._read(body, origin, self._most_predict)

    def check_total(self, steps: int) -> None:
        """Reject more steps than all sequences of a request may have together.

        Raises:
            ChunkTooLong
        """
        _check_count(steps, "sequences", self._most_predict)

    def limit_of(self, kind: type[StepsBody]) -> Limit:
        """The limit on the steps of a body of that type."""
        return self._most_chunk if issubclass(kind, ChunkBody) else self._most_sequence

    def check_final(self, body: StepsBody, inside: str) -> None:
        """Reject `final` if the model does not support it.

        Raises:
            FinalUnsupported
        """
        if isinstance(body, ChunkBody) and body.final and self._served.blocks is None:
            at = f"{inside}.final" if inside else "final"
            raise FinalUnsupported(
                f"{at}: expected none, since model {self._served.name!r} has no `blocks` and "
                "answers every event at once",
                at=at,
                expected="no `final`",
            )

    def add_options(self, body: StepsBody, steps: Steps, inside: str) -> Steps:
        """Add the options of a chunk or sequence: the rate of its alarms, and the resets of its
        member `resets` to those of its events.

        Raises:
            InvalidInput: an index is out of range or out of order, or the model has no such alarms.
            ResetsUnsupported: it is a chunk of a model whose streams cannot be reset.
        """
        if (rate := body.false_alarms_per_day) is not None:
            name = "false_alarms_per_day"
            self._served.check_alarm_rate(rate, f"{inside}.{name}" if inside else name)
            steps = replace(steps, false_alarms_per_day=rate)
        at = f"{inside}.resets" if inside else "resets"
        resets = body.resets or []
        before = -1
        for index, reset in enumerate(resets):
            if not before < reset < steps.length:
                raise _invalid_reset(f"{at}[{index}]", steps.length, reset)
            before = reset
        if resets:
            steps = replace(steps, resets=tuple(sorted({*resets, *steps.resets})))
        if steps.resets and isinstance(body, ChunkBody) and self._served.blocks is not None:
            raise ResetsUnsupported(
                f"{at}: expected none, since model {self._served.name!r} has `blocks`, whose "
                "windows would extend across a reset",
                at=at,
                expected="no resets",
            )
        return steps

    def _read(self, body: StepsBody, origin: Origin, most: Limit, least: int = 1) -> Steps:
        inside, first, _ = origin
        lead = f"{inside}." if inside else ""
        if (body.events is None) == (body.inputs is None):
            raise self._not_exactly_one(
                inside or "body", "both" if body.events is not None else "none"
            )
        schema = self._served.events
        if body.events is not None and schema is not None:
            count = len(body.events)
            _check_count(count, f"{lead}events", most, least)
            columns = columns_from_events(schema, body.events)
            marked: tuple[int, ...] = ()
            if self._marks:
                marked = tuple(at for at, event in enumerate(body.events) if event.get(RESET))
            return Steps(Feed.EVENTS, count, columns=columns, resets=marked)
        at = f"{lead}inputs"
        rows = (
            self._rows_of_bytes(body.inputs, at)
            if isinstance(body.inputs, bytes)
            else self._rows_of_lists(body.inputs, at, most, first)
        )
        _check_count(len(rows), at, most, least)
        try:
            check_rows(self._columns, rows)
        except DataError as error:
            raise self._invalid_rows(at, error, body.inputs, first) from error
        return Steps(Feed.INPUTS, len(rows), rows=rows)

    def _rows_of_lists(
        self, values: list[list[float]], at: str, most: Limit, first: int
    ) -> FloatRows:
        _check_count(len(values), at, most, least=0)
        wide = len(self._columns)
        for index, row in enumerate(values):
            if len(row) != wide:
                raise self.wrong_width(f"{at}[{index + first}]", str(len(row)))
        with np.errstate(over="ignore"):
            return np.array(values, np.float64).astype(np.float32).reshape(-1, wide)

    def _rows_of_bytes(self, values: bytes, at: str) -> FloatRows:
        wide = 4 * len(self._columns)
        if len(values) % wide:
            got = f"{len(values)} bytes, no multiple of {wide} (4 for each value)"
            raise self.wrong_width(at, got)
        return np.frombuffer(values, "<f4").astype(np.float32, copy=False).reshape(-1, wide // 4)

    def _invalid_rows(
        self, at: str, error: DataError, values: bytes | list[list[float]], first: int
    ) -> InvalidInput:
        """The error for one value of a row, such as `inputs[3][0]`, with the name of its column."""
        if error.index is None or error.field is None:
            return invalid_data(at, error)
        column = [column.name for column in self._columns].index(error.field)
        place = f"{at}[{error.index + first}][{column}]"
        # As it was sent: after the cast, what overflowed is infinite.
        got = error.got if isinstance(values, bytes) else shown(values[error.index][column])
        return InvalidInput(
            f"{place} ({error.field}): expected {error.expected}, got {got}",
            at=place,
            column=error.field,
            expected=error.expected,
            got=got,
        )

    def wrong_width(self, at: str, got: str) -> InvalidInput:
        """The error for a row of the wrong width."""
        names = [column.name for column in self._columns]
        more = ", ..." if len(names) > NAMED_COLUMNS else ""
        listed = ", ".join(names[:NAMED_COLUMNS]) + more
        expected = f"rows of {len(names)} values ({listed})"
        return InvalidInput(
            f"{at}: expected {expected}, got {got}", at=at, expected=expected, got=got
        )

    def _not_exactly_one(self, at: str, got: str) -> InvalidInput:
        both = "exactly one of `events` and `inputs`"
        feeds = "`inputs`" if self._served.events is None else both
        return InvalidInput(f"{at}: expected {feeds}, got {got}", at=at, expected=feeds, got=got)


def decode_token(text: str) -> bytes | None:
    """The bytes of a state token in JSON; None if it is not base64."""
    try:
        return b64decode(text, validate=True)
    except ValueError:
        return None


def _invalid_reset(at: str, steps: int, got: int) -> InvalidInput:
    expected = f"ascending indexes from 0 to {steps - 1}, each once, of the {steps} events or rows"
    return InvalidInput(f"{at}: expected {expected}, got {got}", at=at, expected=expected, got=got)


def _check_count(count: int, at: str, most: Limit, least: int = 1) -> None:
    if count < least:
        expected = "at least one step"
        raise InvalidInput(f"{at}: expected {expected}, got none", at=at, expected=expected, got=0)
    if count > most.steps:
        raise most.exceeded(at, count)
