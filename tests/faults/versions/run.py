"""One run: streams under load, versions that are loaded, canaries, promoted and rolled back, and
workers and stores that are killed all the while."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from carry_client import Problem
from models.artifact.artifact import load_artifact
from tests.faults import network
from tests.faults.checker import Finding
from tests.faults.client import Sender
from tests.faults.deployment import Deployment, RunOptions, deploy
from tests.faults.faults import KILL, FaultInjector, make_fault
from tests.faults.history import NO_HEAD, Chunk, History
from tests.faults.traffic import STAGES
from tests.faults.transports import Conditions, WorkerClient
from tests.faults.versions.check import Stream, check
from tests.faults.waits import wait

VERSIONS: Final = {"z": 1, "a": 2, "b": 3, "c": 5}
"""Folders of the versions and their gains; a process without aliases starts with the last name."""
HISTORY_EVENTS: Final = 24
BURN_IN: Final = 60
"""Longer than a history, so that there are states that announce what they have seen."""
CANARY: Final = 0.1
Plan = Sequence[tuple[str, str]]
"""Actions, each with a version."""
PLAN: Final[Plan] = tuple(
    (action, version)
    for version, actions in (
        ("a", ("load", "shadow", "canary", "promote", "rollback", "promote")),
        ("b", ("load", "canary", "promote")),
        ("c", ("load", "shadow", "promote", "rollback", "canary", "promote")),
    )
    for action in actions
)
"""Three retrained versions in a row."""

SENDERS: Final = 32
LONGEST: Final = 8
QUIET_SHARE: Final = 3
"""One stream of this many gets a chunk from each champion and then rests until the next one: the
state that an earlier champion left is behind it, and its events since then are in the history."""

LONGEST_PAUSE_S: Final = 1.5
"""Between two tries: on a busy machine many tries would keep the workers from starting."""

DUPLICATES: Final = 0.1
MOST_FAULTS: Final = 3
"""For each action: it waits until every worker serves."""
FINISH_S: Final = 120.0
_SETTINGS: Final = {"CARRY_HISTORY_EVENTS": str(HISTORY_EVENTS), "CARRY_HISTORY_SNAPSHOTS": "4"}
_SETTINGS_WITH_A_BUG: Final = {"CARRY_SHADOW_BUDGET": "0"}
"""On an idle machine the shadow keeps the states of every version at the heads of their streams:
each bug that needs one behind it would go unnoticed."""


def options_of(store: str, **options: Any) -> RunOptions:
    """The options of a run; on a cluster, what was acknowledged survives a failover."""
    settings = _SETTINGS | (_SETTINGS_WITH_A_BUG if "plant" in options else {})
    return RunOptions(
        store,
        strict=store == "cluster",
        settings=settings,
        model=f"{network.MODEL}/z",
        burn_in=BURN_IN,
        **options,
    )


def kinds_of(store: str) -> list[str]:
    """The faults of a run, in turn; none loses what was acknowledged."""
    loses_nothing = "failover" if store == "cluster" else "store killed"
    return [*(KILL[stage] for stage in STAGES), loses_nothing, "worker terminated", "replies cut"]


@dataclass(slots=True, eq=False)
class StreamSender(Sender):
    """Sends a chunk of one stream after the other, each until it is answered."""

    streams: deque[Stream]
    run: "VersionRun"
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def send_all(self, stop: asyncio.Event) -> None:
        """Send chunks until `stop` is set."""
        while not stop.is_set():
            stream, changes = self.streams.popleft(), self.run.changes
            async with self.lock:
                await self.deliver(stream)
            self.run.delivered += 1
            if changes == self.run.changes and self.run.may_rest(stream):
                self.run.resting.append(stream)
            else:
                self.streams.append(stream)

    async def deliver(self, stream: Stream) -> None:
        """Send the stream's next chunk until it is answered; some to two workers at once."""
        rows = network.random_events(self.random, int(self.random.integers(1, LONGEST + 1)))
        chunk, pause_s = Chunk(stream.name, stream.position, rows), 0.04
        stream.chunks.append(chunk)
        last = stream.replies[-1] if stream.replies else NO_HEAD
        conditions = Conditions(epoch=last.epoch if self._draw(0.5) else None)
        while True:
            workers = [self._any_worker()]
            if self._draw(DUPLICATES):
                workers.append(self._any_worker())
                self._count("sent twice at once")
            attempts = (self._attempt(chunk, worker, conditions) for worker in workers)
            replies = [each for each in await asyncio.gather(*attempts) if each is not None]
            if replies:
                break
            self._count("blind retries")
            await asyncio.sleep(pause_s * self.random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        stream.replies += replies
        for reply in replies:
            self._count(f"rejected {reply.code}" if reply.code else f"by {reply.version}")
            self._count("replays", reply.replayed)

    async def read_final(self, stream: Stream) -> None:
        """Read the stream's head at the end."""
        stream.final = await self._read_head(stream.name, self._any_worker())


class VersionRun:
    """A run on a deployment.

    Attributes:
        champions: versions, by fingerprint; the last one answers, a rollback goes back to the one
            before.
        changes: how often the champion changed.
        resting: quiet streams that the champion has answered.
    """

    def __init__(self, options: RunOptions, deployment: Deployment, plan: Plan):
        self.options, self.deployment, self.history = options, deployment, History()
        self.streams = [Stream(f"s{number:04d}") for number in range(options.streams)]
        self.delivered, self.plan = 0, plan
        self.gains: dict[str, int] = {}
        self.champions: list[str] = []
        self.changes, self.resting, self._faults = 0, list[Stream](), 0
        self._quiet = frozenset(self.streams[QUIET_SHARE - 1 :: QUIET_SHARE])
        random = np.random.default_rng(options.seed)
        self._random, self._queue = random, deque(self.streams)
        # so that a stream is left for each sender while the quiet ones rest
        senders = min(SENDERS, options.streams - len(self._quiet))
        self.senders = [
            StreamSender(
                f"sender{number}", deployment.clients, self.history, child, self._queue, self
            )
            for number, child in enumerate(random.spawn(senders))
        ]

    def may_rest(self, stream: Stream) -> bool:
        """Whether it is a quiet stream whose last chunk the champion answered."""
        reply = stream.replies[-1]
        # some transports name no champion
        is_by_champion = not reply.code and reply.version in (self.champions[-1], None)
        return is_by_champion and stream in self._quiet

    async def drive(self) -> None:
        """Send chunks while versions change and processes are killed."""
        stop, changed = asyncio.Event(), asyncio.Event()
        injector = FaultInjector(
            self.deployment, self.senders, self.history, *self._random.spawn(1)
        )
        self.champions.append(self._find_version("z"))
        async with asyncio.TaskGroup() as group:
            sending = [group.create_task(sender.send_all(stop)) for sender in self.senders]
            breaking = group.create_task(self._break(injector, changed))
            await self._change_versions()
            changed.set()
            await breaking
            await self.deployment.wait_until_up()
            stop.set()
            _, late = await asyncio.wait(sending, timeout=FINISH_S)
            self.history.unexpected += [f"a sender did not end in {FINISH_S} s" for _ in late]
            for task in late:
                task.cancel()
        for first in range(0, len(self.streams), len(self.senders)):
            pairs = zip(self.senders, self.streams[first:], strict=False)
            await asyncio.gather(*(sender.read_final(stream) for sender, stream in pairs))

    async def _break(self, injector: FaultInjector, changed: asyncio.Event) -> None:
        """Inject one fault after the other until all versions were changed and each kind of fault
        has occurred."""
        kinds, number = kinds_of(self.options.store), 0
        while not changed.is_set() or number < len(kinds):
            target = self.delivered + self.options.events // (2 * len(self.plan))
            fault = make_fault(kinds[number % len(kinds)], self._random, self.options.longest_s)
            if self.options.verbose:
                print(
                    f"  {self._now_s():7.2f} s {self.delivered:8d} chunks  {fault.kind}", flush=True
                )
            await injector.inject(fault)
            number += 1
            self._faults += 1
            await self._wait(
                lambda target=target: (
                    (self.delivered >= target and self._faults < MOST_FAULTS) or changed.is_set()
                ),
                "chunks before the next fault",
            )

    async def _change_versions(self) -> None:
        """Carry out the plan, one action for each part of the chunks, however late it is done."""
        part = self.options.events // (len(self.plan) + 1)
        for action, version in self.plan:
            await self._deliver_more(part)
            if action == "load":
                folder = f"{network.MODEL}/{version}"
                models, gain = self.deployment.models, VERSIONS[version]
                await asyncio.to_thread(network.write, models, folder, gain, BURN_IN)
                self._find_version(version)
                await self._post("versions", path=folder, label=version)
            elif action == "rollback":
                if await self._post("aliases", action=action):
                    await self._change_champion(self.champions[:-1])
            else:
                share = {"share": CANARY} if action == "canary" else {}
                done = await self._post("aliases", action=action, version=version, **share)
                if done and action == "promote":
                    await self._change_champion([*self.champions, self._find_version(version)])
            self._faults = 0
            self.history.seen[f"{action} of a version"] += 1
            if self.options.verbose:
                print(
                    f"  {self._now_s():7.2f} s {self.delivered:8d} chunks  {action} {version}",
                    flush=True,
                )
        await self._deliver_more(part)

    async def _deliver_more(self, count: int) -> None:
        """Wait for more chunks."""
        target = self.delivered + count
        await self._wait(lambda: self.delivered >= target, f"{target} chunks")

    async def _wait(self, is_met: Callable[[], bool], what: str) -> None:
        await wait(is_met, what, lambda: self.delivered)

    async def _change_champion(self, champions: list[str]) -> None:
        """Wait until the last of these answers in every worker; then until each quiet stream got a
        chunk from it."""
        for name, worker in self.deployment.clients.items():
            await self._wait_for_champion(name, worker, champions[-1])
        self.champions, self.changes = champions, self.changes + 1
        self._queue.extendleft(self.resting)
        self.resting.clear()
        await self._wait(lambda: len(self.resting) == len(self._quiet), "quiet streams")

    async def _wait_for_champion(self, name: str, worker: WorkerClient, version: str) -> None:
        """Wait until a version answers in a worker."""
        answering, deadline_s = None, time.monotonic() + FINISH_S
        while answering != version:
            assert time.monotonic() < deadline_s, f"{name} has {answering}, not {version}"
            await asyncio.sleep(0.02)
            try:
                model = await worker.request("GET", f"/v1/models/{network.MODEL}")
                answering = str(model["version"])
            except Problem as problem:
                self.history.seen[f"operator: {problem.code or 'no reply'}"] += 1

    def _find_version(self, name: str) -> str:
        """The fingerprint of a version, whose gain it remembers."""
        folder = self.deployment.models / network.MODEL / name
        version = load_artifact(folder).version
        self.gains[version] = VERSIONS[name]
        return version

    async def _post(self, place: str, **body: object) -> bool:
        """Change versions, once every worker is able to; whether it was done."""
        sender, deadline_s = self.senders[0], time.monotonic() + FINISH_S
        may_be_done = False
        path = f"/v1/models/{network.MODEL}/{place}"
        while True:
            worker = self.deployment.clients[sender._any_worker()]
            try:
                await worker.request("POST", path, body)
                return True
            except Problem as problem:
                self.history.seen[f"operator: {problem.code or 'no reply'}"] += 1
                if may_be_done and problem.code == "invalid_input":
                    return True  # a rollback whose reply was lost
                may_be_done |= body.get("action") == "rollback" and not problem.status
                is_late = time.monotonic() > deadline_s
                if is_late or (problem.status and not problem.is_retryable):
                    self.history.unexpected.append(f"{body}: {dict(problem.document)}")
                    return False
            await asyncio.sleep(0.1)

    def _now_s(self) -> float:
        return time.monotonic() - self.history.began_s


async def run(options: RunOptions, plan: Plan = PLAN) -> tuple[History, list[Finding]]:
    """A run, and what its check finds."""
    async with deploy(options) as deployment:
        one = VersionRun(options, deployment, plan)
        await one.drive()
        for worker in deployment.workers:
            logged = (line for line in worker.whole_log().splitlines() if '"exception":' in line)
            one.history.unexpected += [f"{worker.name} logged {line}" for line in logged]
    return one.history, await asyncio.to_thread(check_all, one)


def check_all(one: VersionRun) -> list[Finding]:
    """The violations in all streams."""
    seen = one.history.seen
    seen["chunks"], seen["seconds"] = one.delivered, round(one._now_s())
    seen["events"] = sum(stream.position for stream in one.streams)
    return [
        finding for stream in one.streams for finding in check(stream, one.gains, BURN_IN, seen)
    ]


def describe_failures(
    options: RunOptions, history: History, findings: Sequence[Finding]
) -> list[str]:
    """Why a run failed; empty if it passed."""
    reasons = [f"{kind}: {what}" for kind, what in findings]
    reasons += [f"unexpected: {each}" for each in history.unexpected]
    return reasons + [
        f"{kind} did not occur" for kind in kinds_of(options.store) if not history.seen[kind]
    ]
