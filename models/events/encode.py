"""From event columns to the float32 rows that a network reads.

Training and serving use the same code. Two kinds of values depend on earlier events: the gap
between timestamps, computed in int64 milliseconds from the latest one, and numbers that are
standardised by the stream's own values (`models.events.statistics`). What they need is the clock, a
part of the stream's state, so that encoding is chunk-invariant:
encoding a sequence at once, and encoding its chunks in order while passing on the clock,
produce the same bits.

    numeric      (transform(value) - mean) / std in float64, then float32
    categorical  its code: 0 unknown, 1..K the vocabulary, K+1 absent
    boolean      1 or 0
    timestamp    gap      (log(1 + gap in seconds) - gap_mean) / gap_std
                 hour     sin and cos of 2 pi m / 1440, m the local minute of the day
                 weekday  sin and cos of 2 pi d / 7, d the local day of the week, Monday 0
                 yearday  sin and cos of 2 pi d / D, d the local day of the year, 1 January 0, D the
                          days of that year
    .missing     1 if absent; then every other column of the field is 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import DataError, StateError
from models.events.calendar import calendar_angles
from models.events.columns import (
    GAP_ROW,
    Block,
    BlockLayout,
    EventColumns,
    FieldPosition,
    IntArray,
    block_of,
)
from models.events.parse import MAX_TIMESTAMP_MS, MIN_TIMESTAMP_MS
from models.events.schema import (
    EventSchema,
)
from models.events.segment_statistics import SegmentStatistics, encode_statistics
from models.events.statistics import encode_parts
from models.events.values import FINITE
from models.spec.layout import CLOCK_LAST_MS, CLOCK_OUT_OF_ORDER, CLOCK_SEEN
from models.spec.resets import EventTimes, gaps_of_segments_ms
from models.spec.state import StateSpec

FloatArray = NDArray[np.float32]

ApplyStatistics = Callable[[NDArray[np.bool_] | None, NDArray[np.float64], FloatArray], None]
"""Takes what is absent, numbers and rows."""

_NO_STATISTICS = bytes(8)

PART_EVENTS = 8192
"""Events of many segments that are encoded at a time, so that copies stay in the caches."""

MAX_SEEN = 2**62
"""More events than any stream can have; counting on from it does not overflow int64."""

MAX_RESTORED_SEEN = 2**61
"""Largest event count of a restored state; no stream can reach `MAX_SEEN` from there."""


class Clock(NamedTuple):
    """What encoding depends on besides the events: a part of a stream's state.

    Attributes:
        last_ms: the latest timestamp so far, epoch milliseconds; 0 while `seen` is 0.
        seen: number of events with a timestamp.
        out_of_order: number of events with an earlier timestamp than `last_ms`.
        statistics: the words of the fields' statistics, int64; empty for a new stream, or if no
            field has any.
    """

    last_ms: int = 0
    seen: int = 0
    out_of_order: int = 0
    statistics: bytes = b""

    @classmethod
    def from_ints(cls, spec: StateSpec, ints: IntArray, max_seen: int = MAX_SEEN) -> Clock:
        """Read the clock from a state's int64 row [M].

        A model without a timestamp field, or without statistics, has no such parts: they are then
        zero.

        Args:
            max_seen: largest accepted count of events.

        Raises:
            StateError: impossible counters, a timestamp out of range, or a negative variance.
        """
        statistics = b""
        if spec.statistic_counts:
            statistics = _checked_statistics(spec, ints, max_seen)
        if CLOCK_SEEN not in spec.slices:
            return cls(statistics=statistics)
        slices, values = spec.slices, ints.tolist()
        last_ms = values[slices[CLOCK_LAST_MS].start]
        seen = values[slices[CLOCK_SEEN].start]
        out_of_order = values[slices[CLOCK_OUT_OF_ORDER].start]
        if not 0 <= seen <= max_seen or not 0 <= out_of_order <= max(seen - 1, 0):
            raise StateError(
                f"parts {CLOCK_SEEN!r} and {CLOCK_OUT_OF_ORDER!r}: expected counts of at most "
                f"{max_seen}, the second below the first, got {seen} and {out_of_order}"
            )
        if seen == 0:
            return cls(statistics=statistics)
        if not MIN_TIMESTAMP_MS <= last_ms < MAX_TIMESTAMP_MS:
            raise StateError(
                f"part {CLOCK_LAST_MS!r}: expected epoch milliseconds between 1900 and 2200, "
                f"got {last_ms}"
            )
        return cls(last_ms, seen, out_of_order, statistics)

    def into_ints(self, spec: StateSpec, ints: IntArray) -> IntArray:
        """A copy of a state's int64 row [M] with the clock's parts set to this clock."""
        slices, result = spec.slices, ints.copy()
        if CLOCK_SEEN in slices:
            result[slices[CLOCK_LAST_MS].start] = self.last_ms
            result[slices[CLOCK_SEEN].start] = self.seen
            result[slices[CLOCK_OUT_OF_ORDER].start] = self.out_of_order
        if spec.statistic_counts:
            result[spec.statistics] = np.frombuffer(self.statistics or _NO_STATISTICS, np.int64)
        return result


def _checked_statistics(spec: StateSpec, ints: IntArray, max_seen: int) -> bytes:
    """The words of the statistics in a state's int64 row [M]."""
    for name, at in spec.statistic_counts:
        if not 0 <= ints[at] <= max_seen:
            raise StateError(
                f"part {name!r}: expected a count of at most {max_seen}, got {ints[at]}"
            )
    for name, at in spec.statistic_variances:
        # a float64 is negative if its bits are
        if ints[at] < 0:
            value = ints[at : at + 1].view(np.float64)[0]
            raise StateError(f"part {name!r}: expected a variance of at least 0, got {value}")
    return ints[spec.statistics].tobytes()


