"""Clients of the fault tests: each sends one stream's events in random cuts, and logs every answer.

A client retries blindly: a request that fails without naming the stream's head is repeated
unchanged, at any worker, until it is answered. Some chunks go to two workers at once. An answer
that names another position moves the client there, and it sends from there in other cuts. Some
clients send If-Match, some the epoch, some neither; those notice by the tag that a history was
replaced. One chunk of a stream is in flight at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import numpy as np

from service.client import Problem
from tests.faults.network import FEATURES, Rows, random_events
from tests.faults.records import (
    FIRST_TAG,
    Ack,
    Head,
    History,
    Rejection,
    Sent,
    Span,
    StreamLog,
    digest,
    next_tag,
)
from tests.faults.requests import WorkerClient, outputs_of

REJECTIONS = frozenset(
    {"position_ahead", "position_behind", "already_applied", "state_changed", "epoch_mismatch"}
)
_SHORTEST_S = 0.01
_UNEXPECTED_KEPT = 20
SHORT_LIVED = "x"
"""Prefix of the names of short-lived streams, which are deleted and created all the time."""

_LATE_S = 15.0
"""A request that was given up is carried out this much later at most."""

Expire = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Behavior:
    """Behavior of clients.

    Attributes:
        longest: events in the longest chunk.
        duplicates: share of the chunks that are sent to two workers at once.
        removals: share of the chunks before which the stream is deleted, or expires.
        expires: share of those before which it expires.
        pause_s: mean pause between two chunks of a stream.
        rest_s: mean pause after it was deleted.
        deadlines: share of the attempts with a Carry-Timeout.
        timeout_s: how long a reply is waited for.
    """

    longest: int = 32
    duplicates: float = 0.12
    removals: float = 0.003
    expires: float = 0.5
    pause_s: float = 0.06
    rest_s: float = 0
    deadlines: float = 0.2
    timeout_s: float = 2.5


class Client:
    """One client and its stream.

    Attributes:
        applied: events that were acknowledged.
        was_set_back: its stream was, the last time that it was suspended.

    Args:
        ports: the port of each worker.
        number: decides how it protects itself: If-Match, epoch, or the tag alone.
        expire: lets the stream's keys expire behind the service's back.
    """

    def __init__(
        self,
        name: str,
        number: int,
        ports: Mapping[str, int],
        history: History,
        behavior: Behavior,
        random: np.random.Generator,
        expire: Expire,
    ):
        self.log = StreamLog(name)
        history.streams.append(self.log)
        self._history = history
        self._behavior = behavior
        self._random = random
        self._expire = expire
        self._workers = list(ports)
        self._clients = {
            worker: WorkerClient(port, behavior.timeout_s) for worker, port in ports.items()
        }
        self._sends_etag = number % 4 == 1
        self._sends_epoch = number % 4 == 2
        self._rows = np.zeros((0, FEATURES), np.int8)
        self._position = 0
        self._epoch: str | None = None
        self._tag: bytes | None = None
        self._worker = self._workers[0]
        self._next_worker: str | None = None
        self._free = asyncio.Event()
        self._free.set()
        self._idle = asyncio.Event()
        self._moved = asyncio.Event()
        self.was_rolled_back = False
        self.applied = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Send chunks until `stop` is set."""
        while not stop.is_set():
            if not self._free.is_set():
                self._idle.set()
                await self._free.wait()
                self._idle.clear()
                await self._move_stream()
                self._moved.set()
            if self._random.random() < self._behavior.removals:
                await self._remove()
            length = int(self._random.integers(1, self._behavior.longest + 1))
            await self._deliver(self._events(length))
            await asyncio.sleep(self._random.exponential(self._behavior.pause_s))

    async def suspend(self, within_s: float) -> bool:
        """Suspend it after its chunk, while its last worker caches the stream; whether it succeeds.

        It fails if the chunk cannot be acknowledged in time.
        """
        self._idle.clear()
        self._free.clear()
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            self._free.set()
            return False
        return True

    async def resume(self) -> None:
        """Resume it, after others advanced its stream with other events if it was rolled back.

        Returns when they have; `was_rolled_back` says whether it was."""
        self._moved.clear()
        self._free.set()
        await self._moved.wait()

    async def finish(self) -> None:
        """Once everything serves again: send one chunk, then read the stream's head."""
        await self._deliver(self._events(1))
        self.log.final = await self._read_head(self._other(self._worker))

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.close()

    def _events(self, length: int) -> Rows:
        """The events from the present position on; those that were sent before stay the same."""
        missing = self._position + length - len(self._rows)
        if missing > 0:
            self._rows = np.concatenate([self._rows, random_events(self._random, missing)])
        return self._rows[self._position : self._position + length].copy()

    def _other(self, worker: str) -> str:
        others = [each for each in self._workers if each != worker]
        return others[int(self._random.integers(len(others)))] if others else worker

    def _any(self) -> str:
        return self._workers[int(self._random.integers(len(self._workers)))]

    async def _deliver(self, rows: Rows) -> None:
        """Send a chunk until it is answered, and adopt the head that the answer names."""
        answer = await self._send(self._position, rows, self._next_worker or self._any())
        self._next_worker = None
        if isinstance(answer, Ack):
            if answer.expected_tag is not None and answer.expected_tag != answer.tag:
                self._notice("a tag that does not follow")
            self.applied += len(rows)
            self._worker = answer.worker
            self._adopt(answer.epoch, answer.tag, answer.position)
        else:
            self._history.seen[f"refused {answer.code}"] += 1
            if answer.code == "position_ahead":
                self._history.seen["resends"] += 1
            self._notice(answer.code)
            self._adopt(answer.epoch, answer.tag, answer.position)

    def _adopt(self, epoch: str | None, tag: bytes | None, position: int) -> None:
        self._epoch, self._tag, self._position = epoch, tag, position
        if position == 0:
            # a new stream, because many chunkings of the same events would be too many histories
            self._rows = self._rows[:0]
        self._events(0)

    def _notice(self, how: str) -> None:
        self._history.seen[f"noticed by {how}"] += 1
        self.log.noticed_s.append(time.monotonic())

    async def _send(
        self, start: int, rows: Rows, worker: str, *, plain: bool = False
    ) -> Ack | Rejection:
        """Try until there is an answer; every answer is recorded.

        Args:
            plain: without If-Match and epoch, as another client.
        """
        sent = Sent(start, rows, digest(rows), time.monotonic())
        self.log.sents.append(sent)
        tries = 0
        while True:
            workers = [worker]
            if not plain and self._random.random() < self._behavior.duplicates:
                workers.append(self._other(worker))
                self._history.seen["sent twice at once"] += 1
            answers = await asyncio.gather(*(self._try(sent, each, plain) for each in workers))
            acks = [each for each in answers if isinstance(each, Ack)]
            rejections = [each for each in answers if isinstance(each, Rejection)]
            if acks or rejections:
                return (acks or rejections)[0]
            tries += 1
            self._history.seen["blind retries"] += 1
            await asyncio.sleep(min(0.02 * 2**tries, 0.3) * self._random.uniform(0.5, 1))
            worker = self._any()

    async def _try(self, sent: Sent, worker: str, plain: bool) -> Ack | Rejection | None:
        """One attempt; None where its outcome is unknown."""
        knows = not plain and self._epoch is not None and self._tag is not None
        epoch = self._epoch if knows and self._sends_epoch else None
        etag = f"{self._epoch}-{self._tag.hex()}" if knows and self._sends_etag else None
        expected = None
        if not plain and sent.start == self._position and (knows or sent.start == 0):
            expected = next_tag(self._tag or FIRST_TAG, sent.start, sent.digest)
        deadline_s = None
        if self._random.random() < self._behavior.deadlines:
            # As many short ones as long ones: most tries are answered within a tenth of a second.
            longest_s = self._behavior.timeout_s
            deadline_s = _SHORTEST_S * (longest_s / _SHORTEST_S) ** float(self._random.random())
        began_s = time.monotonic()
        try:
            document = await self._clients[worker].send(
                self.log.name,
                sent.rows,
                sent.start,
                encoding="json" if self._random.random() < 0.5 else "msgpack",
                epoch=epoch,
                etag=etag,
                deadline_s=deadline_s,
            )
        except Problem as problem:
            return self._record_problem(problem, worker, began_s)
        self._history.seen["replays"] += bool(document["replayed"])
        sent.acked = True
        ack = Ack(
            sent,
            worker,
            document["epoch"],
            bytes.fromhex(document["tag"]),
            document["position"],
            outputs_of(document),
            document["replayed"],
            began_s,
            time.monotonic(),
            expected,
        )
        self.log.acks.append(ack)
        return ack

    def _record_problem(self, problem: Problem, worker: str, sent_s: float) -> Rejection | None:
        """Count a problem; a rejection that names the stream's head is logged and returned."""
        if problem.status == 0:
            self._history.seen["no reply"] += 1
            return None
        if problem.code in REJECTIONS:
            tag = problem.document.get("tag")
            rejection = Rejection(
                problem.code,
                worker,
                problem.document.get("epoch"),
                None if tag is None else bytes.fromhex(tag),
                problem.position or 0,
                sent_s,
                time.monotonic(),
            )
            self.log.rejections.append(rejection)
            return rejection
        self._history.seen[f"failed {problem.code}"] += 1
        is_expected = problem.document.get("retryable") and problem.code != "internal_error"
        if not is_expected and len(self._history.unexpected) < _UNEXPECTED_KEPT:
            what = f"{self.log.name}: {problem.status} {problem} {dict(problem.document)}"
            self._history.unexpected.append(what)
        return None

    async def _read_head(self, worker: str) -> Head | None:
        """The stream's head, asked for until it is answered."""
        while True:
            try:
                return await self._clients[worker].read_head(self.log.name)
            except Problem as problem:
                self._record_problem(problem, worker, 0.0)
            await asyncio.sleep(0.1)
            worker = self._any()

    async def _remove(self) -> None:
        """Have the stream deleted, or its keys expire, while the last worker caches it.

        The client continues as before, and must be rejected.
        """
        if self._position == 0:
            return
        began_s = time.monotonic()
        if self._random.random() < self._behavior.expires:
            await self._expire(self.log.name)
            self._history.seen["expired"] += 1
            self.log.removed.append(Span(began_s, time.monotonic()))
        else:
            span = await self._delete(began_s)
            if span is None:
                return
            self._history.seen["deleted"] += 1
            self.log.removed.append(span)
            await asyncio.sleep(self._random.exponential(self._behavior.rest_s))
        self._next_worker = self._worker

    async def _delete(self, began_s: float) -> Span | None:
        """Have another worker delete the stream; None if its If-Match fails.

        An abandoned request may still be carried out, and without If-Match it then deletes the
        stream in the state that it has by then.
        """
        etag, unanswered, unknown = None, False, False
        if self._random.random() < 0.5:
            etag = f"{self._epoch}-{self._tag.hex()}"
        while True:
            try:
                await self._clients[self._other(self._worker)].delete(self.log.name, etag)
                return self._removed_since(began_s, unanswered)
            except Problem as problem:
                if problem.status == 412 and not (unanswered or unknown):
                    return None
                if problem.status in (404, 412):
                    is_certain = problem.status == 404
                    return self._removed_since(began_s, unanswered, is_certain=is_certain)
                self._record_problem(problem, self._worker, began_s)
                unanswered = unanswered or problem.status == 0
                unknown = unknown or problem.status > 0
            await asyncio.sleep(0.1)

    def _removed_since(self, began_s: float, unanswered: bool, *, is_certain: bool = True) -> Span:
        until_s = time.monotonic() + (_LATE_S if unanswered else 0)
        return Span(began_s, until_s, sure=is_certain and not unanswered)

    async def _move_stream(self) -> None:
        """After a rollback, advance the stream with other events by another worker, to the very
        position that this client expects. Its next chunk goes to the worker that caches the old
        state there."""
        other = self._other(self._worker)
        head = await self._read_head(other)
        at = head.position if head is not None else 0
        self.was_rolled_back = at < self._position
        if not self.was_rolled_back:
            return
        while at < self._position:
            length = min(
                int(self._random.integers(1, self._behavior.longest + 1)), self._position - at
            )
            rows = random_events(self._random, length)
            answer = await self._send(at, rows, other, plain=True)
            if not isinstance(answer, Ack):
                return
            self._rows[at : at + length] = rows
            at = answer.position
        self._history.seen["advanced by others"] += 1
        self._next_worker = self._worker
