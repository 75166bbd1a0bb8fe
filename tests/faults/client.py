"""Clients of the fault tests: each sends one stream's events in random cuts, and logs every answer.

A client retries blindly: a request that fails without naming the stream's head is repeated
unchanged, at any worker, until it is answered. Some chunks go to two workers at once. An answer
that names another position moves the client there, and it sends from there in other cuts. Some
clients send If-Match, some the epoch, some neither; those notice by the tag that a history was
replaced. One chunk of a stream is in flight at a time.

An appender sends bursts of chunks without a position, which are applied as often as they are sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import numpy as np

from carry_client import Problem
from tests.faults.history import (
    FIRST_TAG,
    Burst,
    Head,
    History,
    Reply,
    Sent,
    Span,
    StreamLog,
    digest,
    next_tag,
)
from tests.faults.network import FEATURES, Rows, random_events
from tests.faults.requests import TIMEOUT_S, WorkerClient, read_reply

APPENDS = 16
SHORT_LIVED = "x"
"""Prefix of the names of short-lived streams, which are deleted and created all the time."""

_REJECTIONS = frozenset(
    {"position_ahead", "position_behind", "already_applied", "state_changed", "epoch_mismatch"}
)
_LONGEST = 32
_DUPLICATES, _DEADLINES, _EXPIRIES = 0.12, 0.2, 0.5
"""Shares: of chunks sent to two workers at once, of attempts with a Carry-Timeout, and of removals
by expiry."""
_SHORT_LIVED_REMOVALS, _SHORT_LIVED_REST_S = 0.04, 0.4
_PAUSE_S = 0.06
_SHORTEST_DEADLINE_S = 0.01
_UNEXPECTED_KEPT = 20
_LATE_S = 15.0
"""An abandoned request is carried out this much later at most."""


class Client:
    """One client and its stream.

    Attributes:
        lock: held while a chunk is in flight; whoever takes it suspends the client.
        applied: events that were acknowledged.

    Args:
        number: decides how it protects itself: If-Match, epoch, or the tag alone.
        removals: share of the chunks before which the stream is deleted, or expires.
        expire: lets the stream's keys expire behind the service's back.
    """

    def __init__(
        self,
        name: str,
        number: int,
        ports: Mapping[str, int],
        history: History,
        random: np.random.Generator,
        removals: float,
        expire: Callable[[str], Awaitable[None]],
    ):
        self.log = StreamLog(name)
        history.streams.append(self.log)
        self.lock = asyncio.Lock()
        self.applied = 0
        self._history = history
        self._random = random
        self._expire = expire
        self._short_lived = name.startswith(SHORT_LIVED)
        self._removals = max(removals, _SHORT_LIVED_REMOVALS) if self._short_lived else removals
        self._clients = {worker: WorkerClient(port) for worker, port in ports.items()}
        self._sends_etag, self._sends_epoch = number % 4 == 1, number % 4 == 2
        self._rows = np.zeros((0, FEATURES), np.int8)
        self._head = Head(None, None, 0)
        self._worker = next(iter(ports))
        self._next_worker: str | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Send chunks until `stop` is set."""
        while not stop.is_set():
            async with self.lock:
                if self._random.random() < self._removals and self._head.position > 0:
                    await self._remove()
                await self._deliver(int(self._random.integers(1, _LONGEST + 1)))
            await asyncio.sleep(self._random.exponential(_PAUSE_S))

    async def finish(self) -> None:
        """Once everything serves again: send one chunk, then read the stream's head."""
        await self._deliver(1)
        self.log.final = await self._read_head(self._other(self._worker))

    async def advance_by_others(self) -> bool:
        """While it is suspended after a rollback: advance the stream by another worker with other
        events, to the very position that this client expects. Its next chunk goes to the worker
        that caches the old state there. False if the stream was not rolled back."""
        other = self._other(self._worker)
        head = await self._read_head(other)
        at, end = head.position if head is not None else 0, self._head.position
        if at >= end:
            return False
        while at < end:
            length = min(int(self._random.integers(1, _LONGEST + 1)), end - at)
            rows = random_events(self._random, length)
            answer = await self._send(at, rows, other, as_other=True)
            if answer.code:
                return True
            self._rows[at : at + length] = rows
            at = answer.position
        self._history.seen["advanced by others"] += 1
        self._next_worker = self._worker
        return True

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    def _extend(self, length: int) -> Rows:
        """The events from the present position on; those that were sent before stay the same."""
        at = self._head.position
        if at + length > len(self._rows):
            more = random_events(self._random, at + length - len(self._rows))
            self._rows = np.concatenate([self._rows, more])
        return self._rows[at : at + length].copy()

    def _other(self, worker: str) -> str:
        return next(each for each in self._clients if each != worker)

    def _any(self) -> str:
        return str(self._random.choice(list(self._clients)))

    async def _deliver(self, length: int) -> None:
        """Send a chunk until it is answered, and adopt the head that the answer names."""
        head, rows = self._head, self._extend(length)
        answer = await self._send(head.position, rows, self._next_worker or self._any())
        self._next_worker = None
        if answer.code:
            self._history.seen[f"refused {answer.code}"] += 1
            self._history.seen["resends"] += answer.code == "position_ahead"
            self._notice(answer.code)
        else:
            tag = head.tag or FIRST_TAG
            if (head.tag is not None or head.position == 0) and answer.tag != next_tag(
                tag, head.position, answer.sent.digest
            ):
                self._notice("a tag that does not follow")
            self.applied += length
            self._worker = answer.worker
        self._head = answer
        if answer.position == 0:
            # new events, because many chunkings of the same ones would be too many histories
            self._rows = self._rows[:0]
        self._extend(0)

    def _notice(self, how: str) -> None:
        self._history.seen[f"noticed by {how}"] += 1
        self.log.noticed_s.append(time.monotonic())

    async def _send(self, start: int, rows: Rows, worker: str, *, as_other: bool = False) -> Reply:
        """Try until there is an answer; every answer is recorded.

        Args:
            as_other: as another client, without If-Match and epoch.
        """
        sent = Sent(start, rows, digest(rows))
        self.log.sents.append(sent)
        pause_s = 0.04
        while True:
            workers = [worker]
            if not as_other and self._random.random() < _DUPLICATES:
                workers.append(self._other(worker))
                self._history.seen["sent twice at once"] += 1
            tries = (self._try(sent, each, as_other=as_other) for each in workers)
            answers = [each for each in await asyncio.gather(*tries) if each is not None]
            if answers:
                return min(answers, key=lambda answer: answer.code != "")
            self._history.seen["blind retries"] += 1
            await asyncio.sleep(pause_s * self._random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, 0.3)
            worker = self._any()

    async def _try(self, sent: Sent, worker: str, *, as_other: bool) -> Reply | None:
        """One attempt; None where its outcome is unknown."""
        deadline_s = None
        if self._random.random() < _DEADLINES:
            # as many short ones as long ones: most tries are answered within a tenth of a second
            longest = TIMEOUT_S / _SHORTEST_DEADLINE_S
            deadline_s = _SHORTEST_DEADLINE_S * longest ** float(self._random.random())
        sent_s = time.monotonic()
        try:
            document = await self._clients[worker].send(
                self.log.name,
                sent.rows,
                sent.start,
                encoding="json" if self._random.random() < 0.5 else "msgpack",
                epoch=self._head.epoch if self._sends_epoch and not as_other else None,
                etag=self._etag if self._sends_etag and not as_other else None,
                deadline_s=deadline_s,
            )
        except Problem as problem:
            if problem.code not in _REJECTIONS:
                self._record_problem(problem)
                return None
            rejection = read_reply(dict(problem.document), sent, worker, sent_s, problem.code)
            self.log.rejections.append(rejection)
            return rejection
        ack = read_reply(document, sent, worker, sent_s)
        self._history.seen["replays"] += ack.replayed
        sent.acked = True
        self.log.acks.append(ack)
        return ack

    @property
    def _etag(self) -> str | None:
        return None if self._head.tag is None else f"{self._head.epoch}-{self._head.tag.hex()}"

    def _record_problem(self, problem: Problem) -> None:
        """Count a problem; one that no retry could resolve fails the run."""
        seen, unexpected = self._history.seen, self._history.unexpected
        seen[f"failed {problem.code}" if problem.status else "no reply"] += 1
        may_pass = problem.status == 0 or problem.document.get("retryable")
        if (
            not (may_pass and problem.code != "internal_error")
            and len(unexpected) < _UNEXPECTED_KEPT
        ):
            unexpected.append(f"{self.log.name}: {problem.status} {dict(problem.document)}")

    async def _read_head(self, worker: str) -> Head | None:
        """The stream's head, asked for until it is answered."""
        while True:
            try:
                return await self._clients[worker].read_head(self.log.name)
            except Problem as problem:
                self._record_problem(problem)
            await asyncio.sleep(0.1)
            worker = self._any()

    async def _remove(self) -> None:
        """Have the stream deleted, or its keys expire, while the last worker caches it.

        The client continues as before, and must be rejected.
        """
        began_s = time.monotonic()
        if not self._short_lived and self._random.random() < _EXPIRIES:
            await self._expire(self.log.name)
            self._history.seen["expired"] += 1
            self.log.removed.append(Span(began_s, time.monotonic()))
        else:
            span = await self._delete(began_s)
            if span is None:
                return
            self._history.seen["deleted"] += 1
            self.log.removed.append(span)
            if self._short_lived:
                await asyncio.sleep(self._random.exponential(_SHORT_LIVED_REST_S))
        self._next_worker = self._worker

    async def _delete(self, began_s: float) -> Span | None:
        """Have another worker delete the stream; None if its If-Match fails.

        An abandoned request may still be carried out, and without If-Match it then deletes the
        stream in the state that it has by then.
        """
        etag = self._etag if self._random.random() < 0.5 else None
        unanswered, unknown, status = False, False, 204
        while True:
            try:
                await self._clients[self._other(self._worker)].delete(self.log.name, etag)
                break
            except Problem as problem:
                status = problem.status
                if status == 412 and not (unanswered or unknown):
                    return None
                if status in (404, 412):
                    break
                self._record_problem(problem)
                unanswered, unknown = unanswered or status == 0, unknown or status > 0
            await asyncio.sleep(0.1)
        until_s = time.monotonic() + (_LATE_S if unanswered else 0)
        return Span(began_s, until_s, sure=status != 412 and not unanswered)