def event_times(
    schema: EventSchema, columns: EventColumns, clock: Clock | None = None
) -> EventTimes | None:
    """The timestamps of events, for `find_resets`; None if the schema has none.

    Args:
        clock: the stream's clock before the events; None for a new stream.
    """
    if schema.timestamp is None:
        return None
    name = schema.timestamp.name
    last_ms = clock.last_ms if clock is not None and clock.seen else None
    return EventTimes(columns.values[name], columns.present[name], last_ms)


def encode(
    schema: EventSchema, columns: EventColumns, clock: Clock, resets: Sequence[int] = ()
) -> tuple[FloatArray, Clock]:
    """Encode T events that follow the clock.

    Args:
        schema: a fitted schema.
        columns: T >= 0 events of that schema.
        clock: the stream's clock before the first of them; `Clock()` for a new stream.
        resets: ascending indexes of the events before which the clock is reset. Many cost as much
            as one.

    Returns:
        Rows, float32 [T, F], finite; and the clock after the last event.

    Raises:
        DataError: a numeric value that is not finite as a float32 once standardised.
    """
    block = block_of(schema, columns)
    if resets:
        starts = np.array(resets if resets[0] == 0 else [0, *resets], np.int64)
        before = {} if resets[0] == 0 else {0: clock}
        last = np.array([len(starts) - 1])
        rows, after, _ = _encode_segments(block, starts, before, last)
        clock = after.clock(0)
    else:
        rows, (clock,) = _encode_blocks([block], [clock])
    if not np.isfinite(rows).all():
        raise _not_finite(schema, columns, rows)
    return rows, clock


