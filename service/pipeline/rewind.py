"""The past of a stream: what is kept of it, and the exact states that follow from that.

The state of an earlier position is exact if it is kept, or if a kept state at or before it and
every event in between are. Nothing else is a state that the stream ever had, so nothing else is
offered: a recurrent state has no inverse.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import structlog

from service.core.delivery import stream_facts
from service.core.errors import CarryError, PositionUnavailable, StateDamaged
from service.core.values import StreamHead, StreamKey, StreamState
from service.engine.compute import Compute
from service.pipeline.history_run import HistoryGap, HistoryRun, advance_many, decode_entries
from service.pipeline.model_versions import ModelVersions
from service.pipeline.served_model import ServedModel
from service.store.base import decode_stream, decode_value, state_damaged_error
from service.store.codec import pack_head, read_packed_head
from service.store.history import Histories, HistoryCopy, StoredHistory
from service.store.history_codec import HistoryEntry, entries_from, read_range
from service.store.layout import CodecError

log = structlog.get_logger(__name__)


class Past(NamedTuple):
    """What is kept of a stream's past, as positions.

    Attributes:
        states: positions of the states that are kept, ascending, with that of the stream itself,
            and 0 if the events reach back to the stream's beginning.
        start, end: positions of the first event that is kept, and after the last one.
        cuts: the ends of the kept chunks, ascending, of a model that sees each chunk as a whole:
            it has no state within one; None for any other model.
    """

    states: Sequence[int]
    start: int
    end: int
    cuts: Sequence[int] | None = None

    def find_base(self, position: int) -> int | None:
        """The position of the state from which the events lead to `position`; None if no state
        does."""
        at = bisect_right(self.states, position) - 1
        if at < 0 or (self.states[at] < position and not self._has_events(position)):
            return None
        base = self.states[at]
        return base if base == position or base >= self.start else None

    def _has_events(self, position: int) -> bool:
        """Whether a state could be computed at this position from an earlier one."""
        if not self.start <= position <= self.end:
            return False
        return self.cuts is None or position in self.cuts

    def available(self) -> list[tuple[int, int]]:
        """The positions that have a base, as ascending ranges of first and last position."""
        ranges = [(position, position) for position in self.states]
        at = bisect_left(self.states, self.start)
        if at < len(self.states) and self.states[at] <= self.end:
            first = self.states[at]
            if self.cuts is None:
                ranges.append((first, self.end))
            else:
                ranges += [(cut, cut) for cut in self.cuts if cut >= first]
        return _merge(ranges)


class History(NamedTuple):
    """A stream with what is kept of its past.

    Attributes:
        served: the version of the model that reads it, and wrote the snapshots.
        entries: its recent events, encoded, without gaps up to its position.
        positions: of the snapshots, ascending.
        snapshot: the newest one at or before the position that was asked for, if there is one.
        reaches_start: whether the state before the first event is the initial one.
    """

    key: StreamKey
    served: ServedModel
    stream: StreamState
    entries: Sequence[bytes] = ()
    positions: Sequence[int] = ()
    snapshot: StreamState | None = None
    reaches_start: bool = False

    @classmethod
    def read(
        cls, key: StreamKey, served: ServedModel, stream: StreamState, stored: StoredHistory
    ) -> History:
        """What a store keeps of a stream; without the events if the version cannot read them.

        Raises:
            StateDamaged: the snapshot is invalid.
        """
        entries, reaches_start, snapshot = stored.entries, False, None
        try:
            reaches_start = bool(entries) and served.history_codec.decode(entries[0]).starts
        except CodecError as error:
            log.warning("history_unreadable", model=key.model, stream=key.stream, reason=str(error))
            entries = ()
        if stored.snapshot is not None:
            try:
                snapshot = decode_stream(stored.snapshot)
            except CodecError as error:
                raise state_damaged_error(key, error, stored.snapshot) from error
        return cls(key, served, stream, entries, stored.positions, snapshot, reaches_start)

    @property
    def start(self) -> int:
        """The position of the oldest event; that of the stream if there is none."""
        return read_range(self.entries[0]).start if self.entries else self.stream.head.position

    @property
    def past(self) -> Past:
        """What is kept, as positions."""
        head = self.stream.head.position
        if self.served.history is None:
            return Past((), head, head)
        states = {*self.positions}
        if self.served.is_compatible(self.stream):
            states.add(head)
        if self.reaches_start:
            states.add(self.start)
        cuts = None
        if self.served.chunk_limit is not None:
            cuts = [read_range(entry).stop for entry in self.entries]
        return Past(sorted(states), self.start, head, cuts)

    def cut(self, start: int, limit: int) -> tuple[list[HistoryEntry], int | None]:
        """Decode the events from a position on, at most `limit`, by the chunks that they came in;
        also returns the position to continue from, None after the last.

        Raises:
            StateDamaged
        """
        parts: list[HistoryEntry] = []
        at = bisect_right(self.entries, start, key=lambda value: read_range(value).stop)
        for value in self.entries[at:]:
            events = read_range(value)
            first = max(start, events.start)
            if events and not limit:
                return parts, first
            part, until = self._decode(value), min(events.stop, first + limit)
            parts.append(part if range(first, until) == events else part.cut(first, until))
            limit -= until - first
            if until < events.stop:
                return parts, until
        return parts, None

    async def stream_at(self, position: int, compute: Compute) -> StreamState:
        """The stream with its exact state at a position that has a base; the head is unchanged.

        Raises:
            StateDamaged: what is kept is invalid.
            CarryError: the state cannot be computed.
        """
        base, served, since = self.past.find_base(position), self.served, None
        if base is None:
            raise ValueError(f"expected a position with a base, got {position}")
        if base == self.stream.head.position and served.is_compatible(self.stream):
            return self.stream
        if self.snapshot is not None and self.snapshot.head.position == base:
            state, since = self.snapshot.state, self.snapshot.since
        elif self.reaches_start and base == self.start:
            state = served.initial
        else:
            raise self._damaged(f"the snapshot of position {base} is missing")
        values = entries_from(self.entries, base)
        run = HistoryRun(state, base, decode_entries(served, values), position)
        [advanced] = await advance_many(served, compute, [run])
        if isinstance(advanced, CarryError):
            raise advanced
        if isinstance(advanced, HistoryGap):
            raise self._damaged(advanced) from advanced
        since = served.find_since(since, position, was_reset=advanced.was_reset)
        return self.stream._replace(state=advanced.state, since=since)

    def entries_until(self, position: int) -> list[bytes]:
        """The encoded events up to a position.

        Raises:
            StateDamaged
        """
        try:
            return self.served.history_codec.keep_until(self.entries, position)
        except CodecError as error:
            raise self._damaged(error) from error

    def _decode(self, value: bytes) -> HistoryEntry:
        try:
            return self.served.history_codec.decode(value)
        except CodecError as error:
            raise self._damaged(error) from error

    def _damaged(self, reason: object) -> StateDamaged:
        stream = self.key.stream
        return StateDamaged(f"the history of stream {stream!r} is invalid: {reason}", stream=stream)


async def copy_history(store: Histories, key: StreamKey, head: StreamHead) -> HistoryCopy | None:
    """Read the history that leads to a stream head; None if the stream has another head by now."""
    ((value, history),) = await store.copy([key])
    if value is None or read_packed_head(value) != pack_head(head):
        return None
    return history or HistoryCopy()


async def read_histories(
    store: Histories, key: StreamKey, versions: ModelVersions, position: int | None
) -> list[History]:
    """The history of a stream as each loaded version reads it, the one that answers first; none if
    there is no stream. Each is read by itself: their streams may differ.

    Args:
        position: to rewind to, if any.

    Raises:
        StateDamaged, StoreUnavailable
    """
    histories: list[History] = []
    answering = versions.route.answering(key.stream)
    for served in sorted(versions.loaded.values(), key=lambda each: each is not answering):
        stored = await store.read(key, served.fingerprint, position)
        stream = decode_value(key, stored.record)
        if isinstance(stream, CarryError):
            raise stream
        if not isinstance(stream, StreamState):
            return []
        histories.append(History.read(key, served, stream, stored))
    return histories


def choose_history(histories: Sequence[History], position: int) -> History:
    """The first history of a stream that leads to a position.

    Args:
        histories: as each version of the model reads it; that which answers first.

    Raises:
        PositionUnavailable: with the positions to which one leads.
    """
    for history in histories:
        if history.past.find_base(position) is not None:
            return history
    key, available = histories[0].key, available_positions(histories)
    ranges = ", ".join(f"{first} to {last}" for first, last in available[-8:]) or "there is none"
    raise PositionUnavailable(
        f"expected a position of stream {key.stream!r} whose exact state is kept ({ranges}), got "
        f"{position}",
        available=[[*each] for each in available],
        got=position,
        **stream_facts(key.stream, histories[0].stream.head),
    )


def available_positions(histories: Iterable[History]) -> list[tuple[int, int]]:
    """The positions to which a stream can be rewound, as ascending ranges, first and last of each.

    Args:
        histories: as for `choose_history`.
    """
    return _merge([each for history in histories for each in history.past.available()])


def _merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges of whole numbers, of which no two touch."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return merged
