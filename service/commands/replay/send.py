"""Sends recorded events through a running service as live streams, one chunk of each in flight.

It asks for every stream's position first, so that a second replay resumes where the first ended.
The Python client (`carry_client`) retries, and detects a stream at another position: behind (the
store lost commits) or ahead (its reply is no longer stored); the replay continues from there. A
reply that cannot be correct is counted as a fault, and the replay continues, so that one run shows
all of them.

Everything here runs in one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from carry_client import (
    AsyncModel,
    AsyncStream,
    CarryError,
    ModelDescription,
    Problem,
    Reply,
    StreamMoved,
)
from carry_client.errors import AlreadyApplied
from service.commands.replay.events import ReplayError, StreamEvents

FloatRows = NDArray[np.float32]

ABSOLUTE: Final = 1e-5
RELATIVE: Final = 1e-5
"""The contract's bounds: |a - b| <= ABSOLUTE + RELATIVE |b|."""


def excess(actual: FloatRows, expected: FloatRows) -> NDArray[np.float64]:
    """|a - b| - RELATIVE |b| in float64; the contract holds if it is at most ABSOLUTE."""
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    return np.asarray(np.abs(a - b) - RELATIVE * np.abs(b))


@dataclass(frozen=True, slots=True)
class Pace:
    """Sizes and times of the chunks.

    Attributes:
        chunk: the least and the most events of a chunk, drawn uniformly between the two.
        seed: of the sizes; the same seed and stream give the same chunks.
        streams_in_flight: most streams with a chunk in flight at once.
        speed: times real time by the events' timestamps; None for as fast as possible.
    """

    chunk: tuple[int, int] = (1, 64)
    seed: int = 1
    streams_in_flight: int = 64
    speed: float | None = None


@dataclass(slots=True)
class Tally:
    """Counts of one replay.

    Attributes:
        events: applied events; those that were sent again after the store lost them count twice.
        chunks: applied chunks.
        replayed: replies marked `replayed`.
        retries: failed attempts that were repeated, by error code.
        sent_again: events that the store had lost.
        skipped: events whose outputs were not received, because their stored reply had expired.
        faults: replies and positions that cannot be correct.
        latencies_s: of every answered chunk, with its retries.
    """

    events: int = 0
    chunks: int = 0
    replayed: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    sent_again: int = 0
    skipped: int = 0
    faults: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0


class StreamReplay:
    """Position and outputs of one stream.

    Attributes:
        events: the stream's events.
        position: how many of them the service has consumed.
        start: its position before the replay.
        outputs: float32 [T, O], NaN if this run received none.
    """

    def __init__(self, events: StreamEvents, stream: AsyncStream, width: int, pace: Pace):
        self.events = events
        self.position = self.start = 0
        self.outputs = np.full((len(events), width), np.nan, np.float32)
        self._stream = stream
        self._chunk = pace.chunk
        self._random = Random(f"{pace.seed} {events.name}")  # noqa: S311

    def next_stop(self) -> int:
        """The position after the next chunk; every call draws its size again."""
        return min(self.position + self._random.randint(*self._chunk), len(self.events))

    async def refresh(self) -> int:
        """Ask for the stream's position, and continue from there.

        Raises:
            Problem
        """
        self.position = (await self._stream.refresh()).position
        return self.position

    async def send(self, stop: int) -> Reply | AlreadyApplied | StreamMoved | Problem:
        """Send the events up to a position.

        Returns:
            The reply, or the error after which the stream's position has to be asked for.

        Raises:
            Problem: the service rejected the chunk, or no attempt is left.
        """
        try:
            return await self._stream.send(self.events.events(self.position, stop))
        except (AlreadyApplied, StreamMoved) as error:
            return error
        except Problem as problem:
            if problem.code != "unreadable_reply":
                raise
            return problem


