"""Watching streams: their outputs, committed by any worker, in order and without silent gaps.

A watch first subscribes, then reads the stream, so that nothing is committed in between unseen.
Whatever is lost, by a watch that is slower than its stream or by a broken connection, is noticed by
the positions: of the next output, or of the stream, which is read again whenever the watch was idle
for a while. The last chunk's outputs are then taken from its stored reply; of older ones only the
positions are known (`Gap`).

The latest outputs of a stream are buffered once for all its watches, which read them at their own
pace, by sequence numbers. Neither a watch that waits for its client nor their number costs anything
when an output arrives, and the memory is bounded by the stream: the oldest outputs are dropped for
new ones.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, Final, NamedTuple

from service.access.caller import Caller, Verb
from service.core.errors import CarryError, ShuttingDown
from service.core.values import FloatRows, StoredReply, StreamHead, StreamKey, StreamState
from service.pipeline.recorder import Recorder
from service.pipeline.turns import Turns
from service.store.base import StateStore
from service.store.capabilities import OutputChannel, PublishedOutput

REORDER_S: Final = 0.05
"""How long an output waits for the one before it, which another worker may publish later."""

MAX_BUFFERED: Final = 256
"""Outputs that are buffered for one stream."""

MAX_BUFFERED_BYTES: Final = 2**20

MAX_AT_ONCE_BYTES: Final = 16 * 1024
"""Outputs that a watch reads in one turn, unless a single one has more."""


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
        fingerprint: of the version that computed them.
        encoded: what transports made of it, by their options; shared by the watches of a stream.
    """

    start: int
    head: StreamHead
    outputs: FloatRows
    fingerprint: bytes
    encoded: dict[Any, bytes]


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


class BufferedOutput(NamedTuple):
    """An output and what transports made of it, so that each encodes it once for all watches.

    Attributes:
        encoded: by the options of the transport.
    """

    output: PublishedOutput
    encoded: dict[Any, bytes]


class OutputBuffer:
    """Buffer of one stream, a `Receiver`.

    Attributes:
        watches: the watches that read it.
        turns: shared by all watches of the worker.
        end: sequence number of the next output.
    """

    def __init__(self, turns: Turns):
        self.watches: set[Watch] = set()
        self.turns = turns
        self._buffered: deque[BufferedOutput] = deque()
        self._bytes = 0
        self.end = 0
        # ordered, so that the watch that has waited longest is first
        self._idle: dict[asyncio.Future[None], None] = {}

    def receive(self, output: PublishedOutput) -> None:
        """Buffer an output, in place of the oldest ones if there is no room."""
        self._buffered.append(BufferedOutput(output, {}))
        self._bytes += _size(output)
        self.end += 1
        while len(self._buffered) > MAX_BUFFERED or self._bytes > MAX_BUFFERED_BYTES:
            self._bytes -= _size(self._buffered.popleft().output)
        for turn in self._idle:
            self.turns.request(turn)
        self._idle.clear()

    def resynchronize(self) -> None:
        """Outputs may have been lost: the watches read the stream."""
        for watch in self.watches:
            watch.resynchronize()

    def read(self, start: int) -> tuple[list[BufferedOutput], int]:
        """The outputs from a sequence number on, as many as are read at once, and the sequence
        number after them; those that were dropped are skipped."""
        first = max(start, self.end - len(self._buffered))
        outputs: list[BufferedOutput] = []
        size = 0
        for each in islice(self._buffered, first - self.end + len(self._buffered), None):
            size += _size(each.output)
            if outputs and size > MAX_AT_ONCE_BYTES:
                break
            outputs.append(each)
        return outputs, first + len(outputs)

    async def wait(self, start: int, turn: asyncio.Future[None]) -> None:
        """Wait for a turn, which is requested once there is an output from `start` on."""
        if start < self.end:
            self.turns.request(turn)
        else:
            self._idle[turn] = None
        try:
            await turn
        finally:
            self._idle.pop(turn, None)


