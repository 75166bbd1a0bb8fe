"""Reader of the steps of one model: from decoded events or rows to `Steps`.

Everything that does not depend on a stream's state is checked here, for every transport: the number
of steps, finite numbers, codes of categories, the indexes of resets, the rate of alarms.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, Final

import msgspec
import numpy as np
import structlog
from msgspec.structs import replace
from numpy.typing import NDArray

from models.errors import DataError
from models.events.reader import EventReader, ReadEvents
from models.events.values import check_rows
from models.spec.model import ModelSpec
from service.codec.body_types import StepsBody, wrong_width
from service.codec.decoding import decode_element, format_value, invalid
from service.codec.media import Media
from service.codec.settings import Limit
from service.core.errors import InvalidInput, ResetsUnsupported
from service.core.values import Feed, FloatRows, Steps

log = structlog.get_logger(__name__)

_F4: Final = np.dtype("<f4")


def member_place(inside: str, name: str) -> str:
    """The place of a member of an object; the object's is empty for the body."""
    return f"{inside}.{name}" if inside else name


class StepsReader:
    """Reads the steps of chunks and sequences of one model.

    Attributes:
        has_codes: whether a column has codes of categories, which finite rows may violate.
    """

    def __init__(self, spec: ModelSpec, events: EventReader | None):
        self._name = spec.name
        self._columns = spec.columns
        self._features = len(self._columns)
        self.has_codes = any(column.codes is not None for column in self._columns)
        self._has_blocks = spec.blocks is not None
        self._events = events
        self._has_warned = False
        self._wrong_width = wrong_width(spec)
        detection = spec.detection
        self._max_alarm_rate = detection.fit.rates[-1] if detection and detection.fit else None

    def read(self, body: StepsBody, inside: str, limit: Limit, min_steps: int = 1) -> Steps:
        """The steps of a decoded chunk or sequence, without its options.

        Args:
            inside: where it is in the request, as `chunks[2]`; empty for the body itself.

        Raises:
            InvalidInput, ChunkTooLong
        """
        events, inputs = body.events, body.inputs
        if events is not None and inputs is None:
            return self.events(events, inside, limit, min_steps)
        if inputs is None or events is not None:
            raise self._not_exactly_one(inside or "body", "none" if inputs is None else "both")
        if isinstance(inputs, bytes):
            return self.packed_rows(inputs, inside, limit, min_steps)
        size = len(inputs) * self._features
        flat = np.fromiter(chain.from_iterable(inputs), np.float64, size)
        return self.flat_rows(flat, inside, limit, min_steps)

    def events(
        self, events: Sequence[msgspec.Struct], inside: str, limit: Limit, min_steps: int = 1
    ) -> Steps:
        """The steps of events that are decoded.

        Raises:
            InvalidInput, ChunkTooLong
        """
        at = member_place(inside, "events")
        check_count(len(events), at, limit, min_steps)
        if self._events is None:
            raise self._not_exactly_one(inside or "body", "events")
        read = self._read(self._events, events, at)
        return Steps(Feed.EVENTS, len(events), read.columns, None, read.resets)

    def _read(self, reader: EventReader, events: Sequence[msgspec.Struct], at: str) -> ReadEvents:
        """Decoded events as columns; the first that probably has epoch seconds is logged."""
        read = read_columns(reader, events, at)
        if not self._has_warned and (got := reader.find_epoch_seconds(events)) is not None:
            self._has_warned = True
            expected = "epoch milliseconds, or epoch: s in the field"
            log.warning("timestamps_in_seconds", model=self._name, expected=expected, got=got)
        return read

    def flat_rows(
        self, flat: NDArray[np.float64], inside: str, limit: Limit, min_steps: int = 1
    ) -> Steps:
        """The steps of rows of the model's width, one number after the other.

        Raises:
            InvalidInput, ChunkTooLong
        """
        at = member_place(inside, "inputs")
        check_count(len(flat) // self._features, at, limit, min_steps)
        with np.errstate(over="ignore"):
            rows = flat.astype(_F4).reshape(-1, self._features)
        return self.checked_rows(rows, at, flat)

    def packed_rows(
        self, packed: bytes | memoryview, inside: str, limit: Limit, min_steps: int = 1
    ) -> Steps:
        """The steps of rows of float32 in little-endian, row by row.

        Raises:
            InvalidInput, ChunkTooLong
        """
        at = member_place(inside, "inputs")
        row_bytes = _F4.itemsize * self._features
        count, rest = divmod(len(packed), row_bytes)
        if rest:
            got = f"{len(packed)} bytes, no multiple of {row_bytes} (4 for each value)"
            raise self._wrong_width(at, got)
        check_count(count, at, limit, min_steps)
        return self.checked_rows(np.frombuffer(packed, _F4).reshape(count, self._features), at)

    def event(self, event: object, at: str) -> msgspec.Struct:
        """An event of Python's objects, checked; `events` reads it.

        Raises:
            InvalidInput
        """
        if self._events is None:
            raise self._not_exactly_one("body", "events")
        checked: msgspec.Struct = decode_element(Media.JSON, event, self._events.event, at)
        return checked

    def read_many(self, bodies: Sequence[StepsBody], limit: Limit) -> list[Steps] | None:
        """The steps of several chunks or sequences, without their options, as views of the same
        arrays; None if some have events and others rows, or one is invalid."""
        events = [body.events for body in bodies if body.events is not None]
        inputs = [body.inputs for body in bodies if body.inputs is not None]
        if not bodies or len(events) + len(inputs) != len(bodies) or (events and inputs):
            return None
        lengths = list(map(len, events or inputs))
        try:
            if events:
                return self._events_of_many(events, lengths, limit)
            return self._rows_of_many(inputs, lengths, limit)
        except InvalidInput:
            return None

    def _events_of_many(
        self, events: Sequence[Sequence[msgspec.Struct]], counts: list[int], limit: Limit
    ) -> list[Steps] | None:
        if self._events is None or not 0 < min(counts) <= max(counts) <= limit.steps:
            return None
        read = self._read(self._events, list(chain.from_iterable(events)), "")
        if read.resets:
            return None
        return [
            Steps(Feed.EVENTS, count, read.columns[end - count : end], None)
            for count, end in zip(counts, accumulate(counts), strict=True)
        ]

    def _rows_of_many(
        self, inputs: Sequence[Any], counts: list[int], limit: Limit
    ) -> list[Steps] | None:
        if isinstance(inputs[0], bytes):
            row_bytes = _F4.itemsize * self._features
            if any(size % row_bytes for size in counts):
                return None
            counts = [size // row_bytes for size in counts]
            flat = np.frombuffer(b"".join(inputs), _F4)
        else:
            numbers = chain.from_iterable(chain.from_iterable(inputs))
            with np.errstate(over="ignore"):
                flat = np.fromiter(numbers, np.float64, sum(counts) * self._features).astype(_F4)
        if not 0 < min(counts) <= max(counts) <= limit.steps:
            return None
        rows = flat.reshape(-1, self._features)
        self.checked_rows(rows, "")
        return [
            Steps(Feed.INPUTS, count, None, rows[end - count : end])
            for count, end in zip(counts, accumulate(counts), strict=True)
        ]

    def check_codes(self, steps: Steps) -> None:
        """Check the codes of rows that are finite.

        Raises:
            InvalidInput
        """
        if steps.rows is not None:
            self.checked_rows(steps.rows, "inputs")

    def checked_rows(
        self, rows: FloatRows, at: str, sent: NDArray[np.float64] | None = None
    ) -> Steps:
        """The steps of rows [T, F].

        Args:
            sent: the numbers before they became float32, which errors show.

        Raises:
            InvalidInput: a value is not finite, or not a code of its column.
        """
        # takes a third of the time of `all()`
        if self.has_codes or b"\0" in np.isfinite(rows).tobytes():
            try:
                check_rows(self._columns, rows)
            except DataError as error:
                raise self._invalid_row(at, error, sent) from error
        return Steps(Feed.INPUTS, len(rows), None, rows)

    def add_options(
        self,
        steps: Steps,
        inside: str,
        resets: Sequence[int] | None,
        false_alarms_per_day: float | None,
        *,
        is_chunk: bool,
    ) -> Steps:
        """Add the options of a chunk or sequence: the rate of its alarms, and its resets to those
        of its events.

        Raises:
            InvalidInput: an index is out of range or out of order, or the model has no such alarms.
            ResetsUnsupported: it is a chunk of a model whose streams cannot be reset.
        """
        if false_alarms_per_day is not None:
            at = member_place(inside, "false_alarms_per_day")
            self._check_alarm_rate(false_alarms_per_day, at)
            steps = replace(steps, false_alarms_per_day=false_alarms_per_day)
        at = member_place(inside, "resets")
        if resets:
            before = -1
            for index, reset in enumerate(resets):
                if not before < reset < steps.length:
                    raise invalid(
                        f"{at}[{index}]",
                        f"ascending indexes from 0 to {steps.length - 1}, each once, of the "
                        f"{steps.length} events or rows",
                        reset,
                    )
                before = reset
            steps = replace(steps, resets=tuple(sorted({*resets, *steps.resets})))
        if steps.resets and is_chunk and self._has_blocks:
            raise ResetsUnsupported(
                f"{at}: expected none, since model {self._name!r} has `blocks`, whose "
                "windows would extend across a reset",
                at=at,
                expected="no resets",
            )
        return steps

    def _check_alarm_rate(self, rate: float, at: str) -> None:
        limit, expected = self._max_alarm_rate, ""
        if limit is None:
            expected = f"none, since model {self._name!r} has no `detection`"
        elif rate > limit:
            expected = (
                f"at most {limit:g}, the highest rate that the alarms of model {self._name!r} have "
                "on the data that they are calibrated on"
            )
        if expected:
            raise InvalidInput(
                f"{at}: expected {expected}; got {rate}", at=at, expected=limit or "none", got=rate
            )

    def _invalid_row(
        self, at: str, error: DataError, sent: NDArray[np.float64] | None
    ) -> InvalidInput:
        """The error for one value of a row, such as `inputs[3][0]`, with the name of its column."""
        column = [column.name for column in self._columns].index(error.field or "")
        place = f"{at}[{error.index}][{column}]"
        got = error.got
        if sent is not None and error.index is not None:
            # as it was sent: after the cast, what overflowed is infinite
            got = format_value(float(sent[error.index * self._features + column]))
        return InvalidInput(
            f"{place} ({error.field}): expected {error.expected}, got {got}",
            at=place,
            column=error.field,
            expected=error.expected,
            got=got,
        )

    def _not_exactly_one(self, at: str, got: str) -> InvalidInput:
        both = "exactly one of `events` and `inputs`"
        return invalid(at, "`inputs`" if self._events is None else both, got)


def read_columns(reader: EventReader, events: Sequence[msgspec.Struct], at: str) -> ReadEvents:
    """Decoded events as columns.

    Raises:
        InvalidInput
    """
    try:
        return reader.read(events)
    except DataError as error:
        place = f"{at}[{error.index}].{error.field}"
        raise invalid(place, error.expected, error.got) from error


def check_count(count: int, at: str, limit: Limit, min_steps: int = 1) -> None:
    """Reject too few or too many steps.

    Raises:
        InvalidInput, ChunkTooLong
    """
    if count < min_steps:
        expected = "at least one step"
        raise InvalidInput(f"{at}: expected {expected}, got none", at=at, expected=expected, got=0)
    if count > limit.steps:
        raise limit.exceeded(at, count)
