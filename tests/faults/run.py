"""One run of the fault tests: a store, its workers, clients, faults, the check, and the report."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.faults import network
from tests.faults.checker import DOUBLED, LOST, MIXED, Finding, check
from tests.faults.client import SHORT_LIVED, Appender, Client
from tests.faults.faults import (
    KILLED,
    KINDS,
    WARM_ROLLBACKS,
    Fault,
    FaultInjector,
    Kind,
    make_fault,
    make_plan,
)
from tests.faults.history import History
from tests.faults.proxy import Connection
from tests.faults.stores import (
    ClusterStore,
    Deployment,
    EmbeddedValkey,
    SingleStore,
    Store,
    Worker,
    has_connection,
)
from tests.faults.traffic import STAGES, Traffic

WORKERS = ("a", "b")
_PLANTED_BUGS = Path(__file__).parent / "planted_bugs"
_ROOT = Path(__file__).parents[2]
_SETTINGS = {
    "CARRY_RUNTIME": "onnxruntime",
    "CARRY_STORE_WAIT_S": "3",
    # no longer than a client assumes of an abandoned request
    "CARRY_TIMEOUT_S": "3",
    "CARRY_DRAIN_S": "2",
}
"""The workers' time limits are shorter than the pauses of a run."""
_FINISH_S = 60.0
_MORE_KILLS = 20
_SHOWN = 12
_EXPECTED = (
    *("conflicts", "replays", "resends", "blind retries", "deleted", "expired", "appends"),
    *("refused position_ahead", "refused state_changed", "refused epoch_mismatch"),
    *("failed deadline_exceeded", "failed outcome_unknown"),
)
_EXPECTED_OF_ROLLBACKS = (
    *(WARM_ROLLBACKS, "advanced by others", "noticed by a tag that does not follow"),
)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one run.

    Attributes:
        events: acknowledged at least, before it ends; faults are spread over them.
        kills_per_stage: further kills follow until each stage was hit this often.
        plan: the faults; None to make them from the seed.
        plant: a bug that is planted in the workers.
        strict: chunks are acknowledged when the replicas have them.
        removals: share of chunks before which the stream is deleted or expires.
        short_lived: one stream of this many is deleted and created all the time; 0: none.
        append_pause_s: mean pause between two bursts of an appender.
        longest_s: no pause is longer.
        verbose: print each fault before it is injected.
    """

    store: str
    seed: int = 0
    events: int = 0
    faults: int = 0
    streams: int = 48
    kills_per_stage: int = 0
    plan: tuple[Fault, ...] | None = None
    plant: str | None = None
    strict: bool = False
    removals: float = 0.003
    short_lived: int = 7
    appenders: int = 2
    append_pause_s: float = 0.3
    longest_s: float = 10.0
    verbose: bool = False


@asynccontextmanager
async def deploy(options: RunOptions) -> AsyncIterator[Deployment]:
    """Two workers that serve on a store; they are ended in any case."""
    settings, workers = dict(_SETTINGS), []
    if options.strict:
        settings["CARRY_DURABILITY"] = "replicated"
    if options.plant is not None:
        settings["PLANTED_BUG"] = options.plant
        settings["PYTHONPATH"] = f"{_PLANTED_BUGS}{os.pathsep}{_ROOT}"

    def find_owner(connection: Connection) -> str:
        up = [each for each in workers if each.process is not None]
        return next((each.name for each in up if has_connection(each.process.pid, connection)), "")

    traffic = Traffic(find_owner)
    async with AsyncExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="carry-faults-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        models = network.write(folder / "models")
        (folder / "store").mkdir()
        store: Store
        match options.store:
            case "valkey":
                server = EmbeddedValkey(folder / "store", models, settings)
                store = SingleStore(server, traffic, WORKERS)
            case "redis":
                store = SingleStore.redis(folder / "store", traffic, WORKERS)
            case _:
                store = ClusterStore(folder / "store", traffic, strict=options.strict)
        stack.push_async_callback(asyncio.to_thread, store.stop)
        for proxy in store.proxies:
            await proxy.open()
            stack.push_async_callback(proxy.close)
        await asyncio.to_thread(store.start)
        for number, name in enumerate(WORKERS):
            worker = Worker(name, folder / name, models, store.url(number), traffic, settings)
            workers.append(worker)
            await worker.proxy.open()
            stack.push_async_callback(worker.proxy.close)
            worker.restart()
            stack.callback(worker.kill)
        for worker in workers:
            await worker.started()
        yield Deployment(store, workers, traffic)


async def run(options: RunOptions) -> tuple[History, list[Finding]]:
    """Run a plan of faults, and check what the clients saw."""
    history = History()
    async with deploy(options) as deployment:
        await _drive(options, deployment, history)
        for worker in deployment.workers:
            history.unexpected += [
                f"{worker.name} logged {line}"
                for line in worker.whole_log().splitlines()
                if '"exception":' in line
            ]
    return history, await asyncio.to_thread(check, history)


async def _drive(options: RunOptions, deployment: Deployment, history: History) -> None:
    """Let clients send while faults are injected."""
    random = np.random.default_rng(options.seed)
    ports = deployment.ports

    async def expire(stream: str) -> None:
        # streams live longer than a network holds bytes
        await injector.wait_for_held_writes()
        await asyncio.to_thread(deployment.store.expire, stream)

    clients = []
    for number in range(options.streams):
        brief = options.short_lived and number % options.short_lived == 0
        name = f"{SHORT_LIVED if brief else 's'}{number:03d}"
        clients.append(
            Client(name, number, ports, history, _child(random), options.removals, expire)
        )
    appenders = [
        Appender(f"append{n}", ports, history, _child(random)) for n in range(options.appenders)
    ]
    injector = FaultInjector(deployment, clients, history, _child(random))
    plan = options.plan
    if plan is None:
        plan = tuple(make_plan(options.store, options.faults, random, options.longest_s))
    history.began_s = time.monotonic()

    def events() -> int:
        return sum(client.applied for client in clients)

    async def wait_for_events(count: int) -> None:
        while events() < count:
            for task in tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.02)

    async def inject(fault: Fault) -> None:
        if options.verbose:
            now_s = time.monotonic() - history.began_s
            print(f"  {now_s:7.2f} s {events():8d} events  {fault}", flush=True)
        await injector.run(fault)

    stop = asyncio.Event()
    tasks = [asyncio.create_task(client.run(stop)) for client in clients]
    tasks += [asyncio.create_task(each.run(stop, options.append_pause_s)) for each in appenders]
    try:
        for place, fault in enumerate(plan):
            await wait_for_events(options.events * place // max(1, len(plan)))
            await inject(fault)
        for _ in range(_MORE_KILLS):
            for stage in STAGES:
                if history.seen[KILLED[stage]] < options.kills_per_stage:
                    await inject(make_fault(Kind.WORKER_KILL, stage, random))
        await wait_for_events(options.events)
        await injector.resolve()
        stop.set()
        await _finish(tasks, history)
        tasks = [asyncio.create_task(client.finish()) for client in clients]
        await _finish(tasks, history)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await injector.resolve()
        for each in (*clients, *appenders):
            await each.close()
    history.seen["conflicts"] = deployment.traffic.conflicts
    history.seen["events"] = events()
    history.seen["seconds"] = round(time.monotonic() - history.began_s)


async def _finish(tasks: list[asyncio.Task[None]], history: History) -> None:
    """Wait for the clients' tasks; one that does not end in time fails the run."""
    done, pending = await asyncio.wait(tasks, timeout=_FINISH_S)
    for task in pending:
        task.cancel()
    await asyncio.gather(*done)
    history.unexpected += [f"a client did not end within {_FINISH_S} s"] * len(pending)