class Clocks(NamedTuple):
    """Clocks of N streams, as `Clock`.

    Attributes:
        last_ms, seen, out_of_order: int64 [N].
        statistics: int64 [N, W].
    """

    last_ms: IntArray
    seen: IntArray
    out_of_order: IntArray
    statistics: IntArray

    @classmethod
    def new(cls, count: int, words: int = 0) -> Clocks:
        """Clocks of new streams."""
        nothing = np.zeros(count, np.int64)
        return cls(nothing, nothing, nothing, np.zeros((count, words), np.int64))

    def clock(self, at: int) -> Clock:
        """One of them."""
        last_ms, seen, out_of_order = (int(column[at]) for column in self[:3])
        return Clock(last_ms, seen, out_of_order, self.statistics[at].tobytes())

    def write_ints(self, spec: StateSpec, ints: IntArray) -> None:
        """Set the clocks' parts in the int64 rows [N, M] of states."""
        if CLOCK_SEEN in spec.slices:
            ints[:, spec.slices[CLOCK_LAST_MS].start] = self.last_ms
            ints[:, spec.slices[CLOCK_SEEN].start] = self.seen
            ints[:, spec.slices[CLOCK_OUT_OF_ORDER].start] = self.out_of_order
        if spec.statistic_counts:
            ints[:, spec.statistics] = self.statistics


class EncodedSegments(NamedTuple):
    """Events of many segments, encoded.

    Attributes:
        rows: float32 [T, F].
        clocks: after the wanted segments.
        out_of_order: events with an earlier timestamp than one before them in their segment.
    """

    rows: FloatArray
    clocks: Clocks
    out_of_order: int


def encode_segments(
    schema: EventSchema,
    columns: EventColumns,
    starts: IntArray,
    before: Mapping[int, Clock],
    wanted: IntArray,
) -> EncodedSegments:
    """Encode segments of many streams at once; equal to `encode` of each bit for bit.

    Args:
        schema: a fitted schema.
        columns: T > 0 events, one segment after the other.
        starts: int64 [G], ascending, the first event of each segment; the first is 0.
        before: by segment, the clock before it; a new one for the others.
        wanted: the segments whose clocks are returned.

    Raises:
        DataError: a numeric value that is not finite as a float32 once standardised.
    """
    encoded = _encode_segments(block_of(schema, columns), starts, before, wanted)
    if not np.isfinite(encoded.rows).all():
        raise _not_finite(schema, columns, encoded.rows)
    return encoded


def encode_many(
    schema: EventSchema, columns: Sequence[EventColumns], clocks: Sequence[Clock]
) -> tuple[list[FloatArray], list[Clock]]:
    """Encode chunks of several streams in one batch; equal to `encode` of each bit for bit.

    Args:
        schema: a fitted schema.
        columns: N >= 1 chunks, of different streams.
        clocks: the N streams' clocks before them.

    Returns:
        N arrays of rows, float32 [T, F], finite, views of one array; and the N clocks after.

    Raises:
        DataError: the error of the first chunk that `encode` rejects. Encode separately
            to get the other rows.
    """
    blocks = [block_of(schema, chunk) for chunk in columns]
    rows, after = _encode_blocks(blocks, clocks)
    cuts = list(accumulate([block.steps for block in blocks], initial=0))
    parts = [rows[start:stop] for start, stop in pairwise(cuts)]
    if not np.isfinite(rows).all():
        at = next(at for at, part in enumerate(parts) if not np.isfinite(part).all())
        raise _not_finite(schema, columns[at], parts[at])
    return parts, after


def _encode_blocks(
    blocks: Sequence[Block], clocks: Sequence[Clock]
) -> tuple[FloatArray, list[Clock]]:
    """Encode blocks of one layout into consecutive rows, which may contain infinities."""
    layout = blocks[0].layout
    numbers = np.concatenate([block.numbers for block in blocks], axis=1)
    times_ms = gaps = None
    after = list(clocks)
    if layout.time is not None:
        times_ms, gaps, after = _gaps(layout.time, blocks, clocks)
    has_absent = any(block.absent is not None for block in blocks)
    if not layout.statistics:
        return _encode_numbers(layout, numbers, has_absent, times_ms, gaps), after
    words = [_statistics_words(layout, clock) for clock in clocks]
    cuts = pairwise(accumulate([block.steps for block in blocks], initial=0))
    parts = [(slice(*cut), own) for cut, own in zip(cuts, words, strict=True)]
    apply = partial(encode_parts, layout.statistics, parts)
    rows = _encode_numbers(layout, numbers, has_absent, times_ms, gaps, apply)
    return rows, [
        clock._replace(statistics=own.tobytes()) for clock, own in zip(after, words, strict=True)
    ]


