"""The faults: which come in which order, made from a seed before a run begins, and how they are
injected, one after the other, while the clients send.

A fault waits until some chunk is in flight. A worker that was killed or terminated starts again
beside the faults that follow. Every fault that may roll back acknowledged chunks is recorded in the
history, with the moments between which it can have.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from itertools import cycle, islice
from typing import Final, Literal

import httpx
import numpy as np

from tests.faults.client import SHORT_LIVED, Client
from tests.faults.deployment import Deployment, Worker
from tests.faults.history import History, Loss
from tests.faults.network import MODEL
from tests.faults.stores import suspension
from tests.faults.traffic import BEFORE_LOAD, COMPUTING, STAGES, let_pass
from tests.support.proxy import Connection, CutError, Direction

IN_FLIGHT = "faults with chunks in flight"
HOLD = "writes held, delivered late"
KILL = {stage: f"kill of a worker at {stage!r}" for stage in STAGES}
KILLED = {stage: f"worker killed at the stage {stage!r}" for stage in STAGES}
"""What is tried, and what happened: the worker may get on before it ends."""
WARM_ROLLBACKS = "rollbacks with warm caches"
_LONGEST_WAIT_S = 60.0
"""How long a fault waits for something to break: workers and store serve again by then."""
_MORE_S = 5.0  # how long a fault that has broken something waits for more
_SUSPENDED_SHARE = 3
"""One client of this many is suspended during a rollback, and its stream advanced by others."""
_SUSPEND_S = 4.0  # how long a client may take to be suspended: more than it waits for a reply
_ALONE_SHARE = 4  # one fault of this many may hit a worker while the others are down
_CUTS = 3
_CHUNKS_WITHOUT_SENTINELS = 100
_PAUSES_S: Final = (0.2, 0.5, 0.5, 1.0, 1.5, 3.5)
"""Short ones, ones longer than a worker waits for an answer, one longer than the store's whole
patience."""
_LATE_S = {BEFORE_LOAD: 0.0006, COMPUTING: 0.0012}
"""A kill comes up to so long after the request, or the load's answer, was forwarded: the worker
is to have it. Commits are still in the proxy when the kill comes."""
_ANYTHING, _WRITES = re.compile(b""), re.compile(b"EVAL")
_APPLIED = re.compile(
    rb'^HTTP/1\.1 200|"status":200|\xa6status\xcc\xc8|\x0a\x09%b' % MODEL.encode()
)
_CREATES_OR_DELETES = re.compile(
    rb"EVAL.*:s:%b:%b.*CRRY\x01(?:\x04|.{59}\x00{8})" % (MODEL.encode(), SHORT_LIVED.encode()),
    re.DOTALL,
)
"""A tombstone, or the state after a chunk that starts at 0, by docs/reference/store.md."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault."""

    kind: str  # a key of `FAULTS`
    seconds: float  # length of a pause, age of the restored files, longest delay of held writes
    gap_s: float  # pause before it
    pick: int  # chooses what it hits


def make_plan(store: str, count: int, random: np.random.Generator, longest_s: float) -> list[Fault]:
    """`count` faults for a store, each kind as often as the others, shuffled."""
    kinds = random.permutation(list(islice(cycle(kinds_of(store)), count)))
    return [make_fault(str(kind), random, longest_s) for kind in kinds]


def make_fault(kind: str, random: np.random.Generator, longest_s: float = 0.0) -> Fault:
    """A fault of random length and place."""
    seconds = min(longest_s, float(random.choice(_PAUSES_S)))
    gap_s, pick = float(random.uniform(0.05, 0.4)), int(random.integers(1 << 30))
    return Fault(kind, seconds, gap_s, pick)


def kinds_of(store: str) -> list[str]:
    """What can occur on a store."""
    return [kind for kind, (_, stores) in FAULTS.items() if store in stores]


