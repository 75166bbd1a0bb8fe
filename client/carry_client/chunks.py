"""Chunks of a source: cut by number of events, or earlier when the oldest event has waited."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from carry_client.calls import END, LATE, Call, Open, Read
from carry_client.errors import PositionAhead, StreamRolledBack
from carry_client.steps import Steps, cut, is_sliceable, length, to_steps
from carry_client.types import AsyncReplayFrom, AsyncSource, Events, Head, Json

_BLOCK_EVENTS: Final = 1024


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive events of a stream.

    Attributes:
        start: the position of the first event.
        is_final: no event follows; only such a chunk may be empty.
        resets: ascending indexes of the events before which the state is reset.
    """

    start: int
    steps: Steps
    is_final: bool = False
    resets: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """The position after it."""
        return self.start + len(self.steps)


class ChunkReader:
    """Reads chunks from a source, one task at a time."""

    def __init__(
        self,
        source: AsyncSource,
        position: int,
        chunk_events: int,
        linger_s: float | None,
        clock: Callable[[], float],
        resets: Sequence[int] = (),
    ) -> None:
        """Nothing is read yet.

        Args:
            position: of the source's first event.
            linger_s: longest wait of an event for those after it; None without a limit.
            resets: ascending positions of the events before which the state is reset.
        """
        self._resets = resets
        self._source, self._position = source, position
        self._chunk_events, self._linger_s, self._clock = chunk_events, linger_s, clock
        self._reader: Any = None
        self._rest: Steps = []
        self._is_exhausted = False

    def close(self) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.close()

    def skip_to(self, position: int) -> Call[None]:
        """Drop the events before a position.

        Raises:
            ValueError: the source has fewer.
        """
        if is_sliceable(self._source):
            start = min(position - self._position, length(self._source))
            self._source = cut(self._source, start, length(self._source))
            self._position += start
        while self._position < position:
            if self._is_exhausted:
                raise ValueError(
                    f"the source ends at position {self._position}, and the stream is at "
                    f"{position}; first_position=None appends the source"
                )
            if not len(self._rest):
                yield from self._read(None)
            dropped = min(position - self._position, len(self._rest))
            self._rest, self._position = self._rest[dropped:], self._position + dropped

    def next_chunk(self, most: int | None = None) -> Call[Chunk | None]:
        """The next chunk; None at the end.

        Args:
            most: events that it may have at most, besides the limit of all chunks.
        """
        size = min(self._chunk_events, most or self._chunk_events)
        end_s = None
        while len(self._rest) < size and not self._is_exhausted:
            if len(self._rest) and self._linger_s is not None and end_s is None:
                end_s = self._clock() + self._linger_s
            wait_s = None if end_s is None else max(0.0, end_s - self._clock())
            if not (yield from self._read(wait_s)):
                break
        if not len(self._rest):
            return None
        start, steps = self._position, self._rest[:size]
        own = self._resets[bisect_left(self._resets, start) :]
        own = own[: bisect_left(own, start + len(steps))]
        chunk = Chunk(start, steps, resets=tuple(position - start for position in own))
        self._rest, self._position = self._rest[size:], chunk.end
        return chunk

    @property
    def end(self) -> Chunk:
        """The chunk that ends the stream, without events."""
        return Chunk(self._position, self._rest[:0], is_final=True)

    def _read(self, wait_s: float | None) -> Call[bool]:
        """Read one item of the source; False if none came in time."""
        if self._reader is None:
            source = blocks(self._source) if is_sliceable(self._source) else self._source
            self._reader = yield Open(source, is_timed=self._linger_s is not None)
        item = yield Read(self._reader, wait_s)
        if item is LATE:
            return False
        if item is END:
            self._is_exhausted = True
        else:
            self._append(to_steps(_as_block(item)))
        return True

    def _append(self, steps: Steps) -> None:
        rest = self._rest
        if not len(rest):
            self._rest = steps
        elif isinstance(rest, list) and isinstance(steps, list):
            self._rest = rest + steps
        elif isinstance(rest, np.ndarray) and isinstance(steps, np.ndarray):
            self._rest = np.concatenate([rest, steps])
        else:
            raise TypeError("expected either events or rows of encoded values, got both")


def blocks(source: Any) -> Iterator[Any]:
    """The parts of a source of any length, in order."""
    for start in range(0, length(source), _BLOCK_EVENTS):
        yield cut(source, start, start + _BLOCK_EVENTS)


def _as_block(item: Any) -> Any:
    """An item of an iterable as a block: one event, one row, or a block already."""
    if isinstance(item, np.ndarray) and item.ndim == 1:
        return item[None]
    is_event = hasattr(item, "keys") and not hasattr(item, "iloc")
    return [item] if is_event else item


def replay_source(source: Events, first: int, name: str) -> AsyncReplayFrom:
    """The function that reads a source again, which can be read from any place."""

    def replay_from(position: int) -> Events:
        if position < first:
            detail = f"is at an earlier position than the source, which begins at {first}"
            raise StreamRolledBack(detail, name, Head(first), Head(position))
        return cut(source, position - first, length(source))

    return replay_from


def source_gap(name: str, head: Head, first: int) -> PositionAhead:
    """The error for a source that begins at `first`, after the stream's position."""
    detail = (
        f"stream {name!r}: expected a source that begins at {head.position}, the stream's "
        f"position, or before, got first_position={first}; send events {head.position} to "
        f"{first - 1} before, give Model.stream a replay_from that has them, or append the source "
        "with first_position=None"
    )
    document: dict[str, Json] = {
        "stream": name,
        "expected": head.position,
        "got": first,
        "position": head.position,
        "epoch": head.epoch,
        "tag": head.tag,
    }
    return PositionAhead(0, "position_ahead", detail, document=document)
