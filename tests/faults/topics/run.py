"""One run: producers append to the topics of a store, consumers read them, and both break."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Final

import numpy as np

from tests.faults.deployment import PLANTED_BUGS
from tests.faults.network import write
from tests.faults.topics import layout
from tests.faults.topics.check import check_topics
from tests.faults.topics.processes import (
    DOWN_S,
    ClusterStore,
    ConsumerProcess,
    ServerStore,
    suspend,
)
from tests.faults.topics.producer import UNAVAILABLE, Producer
from tests.support.servers import until

STORES: Final = ("valkey", "redis", "cluster")
PRODUCERS: Final = 2
LONGEST_LAG: Final = 4_000
"""Producers wait while the consumers are this many entries behind."""

BACKLOG, BACKLOG_S = 200, 2.0
"""Leases expire while so many entries wait, or after this time without."""

OWNED_S: Final = 8.0
"""How long a fault waits for consumers to acquire topics."""

NOTICED_S: Final = 30.0
"""A failover loses what was acknowledged no longer before it was noticed."""

IDLE_S: Final = 120.0
"""A run fails if nothing is appended or acknowledged for this long between its faults: on a busy
machine consumers start for half a minute."""

PLANTED_IDLE_S: Final = 30.0
"""The same with a planted bug, which may be what stalls the run."""

PATIENT: Final = {"CARRY_STORE_WAIT_S": "30", "CARRY_TIMEOUT_S": "30"}
"""Settings of consumers with a planted bug: one that was suspended continues where it was."""

ROLLED_BACK_S: Final = (0.2, 1.0)


@dataclass(frozen=True, slots=True)
class TopicOptions:
    """Options of one run."""

    store: str
    seed: int
    events: int = 1_000_000  # appended, at least
    faults: int = 100
    streams: int = 48
    consumers: int = 3
    plant: str | None = None
    verbose: bool = False
    longest_s: float = 3.5  # no pause of the store is longer


@dataclass(slots=True)
class TopicRun:
    """A run in progress; `findings` is what is wrong."""

    options: TopicOptions
    store: ServerStore | ClusterStore
    random: np.random.Generator
    consumers: list[ConsumerProcess] = field(default_factory=list)
    producers: list[Producer] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    failovers_s: list[float] = field(default_factory=list)  # when they were noticed
    lag: int = 0  # entries that are not acknowledged; -1 while that is not known

    def inject(self, kind: str) -> None:
        """Inject one fault."""
        self.store.wait_until_whole()
        time.sleep(self.random.uniform(0.05, 0.4))
        FAULTS[kind][0](self)
        self.seen[kind] += 1

    def kill_consumer(self) -> None:
        """SIGKILL to one consumer."""
        self._choose_consumer().kill()

    def kill_all_consumers(self) -> None:
        """SIGKILL to all consumers."""
        for consumer in self.consumers:
            consumer.kill()

    def suspend_consumer(self) -> None:
        """Suspend a consumer for less than its lease."""
        suspend(self._choose_consumer().signal, layout.LEASE_S * self.random.uniform(0.1, 0.7))

    def expire_leases(self) -> None:
        """Suspend all consumers but one, while entries wait, until it has their topics."""
        self._await_owners(*self.consumers)
        with suppress(AssertionError):
            until(lambda: self.lag > BACKLOG, "a backlog", BACKLOG_S, 0.01)
        chosen = self._choose_consumer()

        def send(number: int) -> None:
            for consumer in self.consumers:
                if consumer is not chosen:
                    consumer.signal(number)

        send(signal.SIGSTOP)
        self._await_owners(chosen)
        send(signal.SIGCONT)

    def _await_owners(self, *owners: ConsumerProcess) -> None:
        """Wait until these consumers own all topics, and each some; not for long."""
        with suppress(AssertionError):
            until(
                lambda: read_owners(self.store) == {owner.pid() for owner in owners},
                "other owners",
                OWNED_S,
                0.05,
            )

    def terminate_consumer(self) -> None:
        """SIGTERM to one consumer: its topics go to the others, and come back."""
        consumer = self._choose_consumer()
        if not consumer.terminate():
            self.findings.append(f"{consumer.name} did not end after SIGTERM")

    def remove_consumer(self) -> None:
        """One consumer fewer for a while."""
        consumer = self._choose_consumer()
        consumer.is_wanted = False
        consumer.terminate()
        time.sleep(self.random.uniform(0.5, 2.0))
        consumer.is_wanted = True

    def kill_store(self) -> None:
        """Kill a server, and start it again."""
        with self._writes_may_be_lost(whenever=self.store.may_lose_writes):
            server = self.store.choose(self._pick())
            server.kill()
            time.sleep(DOWN_S)
            server.start()

    def suspend_store(self) -> None:
        """Suspend a server."""
        with self._writes_may_be_lost(whenever=self.store.may_lose_writes):
            seconds = float(self.random.uniform(0.2, self.options.longest_s))
            suspend(self.store.choose(self._pick()).signal, seconds)

    def fill_store(self) -> None:
        """Keep the memory of all servers full for a while."""
        for size in (1, 0):
            for server in self.store.servers:
                server.configure("maxmemory", size)
            time.sleep(0.5 * size)

    def cut_connections(self) -> None:
        """End the connections of all clients to a server, some times."""
        server = self.store.choose(self._pick())
        for _ in range(10):
            server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            time.sleep(self.random.uniform(0, 0.05))

    def fail_over(self) -> None:
        """Kill a primary until its replica is promoted."""
        with self._writes_may_be_lost():
            self.store.fail_over(self._pick())

    def roll_back(self) -> None:
        """Set the store, or a primary of it, back by some moments."""
        self.store.wait_until_whole()
        self.store.prepare_rollback(self._pick())
        time.sleep(self.random.uniform(*ROLLED_BACK_S))
        with self._writes_may_be_lost():
            self.store.roll_back()

    @contextmanager
    def _writes_may_be_lost(self, *, whenever: bool = True) -> Iterator[None]:
        """Suspend the producers; afterwards they append again what the store has lost."""
        if not whenever:
            yield
            self.store.wait_until_whole()
            return
        with ExitStack() as stack:
            for producer in self.producers:
                stack.enter_context(producer.lock)
            yield
            self.store.wait_until_whole()
            for producer in self.producers:
                producer.find_positions()

    def _choose_consumer(self) -> ConsumerProcess:
        return self.consumers[self._pick() % len(self.consumers)]

    def _pick(self) -> int:
        return int(self.random.integers(1 << 30))

    def appended(self) -> int:
        """How many events were acknowledged to the producers."""
        return sum(producer.appended for producer in self.producers)

    def has_room(self) -> bool:
        """Whether the producers may append more."""
        return 0 <= self.lag < LONGEST_LAG

    def supervise(self) -> None:
        """Start consumers that have ended, and read the lag, until the run ends."""
        known = self.store.count_failovers()
        while not self.ended.wait(0.1):
            for consumer in self.consumers:
                consumer.supervise()
            self.lag = read_lag(self.store)
            count = self.store.count_failovers()
            if count not in (None, known):
                known = count
                self.failovers_s.append(time.monotonic())

    def wait_for_events(self, count: int) -> bool:
        """Wait until as many events were appended; returns whether they were."""
        return self._wait_until(lambda: self.appended() >= count)

    def wait_until_consumed(self) -> None:
        """Wait until every entry is acknowledged."""
        self._wait_until(lambda: read_lag(self.store) == 0)

    def _wait_until(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition is met; a run fails in which nothing changes before it is."""
        before, changed_s = None, time.monotonic()
        idle_s = IDLE_S if self.options.plant is None else PLANTED_IDLE_S
        while not condition():
            present = self.appended(), self.lag
            if present != before:
                before, changed_s = present, time.monotonic()
            elif time.monotonic() > changed_s + idle_s:
                lag = "an unknown number of" if self.lag < 0 else self.lag
                self.findings.append(
                    f"stalled for {idle_s:.0f} s: {lag} entries are not acknowledged"
                )
                return False
            time.sleep(0.05)
        return True

    def stop_consumers(self) -> None:
        """Terminate all consumers for good."""
        for consumer in self.consumers:
            consumer.is_wanted = False
            if not consumer.terminate():
                self.findings.append(f"{consumer.name} did not end after SIGTERM")

    def _is_explained(self, stream: str, start: int, end: int) -> bool:
        """Whether a failover explains that the store has lost acknowledged events of a stream: it
        was noticed soon after each of them was acknowledged for the last time."""
        acknowledged_s = {
            (burst[0], number): moment_s
            for producer in self.producers
            for moment_s, burst in producer.acknowledged
            for number in range(max(start, burst[1]), min(end, burst[2]))
            if burst[0] == stream
        }
        return all(
            any(0 <= failover_s - moment_s < NOTICED_S for failover_s in self.failovers_s)
            for moment_s in acknowledged_s.values()
        )

    def check(self) -> None:
        """Check the topics, and what the consumers logged."""
        told = {name: end for each in self.producers for name, end in each.told.items()}
        self.findings += check_topics(self.store.connect(), told, self._is_explained, self.seen)
        for consumer in self.consumers:
            logged = consumer.lines('"exception":')
            self.findings += [f"{consumer.name} logged {line}" for line in logged[:3]]
            self.seen["topics lost"] += len(consumer.lines('"topic_lost"'))
            self.seen["topics acquired"] += len(consumer.lines('"topic_acquired"'))
        self.seen["events appended"] = self.appended()


