"""Clients of the fault tests: each sends one stream's events in random cuts, and logs every answer.

A client retries blindly: a request that fails without naming the stream's head is repeated
unchanged, at any worker, until it is answered. Some chunks go to two workers at once. An answer
that names another position moves the client there, and it sends from there in other cuts. Some
clients send If-Match, some the epoch, some neither; those notice by the tag that a history was
replaced. One chunk of a stream is in flight at a time.

An appender sends bursts of chunks without a position, which are applied as often as they are sent.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from carry_client import Problem
from tests.faults.history import NO_HEAD, Burst, Chunk, Head, History, Reply, Span, StreamLog
from tests.faults.network import FEATURES, Rows, random_events
from tests.faults.transports import ALWAYS, TIMEOUT_S, Conditions, WorkerClient

APPENDS = 16
SHORT_LIVED = "x"
"""Prefix of the names of short-lived streams, which are deleted and created all the time."""

_LONGEST = 32
_DUPLICATES, _DEADLINES, _EXPIRIES = 0.12, 0.2, 0.5
"""Shares: of chunks sent to two workers at once, of attempts with a deadline, and of removals by
expiry."""
_SHORT_LIVED_REMOVALS, _SHORT_LIVED_REST_S = 0.04, 0.8
_PAUSE_S = 0.06
_LONGEST_PAUSE_S = 10.0
_SHORTEST_DEADLINE_S = 0.01
_UNEXPECTED_KEPT = 20
_LATE_S = 15.0  # an abandoned request is carried out this much later at most


@dataclass(slots=True, eq=False)
class Sender:
    """Sends single requests to workers, and records how they fail."""

    name: str
    workers: Mapping[str, WorkerClient]
    history: History
    random: np.random.Generator

    async def _attempt(
        self, chunk: Chunk, worker: str, conditions: Conditions = ALWAYS
    ) -> Reply | None:
        """Send a chunk once; None where the outcome is unknown."""
        try:
            return await self.workers[worker].send(chunk, conditions, self.random)
        except Problem as problem:
            self._record(problem, is_append=chunk.start is None)
            return None

    async def _read_head(self, stream: str, worker: str) -> Head:
        """A stream's head, asked for until it is answered."""
        while True:
            try:
                return await self.workers[worker].read_head(stream)
            except Problem as problem:
                self._record(problem)
            await asyncio.sleep(0.1)
            worker = self._any_worker()

    def _record(self, problem: Problem, *, is_append: bool = False) -> None:
        """Count a problem; one that no retry could resolve fails the run."""
        self._count(f"failed {problem.code}" if problem.status else "no reply")
        may_pass = problem.status == 0 or problem.document.get("retryable")
        # an append of unknown outcome is not retryable: it might be applied twice
        may_pass = may_pass or (is_append and problem.status >= 500)
        unexpected = self.history.unexpected
        if not may_pass or problem.code == "internal_error":
            unexpected.append(f"{self.name}: {problem.status} {dict(problem.document)}")
            del unexpected[_UNEXPECTED_KEPT:]

    def _count(self, what: str, times: int = 1) -> None:
        self.history.seen[what] += times

    def _any_worker(self) -> str:
        return str(self.random.choice(list(self.workers)))

    def _draw(self, share: float) -> bool:
        """True with a probability."""
        return bool(self.random.random() < share)

    def _draw_length(self) -> int:
        return int(self.random.integers(1, _LONGEST + 1))


