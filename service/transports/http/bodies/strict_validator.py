"""From checked bodies to steps, value by value, saying what is wrong and where.

The strict way behind the fast one of `plain.py`: it reads what that left, and makes the errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.errors import DataError
from models.events.columns import columns_from_events
from models.events.encode import check_rows
from service.core.errors import ChunkTooLong, FinalUnsupported, InvalidInput
from service.core.values import Feed, FloatRows, Steps
from service.pipeline.served_model import ServedModel, invalid_data
from service.transports.http.bodies.body_types import ChunkBody, StepsBody
from service.transports.http.bodies.validation_errors import Origin, shown
from service.transports.http.limits import ApiLimits

NAMED_COLUMNS = 8
"""How many columns an error names before it says `...`."""


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


class StrictSteps:
    """Reads the steps of one model's bodies.

    Args:
        limits: those of the model.
    """

    def __init__(self, served: ServedModel, limits: ApiLimits):
        self._served = served
        self._columns = served.artifact.spec.columns
        self._most_chunk = Limit(limits.max_chunk_steps, "max_chunk_steps")
        self._most_predict = most = Limit(limits.max_predict_steps, "max_predict_steps")
        limit = served.chunk_limit
        self._most_sequence = most if limit is None else min(most, Limit(limit, "max_chunk_steps"))

    def of_chunk(self, body: ChunkBody, inside: str) -> Steps:
        """The steps of a chunk; a final one may have none.

        Args:
            inside: where the chunk is in its body, as `chunks[2]`; empty for the body itself.

        Raises:
            FinalUnsupported, InvalidInput, ChunkTooLong
        """
        self.check_final(body, inside)
        least = 0 if body.final else 1
        return self._read(body, Origin(inside), self._most_chunk, least)

    def of_sequence(self, body: StepsBody, inside: str) -> Steps:
        """The steps of one sequence.

        Raises:
            InvalidInput, ChunkTooLong
        """
        return self._read(body, Origin(inside), self._most_sequence)

    def of_sequences(self, bodies: Sequence[StepsBody], first: int = 0) -> list[Steps]:
        """The steps of whole sequences.

        Args:
            first: index in the request of the first sequence.

        Raises:
            InvalidInput, ChunkTooLong
        """
        steps = [
            self.of_sequence(sequence, f"sequences[{at}]")
            for at, sequence in enumerate(bodies, first)
        ]
        self.check_total(sum(sequence.length for sequence in steps))
        return steps

    def of_body(self, body: StepsBody, inside: str) -> Steps:
        """The steps of a chunk or of a sequence, depending on the type of the body."""
        if isinstance(body, ChunkBody):
            return self.of_chunk(body, inside)
        return self.of_sequence(body, inside)

    def of_part(self, body: StepsBody, origin: Origin) -> Steps:
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
        _counted(steps, "sequences", self._most_predict)

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

    def _read(self, body: StepsBody, origin: Origin, most: Limit, least: int = 1) -> Steps:
        inside, first = origin
        lead = f"{inside}." if inside else ""
        if (body.events is None) == (body.inputs is None):
            raise self._not_one(inside or "body", "both" if body.events is not None else "none")
        schema = self._served.events
        if body.events is not None and schema is not None:
            count = _counted(len(body.events), f"{lead}events", most, least)
            columns = columns_from_events(schema, body.events)
            return Steps(Feed.EVENTS, count, columns=columns)
        at = f"{lead}inputs"
        rows = (
            self._rows_of_bytes(body.inputs, at)
            if isinstance(body.inputs, bytes)
            else self._rows_of_lists(body.inputs, at, most, first)
        )
        _counted(len(rows), at, most, least)
        try:
            check_rows(self._columns, rows)
        except DataError as error:
            raise self._invalid_rows(at, error, body.inputs, first) from error
        return Steps(Feed.INPUTS, len(rows), rows=rows)

    def _rows_of_lists(
        self, given: list[list[float]], at: str, most: Limit, first: int
    ) -> FloatRows:
        _counted(len(given), at, most, least=0)
        wide = len(self._columns)
        for index, row in enumerate(given):
            if len(row) != wide:
                raise self.wrong_width(f"{at}[{index + first}]", str(len(row)))
        with np.errstate(over="ignore"):
            return np.array(given, np.float64).astype(np.float32).reshape(-1, wide)

    def _rows_of_bytes(self, given: bytes, at: str) -> FloatRows:
        wide = 4 * len(self._columns)
        if len(given) % wide:
            raise self.wrong_width(at, f"{len(given)} bytes, which {wide} does not divide")
        return np.frombuffer(given, "<f4").astype(np.float32, copy=False).reshape(-1, wide // 4)

    def _invalid_rows(
        self, at: str, error: DataError, given: bytes | list[list[float]], first: int
    ) -> InvalidInput:
        """The refusal of one value of a row, as `inputs[3][0]`, with the name of its column."""
        if error.index is None or error.field is None:
            return invalid_data(at, error)
        column = [column.name for column in self._columns].index(error.field)
        place = f"{at}[{error.index + first}][{column}]"
        # As it was sent: after the cast, what overflowed is infinite.
        got = error.got if isinstance(given, bytes) else shown(given[error.index][column])
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

    def _not_one(self, at: str, got: str) -> InvalidInput:
        both = "exactly one of `events` and `inputs`"
        feeds = "`inputs`" if self._served.events is None else both
        return InvalidInput(f"{at}: expected {feeds}, got {got}", at=at, expected=feeds, got=got)


def _counted(count: int, at: str, most: Limit, least: int = 1) -> int:
    if count < least:
        expected = "at least one step"
        raise InvalidInput(f"{at}: expected {expected}, got none", at=at, expected=expected, got=0)
    if count > most.steps:
        raise most.exceeded(at, count)
    return count