def _child(random: np.random.Generator) -> np.random.Generator:
    return np.random.default_rng(int(random.integers(1 << 62)))


def new_seed() -> int:
    """A seed, printed: it repeats the faults of a run."""
    seed = secrets.randbelow(1 << 31)
    print(f"seed {seed}", flush=True)
    return seed


def report(options: RunOptions, history: History, findings: list[Finding]) -> list[str]:
    """The counts of a run, as lines."""
    kinds = [kind for kind, _ in findings]
    return [
        f"{options.store}: seed {options.seed}",
        "  " + ", ".join(f"{kind} {kinds.count(kind)}" for kind in (LOST, DOUBLED, MIXED)),
        *(f"  {count:6d}  {name}" for name, count in sorted(history.seen.items())),
    ]


def describe_failures(
    options: RunOptions, history: History, findings: list[Finding], *, whole: bool
) -> list[str]:
    """The reasons why a run failed, and when acknowledged chunks may have been rolled back; empty
    if it passed.

    Args:
        whole: whether everything that can occur on the store must have occurred.
    """
    reasons = [f"{kind}: {what}" for kind, what in findings]
    reasons += [f"unexpected: {each}" for each in history.unexpected]
    # with `strict`, what the stopped replica does not have was never acknowledged
    names = _EXPECTED if options.strict else (*_EXPECTED, *_EXPECTED_OF_ROLLBACKS)
    expected = dict.fromkeys((*KINDS[options.store], *names), 1)
    expected |= dict.fromkeys((KILLED[stage] for stage in STAGES), options.kills_per_stage)
    reasons += [
        f"{name}: {history.seen[name]} times, expected {count} at least"
        for name, count in expected.items()
        if whole and history.seen[name] < count
    ]
    if not reasons:
        return []
    more = [f"... and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
    losses = [
        f"{loss.what}: from {loss.since_s - history.began_s:.2f}, "
        f"struck {loss.struck_s - history.began_s:.2f}, "
        f"until {loss.until_s - history.began_s:.2f}, done {loss.done_s - history.began_s:.2f} s"
        for loss in history.losses
    ]
    return [*reasons[:_SHOWN], *more, *losses]