class Replay:
    """One replay of a set of streams.

    Args:
        model: of a client whose deadline bounds the retries of one chunk.
        description: the model's.
        streams: the events to send.
        pace: sizes and times of the chunks.
        advance: called with the number of events that were applied or skipped, negative if the
            store lost some.
    """

    def __init__(
        self,
        model: AsyncModel,
        description: ModelDescription,
        streams: Sequence[StreamEvents],
        pace: Pace,
        advance: Callable[[int], None] = lambda events: None,
    ) -> None:
        self._description, self._pace, self._advance = description, pace, advance
        self._slots = asyncio.Semaphore(pace.streams_in_flight)
        self._start_s = 0.0
        self._first_ms = 0
        self.tally = Tally()
        # without a buffer the client raises instead of sending events again by itself, so that
        # the outputs of all that are sent again are seen
        self.streams = [
            StreamReplay(each, model.stream(each.name, buffer_events=0), description.width, pace)
            for each in streams
        ]

    async def run(self) -> None:
        """Send everything that is not consumed yet, and check the positions at the end.

        Raises:
            ReplayError: the service rejected a chunk, or was unavailable until the deadline.
        """
        with _counted_retries(self.tally.retries):
            await self._each(self._ask_start)
            waiting = [each for each in self.streams if each.position < len(each.events)]
            self._first_ms = min(
                (each.events.time_ms(each.position) for each in waiting), default=0
            )
            self._start_s = time.monotonic()
            await self._each(self._send_all)
            self.tally.wall_s = time.monotonic() - self._start_s
            await self._each(self._check_position)

    async def _each(self, work: Callable[[StreamReplay], Coroutine[Any, Any, None]]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for stream in self.streams:
                    tasks.create_task(work(stream))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group

    async def _ask_start(self, stream: StreamReplay) -> None:
        async with self._slots:
            stream.start = await self._refresh(stream)
        self._advance(min(stream.start, len(stream.events)))

    async def _check_position(self, stream: StreamReplay) -> None:
        async with self._slots:
            position, end = await self._refresh(stream), len(stream.events)
        if position != end:
            name = stream.events.name
            self.tally.faults.append(f"stream {name!r}: expected position {end}, got {position}")

    async def _send_all(self, stream: StreamReplay) -> None:
        while stream.position < len(stream.events):
            stop = stream.next_stop()
            if self._pace.speed is not None:
                due_s = (stream.events.time_ms(stop - 1) - self._first_ms) / 1000 / self._pace.speed
                await asyncio.sleep(self._start_s + due_s - time.monotonic())
            # a semaphore is fair: streams take turns
            async with self._slots:
                before = stream.position
                await self._send_chunk(stream, stop)
            self._advance(min(stream.position, len(stream.events)) - before)

    async def _send_chunk(self, stream: StreamReplay, stop: int) -> None:
        """Send one chunk, check its reply, and move the stream."""
        tally, start = self.tally, stream.position
        chunk = f"stream {stream.events.name!r}, chunk at {start}: "
        sent_s = time.monotonic()
        try:
            answer = await stream.send(stop)
        except Problem as problem:
            raise _replay_error(problem, chunk) from problem
        if isinstance(answer, Reply):
            tally.latencies_s.append(time.monotonic() - sent_s)
            self._store_outputs(stream, stop, answer, chunk)
            tally.replayed += answer.is_replayed
            tally.chunks += 1
            tally.events += stop - start
            stream.position = stop
            return
        if not isinstance(answer, (AlreadyApplied, StreamMoved)):
            tally.faults.append(f"{chunk}{answer.detail}")
        position = await self._refresh(stream)
        if position < start:
            tally.sent_again += start - position
        elif position == start and not isinstance(answer, StreamMoved):
            raise ReplayError(f"{chunk}expected a reply, got {answer}")
        else:
            tally.skipped += min(position, len(stream.events)) - start

    def _store_outputs(self, stream: StreamReplay, stop: int, reply: Reply, chunk: str) -> None:
        outputs = self._description.pack(reply.outputs, stop - stream.position)
        if not np.isfinite(outputs).all():
            self.tally.faults.append(f"{chunk}expected finite outputs")
        stored = stream.outputs[stream.position : stop]
        is_stored = ~np.isnan(stored).any(axis=1)
        if (excess(outputs[is_stored], stored[is_stored]) > ABSOLUTE).any():
            self.tally.faults.append(f"{chunk}other outputs than before for the same events")
        stored[:] = outputs

    async def _refresh(self, stream: StreamReplay) -> int:
        try:
            return await stream.refresh()
        except CarryError as error:
            raise _replay_error(error, f"stream {stream.events.name!r}: ") from error


def _replay_error(error: CarryError, what: str = "") -> ReplayError:
    """The error that ends a replay after the last attempt of a request."""
    if isinstance(error, Problem) and error.is_retryable:
        return ReplayError(f"{what}{error}; start again to resume from the streams' positions")
    return ReplayError(f"{what}the service rejected it: {error}")


@contextmanager
def _counted_retries(retries: Counter[str]) -> Iterator[None]:
    """Count the failed attempts that the client repeats and logs."""
    logger = logging.getLogger("carry_client")
    before = logger.level, logger.propagate

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            code = getattr(record, "code", None)
            if code is not None:
                retries[code] += 1

    handler = Handler()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.level, logger.propagate = before
        logger.removeHandler(handler)