@dataclass(slots=True)
class FaultInjector:
    """Injects faults into workers and their store."""

    deployment: Deployment
    clients: Sequence[Client]
    history: History
    random: np.random.Generator

    async def inject(self, fault: Fault) -> None:
        """One fault, from the wait before it until it is over."""
        await asyncio.sleep(fault.gap_s)
        await self._wait_for_chunk_in_flight()
        inject, _ = FAULTS[fault.kind]
        loss = await inject(self, fault)
        if loss is not None:
            self.history.losses.append(loss)
        self.history.seen[fault.kind] += 1

    async def kill_worker(self, fault: Fault, *, stage: str) -> None:
        """Kill a worker when one of its chunks is at the stage, or after a while anyway."""
        worker, traffic = await self._serving_worker(fault.pick), self.deployment.traffic
        loop, reached = asyncio.get_running_loop(), asyncio.Event()

        def kill() -> None:
            if worker.serves:
                worker.serves = False
                worker.process.kill()
            reached.set()

        def reach(name: str, stage_reached: str) -> None:
            if (name, stage_reached) != (worker.name, stage):
                return
            traffic.hook = quiet
            if stage in _LATE_S:
                loop.call_later(self.random.uniform(0, _LATE_S[stage]), kill)
            else:
                kill()

        quiet, traffic.hook = traffic.hook, reach
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reached.wait(), _LONGEST_WAIT_S)
            self.history.seen[KILLED[stage]] += 1
        traffic.hook = quiet
        kill()
        await asyncio.to_thread(worker.process.wait)
        worker.restart()

    async def pause_worker(self, fault: Fault) -> None:
        """Stop a worker, and continue it."""
        worker = await self._serving_worker(fault.pick)
        with suspension(worker.process.send_signal):
            await asyncio.sleep(fault.seconds)

    async def terminate_worker(self, fault: Fault) -> None:
        """End a worker as a supervisor does."""
        worker = await self._serving_worker(fault.pick)
        worker.serves = False
        await asyncio.to_thread(worker.stop)
        worker.restart()

    async def roll_back(self, fault: Fault) -> Loss:
        """Set the store back by some moments under workers whose caches are newer."""
        store = self.deployment.store
        await self.deployment.wait_until_up()
        since_s = await asyncio.to_thread(store.prepare_rollback, fault.pick)
        chosen = self.clients[-fault.pick % _SUSPENDED_SHARE :: _SUSPENDED_SHARE]
        before = [client.applied for client in chosen]
        await asyncio.sleep(0.3 + min(fault.seconds, 1.5))
        deadline_s = time.monotonic() + _LONGEST_WAIT_S
        while time.monotonic() < deadline_s:
            # on a busy machine it takes longer until there is something to roll back
            moved = [each.applied > old for each, old in zip(chosen, before, strict=True)]
            if sum(moved) > len(chosen) // 2:
                break
            await asyncio.sleep(0.01)
        attempts = (asyncio.wait_for(each.lock.acquire(), _SUSPEND_S) for each in chosen)
        results = await asyncio.gather(*attempts, return_exceptions=True)
        idle = [each for each, result in zip(chosen, results, strict=True) if result is True]
        loss = await asyncio.to_thread(store.roll_back, since_s)
        streams = sum(await asyncio.gather(*(client.advance_by_others() for client in idle)))
        for client in idle:
            client.lock.release()
        self.history.seen["streams rolled back while their client was suspended"] += streams
        self.history.seen[WARM_ROLLBACKS] += streams > 0
        return loss

    async def stop_sentinels(self, fault: Fault) -> None:
        """Break the connections to the primary while no Sentinel runs, until chunks are applied."""
        store = self.deployment.store
        await asyncio.to_thread(store.stop_sentinels)
        before, deadline_s = self._applied(), time.monotonic() + _LONGEST_WAIT_S
        while self._applied() < before + _CHUNKS_WITHOUT_SENTINELS:
            if time.monotonic() > deadline_s:
                self.history.unexpected.append("no chunk was applied while no Sentinel ran")
                break
            await asyncio.sleep(0.01)
        for worker in self.deployment.workers:
            if worker.serves and not await asyncio.to_thread(_becomes_ready, worker.url):
                self.history.unexpected.append("a worker was not ready while no Sentinel ran")
        await asyncio.sleep(fault.seconds)
        await asyncio.to_thread(store.start_sentinels)

    def _applied(self) -> int:
        return sum(client.applied for client in self.clients)

    async def break_store(self, fault: Fault, *, method: str) -> Loss | None:
        """What a method of the store does, in a thread."""
        call: Callable[[int, float], Loss | None] = getattr(self.deployment.store, method)
        return await asyncio.to_thread(call, fault.pick, fault.seconds)

    async def cut(
        self,
        fault: Fault,
        *,
        side: Literal["clients", "store"],
        direction: Direction,
        pattern: re.Pattern[bytes] = _ANYTHING,
        holds: bool = False,
    ) -> None:
        """Cut some connections of workers within bytes that match; at least one.

        Args:
            direction: of clients' requests, those with chunks are cut; of the store's replies,
                those to commits.
            holds: whether all that the worker writes is held back instead, mostly from the creation
                or deletion of a short-lived stream on, and delivered after it was abandoned.
        """
        traffic, done, count = self.deployment.traffic, asyncio.Semaphore(0), 1
        is_store = side == "store"
        proxies = self.deployment.store.proxies if is_store else traffic.proxies
        if holds and self.random.random() < 0.7:
            pattern = _CREATES_OR_DELETES

        def cut(connection: Connection, passing: Direction, data: bytes) -> None:
            if passing != direction or pattern.search(data) is None:
                return
            if not is_store and passing == "request" and not traffic.begins_chunk(connection, data):
                return
            if is_store and traffic.owner_of(connection) == "":
                return
            if is_store and passing == "reply" and not traffic.has_pending_commit(connection):
                return
            done.release()
            if not holds:
                raise CutError(data[: len(data) // 2])
            late_s = self.random.uniform(0, fault.seconds)
            connection.hold(partial(asyncio.sleep, late_s), silent=fault.pick % 2 == 1)

        for proxy in proxies:
            proxy.cut = cut
        try:
            first = asyncio.ensure_future(done.acquire())
            # on a busy machine workers take long to start
            up = asyncio.ensure_future(self.deployment.wait_until_up())
            await asyncio.wait({first, up}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait_for(first, _LONGEST_WAIT_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_MORE_S):
                    while count < _CUTS:
                        await done.acquire()
                        count += 1
        finally:
            for proxy in proxies:
                proxy.cut = let_pass
        self.history.seen[f"{fault.kind}, connections"] += count

    async def _wait_for_chunk_in_flight(self) -> None:
        deadline_s = time.monotonic() + _LONGEST_WAIT_S
        while time.monotonic() < deadline_s:
            if any(client.lock.locked() for client in self.clients):
                self.history.seen[IN_FLIGHT] += 1
                return
            await asyncio.sleep(0.001)

    async def _serving_worker(self, pick: int) -> Worker:
        """A worker that serves; mostly while all do, so that the clients get on."""
        workers = self.deployment.workers
        while True:
            up = [worker for worker in workers if worker.serves]
            if len(up) == len(workers) or (up and pick % _ALONE_SHARE == 0):
                return up[pick // _ALONE_SHARE % len(up)]
            await self.deployment.wait_until_up()


def _becomes_ready(url: str) -> bool:
    """Whether a worker is ready within the time in which it reconnects."""
    deadline_s = time.monotonic() + _LONGEST_WAIT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health/ready", timeout=10).status_code == HTTPStatus.OK:
                return True
        time.sleep(0.1)
    return False


Inject = Callable[[FaultInjector, Fault], Awaitable[Loss | None]]
_EVERY: Final = ("valkey", "redis", "cluster", "sentinel")
_on_store = partial(partial, FaultInjector.break_store)
_cut = partial(partial, FaultInjector.cut)

FAULTS: Final[dict[str, tuple[Inject, tuple[str, ...]]]] = {
    **{
        name: (partial(FaultInjector.kill_worker, stage=stage), _EVERY)
        for stage, name in KILL.items()
    },
    "worker stopped and continued": (FaultInjector.pause_worker, _EVERY),
    "worker terminated": (FaultInjector.terminate_worker, _EVERY),
    "store killed": (_on_store(method="kill"), _EVERY),
    "store stopped and continued": (_on_store(method="pause"), _EVERY),
    "store's memory full": (_on_store(method="fill"), _EVERY),
    "requests cut": (_cut(side="clients", direction="request"), _EVERY),
    "replies cut": (_cut(side="clients", direction="reply", pattern=_APPLIED), _EVERY),
    "commits cut": (_cut(side="store", direction="request", pattern=_WRITES), _EVERY),
    "commits' answers cut": (_cut(side="store", direction="reply"), _EVERY),
    HOLD: (_cut(side="store", direction="request", pattern=_WRITES, holds=True), _EVERY),
    "store rolled back": (FaultInjector.roll_back, ("valkey", "redis")),
    "embedded store's service killed": (_on_store(method="kill_owner"), ("valkey",)),
    "embedded store's service terminated": (_on_store(method="terminate_owner"), ("valkey",)),
    "failover": (_on_store(method="fail_over"), ("cluster", "sentinel")),
    "lossy failover": (FaultInjector.roll_back, ("cluster", "sentinel")),
    "Sentinels killed": (FaultInjector.stop_sentinels, ("sentinel",)),
}
"""What breaks, and on which stores."""
