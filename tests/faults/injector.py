"""FaultInjector: carries out a plan, one fault after the other, while the clients send.

A fault waits until some chunk is in flight. A worker that was killed or terminated starts again
beside the faults that follow. Every fault that may roll back acknowledged chunks is recorded in the
history, with the moments between which it can have.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence

import numpy as np

from tests.faults.client import SHORT_LIVED, Client
from tests.faults.cluster_store import ClusterStore
from tests.faults.network import MODEL
from tests.faults.plan import Fault, Kind
from tests.faults.proxy import Choice, Connection, Direction, Hold, Proxy
from tests.faults.records import History, Loss
from tests.faults.stores import Store, ValkeyStore
from tests.faults.traffic import (
    BEFORE_LOAD,
    COMPUTING,
    ClientTraffic,
    PendingChunk,
    StoreTraffic,
    count_stages,
)
from tests.faults.workers import Worker

TRIGGER_S = 5.0
"""How long a fault that waits for a moment waits for it."""

LONGEST_WAIT_S = 60.0
"""How long a fault waits for something to break: workers and store serve again by then."""

HELD_SHARE = 3
"""One client of this many is suspended during a rollback, and its stream advanced by others."""

REST_S = 4.0
"""How long a client may take to come to rest: more than it waits for a reply."""

ALONE_SHARE = 4
"""One fault of this many may hit a worker while the others are down."""

CHUNKS_IN_FLIGHT = "faults with chunks in flight"
WARM_ROLLBACKS = "rollbacks with warm caches"
CUTS = 3
CUT = (Kind.CUT_REQUEST, Kind.CUT_REPLY, Kind.CUT_COMMIT, Kind.CUT_ANSWER, Kind.HOLD_WRITE)
_POLL_S = 0.001
_LATE_S = {BEFORE_LOAD: 0.0006, COMPUTING: 0.0012}
"""A kill comes up to so long after the request, or the load's answer, was handed on: the worker
is to have it. Commits are still in the path when the kill comes."""


class FaultInjector:
    """Injects faults into one set of workers and their store."""

    def __init__(
        self,
        store: Store,
        workers: Sequence[Worker],
        traffic: tuple[ClientTraffic, StoreTraffic],
        clients: Sequence[Client],
        history: History,
        random: np.random.Generator,
    ):
        self._store = store
        self._workers = list(workers)
        self._client_traffic, self._store_traffic = traffic
        self._clients = list(clients)
        self._history = history
        self._random = random

    async def run(self, fault: Fault) -> None:
        """One fault, from the wait before it until it is over."""
        await asyncio.sleep(fault.gap_s)
        await self._wait_for_chunk_in_flight()
        match fault.kind:
            case Kind.WORKER_KILL:
                await self._kill_worker(fault)
            case Kind.WORKER_PAUSE:
                worker = await self._serving_worker(fault)
                worker.pause()
                await asyncio.sleep(fault.seconds)
                worker.resume()
            case Kind.WORKER_TERM:
                worker = await self._serving_worker(fault)
                await worker.end()
                worker.restart()
            case Kind.STORE_KILL:
                await self._record_loss(self._store.kill, fault.pick)
            case Kind.STORE_PAUSE:
                await self._record_loss(self._store.pause, fault.seconds, fault.pick)
            case Kind.FAILOVER if isinstance(self._store, ClusterStore):
                await self._record_loss(self._store.fail_over, fault.pick)
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
        self._history.faults[fault.kind] += 1

    async def resolve(self) -> None:
        """Let everything serve again."""
        for proxy in self._all_proxies():
            proxy.forget_cuts()
        for worker in self._workers:
            await worker.started()

    def _all_proxies(self) -> list[Proxy]:
        return [*self._store.proxies, *(worker.proxy for worker in self._workers)]

    async def _wait_for_chunk_in_flight(self) -> None:
        deadline_s = time.monotonic() + LONGEST_WAIT_S
        while time.monotonic() < deadline_s:
            if any(self._client_traffic.in_flight(worker.name) for worker in self._workers):
                self._history.seen[CHUNKS_IN_FLIGHT] += 1
                return
            await asyncio.sleep(_POLL_S)

    async def _serving_worker(self, fault: Fault) -> Worker:
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
        worker = await self._serving_worker(fault)
        loop = asyncio.get_running_loop()
        killed: asyncio.Future[tuple[list[PendingChunk], float]] = loop.create_future()

        def kill() -> None:
            if not killed.done():
                killed.set_result(worker.kill())

        def reached(name: str, stream: str, stage: str) -> None:
            if name != worker.name or stage != fault.stage:
                return
            self._client_traffic.hook = self._store_traffic.hook = None
            latest_s = _LATE_S.get(stage)
            if latest_s is None:
                kill()
            else:
                loop.call_later(self._random.uniform(0, latest_s), kill)

        self._client_traffic.hook = self._store_traffic.hook = reached
        try:
            pending, killed_s = await asyncio.wait_for(asyncio.shield(killed), TRIGGER_S)
        except TimeoutError:
            kill()
            pending, killed_s = killed.result()
        finally:
            self._client_traffic.hook = self._store_traffic.hook = None
        await worker.ended(self._store)
        stages = count_stages(self._store_traffic, worker.name, pending, killed_s)
        self._history.chunks_killed += stages
        self._history.kills.update(stages.keys())
        worker.restart()

    async def _record_loss(self, strike: Callable[..., Loss | None], *how: float) -> None:
        """Inject a fault that may roll back acknowledged chunks, and record when."""
        loss = await asyncio.to_thread(strike, *how)
        if loss is not None:
            self._history.losses.append(loss)

    async def _roll_back(self, fault: Fault) -> None:
        """Set the store back by some moments under workers that know better."""
        for worker in self._workers:
            await worker.started()
        since_s = await asyncio.to_thread(self._store.prepare_rollback, fault.pick)
        await asyncio.sleep(0.3 + min(fault.seconds, 1.5))
        chosen = [
            client
            for place, client in enumerate(self._clients)
            if (place + fault.pick) % HELD_SHARE == 0
        ]
        rest = await asyncio.gather(*(client.suspend(REST_S) for client in chosen))
        held = [client for client, rests in zip(chosen, rest, strict=True) if rests]
        loss = await asyncio.to_thread(self._store.roll_back, since_s)
        self._history.losses.append(loss)
        await asyncio.gather(*(client.resume() for client in held))
        roll_back = sum(client.was_rolled_back for client in held)
        self._history.seen["streams set back while their client rested"] += roll_back
        self._history.seen[WARM_ROLLBACKS] += roll_back > 0

    async def wait_for_held_writes(self) -> None:
        """Wait until all writes that are held back have reached the store."""
        for proxy in self._store.proxies:
            await proxy.drained(lambda connection: connection.hold is not None)

    def _is_commit(self, connection: Connection, data: bytes) -> bool:
        return b"EVAL" in data and self._store_traffic.is_workers(connection)

    def _creates_or_deletes(self, connection: Connection, data: bytes) -> bool:
        """Whether these bytes create or delete a short-lived stream."""
        return (
            self._is_commit(connection, data)
            and f":s:{MODEL}:{SHORT_LIVED}".encode() in data
            and _BEGINS_OR_DELETES.search(data) is not None
        )

    async def _cut(self, fault: Fault) -> None:
        """Cut some connections, or hold their writes back; at least one."""
        direction: Direction
        choice: Choice
        proxies = self._store.proxies
        match fault.kind:
            case Kind.CUT_REQUEST:
                proxies = [worker.proxy for worker in self._workers]
                direction, choice = "request", _is_chunk
            case Kind.CUT_REPLY:
                proxies = [worker.proxy for worker in self._workers]
                direction, choice = "reply", _is_applied
            case Kind.CUT_COMMIT:
                direction, choice = "request", self._is_commit
            case Kind.HOLD_WRITE:
                direction, choice = "request", self._is_commit
                if self._random.random() < 0.7:
                    choice = self._creates_or_deletes
            case _:
                direction, choice = (
                    "reply",
                    lambda connection, _: self._store_traffic.has_pending_commit(connection),
                )
        waiting = set()
        for proxy in (*proxies,) * CUTS:
            hold = None
            if fault.kind is Kind.HOLD_WRITE:
                hold = Hold(self._random.uniform(0, fault.seconds), silent=fault.pick % 2 == 1)
            waiting.add(proxy.cut(direction, choice, hold))
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
        for proxy in proxies:
            proxy.forget_cuts()
        self._history.seen[f"{fault.kind}, connections"] += count


_BEGINS_OR_DELETES = re.compile(rb"CRRY\x01(?:\x04|.{59}\x00{8})", re.DOTALL)
"""A tombstone, or the state after a chunk that starts at 0, by docs/reference/store.md."""


def _is_chunk(_: Connection, data: bytes) -> bool:
    return data.startswith(b"POST ") and b"/chunks HTTP" in data[:400]


def _is_applied(_: Connection, data: bytes) -> bool:
    return data.startswith(b"HTTP/1.1 200")