FAULTS: Final[dict[str, tuple[Callable[[TopicRun], None], tuple[str, ...]]]] = {
    "consumer killed": (TopicRun.kill_consumer, STORES),
    "all consumers killed": (TopicRun.kill_all_consumers, STORES),
    "consumer suspended": (TopicRun.suspend_consumer, STORES),
    "consumers suspended for longer than their leases": (TopicRun.expire_leases, STORES),
    "consumer terminated": (TopicRun.terminate_consumer, STORES),
    "consumer removed and added": (TopicRun.remove_consumer, STORES),
    "store killed": (TopicRun.kill_store, STORES),
    "store suspended": (TopicRun.suspend_store, STORES),
    "store's memory full": (TopicRun.fill_store, STORES),
    "connections cut": (TopicRun.cut_connections, STORES),
    "store rolled back": (TopicRun.roll_back, STORES),
    "failover": (TopicRun.fail_over, ("cluster",)),
}
"""What breaks, and on which stores."""


def kinds_of(store: str) -> list[str]:
    """What can occur on a store."""
    return [kind for kind, (_, stores) in FAULTS.items() if store in stores]


def read_lag(store: ServerStore | ClusterStore) -> int:
    """How many entries are not acknowledged; -1 while that is not known."""
    try:
        client, lag = store.connect(), 0
        for partition in range(layout.PARTITIONS):
            name = layout.topic(partition)
            if not client.exists(name):
                continue
            groups = [g for g in client.xinfo_groups(name) if g["name"] == layout.GROUP.encode()]
            last = client.xinfo_stream(name)["last-generated-id"]
            if not groups:
                return -1
            lag += groups[0]["pending"]
            if groups[0]["last-delivered-id"] != last:
                lag += len(client.xrange(name, f"({groups[0]['last-delivered-id'].decode()}"))
        client.close()
    except UNAVAILABLE:
        return -1
    return lag


