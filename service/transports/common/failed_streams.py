"""Which streams of one connection accept no chunk without a position, because a chunk failed.

Chunks that are pipelined without a position would silently be applied in place of one that failed.
So after a failure such chunks are rejected (`previous_failed`) until a chunk that cannot take
another's place has been applied: one with a position, or one that starts the stream over.
"""

from __future__ import annotations

from typing import Final

MAX_FAILED_STREAMS: Final = 1024
"""Streams of a connection that are remembered as failed; beyond it, no stream of this connection
accepts chunks without a position."""


class FailedStreams:
    """The streams of one connection in which a chunk failed; `in` is true for each of them."""

    __slots__ = ("_is_full", "_names")

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._is_full = False

    def __contains__(self, stream: str) -> bool:
        return self._is_full or stream in self._names

    def add(self, stream: str) -> None:
        """Remember that a chunk of a stream failed."""
        self._names.add(stream)
        if len(self._names) > MAX_FAILED_STREAMS:
            self._names.clear()
            self._is_full = True

    def discard(self, stream: str) -> None:
        """Forget it: a chunk that cannot take another's place has been applied."""
        self._names.discard(stream)