def _encode_segments(
    block: Block, starts: IntArray, before: Mapping[int, Clock], wanted: IntArray
) -> EncodedSegments:
    """`encode_segments` of a block, into rows that may contain infinities."""
    layout = block.layout
    clocks = Clocks.new(len(starts))
    times_ms = gaps = None
    out_of_order = 0
    if layout.time is not None:
        times_ms = _times_ms(block)
        gaps, clocks = _gaps_of_segments(block, layout.time, starts, before)
        out_of_order = int(clocks.out_of_order.sum())
        out_of_order -= sum(clock.out_of_order for clock in before.values())
    clocks = Clocks(*(column[wanted] for column in clocks))
    has_absent = block.absent is not None
    if layout.statistics:
        known = {at: _statistics_words(layout, clock) for at, clock in before.items()}
        kept = np.zeros((len(wanted), layout.statistics[-1].stop), np.int64)
        clocks = clocks._replace(statistics=kept)
        stops = np.append(starts[1:], block.steps)
        segments = SegmentStatistics(starts, stops, known, wanted, kept)
        apply = partial(encode_statistics, layout.statistics, segments)
        rows = _encode_numbers(layout, block.numbers.copy(), has_absent, times_ms, gaps, apply)
        return EncodedSegments(rows, clocks, out_of_order)
    rows = np.empty((block.steps, len(layout.schema.columns)), np.float32)
    for at in range(0, block.steps, PART_EVENTS):
        part = slice(at, at + PART_EVENTS)
        times = (None, None) if times_ms is None or gaps is None else (times_ms[part], gaps[part])
        rows[part] = _encode_numbers(layout, block.numbers[:, part].copy(), has_absent, *times)
    return EncodedSegments(rows, clocks, out_of_order)


def _statistics_words(layout: BlockLayout, clock: Clock) -> IntArray:
    """A copy of the words of a stream's statistics."""
    if clock.statistics:
        return np.frombuffer(clock.statistics, np.int64).copy()
    return np.zeros(layout.statistics[-1].stop, np.int64)


def _encode_numbers(
    layout: BlockLayout,
    numbers: NDArray[np.float64],
    has_absent: bool,
    times_ms: IntArray | None,
    gaps: IntArray | None,
    apply_statistics: ApplyStatistics | None = None,
) -> FloatArray:
    """Encode the numbers of a block, or of several, into rows.

    Args:
        numbers: float64 [K, T]; overwritten.
        has_absent: whether any value is absent.
        times_ms, gaps: int64 [T], of a schema with a timestamp.
        apply_statistics: standardises the fields with statistics in the transformed numbers, and
            writes their other columns to the rows.
    """
    if not layout.fitted:
        raise ValueError("expected a fitted schema: mean and standard deviation are not known")
    rows = np.empty((numbers.shape[1], len(layout.schema.columns)), np.float32)
    absent = numbers[layout.missing] != 0 if has_absent else None
    if times_ms is not None and gaps is not None:
        np.divide(gaps, 1000.0, out=numbers[GAP_ROW])
        calendar = rows[:, layout.calendar]
        calendar[:] = calendar_angles(layout.schema, times_ms)
        if absent is not None:
            calendar[absent[layout.blanked == GAP_ROW].any(axis=0)] = 0
    with np.errstate(over="ignore"):
        if layout.logs:
            logs = numbers[: layout.logs]
            np.copysign(np.log1p(np.abs(logs)), logs, out=logs)
        if apply_statistics is not None:
            apply_statistics(absent, numbers, rows)
        numbers -= layout.mean
        numbers /= layout.std
        if absent is not None:
            blanked = numbers[layout.blanked]
            blanked[absent] = 0
            numbers[layout.blanked] = blanked
        rows[:, layout.columns] = numbers.T
    return rows


