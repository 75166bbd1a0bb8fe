"""One run: the history of many streams is backfilled and loaded while their events go on, and
loader, workers and consumers are killed all the while."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np

from service.core.values import StreamKey
from tests.faults import network
from tests.faults.deployment import PLANTED_BUGS, Worker
from tests.faults.handover import layout
from tests.faults.handover.check import (
    check_outputs,
    read_history_outputs,
    read_outputs,
)
from tests.faults.handover.traffic import Clients, Producer, outputs_of
from tests.faults.stores import WORKERS
from tests.faults.topics.check import read_entries
from tests.faults.topics.layout import GROUP, SOURCE, SPACE, Events
from tests.faults.topics.processes import ConsumerProcess, ServerStore
from tests.faults.waits import wait
from tests.support.forks import COMMAND, Fork
from tests.support.proxy import Proxy

SENDERS: Final = 32
LONGEST_LAG: Final = 4_000
"""The producer waits while the consumers are so many entries behind, beside those that waited when
they started."""

FIRST_EVENTS: Final = 6
"""Most events of the history of a client's stream."""

SAMPLE: Final = 200
"""Streams, or outputs, that are looked up to see how far a load or the consumers are."""

SLOW_LOAD_S: Final = 100.0
"""How long a load takes that is to be killed."""

