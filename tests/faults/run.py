"""One run: a store, its workers, the clients, the faults, and what was made of it."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tests.faults import network
from tests.faults.appender import Appender
from tests.faults.breaker import Breaker
from tests.faults.checker import check
from tests.faults.client import SHORT_LIVED, Client, Habits
from tests.faults.cluster_store import ClusterStore
from tests.faults.plan import Fault, make_plan, more_kills
from tests.faults.records import History
from tests.faults.sight import STAGES, ClientSight, StoreSight
from tests.faults.stores import RedisStore, Store, ValkeyStore
from tests.faults.undisturbed import compare
from tests.faults.verdict import Verdict
from tests.faults.workers import Worker

WORKERS = ("a", "b")
PLANTS = Path(__file__).parent / "plants"
ROOT = Path(__file__).parents[2]
FINISH_S = 60.0
MORE_KILLS = 20
SHORT_LIVED_FORGETS, SHORT_LIVED_REST_S = 0.04, 0.4
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Course:
    """What a run is to be.

    Attributes:
        events: acknowledged at least, before it ends; faults are spread over them.
        kills_per_stage: further kills come until each stage was met so often.
        plan: the faults; None to make them from the seed.
        plant: a bug that is planted in the workers, by its folder in `plants`.
        strict: chunks are acknowledged when the replicas have them.
        forgets: share of chunks before which the stream is deleted or expires.
        short_lived: one in so many streams is deleted and created all the time; 0: none.
        append_pause_s: mean pause between two episodes of an appender.
        longest_s: no pause is longer.
        quiet: compare with an undisturbed service, too.
        tell: print each fault before it comes.
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
    forgets: float = 0.003
    short_lived: int = 7
    pause_s: float = 0.06
    appenders: int = 2
    append_pause_s: float = 0.3
    longest_s: float = 10.0
    quiet: bool = True
    tell: bool = False


@dataclass(slots=True, repr=False)
class Outcome:
    """What a run was."""

    course: Course
    verdict: Verdict
    history: History
    seconds: float
    events: int
    faults: Counter[str]
    kills: Counter[str]
    chunks_killed: Counter[str]
    in_flight: int
    warm_rollbacks: int
    conflicts: int
    replayed_undisturbed: int = 0
    stuck: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Scene:
    """Workers on a store, with the paths between everyone."""

    store: Store
    workers: list[Worker]
    clients: ClientSight
    stores: StoreSight

    @property
    def ways(self) -> dict[str, int]:
        """The port of each worker's path, for clients."""
        return {worker.name: worker.way.port for worker in self.workers}


def make_store(course: Course, folder: Path, models: Path, settings: dict[str, str]) -> Store:
    """The store of a course, not yet started."""
    match course.store:
        case "valkey":
            return ValkeyStore(folder, models, settings)
        case "redis":
            return RedisStore(folder)
        case "cluster":
            return ClusterStore(folder, strict=course.strict)
    raise ValueError(f"expected valkey, redis or cluster, got {course.store!r}")


def environment(course: Course) -> dict[str, str]:
    """The workers' settings: little patience, so that it ends within a run's pauses."""
    found = {
        "CARRY_RUNTIME": "onnxruntime",
        "CARRY_STORE_WAIT_S": "3",
        # no longer than what a client counts with that gave a request up
        "CARRY_TIMEOUT_S": "3",
        "CARRY_DRAIN_S": "2",
    }
    if course.strict:
        found["CARRY_DURABILITY"] = "replicated"
    if course.plant is not None:
        found["PYTHONPATH"] = f"{PLANTS / course.plant}{os.pathsep}{ROOT}"
    return found


@asynccontextmanager
async def scene(course: Course, folder: Path) -> AsyncIterator[Scene]:
    """Two workers on a store that serve; ended afterwards, whatever happened."""
    models = network.write(folder / "models")
    settings = environment(course)
    store = make_store(course, folder / "store", models, settings)
    store.folder.mkdir()
    client_sight, store_sight = ClientSight(), StoreSight(store.whose)
    workers: dict[str, Worker] = {}
    async with AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, store.stop)
        await store.open_ways(store_sight, WORKERS, workers)
        for way in store.ways:
            stack.push_async_callback(way.close)
        await asyncio.to_thread(store.start)
        for name in WORKERS:
            url = store.url(name)
            worker = Worker(name, folder / name, models, url, client_sight, settings)
            workers[name] = worker
            await worker.way.open()
            stack.push_async_callback(worker.way.close)
            stack.callback(worker.stop)
        await asyncio.gather(*(worker.start() for worker in workers.values()))
        yield Scene(store, list(workers.values()), client_sight, store_sight)


