"""The replay: sends all streams concurrently, one chunk of each in flight, until all are sent.

It asks for every stream's position first, so that a second replay resumes where the first ended.
A chunk without an answer is sent again unchanged; a problem that names the stream's position
moves it there, back (the store lost commits) or forward (its reply is no longer stored).
Any other problem ends the replay. A reply that cannot be correct is counted as a fault, and the
replay continues, so that one run shows all of them.

Everything here runs in one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import numpy as np

from carry_client import ModelDescription, Problem, Retry
from service.replay.checks import FinalAnswer, agree, check_duplicates, check_reply, next_position
from service.replay.client import FloatRows, Reply, Service
from service.replay.options import ReplayError, ReplayOptions
from service.replay.schedule import Cursor, Schedule
from service.replay.source import StreamEvents

MAX_FAULTS = 100
REPORT_PERIOD_S = 0.2


@dataclass(slots=True)
class StreamProgress:
    """Progress and outputs of one stream.

    Attributes:
        cursor: its position and next chunk.
        outputs: float32 [T, O], NaN if this run received none.
        start: its position before the replay.
    """

    cursor: Cursor
    outputs: FloatRows
    start: int = 0


@dataclass(slots=True)
class Tally:
    """Counts of one replay.

    Attributes:
        events: applied events; those that were sent again after the store lost them count twice.
        chunks: applied chunks.
        retries: attempts that failed with a retryable problem.
        problems: number of problems, by code.
        duplicates: chunks sent twice at once.
        replayed: replies marked `replayed`.
        fell_back: how often a stream was behind its acknowledged position.
        lost: by how many events in all.
        skipped: events whose outputs were not received, because their stored reply had expired.
        faults: descriptions of incorrect replies, the first hundred.
        fault_count: number of all incorrect replies.
        latencies_s: of every answered request.
        silence_s: the longest time in which no request was answered.
    """

    events: int = 0
    chunks: int = 0
    requests: int = 0
    retries: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    replayed: int = 0
    fell_back: int = 0
    lost: int = 0
    skipped: int = 0
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    latencies_s: list[float] = field(default_factory=list)
    silence_s: float = 0.0
    wall_s: float = 0.0

    def fault(self, text: str | None) -> None:
        """Record a fault, unless it is None."""
        if text is not None:
            self.fault_count += 1
            if len(self.faults) < MAX_FAULTS:
                self.faults.append(text)


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
    retry = Retry(limit_s)
    try:
        return await retry.run_async(service.describe)
    except Problem as problem:
        raise _failed(problem, retry) from problem


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
                Cursor(stream, options.chunk_min, options.chunk_max, options.seed),
                np.full((len(stream), model.width), np.nan, np.float32),
            )
            for stream in streams
        }

    async def run(self, watcher: Watcher) -> None:
        """Send everything that is not consumed yet; once per replay.

        Raises:
            ReplayError: the service refused, or was unavailable for longer than `patience_s`.
        """
        try:
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
            retry = self._retry()
            async with slots:
                while True:
                    try:
                        return await self._service.position(name)
                    except Problem as problem:
                        self.tally.problems[problem.code] += 1
                        await self._wait(problem, retry, f"stream {name!r}")

        try:
            async with asyncio.TaskGroup() as tasks:
                requests = {name: tasks.create_task(ask(name)) for name in self.progress}
        except ExceptionGroup as group:
            raise _first(group) from group
        return {name: task.result() for name, task in requests.items()}

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
        turn = self._service.next_turn()
        self.tally.duplicates += len(duplicates)
        requests = [self._send(cursors, turn), *(self._send([c], turn + 1) for c in duplicates)]
        answers, *copies = await asyncio.gather(*requests)
        second_of = {c.name: copy[0] for c, copy in zip(duplicates, copies, strict=True)}
        for cursor, answer in zip(cursors, answers, strict=True):
            self._accept(cursor, answer, second_of.get(cursor.name))

    async def _send(self, cursors: list[Cursor], turn: int) -> list[FinalAnswer]:
        """Send until each chunk has a reply or a problem that names the stream's position."""
        tally, retry = self.tally, self._retry()
        final: dict[str, FinalAnswer] = {}
        waiting = cursors
        while waiting:
            sent_s = self._clock()
            answers = await self._service.send(self._model, waiting, turn)
            latency_s = self._clock() - sent_s
            tally.requests += 1
            failed: Problem | None = None
            for cursor, answer in zip(waiting, answers, strict=True):
                if isinstance(answer, Problem):
                    tally.problems[answer.code] += 1
                if isinstance(answer, Reply) or answer.has_stream_position:
                    final[cursor.name] = FinalAnswer(answer, retry.failures, latency_s)
                elif answer.is_retryable:
                    failed = answer
                else:
                    raise ReplayError(
                        f"stream {cursor.name!r}, chunk at {cursor.position}: the service "
                        f"refused: {answer}"
                    )
            if not all(isinstance(a, Problem) and a.status == 0 for a in answers):
                tally.latencies_s.append(latency_s)
                tally.silence_s = max(tally.silence_s, sent_s + latency_s - self._last_answer_s)
                self._last_answer_s = sent_s + latency_s
            waiting = [cursor for cursor in waiting if cursor.name not in final]
            if failed is not None:
                turn = self._service.next_turn()
                await self._wait(failed, retry, "a chunk")
        return [final[cursor.name] for cursor in cursors]

    def _accept(self, cursor: Cursor, first: FinalAnswer, second: FinalAnswer | None) -> None:
        """Check the answers to one chunk and move the stream; never awaits."""
        tally, start, steps = self.tally, cursor.position, cursor.size
        answers = [first.answer] if second is None else [first.answer, second.answer]
        if second is not None:
            tally.fault(check_duplicates(first, second, cursor.name, start))
        reply = None
        for answer in answers:
            tally.fault(check_reply(answer, cursor.name, start, steps))
            if isinstance(answer, Reply):
                tally.replayed += answer.replayed
                reply = answer
        if reply is not None:
            self._store_outputs(cursor, start, reply.outputs)
            tally.chunks += 1
            tally.events += steps
        now = next_position(answers[0], answers[1:])
        position = start if now is None else now
        acknowledged = start + steps if reply is not None else start
        if position < acknowledged:
            tally.fell_back += 1
            tally.lost += acknowledged - position
        elif reply is None:
            tally.skipped += min(position, len(cursor.events)) - start
        if reply is not None and position == start + steps:
            cursor.advance(position)
        else:
            cursor.move(position)

    def _store_outputs(self, cursor: Cursor, start: int, outputs: FloatRows) -> None:
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

    async def _wait(self, problem: Problem, retry: Retry, what: str) -> None:
        """Wait before the next attempt; ReplayError if no attempt is left."""
        try:
            delay_s = retry.next_delay_s(problem)
        except Problem:
            raise _failed(problem, retry, f"{what}: ") from problem
        self.tally.retries += 1
        await asyncio.sleep(delay_s)

    def _retry(self) -> Retry:
        return Retry(self._options.patience_s, self._random)

    def _total(self) -> int:
        return sum(len(stream_progress.cursor.events) for stream_progress in self.progress.values())

    def _done(self) -> int:
        return self._total() - sum(
            stream_progress.cursor.remaining for stream_progress in self.progress.values()
        )


def _failed(problem: Problem, retry: Retry, what: str = "") -> ReplayError:
    """The error that ends a replay after the last attempt of a request."""
    if not problem.is_retryable:
        return ReplayError(f"{what}the service refused: {problem}")
    return ReplayError(
        f"gave up after {retry.limit_s:g} s: {problem}; start again to resume from the streams' "
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