KINDS: Final = ("worker killed", "consumer killed", "all consumers killed")
LOADED_AGAIN, LOADER_KILLED = "loaded again", "loader killed"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one run.

    Attributes:
        partitioned: whether each partition of the store has a topic.
        start: where consumers start: at the beginning of their topics, or at the lowest offset up
            to which the states contain them.
        streams: most of them have a history.
        events: live events before the consumers start, at most, and after that, at least.
        kills: of the loader; and faults of each other kind.
        consumers: processes.
    """

    store: str
    seed: int
    partitioned: bool = True
    start: Literal["beginning", "lowest"] = "beginning"
    streams: int = 100_000
    events: int = 300_000
    kills: int = 10
    consumers: int = 3
    plant: str | None = None
    verbose: bool = False


class Deployment(NamedTuple):
    """The processes of a run, and its folder."""

    folder: Path
    store: ServerStore
    workers: list[Worker]
    urls: list[str]
    consumers: list[ConsumerProcess]
    environment: dict[str, str]


class HandoverRun:
    """A run on a deployment; from within one event loop.

    Attributes:
        history: how many events of each stream are in its history.
        findings: what is wrong.
        seen: what occurred and was checked, by name.
    """

    def __init__(self, options: RunOptions, deployment: Deployment):
        self.options, self.deployment = options, deployment
        self.history, self.seen = Counter[str](), Counter[str]()
        self.findings: list[str] = []
        self._began_s = time.monotonic()
        self._random = np.random.default_rng(options.seed)
        self._client = deployment.store.connect()
        self._out = deployment.folder / "out"
        self._topics = layout.Topics(partitioned=options.partitioned)
        self._events = Events(options.seed)
        self._names = layout.make_names(options.streams)
        self._of_topics = [name for name in self._names if layout.has_topic(name)]
        self._producer = Producer(
            *(deployment.store.connect(), self._topics, self._events, self._of_topics),
            *(self._has_room, options.seed),
        )
        self._most_appended = self._lag = self._most_lag = 0
        self._supervisor: asyncio.Task[None] | None = None

    async def drive(self) -> None:
        """Record a history, backfill and load it while events go on; then consume, and check."""
        producer, starts = self._producer, {}
        # those that live before the load begin first
        for name in sorted(set(self._names) - set(self._of_topics), reverse=True):
            self.history[name] = int(self._random.integers(1, FIRST_EVENTS, endpoint=True))
            starts[name] = 0 if name[0] == "w" else self.history[name]
        clients = Clients(self.deployment.urls, self._events, starts, SENDERS, self.options.seed)
        try:
            first = [name for name in self._of_topics if name[0] != "n"]
            await asyncio.to_thread(producer.append_to, first)
            self._most_appended = producer.appended + self.options.events
            producer.start()
            await self._wait(lambda: not clients.unanswered["w"], "clients' first chunks", clients)
            await asyncio.to_thread(self._backfill)
            await self._load_with_kills()
            await self._consume(clients)
            # every stream goes on from its history
            await self._wait(lambda: not clients.unanswered["h"], "clients of a history", clients)
            await asyncio.to_thread(producer.stop)
            await asyncio.to_thread(producer.append_to, self._of_topics)
        finally:
            await asyncio.to_thread(producer.stop)
            await clients.stop()
        await self._wait_until_consumed()
        await self._stop_consumers()
        self.findings += clients.findings
        self.seen.update(clients.seen)
        self.seen["events appended"], self.seen["events sent"] = (
            producer.appended,
            clients.delivered,
        )
        await asyncio.to_thread(self._check, clients)
        self.seen["seconds"] = round(time.monotonic() - self._began_s)

    async def _wait(self, is_met: Callable[[], bool], what: str, clients: Clients) -> None:
        """Wait for a condition, while clients send and consumers are started again."""

        def progress() -> tuple[int, int, int]:
            return self._producer.appended, self._lag, clients.delivered

        await wait(is_met, what, progress, *clients.tasks, self._supervisor)

    def _say(self, what: str) -> None:
        """Print what happens, with --verbose."""
        if self.options.verbose:
            print(f"  {time.monotonic() - self._began_s:7.1f} s  {what}", flush=True)

    def _has_room(self) -> bool:
        """Whether the producer may append more."""
        if self._most_lag:
            return self._lag < self._most_lag
        return self._producer.appended < self._most_appended

    # The history

    def _backfill(self) -> None:
        """Record what the topics have so far, and compute it."""
        rows: list[layout.RecordedEvent] = [
            (name, number, None) for name, count in self.history.items() for number in range(count)
        ]
        for topic in self._topics.sources:
            for entry_id, fields in read_entries(self._client, topic):
                stream = fields[b"stream"].decode()
                rows.append((stream, self.history[stream], entry_id.decode()))
                self.history[stream] += 1
        folder = self.deployment.folder
        layout.write_history(folder / "history", rows, self._events, self.options.seed)
        self._say(f"backfill of {len(rows):,} events of {len(self.history):,} streams")
        words = folder / "models" / network.MODEL, folder / "history", self._out, *layout.BACKFILL
        self._run("backfill", *map(str, words))

    def _run(self, *words: str) -> None:
        """Run a command to its end."""
        log = self.deployment.folder / "commands.log"
        assert self._start(log, *words).wait() == 0, f"{words}: {log.read_text()[-4000:]}"

    def _start(self, log: Path, *words: str) -> Fork:
        """Start a command, whose output is added to a file."""
        with log.open("ab") as output:
            return Fork([COMMAND, *words], self.deployment.environment, [output] * 3)

    # The load

    async def _load_with_kills(self) -> None:
        """Load the states; the first loads are killed on the way."""
        loadable = [name for name in self.history if name[0] != "w"]
        sample = self._random.choice(loadable, min(SAMPLE, len(loadable)), replace=False).tolist()
        rate = f"{len(loadable) / SLOW_LOAD_S:.3f}"
        for _ in range(self.options.kills):
            self._say("load, to be killed")
            await asyncio.to_thread(self._kill_load, sample, rate)
        self._say("load")
        await self._load()

    def _kill_load(self, sample: Sequence[str], rate: str) -> None:
        """Load slowly, and kill the loader once it has loaded a stream of the sample."""
        before = self._count_stored(sample)
        process = self._start(Path(os.devnull), *self._load_words, "--rate", rate)
        while process.poll() is None:
            if self._count_stored(sample) > before:
                process.kill()
                process.wait()
                self.seen[LOADER_KILLED] += 1
            time.sleep(0.02)

    @property
    def _load_words(self) -> tuple[str, ...]:
        return "streams", "load", str(self._out), "--redis-url", self.deployment.store.url

    def _count_stored(self, streams: Sequence[str]) -> int:
        pipe = self._client.pipeline(transaction=False)
        for stream in streams:
            pipe.exists(SPACE.pair(StreamKey(network.MODEL, stream))[0])
        return sum(pipe.execute())

    async def _load(self) -> None:
        """Load the states to the end, and check which streams were kept."""
        kept = set[str]()
        await asyncio.to_thread(self._run, *self._load_words)
        if (file := self._out / "kept.csv").exists():
            with file.open(newline="") as opened:
                kept = {row["stream"] for row in csv.DictReader(opened)}
        expected = {name for name in self.history if name[0] == "w"}
        self.findings += [f"{name}: kept, expected it to be loaded" for name in kept - expected]
        self.findings += [f"{name}: expected it to be kept" for name in expected - kept]

    # Live events

    async def _consume(self, clients: Clients) -> None:
        """Start the consumers, and inject faults until enough events have passed."""
        self._start_consumers()

        def passed() -> int:
            return self._producer.appended - self._lag + clients.delivered

        plan = self._random.permutation(KINDS * self.options.kills).tolist()
        plan.insert(len(plan) // 2, LOADED_AGAIN)
        for kind in plan:
            target = passed() + self.options.events // (len(plan) + 1)
            await self._wait(lambda target=target: passed() >= target, f"{target} events", clients)
            self._say(kind)
            await self._inject(kind, clients)
            self.seen[kind] += 1
        target = passed() + self.options.events // (len(plan) + 1)
        await self._wait(lambda: passed() >= target, f"{target} events", clients)

    async def _inject(self, kind: str, clients: Clients) -> None:
        """Inject one fault."""
        consumers = self.deployment.consumers
        match kind:
            case "worker killed":
                await self._kill_worker()
            case "consumer killed":
                chosen = consumers[int(self._random.integers(len(consumers)))]
                await asyncio.to_thread(chosen.kill)
            case "all consumers killed":
                for each in consumers:
                    await asyncio.to_thread(each.kill)
            case _:
                # streams have gone on from the states that were loaded
                count = sum(name[0] == "h" for name in self.history)
                await self._wait(
                    lambda: clients.unanswered["h"] < count and self._has_outputs(),
                    "outputs of streams that were loaded",
                    clients,
                )
                await self._load()

    async def _kill_worker(self) -> None:
        """Kill a worker, once all serve, and start it again."""
        workers = self.deployment.workers
        for worker in workers:
            await worker.wait_until_up()
        worker = workers[int(self._random.integers(len(workers)))]
        worker.serves = False
        worker.kill()
        worker.restart()

    def _has_outputs(self) -> bool:
        """Whether consumers have computed an event of a stream that was loaded."""
        return any(
            fields[b"stream"].decode() in self.history
            for topic in self._topics.sinks
            for _, fields in self._client.xrange(topic, count=SAMPLE)
        )

    def _start_consumers(self) -> None:
        folder, options = self.deployment.folder, self.options
        config = folder / "consumer.yaml"
        start = "beginning"
        if options.start == "lowest":
            offsets = json.loads((self._out / "offsets.json").read_text())
            start = offsets[SOURCE]["lowest"]
        config.write_text(layout.config_text(start, partitioned=options.partitioned))
        words = [str(config), "--models", str(folder / "models")]
        words += ["--redis-url", self.deployment.store.url]
        for number in range(options.consumers):
            name, environment = f"consumer{number}", self.deployment.environment
            self.deployment.consumers.append(ConsumerProcess(name, folder, words, environment))
        self._lag = self._read_lag()
        self._most_lag = self._lag + LONGEST_LAG
        self._supervisor = asyncio.create_task(self._supervise())

    async def _supervise(self) -> None:
        """Start consumers that have ended, and read the lag."""
        while True:
            for consumer in self.deployment.consumers:
                consumer.supervise()
            self._lag = await asyncio.to_thread(self._read_lag)
            await asyncio.sleep(0.1)

    def _read_lag(self) -> int:
        """How many entries of the topics are not acknowledged."""
        lag = 0
        for topic in self._topics.sources:
            if not self._client.exists(topic):
                continue
            groups = {each["name"]: each for each in self._client.xinfo_groups(topic)}
            group = groups.get(GROUP.encode())
            last = self._client.xinfo_stream(topic)["last-generated-id"]
            if group is None:
                lag += self._client.xlen(topic)
            elif group["last-delivered-id"] != last:
                lag += group["pending"] + max(1, group["lag"] or 0)
            else:
                lag += group["pending"]
        return lag

    async def _wait_until_consumed(self) -> None:
        """Wait until every entry is acknowledged."""
        try:
            await wait(
                lambda: self._read_lag() == 0, "all entries", lambda: self._lag, self._supervisor
            )
        except AssertionError as stalled:
            self.findings.append(f"stalled: {stalled}")

    async def _stop_consumers(self) -> None:
        """Terminate all consumers for good."""
        self._supervisor.cancel()
        for consumer in self.deployment.consumers:
            consumer.is_wanted = False
            await asyncio.to_thread(consumer.terminate)

    # The check

    def _check(self, clients: Clients) -> None:
        """Check the outputs of all streams, the dead letters and the logs."""
        live = outputs_of(clients) | read_outputs(self._client, self._topics.sinks)
        self.findings += check_outputs(
            *(self._events, self.history, {**self._producer.ends, **dict(clients.ends())}),
            *(read_history_outputs(self._out), live, self.seen),
        )
        for topic in self._topics.dead:
            letters = self._client.xlen(topic)
            self.findings += [f"{topic}: {letters} dead letters"] if letters else []
        logs = [(each.name, each.whole_log().splitlines()) for each in self.deployment.workers]
        logs += [(each.name, each.lines('"exception":')) for each in self.deployment.consumers]
        for name, lines in logs:
            raised = [line for line in lines if '"exception":' in line]
            self.findings += [f"{name} logged {line}" for line in raised[:3]]


@asynccontextmanager
async def deploy(options: RunOptions) -> AsyncIterator[Deployment]:
    """A store, workers behind proxies, and the folder of a run; all of them end in any case."""
    settings = dict(layout.SETTINGS)
    if options.plant is not None:
        settings |= {"PLANTED_BUG": options.plant, "PYTHONPATH": str(PLANTED_BUGS)}
    inherited = {name: value for name, value in os.environ.items() if name[:6] != "CARRY_"}
    async with AsyncExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(
            prefix="carry-handover-", ignore_cleanup_errors=True
        )
        folder = Path(stack.enter_context(temporary))
        models = network.write(folder / "models", fields=layout.FIELDS)
        (folder / "store").mkdir()
        store = ServerStore(options.store, folder / "store")
        stack.push_async_callback(asyncio.to_thread, store.stop)
        await asyncio.to_thread(store.start)
        deployment = Deployment(folder, store, [], [], [], inherited | settings)
        for name in WORKERS:
            worker = Worker(name, folder / name, models, store.url, settings)
            proxy = Proxy(partial(worker.address, "http"), name)
            await stack.enter_async_context(proxy.listening())
            worker.restart()
            stack.push_async_callback(worker.end)
            deployment.workers.append(worker)
            deployment.urls.append(f"http://127.0.0.1:{proxy.port}")
        for worker in deployment.workers:
            await worker.wait_until_up()
        try:
            yield deployment
        finally:
            for consumer in deployment.consumers:
                consumer.is_wanted = False
                await asyncio.to_thread(consumer.kill)


async def run(options: RunOptions) -> HandoverRun:
    """Run, and check every stream."""
    async with deploy(options) as deployment:
        running = HandoverRun(options, deployment)
        await running.drive()
    return running


def report(running: HandoverRun) -> list[str]:
    """The counts of a run, as lines."""
    options = running.options
    kind = "partitioned" if options.partitioned else "one topic"
    return [
        f"{options.store}, {kind}: seed {options.seed}",
        *(f"  {count:9,}  {name}" for name, count in sorted(running.seen.items())),
        *([f"  FAILED: {each}" for each in running.findings[:12]] or ["  passed"]),
    ]
