"""The faults: which come in which order, made from a seed before a run begins, and how they are
injected, one after the other, while the clients send.

A fault waits until some chunk is in flight. A worker that was killed or terminated starts again
beside the faults that follow. Every fault that may roll back acknowledged chunks is recorded in the
history, with the moments between which it can have.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle, islice
from typing import Final

import numpy as np

from tests.faults.client import SHORT_LIVED, Client
from tests.faults.history import History, Loss
from tests.faults.network import MODEL
from tests.faults.proxy import Choice, Connection, Cut, Direction, Hold, Proxy
from tests.faults.stores import Deployment, Worker
from tests.faults.traffic import BEFORE_LOAD, COMPUTING, STAGES, PendingChunk

IN_FLIGHT = "faults with chunks in flight"
KILLED = {stage: f"worker killed at the stage {stage!r}" for stage in STAGES}
WARM_ROLLBACKS = "rollbacks with warm caches"
_TRIGGER_S = 5.0
"""How long a fault that waits for a moment waits for it."""
_LONGEST_WAIT_S = 60.0
"""How long a fault waits for something to break: workers and store serve again by then."""
_SUSPENDED_SHARE = 3
"""One client of this many is suspended during a rollback, and its stream advanced by others."""
_SUSPEND_S = 4.0
"""How long a client may take to be suspended: more than it waits for a reply."""
_ALONE_SHARE = 4
"""One fault of this many may hit a worker while the others are down."""
_KILLED_SHARE: Final = 4
"""One fault of this many kills a worker, the stages in turn."""
_CUTS = 3
_PAUSES_S: Final = (0.2, 0.5, 0.5, 1.0, 1.5, 3.5)
"""Short ones, ones longer than a worker waits for an answer, one longer than the store's whole
patience."""
_LATE_S = {BEFORE_LOAD: 0.0006, COMPUTING: 0.0012}
"""A kill comes up to so long after the request, or the load's answer, was forwarded: the worker
is to have it. Commits are still in the proxy when the kill comes."""
_CREATES_OR_DELETES = re.compile(rb"CRRY\x01(?:\x04|.{59}\x00{8})", re.DOTALL)
"""A tombstone, or the state after a chunk that starts at 0, by docs/reference/store.md."""


class Kind(StrEnum):
    """What breaks."""

    WORKER_KILL = "worker killed"
    WORKER_PAUSE = "worker stopped and continued"
    WORKER_TERM = "worker terminated"
    STORE_KILL = "store killed"
    STORE_PAUSE = "store stopped and continued"
    STORE_FULL = "store's memory full"
    CUT_REQUEST = "requests cut"
    CUT_REPLY = "replies cut"
    CUT_COMMIT = "commits cut"
    CUT_ANSWER = "commits' answers cut"
    HOLD_WRITE = "writes held, delivered late"
    ROLLBACK = "store rolled back"
    OWNER_KILL = "embedded store's service killed"
    OWNER_TERM = "embedded store's service terminated"
    FAILOVER = "failover"
    LOSSY_FAILOVER = "lossy failover"


_ANYWHERE = tuple(Kind)[: tuple(Kind).index(Kind.ROLLBACK)]
KINDS: Final[dict[str, tuple[Kind, ...]]] = {
    "valkey": (*_ANYWHERE, Kind.ROLLBACK, Kind.OWNER_KILL, Kind.OWNER_TERM),
    "redis": (*_ANYWHERE, Kind.ROLLBACK),
    "cluster": (*_ANYWHERE, Kind.FAILOVER, Kind.LOSSY_FAILOVER),
}
"""What can occur on a store."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        seconds: length of a pause, age of the restored files, or longest delay of held writes.
        gap_s: pause before it.
        pick: chooses what it hits.
        stage: where a chunk of the worker that is killed is to be.
    """

    kind: Kind
    seconds: float
    gap_s: float
    pick: int
    stage: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.stage}" if self.stage else str(self.kind)


def make_plan(store: str, count: int, random: np.random.Generator, longest_s: float) -> list[Fault]:
    """`count` faults for a store: kinds and stages as evenly as the count allows, shuffled."""
    kills = max(len(STAGES), count // _KILLED_SHARE)
    chosen = [(Kind.WORKER_KILL, stage) for stage in islice(cycle(STAGES), kills)]
    others = [kind for kind in KINDS[store] if kind is not Kind.WORKER_KILL]
    chosen += [(kind, "") for kind in islice(cycle(others), max(0, count - kills))]
    order = random.permutation(len(chosen))[:count]
    return [make_fault(*chosen[place], random, longest_s) for place in order]


def make_fault(
    kind: Kind, stage: str, random: np.random.Generator, longest_s: float = 0.0
) -> Fault:
    """A fault of random length and place."""
    seconds = min(longest_s, float(random.choice(_PAUSES_S)))
    gap_s, pick = float(random.uniform(0.05, 0.4)), int(random.integers(1 << 30))
    return Fault(kind, seconds, gap_s, pick, stage)


class FaultInjector:
    """Injects faults into workers and their store."""

    def __init__(
        self,
        deployment: Deployment,
        clients: Sequence[Client],
        history: History,
        random: np.random.Generator,
    ):
        self._store, self._traffic = deployment.store, deployment.traffic
        self._workers = deployment.workers
        self._clients = clients
        self._history = history
        self._random = random
        self._proxies = [*self._store.proxies, *(worker.proxy for worker in self._workers)]

    async def run(self, fault: Fault) -> None:
        """One fault, from the wait before it until it is over."""
        await asyncio.sleep(fault.gap_s)
        await self._wait_for_chunk_in_flight()
        store, seconds, pick = self._store, fault.seconds, fault.pick
        loss: Loss | None = None
        match fault.kind:
            case Kind.WORKER_KILL:
                await self._kill_worker(fault)
            case Kind.WORKER_PAUSE:
                worker = await self._serving_worker(pick)
                worker.process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(seconds)
                worker.process.send_signal(signal.SIGCONT)
            case Kind.WORKER_TERM:
                worker = await self._serving_worker(pick)
                worker.serves = False
                await asyncio.to_thread(worker.stop)
                worker.restart()
            case Kind.STORE_KILL:
                loss = await asyncio.to_thread(store.kill, pick)
            case Kind.STORE_PAUSE:
                loss = await asyncio.to_thread(store.pause, seconds, pick)
            case Kind.FAILOVER:
                loss = await asyncio.to_thread(store.fail_over, pick)
            case Kind.STORE_FULL:
                await asyncio.to_thread(store.fill, seconds)
            case Kind.OWNER_KILL | Kind.OWNER_TERM:
                await asyncio.to_thread(store.restart_owner, kill=fault.kind is Kind.OWNER_KILL)
            case Kind.ROLLBACK | Kind.LOSSY_FAILOVER:
                await self._roll_back(fault)
            case _:
                await self._cut(fault)
        if loss is not None:
            self._history.losses.append(loss)
        self._history.seen[fault.kind] += 1

    async def resolve(self) -> None:
        """Let everything serve again."""
        for proxy in self._proxies:
            proxy.forget_cuts()
        for worker in self._workers:
            await worker.started()

    async def wait_for_held_writes(self) -> None:
        """Wait until all writes that are held back have reached the store."""
        for proxy in self._store.proxies:
            await proxy.drained(lambda connection: connection.hold is not None)

    async def _wait_for_chunk_in_flight(self) -> None:
        deadline_s = time.monotonic() + _LONGEST_WAIT_S
        while time.monotonic() < deadline_s:
            if any(worker.pending_chunks() for worker in self._workers):
                self._history.seen[IN_FLIGHT] += 1
                return
            await asyncio.sleep(0.001)

    async def _serving_worker(self, pick: int) -> Worker:
        """A worker that serves; mostly while all do, so that the clients get on."""
        while True:
            up = [worker for worker in self._workers if worker.serves]
            if len(up) == len(self._workers) or (up and pick % _ALONE_SHARE == 0):
                return up[pick // _ALONE_SHARE % len(up)]
            for worker in self._workers:
                await worker.started()

    async def _kill_worker(self, fault: Fault) -> None:
        """Kill a worker when one of its chunks is at the stage, and count where all were."""
        worker = await self._serving_worker(fault.pick)
        loop = asyncio.get_running_loop()
        killed: asyncio.Future[tuple[list[PendingChunk], float]] = loop.create_future()

        def kill() -> None:
            if not killed.done():
                killed.set_result(worker.strike())

        def reach(name: str, stage: str) -> None:
            if name == worker.name and stage == fault.stage:
                self._traffic.hook = None
                if stage in _LATE_S:
                    loop.call_later(self._random.uniform(0, _LATE_S[stage]), kill)
                else:
                    kill()

        self._traffic.hook = reach
        await asyncio.wait([killed], timeout=_TRIGGER_S)
        self._traffic.hook = None
        kill()
        pending, killed_s = killed.result()
        await asyncio.to_thread(worker.process.wait)
        # all that it wrote has to pass
        await worker.proxy.drained(lambda _: True)
        for proxy in self._store.proxies:
            await proxy.drained(lambda each: self._traffic.owner_of(each) == worker.name)
        for stage, count in self._traffic.count_stages(worker.name, pending, killed_s).items():
            self._history.seen[KILLED[stage]] += 1
            self._history.seen[f"{KILLED[stage]}, chunks"] += count
        worker.restart()

    async def _roll_back(self, fault: Fault) -> None:
        """Set the store back by some moments under workers whose caches are newer."""
        for worker in self._workers:
            await worker.started()
        since_s = await asyncio.to_thread(self._store.prepare_rollback, fault.pick)
        await asyncio.sleep(0.3 + min(fault.seconds, 1.5))
        chosen = self._clients[-fault.pick % _SUSPENDED_SHARE :: _SUSPENDED_SHARE]
        attempts = (asyncio.wait_for(each.lock.acquire(), _SUSPEND_S) for each in chosen)
        results = await asyncio.gather(*attempts, return_exceptions=True)
        suspended = [each for each, result in zip(chosen, results, strict=True) if result is True]
        self._history.losses.append(await asyncio.to_thread(self._store.roll_back, since_s))
        rolled_back = sum(
            await asyncio.gather(*(client.advance_by_others() for client in suspended))
        )
        for client in suspended:
            client.lock.release()
        self._history.seen["streams rolled back while their client was suspended"] += rolled_back
        self._history.seen[WARM_ROLLBACKS] += rolled_back > 0

    async def _cut(self, fault: Fault) -> None:
        """Cut some connections, or hold their writes back; at least one."""
        is_commit = self._is_commit
        if fault.kind is Kind.HOLD_WRITE and self._random.random() < 0.7:
            is_commit = self._creates_or_deletes
        to_workers = [worker.proxy for worker in self._workers]
        table: dict[Kind, tuple[Sequence[Proxy], Direction, Choice]] = {
            Kind.CUT_REQUEST: (to_workers, "request", _is_chunk),
            Kind.CUT_REPLY: (to_workers, "reply", _is_applied),
            Kind.CUT_COMMIT: (self._store.proxies, "request", is_commit),
            Kind.HOLD_WRITE: (self._store.proxies, "request", is_commit),
            Kind.CUT_ANSWER: (
                self._store.proxies,
                "reply",
                lambda connection, _: self._traffic.has_pending_commit(connection),
            ),
        }
        proxies, direction, choice = table[fault.kind]
        done, count = asyncio.Semaphore(0), 1
        for proxy in (*proxies,) * _CUTS:
            hold = None
            if fault.kind is Kind.HOLD_WRITE:
                hold = Hold(self._random.uniform(0, fault.seconds), silent=fault.pick % 2 == 1)
            proxy.cut(Cut(direction, choice, hold, done))
        await asyncio.wait_for(done.acquire(), _LONGEST_WAIT_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TRIGGER_S):
                while count < _CUTS:
                    await done.acquire()
                    count += 1
        self._history.seen[f"{fault.kind}, connections"] += count
        for proxy in proxies:
            proxy.forget_cuts()

    def _is_commit(self, connection: Connection, data: bytes) -> bool:
        return b"EVAL" in data and self._traffic.owner_of(connection) != ""

    def _creates_or_deletes(self, connection: Connection, data: bytes) -> bool:
        """Whether these bytes create or delete a short-lived stream."""
        return (
            self._is_commit(connection, data)
            and f":s:{MODEL}:{SHORT_LIVED}".encode() in data
            and _CREATES_OR_DELETES.search(data) is not None
        )


def _is_chunk(_: Connection, data: bytes) -> bool:
    return data.startswith(b"POST ") and b"/chunks HTTP" in data[:400]


def _is_applied(_: Connection, data: bytes) -> bool:
    return data.startswith(b"HTTP/1.1 200")