def read_owners(store: ServerStore | ClusterStore) -> set[int]:
    """The processes that own topics, or did last; empty while that is not known."""
    try:
        client = store.connect()
        names = [f"{layout.topic(each)}:lease:{layout.GROUP}" for each in range(layout.PARTITIONS)]
        owners = {client.hget(name, "owner") for name in names} - {None}
        client.close()
    except UNAVAILABLE:
        return set()
    # a consumer's name has its host, its process and a random part
    return {int(owner.split(b":")[1]) for owner in owners}


def run(options: TopicOptions, plan: list[str] | None = None) -> TopicRun:
    """Run a plan of faults, by default each kind as often as the others, and check the topics."""
    random, kinds = np.random.default_rng(options.seed), kinds_of(options.store)
    plan = plan or [str(k) for k in random.permutation(list(islice(cycle(kinds), options.faults)))]
    began_s = time.monotonic()
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="carry-topics-", ignore_cleanup_errors=True)
        running = _start(options, Path(stack.enter_context(temporary)), random, stack)
        for place, kind in enumerate(plan):
            if not running.wait_for_events(options.events * place // len(plan)):
                break
            if options.verbose:
                now_s = time.monotonic() - began_s
                print(f"  {now_s:7.1f} s {running.appended():9,} events  {kind}", flush=True)
            running.inject(kind)
        running.wait_for_events(options.events)
        for producer in running.producers:
            producer.stopped.set()
            producer.join()
            running.seen.update(producer.seen)
        running.wait_until_consumed()
        running.stop_consumers()
        running.check()
    running.seen["seconds"] = round(time.monotonic() - began_s)
    return running


def _start(
    options: TopicOptions, folder: Path, random: np.random.Generator, stack: ExitStack
) -> TopicRun:
    """Start the store, the consumers with their supervisor, and the producers."""
    models = write(folder / "models")
    (folder / "store").mkdir()
    kind = ClusterStore if options.store == "cluster" else ServerStore
    store = kind(options.store, folder / "store")
    stack.callback(store.stop)
    store.start()
    config = folder / "consumer.yaml"
    config.write_text(layout.CONFIG)
    words = [str(config), "--models", str(models), "--redis-url", store.url]
    settings = dict(layout.SETTINGS)
    if options.plant is not None:
        settings |= {"PLANTED_BUG": options.plant, "PYTHONPATH": str(PLANTED_BUGS)} | PATIENT
    running = TopicRun(options, store, random)
    for number in range(options.consumers):
        running.consumers.append(ConsumerProcess(f"consumer{number}", folder, words, settings))
        stack.callback(running.consumers[-1].kill)
    supervisor = threading.Thread(target=running.supervise, daemon=True)
    supervisor.start()
    stack.callback(supervisor.join)
    stack.callback(running.ended.set)
    events = layout.Events(options.seed)
    for number in range(PRODUCERS):
        names = [f"s{each}" for each in range(number, options.streams, PRODUCERS)]
        seed = options.seed + number
        producer = Producer(names, events, store.connect, running.has_room, seed)
        running.producers.append(producer)
        stack.callback(producer.stopped.set)
        producer.start()
    return running


def report(running: TopicRun) -> list[str]:
    """The counts of a run, as lines."""
    return [
        f"{running.options.store}: seed {running.options.seed}",
        *(f"  {count:9,}  {name}" for name, count in sorted(running.seen.items())),
        *([f"  FAILED: {each}" for each in running.findings[:12]] or ["  passed"]),
    ]
