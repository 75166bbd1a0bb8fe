"""Watching streams: their outputs, committed by any worker, in order and without silent gaps.

A watch first subscribes, then reads the stream, so that nothing is committed in between unseen.
Whatever the channel loses, a full buffer or a broken connection, is noticed by the positions: of
the next output, or of the stream, which is read again whenever the watch was idle for a while. The
last chunk's outputs are then taken from its stored reply; of older ones only the positions are
known (`Gap`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

from service.core.errors import CarryError, ShuttingDown
from service.core.values import FloatRows, StoredReply, StreamHead, StreamKey, StreamState
from service.store.base import StateStore
from service.store.outputs import Output

MAX_BUFFERED: Final = 256
"""Outputs that one watch buffers."""

MAX_BUFFERED_BYTES: Final = 2**20

REORDER_S: Final = 0.05
"""How long an output waits for the one before it, which another worker may publish later."""


class Watched(NamedTuple):
    """The stream as the watch begins, and again when it is in another epoch.

    Attributes:
        head: None if the stream does not exist.
        position: outputs are delivered from here on.
    """

    head: StreamHead | None
    position: int


class Outputs(NamedTuple):
    """The outputs of one chunk.

    Attributes:
        start: position of its first event.
        head: the stream head after it.
        outputs: float32 [T, O].
    """

    start: int
    head: StreamHead
    outputs: FloatRows


class Gap(NamedTuple):
    """Positions from `start` up to `end` whose outputs are not delivered."""

    start: int
    end: int


class Ended(NamedTuple):
    """The last of a watch; the reason is `deleted`, `draining` or the code of an error."""

    reason: str


class Idle(NamedTuple):
    """Nothing happened for the interval of the watch."""


StreamEvent = Watched | Outputs | Gap | Ended
WatchEvent = StreamEvent | Idle


class Watch:
    """One watch of a stream, a `Receiver`; see `Watches.watch`.

    Args:
        start: the position up to which the watcher has all outputs; None for the current one.
    """

    def __init__(self, store: StateStore, key: StreamKey, start: int | None):
        self._store = store
        self._key = key
        self._start = start
        self._epoch: bytes | None = None
        self._position = 0
        self._buffer: deque[Output] = deque()
        self._bytes = 0
        self._must_read = False
        self._is_draining = False
        self._wake = asyncio.Event()

    def receive(self, output: Output) -> None:
        """Buffer an output; if there is no room, it is dropped, and the stream is read later."""
        size = 0 if output.reply is None else output.reply.outputs.nbytes
        if len(self._buffer) >= MAX_BUFFERED or self._bytes + size > MAX_BUFFERED_BYTES:
            self._must_read = True
        else:
            self._buffer.append(output)
            self._bytes += size
        self._wake.set()

    def resynchronize(self) -> None:
        """Read the stream, after what is buffered."""
        self._must_read = True
        self._wake.set()

    def drain(self) -> None:
        """End the watch, after what is buffered."""
        self._is_draining = True
        self._wake.set()

    async def follow(self, interval_s: float) -> AsyncIterator[WatchEvent]:
        """What happens to the stream, until it is deleted or the service stops.

        Args:
            interval_s: time between two `Idle` if nothing happens.
        """
        events = await self._begin()
        while True:
            for event in events:
                yield event
                if isinstance(event, Ended):
                    return
            if self._buffer:
                await self._await_order()
                events = await self._on_output(self._buffer.popleft())
            elif self._is_draining:
                events = [Ended("draining")]
            elif self._must_read:
                self._must_read = False
                events = await self._read()
            else:
                events = []
                self._wake.clear()
                try:
                    async with asyncio.timeout(interval_s):
                        await self._wake.wait()
                except TimeoutError:
                    # what the channel lost is noticed at the latest now
                    self._must_read = True
                    events = [Idle()]

    async def _await_order(self) -> None:
        """Wait a moment if the next output is not the one that is due, and sort what came."""
        first = self._buffer[0].reply
        if first is None or first.head.epoch != self._epoch:
            return
        if self._buffer[0].start > self._position:
            await asyncio.sleep(REORDER_S)
            if all(each.reply and each.reply.head.epoch == self._epoch for each in self._buffer):
                self._buffer = deque(sorted(self._buffer, key=lambda output: output.start))

    async def _begin(self) -> list[WatchEvent]:
        try:
            stored, reply = await self._store.load_with_reply(self._key)
        except CarryError as error:
            return [Ended(error.code)]
        if stored is None:
            return [Watched(None, 0)]
        self._epoch, self._position = stored.head.epoch, stored.head.position
        if self._start is not None:
            # a later position is one of another epoch
            self._position = min(self._start, self._position)
        return [Watched(stored.head, self._position), *self._catch_up(stored, reply)]

    async def _on_output(self, output: Output) -> list[WatchEvent]:
        reply = output.reply
        if reply is None:
            return await self._read()
        self._bytes -= reply.outputs.nbytes
        events: list[WatchEvent] = []
        if reply.head.epoch != self._epoch:
            # of a new stream, or published late by another worker: the store knows
            try:
                stored, _ = await self._store.load_with_reply(self._key)
            except CarryError as error:
                return [Ended(error.code)]
            if stored is None or stored.head.epoch != reply.head.epoch:
                return await self._read()
            events.append(self._enter(stored.head))
        if reply.head.position > self._position:
            events += self._deliver(output.start, reply)
        return events

    async def _read(self) -> list[WatchEvent]:
        """Compare with the stream in the store."""
        try:
            stored, reply = await self._store.load_with_reply(self._key)
        except CarryError as error:
            return [Ended(error.code)]
        if stored is None:
            return [] if self._epoch is None else [Ended("deleted")]
        events: list[WatchEvent] = []
        if stored.head.epoch != self._epoch:
            events.append(self._enter(stored.head))
        return events + self._catch_up(stored, reply)

    def _enter(self, head: StreamHead) -> WatchEvent:
        """Go on in another epoch, whose positions begin again."""
        if self._epoch is not None:
            self._position = 0
        self._epoch = head.epoch
        return Watched(head, self._position)

    def _catch_up(self, stored: StreamState, reply: StoredReply | None) -> list[WatchEvent]:
        """Deliver the stored reply of the last chunk, if it was missed."""
        if stored.head.position <= self._position:
            return []
        if reply is None or stored.last is None or reply.head != stored.head:
            gap = Gap(self._position, stored.head.position)
            self._position = stored.head.position
            return [gap]
        return self._deliver(stored.last.start, reply)

    def _deliver(self, start: int, reply: StoredReply) -> list[WatchEvent]:
        events: list[WatchEvent] = []
        if start > self._position:
            events.append(Gap(self._position, start))
        self._position = reply.head.position
        return [*events, Outputs(start, reply.head, reply.outputs)]


class Watches:
    """The watches of a worker."""

    def __init__(self, store: StateStore):
        self._store = store
        self._watches: set[Watch] = set()
        self._is_draining = False

    @asynccontextmanager
    async def watch(self, key: StreamKey, start: int | None) -> AsyncIterator[Watch]:
        """Watch a stream, which need not exist.

        Args:
            start: deliver outputs from this position on, as far as they are known; None for the
                current position.

        Raises:
            StoreUnavailable, ShuttingDown
        """
        if self._is_draining:
            raise ShuttingDown("the service is stopping")
        watch = Watch(self._store, key, start)
        self._watches.add(watch)
        channel = self._store.outputs
        try:
            await channel.subscribe(key, watch)
            yield watch
        finally:
            self._watches.discard(watch)
            channel.unsubscribe(key, watch)

    def drain(self) -> None:
        """End all watches."""
        self._is_draining = True
        for watch in self._watches:
            watch.drain()
