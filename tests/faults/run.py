"""One run of the fault tests: a store, its workers, clients, faults, and the check."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tests.faults import network
from tests.faults.appends import Appender
from tests.faults.checker import check
from tests.faults.client import SHORT_LIVED, Behavior, Client
from tests.faults.cluster_store import ClusterStore
from tests.faults.injector import FaultInjector
from tests.faults.plan import Fault, make_plan, more_kills
from tests.faults.records import History
from tests.faults.result import CheckResult
from tests.faults.stores import RedisStore, Store, ValkeyStore
from tests.faults.traffic import STAGES, ClientTraffic, StoreTraffic
from tests.faults.workers import Worker

WORKERS = ("a", "b")
PLANTED_BUGS = Path(__file__).parent / "planted_bugs"
ROOT = Path(__file__).parents[2]
FINISH_S = 60.0
MORE_KILLS = 20
SHORT_LIVED_REMOVALS, SHORT_LIVED_REST_S = 0.04, 0.4
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one run.

    Attributes:
        events: acknowledged at least, before it ends; faults are spread over them.
        kills_per_stage: further kills follow until each stage was hit this often.
        plan: the faults; None to make them from the seed.
        plant: a bug that is planted in the workers, by its folder in `planted_bugs`.
        strict: chunks are acknowledged when the replicas have them.
        removals: share of chunks before which the stream is deleted or expires.
        short_lived: one stream of this many is deleted and created all the time; 0: none.
        append_pause_s: mean pause between two bursts of an appender.
        longest_s: no pause is longer.
        verbose: print each fault before it is injected.
    """

    store: str
    seed: int
    events: int
    faults: int
    streams: int = 48
    kills_per_stage: int = 0
    plan: tuple[Fault, ...] | None = None
    plant: str | None = None
    strict: bool = False
    removals: float = 0.003
    short_lived: int = 7
    pause_s: float = 0.06
    appenders: int = 2
    append_pause_s: float = 0.3
    longest_s: float = 10.0
    verbose: bool = False


@dataclass(slots=True, repr=False)
class Outcome:
    """Everything that one run recorded.

    Attributes:
        events: that were acknowledged.
        stuck: clients that did not end.
    """

    options: RunOptions
    history: History
    result: CheckResult
    seconds: float
    events: int
    stuck: list[str]


@dataclass(slots=True)
class Deployment:
    """Workers on a store, with the proxies between all processes."""

    store: Store
    workers: list[Worker]
    clients: ClientTraffic
    stores: StoreTraffic

    @property
    def ports(self) -> dict[str, int]:
        """The port of each worker's proxy, for clients."""
        return {worker.name: worker.proxy.port for worker in self.workers}


def make_store(options: RunOptions, folder: Path, models: Path, settings: dict[str, str]) -> Store:
    """The store of a run, not yet started."""
    match options.store:
        case "valkey":
            return ValkeyStore(folder, models, settings)
        case "redis":
            return RedisStore(folder)
        case "cluster":
            return ClusterStore(folder, strict=options.strict)
    raise ValueError(f"expected valkey, redis or cluster, got {options.store!r}")


def environment(options: RunOptions) -> dict[str, str]:
    """The workers' settings: time limits shorter than the pauses of a run."""
    found = {
        "CARRY_RUNTIME": "onnxruntime",
        "CARRY_STORE_WAIT_S": "3",
        # no longer than a client assumes of an abandoned request
        "CARRY_TIMEOUT_S": "3",
        "CARRY_DRAIN_S": "2",
    }
    if options.strict:
        found["CARRY_DURABILITY"] = "replicated"
    if options.plant is not None:
        found["PYTHONPATH"] = f"{PLANTED_BUGS / options.plant}{os.pathsep}{ROOT}"
    return found


@asynccontextmanager
async def deploy(options: RunOptions, folder: Path) -> AsyncIterator[Deployment]:
    """Two workers that serve on a store; they are ended in any case."""
    models = network.write(folder / "models")
    settings = environment(options)
    store = make_store(options, folder / "store", models, settings)
    store.folder.mkdir()
    client_traffic, store_traffic = ClientTraffic(), StoreTraffic(store.owner_of)
    workers: dict[str, Worker] = {}
    async with AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, store.stop)
        await store.open_proxies(store_traffic, WORKERS, workers)
        for proxy in store.proxies:
            stack.push_async_callback(proxy.close)
        await asyncio.to_thread(store.start)
        for name in WORKERS:
            url = store.url(name)
            worker = Worker(name, folder / name, models, url, client_traffic, settings)
            workers[name] = worker
            await worker.proxy.open()
            stack.push_async_callback(worker.proxy.close)
            stack.callback(worker.stop)
        await asyncio.gather(*(worker.start() for worker in workers.values()))
        yield Deployment(store, list(workers.values()), client_traffic, store_traffic)