class Appender:
    """Sends one burst after the other: each takes a new stream and sends its chunks all at once to
    all workers, every other one or all of them byte-identical. Nothing is retried: what got no
    reply may or may not be applied."""

    def __init__(
        self,
        name: str,
        ports: Mapping[str, int],
        history: History,
        random: np.random.Generator,
        timeout_s: float = TIMEOUT_S,
    ):
        self._name = name
        self._history = history
        self._random = random
        self._clients = [WorkerClient(port, timeout_s) for port in ports.values()]
        self._bursts = 0

    async def run(self, stop: asyncio.Event, pause_s: float) -> None:
        """Send bursts until `stop` is set."""
        while not stop.is_set():
            await self.burst()
            await asyncio.sleep(self._random.exponential(pause_s))

    async def burst(self) -> Burst:
        """Send one burst to a new stream."""
        self._bursts += 1
        name = f"{self._name}-{self._bursts}"
        same, all_equal = random_events(self._random, 3), self._random.random() < 0.5
        chunks = [
            same
            if all_equal or place % 2
            else random_events(self._random, int(self._random.integers(1, 6)))
            for place in self._random.permutation(APPENDS)
        ]
        began_s = time.monotonic()
        answers = await asyncio.gather(
            *(self._append(name, rows, place) for place, rows in enumerate(chunks))
        )
        acks = [answer for answer in answers if answer is not None]
        final = await self._read_head(name)
        span = Span(began_s, time.monotonic())
        burst = Burst(name, span, APPENDS - len(acks), acks, final)
        self._history.bursts.append(burst)
        self._history.seen["appends"] += len(acks)
        return burst

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(client.close() for client in self._clients))

    async def _append(self, name: str, rows: Rows, place: int) -> Reply | None:
        number, sent_s = place % len(self._clients), time.monotonic()
        try:
            document = await self._clients[number].send(name, rows, None)
        except Problem as problem:
            if problem.status:
                self._history.seen[f"failed {problem.code}"] += 1
            return None
        return read_reply(document, Sent(-1, rows, b""), str(number), sent_s)

    async def _read_head(self, name: str) -> Head | None:
        while True:
            for client in self._clients:
                try:
                    return await client.read_head(name)
                except Problem:
                    continue
            await asyncio.sleep(0.1)