@dataclass(slots=True, eq=False)
class Client(Sender):
    """One client and its stream."""

    number: int  # decides how it protects itself: If-Match, epoch, or the tag alone
    removals: float  # share of the chunks before which the stream is deleted, or expires
    expire: Callable[[str], Awaitable[None]]  # lets its keys expire behind the service's back
    # held while a chunk is in flight; whoever takes it suspends the client
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    applied: int = 0  # events that were acknowledged
    log: StreamLog = field(init=False)
    _head: Head = NO_HEAD
    _rows: Rows = field(default_factory=lambda: np.zeros((0, FEATURES), np.int8))
    _worker: str = field(init=False)
    _next_worker: str | None = None

    def __post_init__(self) -> None:
        self.log, self._worker = StreamLog(self.name), next(iter(self.workers))
        self.history.streams.append(self.log)
        if self.name.startswith(SHORT_LIVED):
            self.removals = max(self.removals, _SHORT_LIVED_REMOVALS)

    async def run(self, stop: asyncio.Event) -> None:
        """Send chunks until `stop` is set."""
        while not stop.is_set():
            async with self.lock:
                if self._draw(self.removals) and self._head.position > 0:
                    await self._remove()
                await self._deliver(self._draw_length())
            await asyncio.sleep(self.random.exponential(_PAUSE_S))

    async def finish(self) -> None:
        """Once everything serves again: send one chunk, then read the stream's head."""
        await self._deliver(1)
        self.log.final = await self._read_head(self.name, self._other_worker())

    async def advance_by_others(self) -> bool:
        """While it is suspended after a rollback: advance the stream by another worker with other
        events, to the very position that this client expects. Its next chunk goes to the worker
        that caches the old state there. False if the stream was not rolled back."""
        other, end = self._other_worker(), self._head.position
        at = (await self._read_head(self.name, other)).position
        if at >= end:
            return False
        while at < end:
            rows = random_events(self.random, min(self._draw_length(), end - at))
            reply = await self._send(at, rows, other, as_other=True)
            if reply.code:
                return True
            self._rows[at : at + len(rows)] = rows
            at = reply.position
        self._count("advanced by others")
        self._next_worker = self._worker
        return True

    async def _deliver(self, length: int) -> None:
        """Send a chunk until it is answered, and adopt the head that the answer names."""
        head, worker = self._head, self._next_worker or self._any_worker()
        self._extend(head.position + length)
        rows = self._rows[head.position : head.position + length].copy()
        self._next_worker = None
        reply = await self._send(head.position, rows, worker)
        if reply.code:
            self._count(f"refused {reply.code}")
            self._count("resends", reply.code == "position_ahead")
            self._notice(reply.code)
        else:
            if not head.leads_to(reply):
                self._notice("a tag that does not follow")
            self.applied += length
            self._worker = reply.worker
        self._head = reply
        if reply.position == 0:
            # new events, because many chunkings of the same ones would be too many histories
            self._rows = self._rows[:0]
        self._extend(reply.position)

    def _extend(self, end: int) -> None:
        """Draw events up to a position; those that were sent before stay the same."""
        more = random_events(self.random, max(0, end - len(self._rows)))
        self._rows = np.concatenate([self._rows, more])

    def _notice(self, how: str) -> None:
        self._count(f"noticed by {how}")
        self.log.noticed_s.append(time.monotonic())

    def _other_worker(self, worker: str | None = None) -> str:
        """Another one than `worker`, or than that which acknowledged the last chunk."""
        return next(each for each in self.workers if each != (worker or self._worker))

    async def _send(self, start: int, rows: Rows, worker: str, *, as_other: bool = False) -> Reply:
        """Try until there is an answer, `as_other` without If-Match and epoch; every answer is
        recorded."""
        chunk, pause_s = Chunk(self.name, start, rows), 0.04
        self.log.sent.append(chunk)
        while True:
            workers = [worker]
            if not as_other and self._draw(_DUPLICATES):
                workers.append(self._other_worker(worker))
                self._count("sent twice at once")
            attempts = (self._attempt(chunk, each, self._conditions(as_other)) for each in workers)
            replies = [each for each in await asyncio.gather(*attempts) if each is not None]
            for reply in replies:
                (self.log.rejections if reply.code else self.log.acks).append(reply)
                self._count("replays", reply.replayed)
            if replies:
                return min(replies, key=lambda reply: reply.code != "")
            self._count("blind retries")
            await asyncio.sleep(pause_s * self.random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, 0.3)
            worker = self._any_worker()

    def _conditions(self, as_other: bool) -> Conditions:
        guard, deadline_s = None if as_other else self.number % 4, None
        if self._draw(_DEADLINES):
            # as many short ones as long ones: most tries are answered within a tenth of a second
            longest = TIMEOUT_S / _SHORTEST_DEADLINE_S
            deadline_s = _SHORTEST_DEADLINE_S * longest ** float(self.random.random())
        return Conditions(
            epoch=self._head.epoch if guard == 2 else None,
            etag=self._head.etag if guard == 1 else None,
            deadline_s=deadline_s,
        )

    async def _remove(self) -> None:
        """Have the stream deleted, or its keys expire, while the last worker caches it.

        The client continues as before, and must be rejected.
        """
        is_short_lived, began_s = self.name.startswith(SHORT_LIVED), time.monotonic()
        if not is_short_lived and self._draw(_EXPIRIES):
            await self.expire(self.name)
            span, how = Span(began_s, time.monotonic()), "expired"
        else:
            span, how = await self._delete(began_s), "deleted"
        if span is None:
            return
        self._count(how)
        self.log.removed.append(span)
        self._next_worker = self._worker
        if is_short_lived:
            await asyncio.sleep(self.random.exponential(_SHORT_LIVED_REST_S))

    async def _delete(self, began_s: float) -> Span | None:
        """Have another worker delete the stream; None if its If-Match fails.

        An abandoned request may still be carried out, and without If-Match it then deletes the
        stream in the state that it has by then.
        """
        etag = self._head.etag if self._draw(0.5) else None
        failures: list[int] = []
        while True:
            try:
                await self.workers[self._other_worker()].delete(self.name, etag)
                status = 204
            except Problem as problem:
                status = problem.status
                if status not in (404, 412):
                    self._record(problem)
                    failures.append(status)
                    await asyncio.sleep(0.1)
                    continue
            if status == 412 and not failures:
                return None
            late_s = _LATE_S if 0 in failures else 0.0
            return Span(began_s, time.monotonic() + late_s, sure=status != 412 and not late_s)