async def run(options: RunOptions, folder: Path) -> Outcome:
    """Run a plan of faults, and check what the clients saw."""
    began_s = time.monotonic()
    random = np.random.default_rng(options.seed)
    history = History()
    async with deploy(options, folder) as deployment:
        events, stuck = await _drive(options, deployment, history, random)
    history.unexpected += [line for worker in deployment.workers for line in worker.logged()]
    result = await asyncio.to_thread(check, history)
    return Outcome(options, history, result, time.monotonic() - began_s, events, stuck)


async def _drive(
    options: RunOptions, deployment: Deployment, history: History, random: np.random.Generator
) -> tuple[int, list[str]]:
    """Let clients send while faults are injected: acknowledged events, and stuck clients."""
    behavior = Behavior(removals=options.removals, pause_s=options.pause_s)
    removals = max(options.removals, SHORT_LIVED_REMOVALS)
    short = replace(behavior, removals=removals, expires=0, rest_s=SHORT_LIVED_REST_S)

    async def expire(stream: str) -> None:
        # streams live longer than a network holds bytes
        await injector.wait_for_held_writes()
        await asyncio.to_thread(deployment.store.expire, stream)

    def client(number: int) -> Client:
        brief = options.short_lived and number % options.short_lived == 0
        name, how = (f"{SHORT_LIVED}{number:03d}", short) if brief else (f"s{number:03d}", behavior)
        return Client(name, number, deployment.ports, history, how, _child(random), expire)

    clients = [client(number) for number in range(options.streams)]
    appenders = [
        Appender(f"append{n}", deployment.ports, history, _child(random), behavior.timeout_s)
        for n in range(options.appenders)
    ]
    traffic = (deployment.clients, deployment.stores)
    injector = FaultInjector(
        deployment.store, deployment.workers, traffic, clients, history, _child(random)
    )
    plan = options.plan
    if plan is None:
        plan = tuple(make_plan(options.store, options.faults, random, options.longest_s))

    async def fire(fault: Fault) -> None:
        if options.verbose:
            print(
                f"  {time.monotonic() - began_s:7.2f} s {events():8d} events  {fault}", flush=True
            )
        await injector.run(fault)

    def events() -> int:
        return sum(client.applied for client in clients)

    began_s = history.began_s = time.monotonic()
    stop = asyncio.Event()
    tasks = [asyncio.create_task(client.run(stop)) for client in clients]
    tasks += [asyncio.create_task(each.run(stop, options.append_pause_s)) for each in appenders]
    try:
        for place, fault in enumerate(plan):
            await _until_events(events, options.events * place // max(1, len(plan)), tasks)
            await fire(fault)
        for _ in range(MORE_KILLS):
            missing = [s for s in STAGES if history.kills[s] < options.kills_per_stage]
            if not missing:
                break
            for fault in more_kills(missing, random):
                await fire(fault)
        await _until_events(events, options.events, tasks)
        await injector.resolve()
        stop.set()
        stuck = await _finish(tasks)
        stuck += await _finish([asyncio.create_task(client.finish()) for client in clients])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await injector.resolve()
        for each in (*clients, *appenders):
            await each.close()
    history.seen["conflicts"] = deployment.stores.conflicts
    return events(), stuck


async def _until_events(events: object, count: int, tasks: list[asyncio.Task[None]]) -> None:
    """Wait until `count` events were acknowledged; a client that failed ends the run."""
    while events() < count:
        for task in tasks:
            if task.done() and task.exception() is not None:
                raise task.exception()
        await asyncio.sleep(_POLL_S)


async def _finish(tasks: list[asyncio.Task[None]]) -> list[str]:
    """Wait for the clients' tasks; what did not end in time is cancelled and reported."""
    done, pending = await asyncio.wait(tasks, timeout=FINISH_S)
    for task in pending:
        task.cancel()
    await asyncio.gather(*done)
    return [f"a client did not end within {FINISH_S} s"] * len(pending)


def _child(random: np.random.Generator) -> np.random.Generator:
    return np.random.default_rng(int(random.integers(1 << 62)))


@asynccontextmanager
async def temporary_folder() -> AsyncIterator[Path]:
    """A folder with a short name, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="carry-faults-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_seed() -> int:
    """A seed for a run that was given none."""
    return secrets.randbelow(1 << 31)