def _gaps(
    position: FieldPosition, blocks: Sequence[Block], clocks: Sequence[Clock]
) -> tuple[IntArray, IntArray, list[Clock]]:
    """Compute timestamps and gaps of all events, both int64 [T], and the clocks afterwards.

    Both are undefined for an event without a timestamp.
    """
    times_ms = np.concatenate([_times_ms(block) for block in blocks])
    cuts = list(accumulate([block.steps for block in blocks], initial=0))
    gaps = np.zeros(len(times_ms), np.int64)
    # If events are in order, as almost always, the latest timestamp is the previous one.
    np.subtract(times_ms[1:], times_ms[:-1], out=gaps[1:])
    after = list(clocks)
    others: set[int] = set()
    for at, (block, clock) in enumerate(zip(blocks, clocks, strict=True)):
        start, stop = cuts[at], cuts[at + 1]
        if start == stop:
            continue
        gaps[start] = times_ms.item(start) - clock.last_ms if clock.seen else 0
        after[at] = Clock(times_ms.item(stop - 1), clock.seen + block.steps, clock.out_of_order)
        if position.absent is not None and block.absent is not None:
            others.add(at)
    if np.min(gaps, initial=0) < 0:
        others.update((np.searchsorted(cuts, np.flatnonzero(gaps < 0), "right") - 1).tolist())
    for at in others:
        part, there = slice(cuts[at], cuts[at + 1]), blocks[at].presence(position)
        gaps[part][there], after[at] = gaps_ms(times_ms[part][there], clocks[at])
    return times_ms, gaps, after


def _gaps_of_segments(
    block: Block, position: FieldPosition, starts: IntArray, before: Mapping[int, Clock]
) -> tuple[IntArray, Clocks]:
    """The gaps of all events, int64 [T], and the clocks after all segments, without statistics."""
    times_ms, present = _times_ms(block), block.presence(position)
    known = {at: clock.last_ms for at, clock in before.items() if clock.seen}
    gaps = gaps_of_segments_ms(times_ms, present, starts, known)
    last_ms = np.maximum.reduceat(np.where(present, times_ms, MIN_TIMESTAMP_MS), starts)
    seen = np.add.reduceat(present, starts, dtype=np.int64)
    out_of_order = np.add.reduceat(gaps < 0, starts, dtype=np.int64)
    for at, clock in before.items():
        if clock.seen:
            last_ms[at] = max(last_ms[at], clock.last_ms)
            seen[at] += clock.seen
            out_of_order[at] += clock.out_of_order
    last_ms[seen == 0] = 0
    after = Clocks.new(len(starts))._replace(last_ms=last_ms, seen=seen, out_of_order=out_of_order)
    return np.maximum(gaps, 0, out=gaps), after


def _times_ms(block: Block) -> IntArray:
    if block.times_ms is None:
        raise ValueError("expected a block with timestamps")
    return block.times_ms


def gaps_ms(times_ms: IntArray, clock: Clock) -> tuple[IntArray, Clock]:
    """Compute milliseconds since the latest timestamp before each event, and the clock afterwards.

    The first event of a stream and events out of order have gap 0; the latter are
    counted and do not change the latest timestamp.

    Args:
        times_ms: int64 [T], the timestamps of the events that have one.
        clock: the stream's clock before them.
    """
    if len(times_ms) == 0:
        return np.zeros(0, np.int64), clock
    first = clock.last_ms if clock.seen else int(times_ms[0])
    latest = np.maximum.accumulate(np.concatenate(([np.int64(first)], times_ms)))
    since = times_ms - latest[:-1]
    return np.maximum(since, 0), Clock(
        int(latest[-1]),
        clock.seen + len(times_ms),
        clock.out_of_order + int(np.count_nonzero(since < 0)),
    )


def _not_finite(schema: EventSchema, columns: EventColumns, rows: FloatArray) -> DataError:
    step, at = (int(index) for index in np.argwhere(~np.isfinite(rows))[0])
    name = schema.columns[at].field or schema.columns[at].name
    return DataError(
        index=step,
        field=name,
        expected=FINITE,
        got=repr(columns.values[name].tolist()[step]),
    )