@dataclass(slots=True, eq=False)
class Appender(Sender):
    """Sends one burst after the other: each takes a new stream and sends its chunks all at once to
    all workers, every other one or all of them byte-identical. Nothing is retried: what got no
    reply may or may not be applied.

    After a burst that mostly got no reply it waits longer: on a busy machine the bursts of all
    would keep the workers from answering anything in time.
    """

    async def run(self, stop: asyncio.Event, pause_s: float) -> None:
        """Send bursts until `stop` is set."""
        longer_s = pause_s
        for number in count():
            if stop.is_set():
                return
            acks = await self._send_burst(f"{self.name}-{number}")
            is_answered = acks >= APPENDS / 2
            longer_s = pause_s if is_answered else min(2 * longer_s + 0.5, _LONGEST_PAUSE_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self.random.exponential(longer_s))

    async def _send_burst(self, stream: str) -> int:
        """Send a burst; how many of its chunks were acknowledged."""
        began_s = time.monotonic()
        same, is_uniform = random_events(self.random, 3), self._draw(0.5)
        chunks = [
            same if is_uniform or number % 2 else random_events(self.random, 1 + number % 5)
            for number in self.random.permutation(APPENDS)
        ]
        workers = list(self.workers)
        attempts = (
            self._attempt(Chunk(stream, None, rows), workers[number % len(workers)])
            for number, rows in enumerate(chunks)
        )
        acks = [reply for reply in await asyncio.gather(*attempts) if reply and not reply.code]
        final = await self._read_head(stream, self._any_worker())
        span = Span(began_s, time.monotonic())
        self.history.bursts.append(Burst(stream, span, APPENDS - len(acks), acks, final))
        self._count("appends", len(acks))
        return len(acks)
