"""One run of the fault tests: a store, its workers, clients, faults, the check, and the report."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import numpy as np

from tests.faults import faults
from tests.faults.checker import DOUBLED, LOST, MIXED, Finding, check
from tests.faults.client import SHORT_LIVED, Appender, Client
from tests.faults.deployment import Deployment, RunOptions, deploy
from tests.faults.history import History
from tests.faults.traffic import STAGES
from tests.faults.waits import wait

_FINISH_S: Final = 120.0
_MORE_KILLS: Final = 20
_SHOWN: Final = 12
_EXPECTED: Final = (
    *("conflicts", "replays", "resends", "blind retries", "deleted", "expired", "appends"),
    *("refused position_ahead", "refused state_changed", "refused epoch_mismatch"),
    *("failed deadline_exceeded", "failed outcome_unknown"),
)
_EXPECTED_OF_ROLLBACKS: Final = (
    *(faults.WARM_ROLLBACKS, "advanced by others", "noticed by a tag that does not follow"),
)


async def run(
    options: RunOptions, plan: Sequence[faults.Fault] | None = None
) -> tuple[History, list[Finding]]:
    """Run a plan of faults, by default made from the seed, and check what the clients saw."""
    async with deploy(options) as deployment:
        history = History()
        await _drive(options, plan, deployment, history)
        for worker in deployment.workers:
            logged = (line for line in worker.whole_log().splitlines() if '"exception":' in line)
            history.unexpected += [f"{worker.name} logged {line}" for line in logged]
    return history, await asyncio.to_thread(check, history)


async def _drive(
    options: RunOptions,
    plan: Sequence[faults.Fault] | None,
    deployment: Deployment,
    history: History,
) -> None:
    """Let clients send while faults are injected."""
    random, stop = np.random.default_rng(options.seed), asyncio.Event()
    clients = []
    for number in range(options.streams):
        is_brief = options.short_lived and number % options.short_lived == 0
        name = f"{SHORT_LIVED if is_brief else 's'}{number:03d}"
        context = (name, deployment.clients, history, *random.spawn(1))
        clients.append(Client(*context, number, options.removals, deployment.expire))
    appenders = [
        Appender(f"append{number}", deployment.clients, history, child)
        for number, child in enumerate(random.spawn(options.appenders))
    ]
    injector = faults.FaultInjector(deployment, clients, history, *random.spawn(1))
    plan = plan or faults.make_plan(options.store, options.faults, random, options.longest_s)

    async def inject(fault: faults.Fault) -> None:
        if options.verbose:
            now_s = time.monotonic() - history.began_s
            print(f"  {now_s:7.2f} s {events():8d} events  {fault}", flush=True)
        await injector.inject(fault)

    def events() -> int:
        return sum(client.applied for client in clients)

    async def wait_for_events(count: int) -> None:
        def progress() -> tuple[int, int]:
            return events(), history.seen["appends"]

        await wait(lambda: events() >= count, f"{count} events", progress)

    async def finish(*running: Coroutine[Any, Any, None] | asyncio.Task[None]) -> None:
        """Wait for clients; one that does not end in time fails the run."""
        _, pending = await asyncio.wait(map(asyncio.ensure_future, running), timeout=_FINISH_S)
        history.unexpected += [f"a client did not end within {_FINISH_S} s" for _ in pending]
        for task in pending:
            task.cancel()

    async with asyncio.TaskGroup() as group:
        running = [group.create_task(client.run(stop)) for client in clients]
        running += [group.create_task(each.run(stop, options.append_pause_s)) for each in appenders]
        for place, fault in enumerate(plan):
            await wait_for_events(options.events * place // len(plan))
            await inject(fault)
        for stage in STAGES * _MORE_KILLS:
            if history.seen[faults.KILLED[stage]] < options.kills_per_stage:
                await inject(faults.make_fault(faults.KILL[stage], random))
        await wait_for_events(options.events)
        await deployment.wait_until_up()
        stop.set()
        await finish(*running)
        await finish(*(client.finish() for client in clients))
    history.seen["conflicts"] = deployment.traffic.conflicts
    history.seen["events"] = events()
    history.seen["seconds"] = round(time.monotonic() - history.began_s)


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
    if it passed. In a `whole` run, everything that can occur on the store must have occurred."""
    reasons = [f"{kind}: {what}" for kind, what in findings]
    reasons += [f"unexpected: {each}" for each in history.unexpected]
    if whole:
        # with `strict`, what the stopped replica does not have was never acknowledged
        rollbacks = () if options.strict and options.store == "cluster" else _EXPECTED_OF_ROLLBACKS
        expected = dict.fromkeys((*faults.kinds_of(options.store), *_EXPECTED, *rollbacks), 1)
        expected |= dict.fromkeys(faults.KILLED.values(), options.kills_per_stage)
        reasons += [
            f"{name}: {history.seen[name]} times, expected {count} at least"
            for name, count in expected.items()
            if history.seen[name] < count
        ]
    more = [f"... and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
    losses = [loss.describe(history.began_s) for loss in history.losses] if reasons else []
    return [*reasons[:_SHOWN], *more, *losses]
