"""The clients: each has a stream, sends its events in random cuts, and keeps a record.

A client retries blindly: whatever fails without a refusal is sent again as it was, to whichever
worker, until it is answered. A part of the chunks goes to two workers at once. Told that it is
ahead, it sends again from where it was told, in other cuts. Told that the stream has gone on, it
goes on from there. Some clients send If-Match, some the epoch, some neither, and those
notice by the tag that a history was replaced. One chunk of a stream is in flight at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.faults.http import JSON, MSGPACK, Line, NoReply, chunk_body
from tests.faults.network import FEATURES, OUTPUT, Rows, random_events
from tests.faults.records import (
    FIRST_TAG,
    Ack,
    History,
    Sent,
    Span,
    Standing,
    StreamLog,
    Told,
    digest,
    next_tag,
)

REFUSALS = frozenset(
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
class Habits:
    """How clients behave.

    Attributes:
        longest: events in the longest chunk.
        duplicates: share of the chunks that are sent to two workers at once.
        forgets: share of the chunks before which the stream is deleted, or expires.
        expires: share of those before which it expires.
        pause_s: mean pause between two chunks of a stream.
        rest_s: mean pause after it was deleted.
        deadlines: share of the tries that say how long they may take, by Carry-Timeout.
        timeout_s: how long a reply is waited for.
    """

    longest: int = 32
    duplicates: float = 0.12
    forgets: float = 0.003
    expires: float = 0.5
    pause_s: float = 0.06
    rest_s: float = 0
    deadlines: float = 0.2
    timeout_s: float = 2.5


class Client:
    """One client and its stream.

    Attributes:
        applied: events that were acknowledged.
        was_set_back: its stream was, the last time that it rested.

    Args:
        ways: the port of each worker.
        number: decides how it protects itself: If-Match, epoch, or the tag alone.
        expire: lets the stream's keys expire behind the service's back.
    """

    def __init__(
        self,
        name: str,
        number: int,
        ways: Mapping[str, int],
        history: History,
        habits: Habits,
        random: np.random.Generator,
        expire: Expire,
    ):
        self.log = StreamLog(name)
        history.streams.append(self.log)
        self._history = history
        self._habits = habits
        self._random = random
        self._expire = expire
        self._workers = list(ways)
        self._lines = {worker: Line(port) for worker, port in ways.items()}
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
        self.was_set_back = False
        self.applied = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Send chunks until told to stop."""
        while not stop.is_set():
            if not self._free.is_set():
                self._idle.set()
                await self._free.wait()
                self._idle.clear()
                await self._moved_on()
                self._moved.set()
            if self._random.random() < self._habits.forgets:
                await self._forget()
            length = int(self._random.integers(1, self._habits.longest + 1))
            await self._deliver(self._events(length))
            await asyncio.sleep(self._random.exponential(self._habits.pause_s))

    async def hold(self, within_s: float) -> bool:
        """Let it finish its chunk and then rest, its last worker's memory warm; whether it does.

        A chunk that cannot be acknowledged as things are keeps it from resting.
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

    async def release(self) -> None:
        """Let it go on, after others moved its stream on with other events if it was set back;
        returns when they have. `was_set_back` says whether it was."""
        self._moved.clear()
        self._free.set()
        await self._moved.wait()

    async def finish(self) -> None:
        """Once everything is well again: one chunk, then where the stream stands."""
        await self._deliver(self._events(1))
        self.log.final = await self._read(self._other(self._worker))

    def close(self) -> None:
        """Drop the connections."""
        for line in self._lines.values():
            line.drop()

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
        """Send a chunk until it is answered, and believe the answer."""
        answer = await self._send(self._position, rows, self._next_worker or self._any())
        self._next_worker = None
        if isinstance(answer, Ack):
            if answer.expected_tag is not None and answer.expected_tag != answer.tag:
                self._notice("a tag that does not follow")
            self.applied += len(rows)
            self._worker = answer.worker
            self._stand(answer.epoch, answer.tag, answer.position)
        else:
            self._history.seen[f"refused {answer.code}"] += 1
            if answer.code == "position_ahead":
                self._history.seen["resends"] += 1
            self._notice(answer.code)
            self._stand(answer.epoch, answer.tag, answer.position)

    def _stand(self, epoch: str | None, tag: bytes | None, position: int) -> None:
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
    ) -> Ack | Told:
        """Try until there is an answer; every answer is recorded.

        Args:
            plain: without If-Match and epoch, as another client.
        """
        sent = Sent(start, rows, digest(rows), time.monotonic())
        self.log.sents.append(sent)
        tries = 0
        while True:
            workers = [worker]
            if not plain and self._random.random() < self._habits.duplicates:
                workers.append(self._other(worker))
                self._history.seen["sent twice at once"] += 1
            answers = await asyncio.gather(*(self._try(sent, each, plain) for each in workers))
            acks = [each for each in answers if isinstance(each, Ack)]
            tolds = [each for each in answers if isinstance(each, Told)]
            if acks or tolds:
                return (acks or tolds)[0]
            tries += 1
            self._history.seen["blind retries"] += 1
            await asyncio.sleep(min(0.02 * 2**tries, 0.3) * self._random.uniform(0.5, 1))
            worker = self._any()

    async def _try(self, sent: Sent, worker: str, plain: bool) -> Ack | Told | None:
        """One try; None where nothing is known afterwards."""
        media = JSON if self._random.random() < 0.5 else MSGPACK
        knows = not plain and self._epoch is not None and self._tag is not None
        epoch = self._epoch if knows and self._sends_epoch else None
        etag = f"{self._epoch}-{self._tag.hex()}" if knows and self._sends_etag else None
        expected = None
        if not plain and sent.start == self._position and (knows or sent.start == 0):
            expected = next_tag(self._tag or FIRST_TAG, sent.start, sent.digest)
        deadline_s = None
        if self._random.random() < self._habits.deadlines:
            # As many short ones as long ones: most tries are answered within a tenth of a second.
            longest_s = self._habits.timeout_s
            deadline_s = _SHORTEST_S * (longest_s / _SHORTEST_S) ** float(self._random.random())
        began_s = time.monotonic()
        body = chunk_body(sent.rows, sent.start, media, epoch)
        answer = await self._ask(
            "POST", worker, body=body, media=media, etag=etag, deadline_s=deadline_s
        )
        if answer is None:
            return None
        status, document = answer
        now_s = time.monotonic()
        if status == 200:
            self._history.seen["replays"] += bool(document["replayed"])
            sent.acked = True
            ack = Ack(
                sent,
                worker,
                document["epoch"],
                bytes.fromhex(document["tag"]),
                document["position"],
                np.asarray(document["outputs"][OUTPUT], np.float32),
                document["replayed"],
                began_s,
                now_s,
                expected,
            )
            self.log.acks.append(ack)
            return ack
        told = _told(document, worker, began_s, now_s)
        if told is not None:
            self.log.tolds.append(told)
            return told
        self._failed(status, document)
        return None

    async def _ask(self, method: str, worker: str, **rest: Any) -> tuple[int, Any] | None:
        timeout_s = self._habits.timeout_s
        try:
            return await self._lines[worker].ask(method, self.log.name, timeout_s=timeout_s, **rest)
        except NoReply:
            self._history.seen["no reply"] += 1
            return None

    def _failed(self, status: int, document: Any) -> None:
        code = document["code"] if isinstance(document, dict) else f"status {status}"
        self._history.seen[f"failed {code}"] += 1
        retryable = isinstance(document, dict) and document.get("retryable")
        if (not retryable or code == "internal_error") and len(
            self._history.unexpected
        ) < _UNEXPECTED_KEPT:
            self._history.unexpected.append(f"{self.log.name}: {status} {document}")

    async def _read(self, worker: str) -> Standing | None:
        """Where the stream stands; asked until it is answered."""
        while True:
            answer = await self._ask("GET", worker)
            if answer is not None:
                status, found = answer
                if status == 200:
                    return Standing(found["epoch"], bytes.fromhex(found["tag"]), found["position"])
                if status == 404:
                    return None
                self._failed(status, found)
            await asyncio.sleep(0.1)
            worker = self._any()

    async def _forget(self) -> None:
        """Have the stream deleted, or its keys expire, while the last worker remembers it.

        The client does not know: it goes on where it was, and must be told.
        """
        if self._position == 0:
            return
        began_s = time.monotonic()
        if self._random.random() < self._habits.expires:
            await self._expire(self.log.name)
            self._history.seen["expired"] += 1
            self.log.forgotten.append(Span(began_s, time.monotonic()))
        else:
            span = await self._delete(began_s)
            if span is None:
                return
            self._history.seen["deleted"] += 1
            self.log.forgotten.append(span)
            await asyncio.sleep(self._random.exponential(self._habits.rest_s))
        self._next_worker = self._worker

    async def _delete(self, began_s: float) -> Span | None:
        """Have another worker delete the stream; None if its If-Match fails.

        An abandoned request may still be carried out, and without If-Match it then deletes the
        stream in whatever state it is by that time.
        """
        etag, unanswered, unknown = None, False, False
        if self._random.random() < 0.5:
            etag = f"{self._epoch}-{self._tag.hex()}"
        while True:
            answer = await self._ask("DELETE", self._other(self._worker), etag=etag)
            if answer is None:
                unanswered = True
            elif answer[0] in (204, 404, 412):
                refused = answer[0] == 412
                if refused and not (unanswered or unknown):
                    return None
                until_s = time.monotonic() + (_LATE_S if unanswered else 0)
                return Span(began_s, until_s, sure=not (unanswered or refused))
            else:
                self._failed(*answer)
                unknown = True
            await asyncio.sleep(0.1)

    async def _moved_on(self) -> None:
        """After a rollback, another client takes the stream from where it stands to the very
        position this client believes in, with other events, through another worker. This
        client's next chunk then goes to the worker that remembers the old state there."""
        other = self._other(self._worker)
        standing = await self._read(other)
        at = standing.position if standing is not None else 0
        self.was_set_back = at < self._position
        if not self.was_set_back:
            return
        while at < self._position:
            length = min(
                int(self._random.integers(1, self._habits.longest + 1)), self._position - at
            )
            rows = random_events(self._random, length)
            answer = await self._send(at, rows, other, plain=True)
            if not isinstance(answer, Ack):
                return
            self._rows[at : at + length] = rows
            at = answer.position
        self._history.seen["moved on differently"] += 1
        self._next_worker = self._worker


def _told(document: Any, worker: str, sent_s: float, at_s: float) -> Told | None:
    if not isinstance(document, dict) or document.get("code") not in REFUSALS:
        return None
    tag = document.get("tag")
    return Told(
        document["code"],
        worker,
        document.get("epoch"),
        None if tag is None else bytes.fromhex(tag),
        document.get("position") or 0,
        sent_s,
        at_s,
    )
