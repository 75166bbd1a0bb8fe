"""The order of pipelined chunks on one connection, for WebSockets and gRPC alike.

Each chunk gets one outcome, a reply or an error, and the outcomes of a stream leave in the order of
its chunks. A chunk with a position may start at once: if one before it fails, the pipeline rejects
it by its position. One without would silently be applied in place of one that failed. So it starts
once all earlier chunks of its stream have been answered, and after a failed one it is rejected
(`previous_failed`) until a chunk that cannot take another's place has been applied: one with a
position, or one that starts the stream over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

from service.core.errors import PreviousFailed

MAX_FAILED_STREAMS: Final = 1024
"""Streams of a connection that are remembered as failed; beyond it, no stream of this connection
accepts chunks without a position."""


class PendingChunk:
    """A received chunk that has not been answered.

    Attributes:
        stream: its stream.
        appends: whether it could be applied in place of another; known when it is ready.
        outcome: its reply or error, once it is known.
    """

    __slots__ = ("appends", "outcome", "stream")

    def __init__(self, stream: str):
        self.stream = stream
        self.appends = True
        self.outcome: Any = None


T = TypeVar("T", bound=PendingChunk)


class _PendingChunks(Generic[T]):
    """The chunks of one stream, in order.

    Attributes:
        waiting: those that are ready and have not started.
    """

    __slots__ = ("is_starting", "unanswered", "waiting")

    def __init__(self) -> None:
        self.unanswered: deque[T] = deque()
        self.waiting: deque[T] = deque()
        self.is_starting = False


class StreamOrder(Generic[T]):
    """The unanswered chunks of one connection.

    Args:
        begin: starts a chunk whose turn it is.
        reject: answers a chunk that may not start, by calling `answer`.
        release: sends the outcome of a chunk.
        overlaps: whether a chunk with a position starts before earlier ones have been answered.

    Attributes:
        unanswered: number of chunks that have not been answered.
        is_cleared: whether the client disconnected.
    """

    def __init__(
        self,
        begin: Callable[[T], None],
        reject: Callable[[T, PreviousFailed], None],
        release: Callable[[T], None],
        *,
        overlaps: bool,
    ):
        self._begin = begin
        self._reject = reject
        self._release = release
        self._overlaps = overlaps
        self._streams: dict[str, _PendingChunks[T]] = {}
        self._failed: set[str] = set()
        self._forgot_failed = False
        self.unanswered = 0
        self.is_cleared = False

    def __iter__(self) -> Iterator[T]:
        """The chunks that have not been answered."""
        for chunks in self._streams.values():
            yield from chunks.unanswered

    def add(self, chunk: T) -> T:
        """Add a chunk that was received."""
        chunks = self._streams.get(chunk.stream)
        if chunks is None:
            chunks = self._streams[chunk.stream] = _PendingChunks()
        chunks.unanswered.append(chunk)
        self.unanswered += 1
        return chunk

    def set_ready(self, chunk: T) -> None:
        """Start a chunk as soon as it is its turn; `appends` is set."""
        chunks = self._streams[chunk.stream]
        chunks.waiting.append(chunk)
        self._start(chunks)

    def record_result(self, chunk: T, *, failed: bool) -> None:
        """Record whether a chunk was applied or failed; not for dry runs, which change nothing."""
        if failed:
            self._failed.add(chunk.stream)
            if len(self._failed) > MAX_FAILED_STREAMS:
                self._failed.clear()
                self._forgot_failed = True
        elif not chunk.appends:
            self._failed.discard(chunk.stream)

    def answer(self, chunk: T, outcome: object) -> None:
        """Send an outcome when it is its turn, and start the chunks that waited for it."""
        if self.is_cleared:
            return
        chunk.outcome = outcome
        chunks = self._streams[chunk.stream]
        unanswered = chunks.unanswered
        while unanswered and unanswered[0].outcome is not None:
            self.unanswered -= 1
            self._release(unanswered.popleft())
        if not unanswered:
            self._streams.pop(chunk.stream, None)
        elif not chunks.is_starting:
            self._start(chunks)

    def clear(self) -> None:
        """Forget all chunks: the client disconnected."""
        self._streams.clear()
        self.is_cleared = True

    def _start(self, chunks: _PendingChunks[T]) -> None:
        # not recursive, since a window may have thousands of chunks that are rejected one by one
        chunks.is_starting = True
        while chunks.waiting:
            chunk = chunks.waiting[0]
            waits = chunk.appends or not self._overlaps
            if waits and chunks.unanswered[0] is not chunk:
                break
            chunks.waiting.popleft()
            if chunk.appends and (self._forgot_failed or chunk.stream in self._failed):
                detail = (
                    "expected a chunk with a position, or one that starts the stream over, since "
                    "an earlier chunk of the stream failed on this connection"
                )
                self._reject(chunk, PreviousFailed(detail, stream=chunk.stream))
            else:
                self._begin(chunk)
        chunks.is_starting = False
