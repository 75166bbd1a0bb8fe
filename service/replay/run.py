"""The replay: sends all streams concurrently, one chunk of each in flight, until all are sent.

It asks for every stream's position first, so that a second replay resumes where the first ended.
The Python client (`carry_client`) retries, and notices a stream that is elsewhere: back (the store
lost commits) or forward (its reply is no longer stored); the replay continues from there. A reply
that cannot be correct is counted as a fault, and the replay continues, so that one run shows all of
them.

Everything here runs in one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np

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
from service.replay.checks import agree, check_duplicates, check_outputs
from service.replay.client import FloatRows, Service
from service.replay.options import ReplayError, ReplayOptions
from service.replay.schedule import Cursor, Schedule
from service.replay.source import StreamEvents
from service.replay.tally import RetryCount, Tally

REPORT_PERIOD_S = 0.2


@dataclass(slots=True)
class StreamProgress:
    """Progress and outputs of one stream.

    Attributes:
        number: its place among the streams, which gives its address.
        stream: the client's.
        cursor: its position and next chunk.
        outputs: float32 [T, O], NaN if this run received none.
        start: its position before the replay.
    """

    number: int
    stream: AsyncStream
    cursor: Cursor
    outputs: FloatRows
    start: int = 0


class Watcher(Protocol):
    """Shows a running replay."""

    def begin(self, total: int, done: int) -> None:
        """`done` of `total` events were consumed before the replay."""

    def show(self, done: int, tally: Tally) -> None:
        """`done` events are consumed now."""


async def describe(service: Service, limit_s: float) -> ModelDescription:
    """Fetch the model's description, waiting for a service that is not available yet.

    Raises:
        ReplayError: no service, no such model, or one without an event schema.
    """
    try:
        return await service.describe()
    except Problem as problem:
        raise _failed(problem, limit_s) from problem


class Replay:
    """One replay of a set of streams."""

    def __init__(
        self,
        service: Service,
        model: ModelDescription,
        streams: list[StreamEvents],
        options: ReplayOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._model = model
        self._options = options
        self._clock = clock
        self._random = Random(options.seed)  # noqa: S311
        self._last_answer_s = 0.0
        self.tally = Tally()
        self.progress = {
            stream.name: StreamProgress(
                number,
                service.stream(stream.name, number),
                Cursor(stream, options.chunk_min, options.chunk_max, options.seed),
                np.full((len(stream), model.width), np.nan, np.float32),
            )
            for number, stream in enumerate(streams)
        }

    async def run(self, watcher: Watcher) -> None:
        """Send everything that is not consumed yet; once per replay.

        Raises:
            ReplayError: the service refused, or was unavailable for longer than `patience_s`.
        """
        try:
            with RetryCount(self.tally):
                await self._ask_positions()
                watcher.begin(self._total(), self._done())
                async with asyncio.TaskGroup() as tasks:
                    showing = tasks.create_task(self._show(watcher))
                    try:
                        await self._send_all()
                    finally:
                        showing.cancel()
            watcher.show(self._done(), self.tally)
        except ExceptionGroup as group:
            raise _first(group) from group

    async def check_positions(self) -> None:
        """Ask for every stream's position; one that is not at its end is a fault."""
        for name, position in (await self._positions()).items():
            end = len(self.progress[name].cursor.events)
            if position != end:
                self.tally.fault(f"stream {name!r}: expected position {end}, got {position}")

    async def _ask_positions(self) -> None:
        for name, position in (await self._positions()).items():
            stream_progress = self.progress[name]
            stream_progress.cursor.move(position)
            stream_progress.start = position

    async def _positions(self) -> dict[str, int]:
        slots = asyncio.Semaphore(self._options.streams_in_flight)

        async def ask(name: str) -> int:
            async with slots:
                return await self._refresh(name)

        try:
            async with asyncio.TaskGroup() as tasks:
                requests = {name: tasks.create_task(ask(name)) for name in self.progress}
        except ExceptionGroup as group:
            raise _first(group) from group
        return {name: task.result() for name, task in requests.items()}

    async def _refresh(self, name: str) -> int:
        """Ask for a stream's position, and continue from there."""
        try:
            return (await self.progress[name].stream.refresh()).position
        except Problem as problem:
            raise _failed(problem, self._options.patience_s, f"stream {name!r}: ") from problem

    async def _send_all(self) -> None:
        options = self._options
        cursors = [stream_progress.cursor for stream_progress in self.progress.values()]
        most = max(1, min(options.per_request, options.streams_in_flight))
        slots = asyncio.Semaphore(max(1, options.streams_in_flight // most))
        schedule = Schedule(cursors, options.speed, self._clock)
        start_s = self._last_answer_s = self._clock()

        async def deliver(due: list[Cursor]) -> None:
            try:
                await self._deliver(due)
                for cursor in due:
                    schedule.give_back(cursor)
            finally:
                slots.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await slots.acquire()
                    due = await schedule.take(most)
                    if not due:
                        break
                    tasks.create_task(deliver(due))
        finally:
            self.tally.wall_s = self._clock() - start_s

    async def _deliver(self, cursors: list[Cursor]) -> None:
        """Send the next chunk of each stream, some twice at once, and move the streams."""
        duplicates = [c for c in cursors if self._random.random() < self._options.duplicates]
        self.tally.duplicates += len(duplicates)
        retries = self.tally.retries
        answered, copies = await asyncio.gather(
            self._send(cursors), asyncio.gather(*(self._send_copy(c) for c in duplicates))
        )
        smooth = retries == self.tally.retries
        for cursor, copy in zip(duplicates, copies, strict=True):
            first = answered[cursor.name]
            self.tally.fault(check_duplicates(first, copy, cursor.position, smooth=smooth))
            if isinstance(first, AlreadyApplied) and isinstance(copy, Reply):
                answered[cursor.name] = copy
            elif isinstance(copy, Reply):
                self.tally.replayed += copy.is_replayed
        for cursor in cursors:
            await self._accept(cursor, answered[cursor.name])

    async def _send(self, cursors: list[Cursor]) -> dict[str, Reply | CarryError]:
        """The reply to each stream's next chunk, or the client's error."""
        groups: dict[int, list[StreamProgress]] = {}
        for cursor in cursors:
            progress = self.progress[cursor.name]
            groups.setdefault(progress.number % len(self._service.models), []).append(progress)
        calls = (self._send_group(self._service.models[at], each) for at, each in groups.items())
        return {
            name: reply for each in await asyncio.gather(*calls) for name, reply in each.items()
        }

    async def _send_group(
        self, model: AsyncModel, group: list[StreamProgress]
    ) -> dict[str, Reply | CarryError]:
        sent_s = self._clock()
        answers: dict[str, Reply | CarryError]
        try:
            if len(group) == 1:
                (only,) = group
                answers = {only.stream.name: await only.stream.send(only.cursor.chunk())}
            else:
                answers = await model.send_many(
                    {each.stream: each.cursor.chunk() for each in group}
                )
        except CarryError as error:
            answers = {each.stream.name: error for each in group}
        self.tally.requests += 1
        if any(isinstance(answer, Reply) for answer in answers.values()):
            now_s = self._clock()
            self.tally.latencies_s.append(now_s - sent_s)
            self.tally.silence_s = max(self.tally.silence_s, now_s - self._last_answer_s)
            self._last_answer_s = now_s
        return answers

    async def _send_copy(self, cursor: Cursor) -> Reply | Problem:
        number = self.progress[cursor.name].number + 1
        self.tally.requests += 1
        return await self._service.send_copy(self._model, cursor, number, self.tally.retry)

    async def _accept(self, cursor: Cursor, answer: Reply | CarryError) -> None:
        """Check the answer to a stream's chunk, and move the stream.

        Raises:
            ReplayError: the service refused, or no attempt is left.
        """
        tally, start, steps = self.tally, cursor.position, cursor.size
        if isinstance(answer, Reply):
            tally.fault(check_outputs(answer, start))
            tally.replayed += answer.is_replayed
            self._store_outputs(cursor, start, answer)
            tally.chunks += 1
            tally.events += steps
            cursor.advance(answer.position)
            return
        chunk = f"stream {cursor.name!r}, chunk at {start}: "
        if isinstance(answer, Problem) and not isinstance(answer, AlreadyApplied):
            if answer.code != "unreadable_reply":
                raise _failed(answer, self._options.patience_s, chunk) from answer
            tally.fault(f"{chunk}{answer.detail}")
        position = await self._refresh(cursor.name)
        if position < start:
            tally.fell_back += 1
            tally.lost += start - position
        else:
            tally.skipped += min(position, len(cursor.events)) - start
        if position == start and not isinstance(answer, StreamMoved):
            raise ReplayError(f"{chunk}expected a reply, got {answer}")
        cursor.move(position)

    def _store_outputs(self, cursor: Cursor, start: int, reply: Reply) -> None:
        outputs = self._model.pack(reply.outputs, cursor.size)
        stored = self.progress[cursor.name].outputs[start : start + len(outputs)]
        is_stored = ~np.isnan(stored).any(axis=1)
        if not agree(outputs[is_stored], stored[is_stored]):
            self.tally.fault(
                f"stream {cursor.name!r}, chunk at {start}: other outputs than before for "
                "the same events"
            )
        stored[:] = outputs

    async def _show(self, watcher: Watcher) -> None:
        while True:
            watcher.show(self._done(), self.tally)
            await asyncio.sleep(REPORT_PERIOD_S)

    def _total(self) -> int:
        return sum(len(stream_progress.cursor.events) for stream_progress in self.progress.values())

    def _done(self) -> int:
        return self._total() - sum(
            stream_progress.cursor.remaining for stream_progress in self.progress.values()
        )


def _failed(problem: Problem, patience_s: float, what: str = "") -> ReplayError:
    """The error that ends a replay after the last attempt of a request."""
    if not problem.is_retryable:
        return ReplayError(f"{what}the service refused: {problem}")
    return ReplayError(
        f"gave up after {patience_s:g} s: {problem}; start again to resume from the streams' "
        "positions"
    )


def _first(group: ExceptionGroup) -> Exception:
    """The replay's own error in a group, or else the first of any kind."""
    errors = list(_flat(group))
    own = [error for error in errors if isinstance(error, ReplayError)]
    return (own or errors)[0]


def _flat(group: ExceptionGroup) -> list[Exception]:
    errors: list[Exception] = []
    for error in group.exceptions:
        errors.extend(_flat(error) if isinstance(error, ExceptionGroup) else [error])
    return errors