class Watch:
    """One watch of a stream; see `Watches.watch`.

    Args:
        buffer: the outputs of the stream.
        start: the position up to which the watcher has all outputs; None for the current one.
    """

    def __init__(self, store: StateStore, key: StreamKey, start: int | None, buffer: OutputBuffer):
        self._store = store
        self._key = key
        self._start = start
        self._buffer = buffer
        self._next_output = buffer.end
        self._turn: asyncio.Future[None] | None = None
        self._epoch: bytes | None = None
        self._position = 0
        self._must_read = False
        self._is_draining = False
        self._error: CarryError | None = None

    def resynchronize(self) -> None:
        """Read the stream, after what is buffered."""
        self._must_read = True
        self._wake()

    def drain(self) -> None:
        """End the watch, after what is buffered."""
        self._is_draining = True
        self._wake()

    def end(self, error: CarryError) -> None:
        """End the watch at once, with this error."""
        self._error = error
        self._wake()

    async def follow(self, interval_s: float) -> AsyncIterator[list[WatchEvent]]:
        """Yield what happens to the stream, some events at a time.

        Ends when the stream is deleted or the service stops.

        Args:
            interval_s: time between two `Idle` if nothing happens.
        """
        is_begun = False
        while True:
            try:
                events = await (self._next() if is_begun else self._begin())
            except CarryError as error:
                events = [Ended(error.code)]
            is_begun = True
            if events:
                yield events
                if isinstance(events[-1], Ended):
                    return
            await self._wait(interval_s)

    async def _wait(self, interval_s: float) -> None:
        """Wait for a turn, until something happened or the interval is over."""
        loop = asyncio.get_running_loop()
        self._turn = turn = loop.create_future()
        if self._must_read or self._is_draining or self._error is not None:
            self._buffer.turns.request(turn)
        timer = loop.call_later(interval_s, self._buffer.turns.request, turn)
        try:
            await self._buffer.wait(self._next_output, turn)
        finally:
            timer.cancel()
            self._turn = None

    def _wake(self) -> None:
        if self._turn is not None:
            self._buffer.turns.request(self._turn)

    async def _next(self) -> list[WatchEvent]:
        if self._error is not None:
            return [Ended(self._error.code)]
        if self._next_output < self._buffer.end:
            return await self._on_outputs(await self._read_buffer())
        if self._is_draining:
            return [Ended("draining")]
        if self._must_read:
            self._must_read = False
            return await self._read()
        # what the channel lost is noticed at the latest now
        self._must_read = True
        return [Idle()]

    async def _read_buffer(self) -> list[BufferedOutput]:
        """The buffered outputs, in the order of their positions."""
        expected = self._next_output
        outputs, self._next_output = self._buffer.read(expected)
        if not outputs:
            # even the latest output is too large for the buffer
            self._must_read = True
            return []
        is_early = self._is_of_epoch(outputs[:1]) and outputs[0].output.start > self._position
        if is_early and self._next_output - len(outputs) == expected:
            # nothing was dropped: another worker may publish the one before it a moment later
            await asyncio.sleep(REORDER_S)
            more, self._next_output = self._buffer.read(self._next_output)
            outputs += more
        if self._is_of_epoch(outputs):
            outputs.sort(key=lambda each: each.output.start)
        return outputs

    def _is_of_epoch(self, outputs: list[BufferedOutput]) -> bool:
        """Whether all of these are outputs of the current epoch."""
        replies = [each.output.reply for each in outputs]
        return all(reply is not None and reply.head.epoch == self._epoch for reply in replies)

    async def _begin(self) -> list[WatchEvent]:
        stored, reply = await self._store.load_with_reply(self._key)
        if stored is None:
            return [Watched(None, 0)]
        self._epoch, self._position = stored.head.epoch, stored.head.position
        if self._start is not None:
            # a later position is one of another epoch
            self._position = min(self._start, self._position)
        return [Watched(stored.head, self._position), *self._catch_up(stored, reply)]

    async def _on_outputs(self, outputs: list[BufferedOutput]) -> list[WatchEvent]:
        events: list[WatchEvent] = []
        for (_, start, reply, fingerprint), encoded in outputs:
            try:
                if reply is None:
                    events += await self._read()
                elif reply.head.epoch != self._epoch:
                    events += await self._read(reply.head.epoch)
            except CarryError as error:
                events.append(Ended(error.code))
            if events and isinstance(events[-1], Ended):
                break
            if reply and reply.head.epoch == self._epoch and reply.head.position > self._position:
                events += self._deliver(start, reply, fingerprint, encoded)
        return events

    async def _read(self, epoch: bytes | None = None) -> list[WatchEvent]:
        """Compare with the stream in the store.

        Args:
            epoch: that of an output, which follows if it is the stream's; otherwise the output was
                published late by another worker.
        """
        stored, reply = await self._store.load_with_reply(self._key)
        if stored is None:
            return [] if self._epoch is None else [Ended("deleted")]
        events: list[WatchEvent] = []
        if stored.head.epoch != self._epoch:
            events.append(self._enter(stored.head))
        return events if stored.head.epoch == epoch else events + self._catch_up(stored, reply)

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
        return self._deliver(stored.last.start, reply, stored.fingerprint, {})

    def _deliver(
        self, start: int, reply: StoredReply, fingerprint: bytes, encoded: dict[Any, bytes]
    ) -> list[WatchEvent]:
        outputs = Outputs(start, reply.head, reply.outputs, fingerprint, encoded)
        gap = [Gap(self._position, start)] if start > self._position else []
        self._position = reply.head.position
        return [*gap, outputs]


class Watches:
    """The watches of a worker."""

    def __init__(self, store: StateStore, channel: OutputChannel, recorder: Recorder):
        self._store = store
        self._channel = channel
        self._recorder = recorder
        self._buffers: dict[StreamKey, OutputBuffer] = {}
        self._watches: set[Watch] = set()
        self._turns = Turns()
        self._is_draining = False

    @asynccontextmanager
    async def watch(
        self, caller: Caller, key: StreamKey, start: int | None
    ) -> AsyncIterator[Watch]:
        """Watch a stream, which need not exist.

        Args:
            start: deliver outputs from this position on, as far as they are known; None for the
                current position.

        Raises:
            Forbidden, StoreUnavailable, StoreRefused, ShuttingDown
        """
        caller.check((Verb.WATCH,), key.model, key.stream)
        if self._is_draining:
            raise ShuttingDown("the service is stopping")
        buffer = self._buffers.setdefault(key, OutputBuffer(self._turns))
        watch = Watch(self._store, key, start, buffer)
        buffer.watches.add(watch)
        self._watches.add(watch)
        self._recorder.record_watchers(key.model, 1)
        try:
            await self._channel.subscribe(key, buffer)
            yield watch
        finally:
            self._recorder.record_watchers(key.model, -1)
            self._watches.discard(watch)
            buffer.watches.discard(watch)
            if not buffer.watches:
                del self._buffers[key]
                self._channel.unsubscribe(key, buffer)

    def drain(self) -> None:
        """End all watches."""
        self._is_draining = True
        for watch in self._watches:
            watch.drain()


def _size(output: PublishedOutput) -> int:
    return 0 if output.reply is None else output.reply.outputs.nbytes