async def run(course: Course, folder: Path) -> Outcome:
    """Run a course, check it, compare it with an undisturbed service."""
    began_s = time.monotonic()
    random = np.random.default_rng(course.seed)
    history = History()
    async with scene(course, folder) as on:
        outcome = await _drive(course, on, history, random)
    history.unexpected += [line for worker in on.workers for line in worker.logged()]
    outcome.verdict = await asyncio.to_thread(check, history)
    if course.quiet:
        quiet = folder / "undisturbed"
        quiet.mkdir()
        outcome.replayed_undisturbed = await compare(
            history, outcome.verdict, quiet, folder / "models"
        )
    outcome.seconds = time.monotonic() - began_s
    return outcome


async def _drive(
    course: Course, on: Scene, history: History, random: np.random.Generator
) -> Outcome:
    habits = Habits(forgets=course.forgets, pause_s=course.pause_s)
    forgets = max(course.forgets, SHORT_LIVED_FORGETS)
    short = replace(habits, forgets=forgets, expires=0, rest_s=SHORT_LIVED_REST_S)

    async def expire(stream: str) -> None:
        # streams live longer than a network holds bytes
        await breaker.wait_for_held_writes()
        await asyncio.to_thread(on.store.expire, stream)

    def client(number: int) -> Client:
        brief = course.short_lived and number % course.short_lived == 0
        name, how = (f"{SHORT_LIVED}{number:03d}", short) if brief else (f"s{number:03d}", habits)
        return Client(name, number, on.ways, history, how, _child(random), expire)

    clients = [client(number) for number in range(course.streams)]
    appenders = [
        Appender(f"append{n}", on.ways, history, _child(random), habits.timeout_s)
        for n in range(course.appenders)
    ]
    sights = (on.clients, on.stores)
    breaker = Breaker(on.store, on.workers, sights, clients, history, _child(random))
    plan = course.plan
    if plan is None:
        plan = tuple(make_plan(course.store, course.faults, random, course.longest_s))

    async def fire(fault: Fault) -> None:
        if course.tell:
            print(
                f"  {time.monotonic() - began_s:7.2f} s {events():8d} events  {fault}", flush=True
            )
        await breaker.run(fault)

    def events() -> int:
        return sum(client.applied for client in clients)

    began_s = history.began_s = time.monotonic()
    stop = asyncio.Event()
    tasks = [asyncio.create_task(client.run(stop)) for client in clients]
    tasks += [asyncio.create_task(each.run(stop, course.append_pause_s)) for each in appenders]
    try:
        for place, fault in enumerate(plan):
            await _until_events(events, course.events * place // max(1, len(plan)), tasks)
            await fire(fault)
        for _ in range(MORE_KILLS):
            missing = [s for s in STAGES if breaker.kills[s] < course.kills_per_stage]
            if not missing:
                break
            for fault in more_kills(missing, random):
                await fire(fault)
        await _until_events(events, course.events, tasks)
        await breaker.resolve()
        stop.set()
        stuck = await _ended(tasks)
        finishing = {asyncio.create_task(client.finish()): client for client in clients}
        await asyncio.wait(finishing, timeout=FINISH_S)
        stuck += [client.log.name for task, client in finishing.items() if not task.done()]
        for task in finishing:
            if not task.done():
                task.cancel()
            elif task.exception() is not None:
                raise task.exception()
        await asyncio.gather(*finishing, return_exceptions=True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await breaker.resolve()
        for each in (*clients, *appenders):
            each.close()
    return Outcome(
        course,
        Verdict(),
        history,
        0.0,
        events(),
        breaker.done,
        breaker.kills,
        breaker.chunks_killed,
        breaker.in_flight,
        breaker.warm_rollbacks,
        on.stores.conflicts,
        stuck=stuck,
    )


async def _until_events(events: object, count: int, tasks: list[asyncio.Task[None]]) -> None:
    """Wait until so many events were acknowledged; a client that failed ends the run."""
    while events() < count:
        for task in tasks:
            if task.done() and task.exception() is not None:
                raise task.exception()
        await asyncio.sleep(_POLL_S)


async def _ended(tasks: list[asyncio.Task[None]]) -> list[str]:
    """Let the clients end their chunks; who does not."""
    _, pending = await asyncio.wait(tasks, timeout=FINISH_S)
    for task in pending:
        task.cancel()
    for task in tasks:
        if task not in pending and task.exception() is not None:
            raise task.exception()
    return [f"a client did not end within {FINISH_S} s"] * len(pending)


def _child(random: np.random.Generator) -> np.random.Generator:
    return np.random.default_rng(int(random.integers(1 << 62)))


@asynccontextmanager
async def own_folder() -> AsyncIterator[Path]:
    """A folder with a short name, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="carry-faults-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_seed() -> int:
    """A seed for a run that was given none."""
    return secrets.randbelow(1 << 31)
