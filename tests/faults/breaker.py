"""Carries out a plan, one fault after the other, while the clients go on.

A fault waits until some chunk is in flight. A worker that was killed or told to end starts again
beside the faults that follow. Every fault that may take acknowledged chunks away is noted in the
history, with the moments between which it can have.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from tests.faults.client import SHORT_LIVED, Client
from tests.faults.cluster_store import ClusterStore
from tests.faults.network import MODEL
from tests.faults.path import Choice, Direction, Hold, Link
from tests.faults.path import Path as Way
from tests.faults.plan import Fault, Kind
from tests.faults.records import History, Loss
from tests.faults.sight import BEFORE_LOAD, COMPUTING, ClientSight, Owed, StoreSight, count_stages
from tests.faults.stores import Store, ValkeyStore
from tests.faults.workers import Worker

TRIGGER_S = 5.0
"""How long a fault that waits for a moment waits for it."""

LONGEST_WAIT_S = 60.0
"""How long a fault waits for something to break: workers and store serve again by then."""

HELD_SHARE = 3
"""One client of so many rests over a rollback, and its stream is moved on differently."""

REST_S = 4.0
"""How long a client may take to come to rest: more than it waits for a reply."""

ALONE_SHARE = 4
"""One fault of so many may meet a worker while the others are down."""

CUTS = 3
CUT = (Kind.CUT_REQUEST, Kind.CUT_REPLY, Kind.CUT_COMMIT, Kind.CUT_ANSWER, Kind.HOLD_WRITE)
_POLL_S = 0.001
_LATE_S = {BEFORE_LOAD: 0.0006, COMPUTING: 0.0012}
"""A kill comes up to so long after the request, or the load's answer, was handed on: the worker
is to have it. Commits are still in the path when the kill comes."""


class Breaker:
    """Breaks one set of workers and their store.

    Attributes:
        done: faults by what they were.
        kills: kills by stage, and chunks by stage.
    """

    def __init__(
        self,
        store: Store,
        workers: Sequence[Worker],
        sights: tuple[ClientSight, StoreSight],
        clients: Sequence[Client],
        history: History,
        random: np.random.Generator,
    ):
        self.done: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.chunks_killed: Counter[str] = Counter()
        self.warm_rollbacks = 0
        self.in_flight = 0
        self._store = store
        self._workers = list(workers)
        self._client_sight, self._store_sight = sights
        self._clients = list(clients)
        self._history = history
        self._random = random

    async def run(self, fault: Fault) -> None:
        """One fault, from the wait before it until it is over."""
        await asyncio.sleep(fault.gap_s)
        await self._someone_in_flight()
        match fault.kind:
            case Kind.WORKER_KILL:
                await self._kill_worker(fault)
            case Kind.WORKER_PAUSE:
                worker = await self._one_up(fault)
                worker.pause()
                await asyncio.sleep(fault.seconds)
                worker.go_on()
            case Kind.WORKER_TERM:
                worker = await self._one_up(fault)
                await worker.end()
                worker.restart()
            case Kind.STORE_KILL:
                await self._lose(self._store.kill, fault.pick)
            case Kind.STORE_PAUSE:
                await self._lose(self._store.pause, fault.seconds, fault.pick)
            case Kind.FAILOVER if isinstance(self._store, ClusterStore):
                await self._lose(self._store.fail_over, fault.pick)
            case Kind.STORE_FULL:
                await asyncio.to_thread(self._store.fill, fault.seconds)
            case Kind.ROLLBACK | Kind.LOSSY_FAILOVER:
                await self._roll_back(fault)
            case Kind.OWNER_KILL | Kind.OWNER_TERM if isinstance(self._store, ValkeyStore):
                kill = fault.kind is Kind.OWNER_KILL
                await asyncio.to_thread(self._store.restart_owner, kill=kill)
            case kind if kind in CUT:
                await self._cut(fault)
            case _:
                raise ValueError(f"{fault.kind} on {self._store.name}")
        self.done[fault.kind] += 1

    async def resolve(self) -> None:
        """Let everything serve again."""
        for way in self._all_ways():
            way.forget_cuts()
        for worker in self._workers:
            await worker.started()

    def _all_ways(self) -> list[Way]:
        return [*self._store.ways, *(worker.way for worker in self._workers)]

    async def _someone_in_flight(self) -> None:
        deadline_s = time.monotonic() + LONGEST_WAIT_S
        while time.monotonic() < deadline_s:
            if any(self._client_sight.in_flight(worker.name) for worker in self._workers):
                self.in_flight += 1
                return
            await asyncio.sleep(_POLL_S)

    async def _one_up(self, fault: Fault) -> Worker:
        """A worker that serves; mostly while all do, so that the clients get on."""
        if fault.pick % ALONE_SHARE:
            for worker in self._workers:
                await worker.started()
        while True:
            up = [worker for worker in self._workers if worker.up_s is not None]
            if up:
                return up[fault.pick // ALONE_SHARE % len(up)]
            for worker in self._workers:
                await worker.started()

    async def _kill_worker(self, fault: Fault) -> None:
        """Kill a worker when one of its chunks is at the stage, and count where all were."""
        worker = await self._one_up(fault)
        loop = asyncio.get_running_loop()
        killed: asyncio.Future[tuple[list[Owed], float]] = loop.create_future()

        def kill() -> None:
            if not killed.done():
                killed.set_result(worker.kill())

        def reached(name: str, stream: str, stage: str) -> None:
            if name != worker.name or stage != fault.stage:
                return
            self._client_sight.hook = self._store_sight.hook = None
            latest_s = _LATE_S.get(stage)
            if latest_s is None:
                kill()
            else:
                loop.call_later(self._random.uniform(0, latest_s), kill)

        self._client_sight.hook = self._store_sight.hook = reached
        try:
            owed, killed_s = await asyncio.wait_for(asyncio.shield(killed), TRIGGER_S)
        except TimeoutError:
            kill()
            owed, killed_s = killed.result()
        finally:
            self._client_sight.hook = self._store_sight.hook = None
        await worker.ended(self._store)
        stages = count_stages(self._store_sight, worker.name, owed, killed_s)
        self.chunks_killed += stages
        self.kills.update(stages.keys())
        worker.restart()

    async def _lose(self, strike: Callable[..., Loss | None], *how: float) -> None:
        """Something that may take acknowledged chunks away."""
        loss = await asyncio.to_thread(strike, *how)
        if loss is not None:
            self._history.losses.append(loss)

    async def _roll_back(self, fault: Fault) -> None:
        """Set the store back by some moments under workers that know better."""
        for worker in self._workers:
            await worker.started()
        since_s = await asyncio.to_thread(self._store.look_back, fault.pick)
        await asyncio.sleep(0.3 + min(fault.seconds, 1.5))
        chosen = [
            client
            for place, client in enumerate(self._clients)
            if (place + fault.pick) % HELD_SHARE == 0
        ]
        rest = await asyncio.gather(*(client.hold(REST_S) for client in chosen))
        held = [client for client, rests in zip(chosen, rest, strict=True) if rests]
        loss = await asyncio.to_thread(self._store.set_back, since_s)
        self._history.losses.append(loss)
        await asyncio.gather(*(client.release() for client in held))
        set_back = sum(client.was_set_back for client in held)
        self._history.seen["streams set back while their client rested"] += set_back
        self.warm_rollbacks += set_back > 0

    async def wait_for_held_writes(self) -> None:
        """Wait until all writes that are held back have reached the store."""
        for way in self._store.ways:
            await way.drained(lambda link: link.hold is not None)

    def _is_commit(self, link: Link, data: bytes) -> bool:
        return b"EVAL" in data and self._store_sight.is_workers(link)

    def _creates_or_deletes(self, link: Link, data: bytes) -> bool:
        """Whether these bytes create or delete a short-lived stream."""
        return (
            self._is_commit(link, data)
            and f":s:{MODEL}:{SHORT_LIVED}".encode() in data
            and _BEGINS_OR_DELETES.search(data) is not None
        )

    async def _cut(self, fault: Fault) -> None:
        """Cut some connections, or hold their writes back; at least one."""
        direction: Direction
        choice: Choice
        ways = self._store.ways
        match fault.kind:
            case Kind.CUT_REQUEST:
                ways = [worker.way for worker in self._workers]
                direction, choice = "request", _is_chunk
            case Kind.CUT_REPLY:
                ways = [worker.way for worker in self._workers]
                direction, choice = "reply", _is_applied
            case Kind.CUT_COMMIT:
                direction, choice = "request", self._is_commit
            case Kind.HOLD_WRITE:
                direction, choice = "request", self._is_commit
                if self._random.random() < 0.7:
                    choice = self._creates_or_deletes
            case _:
                direction, choice = "reply", lambda link, _: self._store_sight.owes(link)
        waiting = set()
        for way in (*ways,) * CUTS:
            hold = None
            if fault.kind is Kind.HOLD_WRITE:
                hold = Hold(self._random.uniform(0, fault.seconds), silent=fault.pick % 2 == 1)
            waiting.add(way.cut(direction, choice, hold))
        done, waiting = await asyncio.wait(
            waiting, timeout=LONGEST_WAIT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            raise AssertionError(f"{fault.kind}: nothing to cut within {LONGEST_WAIT_S} s")
        deadline_s, count = time.monotonic() + TRIGGER_S, len(done)
        while count < CUTS and time.monotonic() < deadline_s:
            done, waiting = await asyncio.wait(
                waiting, timeout=TRIGGER_S, return_when=asyncio.FIRST_COMPLETED
            )
            count += len(done)
        for way in ways:
            way.forget_cuts()
        self._history.seen[f"{fault.kind}, connections"] += count


_BEGINS_OR_DELETES = re.compile(rb"CRRY\x01(?:\x04|.{59}\x00{8})", re.DOTALL)
"""A tombstone, or the state after a chunk that starts at 0, by docs/reference/store.md."""


def _is_chunk(_: Link, data: bytes) -> bool:
    return data.startswith(b"POST ") and b"/chunks HTTP" in data[:400]


def _is_applied(_: Link, data: bytes) -> bool:
    return data.startswith(b"HTTP/1.1 200")
