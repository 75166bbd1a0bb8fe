"""The section `consume`: from the entries of a topic to their outputs, and what a rebalance takes.

`carry consume`, the plain loop of `baselines/loop.py`, Quix Streams (`quix.py`) and `carry serve`
run in turns on one core; processes that are not measured are suspended, or have nothing to do. A
round of a topic is a backlog, which is added beforehand. In the open loop events are added at times
fixed beforehand, and a latency ends with the millisecond in the id of the output entry. Every
output is checked: once and in order, those of one stream also against the oracle.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import hiredis
import numpy as np
import orjson
import psutil
from numpy.typing import NDArray

from service.core.values import StreamKey
from service.store.keys import KeySpace
from tests.bench import workloads
from tests.bench.generator import LEAD_S, Load, draw_arrivals, run_open
from tests.bench.quix import start_quix
from tests.bench.run import CONNECTIONS, Bench, Row, Server
from tests.bench.traffic import SAMPLED_CHUNKS, TrafficSpec, WrongReplyError
from tests.bench.workloads import Bodies, make_traffic
from tests.support.forks import COMMAND
from tests.support.machine import REPOSITORY, pin_child
from tests.support.servers import RealServer, until

BURSTS = (1, 16)
"""Consecutive entries of a topic that are of one stream."""

EQUAL_RATES = "consume/1 at 50 % of http/carry"
LEAST_EVENTS, ADDED_AT_ONCE = 2000, 1000
ENDS_WITHIN_S, POLL_S, MIN_WAIT_S = 120.0, 0.002, 0.00005

PARTITIONS = 1024  # by default
SHARED_STREAMS, EVENT_INTERVAL_S, LOOK_EVERY, SETTLED_S = 64, 0.04, 5, 1.0


@dataclass
class TopicFeed:
    """The entries of a topic, a burst of each stream in turns, and the check of its outputs."""

    store: RealServer
    spec: TrafficSpec
    rows: tuple[workloads.FloatRows, ...]
    burst: int
    added: int = 0
    checked: int = 0

    def __post_init__(self) -> None:
        self.source, self.sink = f"{self.spec.prefix}:in", f"{self.spec.prefix}:out"
        self.client = self.store.client()
        self._sampled: list[bytes] = []

    def place(self, number: int) -> tuple[int, int]:
        """Stream and position of the n-th event."""
        return workloads.place_in_bursts(number, self.burst, self.spec.streams)

    def commands(self, events: int) -> list[bytes]:
        """The commands that add the next events, which count as added."""
        packed = []
        for number in range(self.added, self.added + events):
            stream, position = self.place(number)
            event = self.spec.values[self.spec.body(stream, position)][1:-1]
            fields = ("stream", self.spec.name(stream), "position", position, "event", event)
            packed.append(hiredis.pack_command(("XADD", self.source, "*", *fields)))
        self.added += events
        return packed

    def add(self, events: int) -> None:
        """Add the next events."""
        add_at(self.store.socket, self.commands(events), np.zeros(events))

    def await_outputs(self, process: psutil.Process) -> None:
        """Wait for an output entry of each event, from a process."""
        missing = self.added - self.checked

        def has_ended() -> bool:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE

        until(
            lambda: self.client.xlen(self.sink) >= missing or has_ended(),
            self.sink,
            ENDS_WITHIN_S,
            POLL_S,
        )
        assert not has_ended(), f"the reader of {self.source} has ended"

    def check(self) -> dict[tuple[int, int], int]:
        """Check the outputs since the last check, and delete them; the milliseconds of their ids,
        by stream and position."""
        entries = self.client.xrange(self.sink)
        found: dict[tuple[int, int], int] = {}
        positions: dict[int, int] = {}
        for entry_id, fields in entries:
            stream = int(fields[b"stream"].rpartition(b"-")[2])
            position = int(fields[b"position"])
            if positions.setdefault(stream, position) != position:
                raise WrongReplyError(f"{self.sink}: {fields} is not the next one of its stream")
            positions[stream] = position + 1
            found[stream, position] = int(entry_id.partition(b"-")[0])
            if stream == 0 and len(self._sampled) < SAMPLED_CHUNKS:
                self._sampled.append(b'{"outputs":%b}' % fields[b"outputs"])
        expected = {self.place(number) for number in range(self.checked, self.added)}
        if len(entries) != len(expected) or found.keys() != expected:
            raise WrongReplyError(f"{self.sink}: {len(entries)} outputs of {len(expected)} events")
        self.checked = self.added
        for name in (self.source, self.sink):
            self.client.xtrim(name, maxlen=0, approximate=False)
        return found

    def check_oracle(self, bench: Bench) -> None:
        """Compare the first outputs of one stream with the oracle's."""
        workloads.check_answers(bench.artifact, self.spec, self.rows, self._sampled)


@dataclass
class Reader:
    """A process that reads the topic of a feed; suspended while it is not measured."""

    server: Server
    process: psutil.Process
    feed: TopicFeed
    events: int

    def measure(self, bench: Bench, row: str) -> float:
        """One more round of a backlog; events per second."""
        self.feed.add(self.events)
        rate_per_s = bench.measure(row, self.server, self._drain).chunks_per_s
        self.feed.check()
        return rate_per_s

    def warm(self, seconds: float) -> None:
        """Measure how many events a round of so many seconds needs."""
        self.feed.add(self.events)
        self.events = max(LEAST_EVENTS, int(self._drain().chunks_per_s * seconds))
        self.feed.check()

    def _drain(self) -> Load:
        started_s = time.perf_counter()
        self.process.resume()
        self.feed.await_outputs(self.process)
        passed_s = time.perf_counter() - started_s
        self.process.suspend()
        return Load(passed_s, np.array([nan]), self.events, self.events, 0.0)

    def measure_open(self, bench: Bench, row: str, rate_per_s: float, seed: int) -> None:
        """One more round of an open loop."""
        self.process.resume()
        due = draw_arrivals(rate_per_s, bench.options.seconds * 2, seed)
        first = self.feed.added
        added = bench.run, add_at, self.feed.store.socket, self.feed.commands(len(due)), due
        bench.measure(row, self.server, partial(self._run_open, first, due, *added))
        self.process.suspend()

    def _run_open(self, first: int, due: Any, run: Callable[..., Any], *added: Any) -> Load:
        feed, count = self.feed, len(due)
        started_s, cpu_s = run(*added)
        feed.await_outputs(self.process)
        passed_s = time.time() - started_s
        found = feed.check()
        ends_s = np.array([found[feed.place(first + at)] + 1 for at in range(count)]) / 1000
        return Load(passed_s, ends_s - (started_s + due), count, count, cpu_s)


def add_at(path: str, commands: Sequence[bytes], due: NDArray[np.float64]) -> tuple[float, float]:
    """Send commands when they are due, in seconds after the start, without waiting for replies.

    Returns:
        The start, by the clock, and the processor time that it took.
    """
    cpu_s, done, replies = time.process_time(), 0, hiredis.Reader()
    missing = len(commands)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        started_s = time.time() + LEAD_S
        while missing:
            ready = int(np.searchsorted(due, time.time() - started_s, "right"))
            ready = min(ready, done + ADDED_AT_ONCE)
            if ready > done:
                connection.settimeout(None)
                connection.sendall(b"".join(commands[done:ready]))
                done = ready
            wait_s = 0.0 if done == len(due) else due[done] + started_s - time.time()
            connection.settimeout(max(wait_s, MIN_WAIT_S) if done < len(due) else ENDS_WITHIN_S)
            with suppress(TimeoutError):
                replies.feed(connection.recv(1 << 16))
            while (reply := replies.gets()) is not False:
                assert isinstance(reply, bytes), reply
                missing -= 1
    return started_s, time.process_time() - cpu_s


def start_reader(
    bench: Bench, name: str, burst: int, runtime: str, checkout: Path | None = None
) -> Reader:
    """A reader of a topic of its own: `loop`, or `carry consume` on a runtime."""
    spec = make_traffic(bench.artifact, Bodies.random(1), f"{name}-{burst}", bench.options.streams)
    feed = TopicFeed(bench.store, spec, Bodies.random(1).rows, burst)
    feed.add(LEAST_EVENTS)
    if name == "loop":
        command = [sys.executable, "-m", "tests.bench.baselines.loop", feed.source, feed.sink]
    else:
        command = consume_command(bench, feed.source, feed.sink)
    process = psutil.Process(start_process(bench, command, runtime, checkout).pid)
    try:
        feed.await_outputs(process)
    except AssertionError as error:
        raise AssertionError(f"{error}: {(bench.folder / 'readers.log').read_text()}") from error
    feed.check()
    server = Server(name, 0, process.pid, bench.artifact, bench.store)
    reader = Reader(server, process, feed, LEAST_EVENTS)
    reader.process.suspend()
    reader.warm(bench.options.seconds)
    return reader


def consume_command(bench: Bench, source: str, sink: str, *options: str) -> list[str]:
    """The command of a consumer of the standard network."""
    models, url = str(bench.artifact.path), bench.store.url
    command = [COMMAND, "consume", "--from", source, "--to", sink, "--model", "bench"]
    return [*command, "--models", models, "--redis-url", url, *options]


def start_process(
    bench: Bench, command: list[str], runtime: str, checkout: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process on the servers' core, which is killed at the end of the section."""
    variables = {
        "BENCH_ARTIFACT": str(bench.artifact.path),
        "BENCH_SOCKET": bench.store.socket,
        "CARRY_RUNTIME": runtime,
        "PYTHONPATH": str(checkout or REPOSITORY),
    }
    with (bench.folder / "readers.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            env={**os.environ, **variables},
            preexec_fn=pin_child(bench.cores.servers),
        )
    bench.start(process)
    # also while it is suspended
    bench.scope.callback(process.kill)
    return process


def measure_consume(bench: Bench, kind: str) -> None:
    """Backlogs of single events and of bursts, single events over HTTP, the open loop at half of
    the consumer's peak, and a rebalance."""
    results, runtime, rounds = bench.results, kind.removeprefix("carry-"), bench.options.rounds
    names: dict[str, Path | None] = {"carry": None, "loop": None}
    if bench.options.beside is not None:
        names["other"] = bench.options.beside
    http = bench.start_server(kind)
    bench.prepare(http, "http", Bodies.random(1))
    for burst in BURSTS:
        readers = {
            name: start_reader(bench, name, burst, runtime, at) for name, at in names.items()
        }
        quix = start_quix(bench, burst)
        for seed in range(1, rounds + 1):
            if quix is not None:
                quix.measure(bench, f"consume/{burst}/quix")
            for name, reader in readers.items():
                rate = reader.measure(bench, f"consume/{burst}/{name}")
                if name == "carry":
                    half = f"consume/{burst} at 50 %/{name}"
                    reader.measure_open(bench, half, rate / 2, seed)
            if burst == 1:
                row = Row(f"consume/{burst}/http", http, "http", CONNECTIONS)
                peak = bench.measure_closed(row).chunks_per_s
                load = (run_open, "http", http.port, peak / 2, bench.options.seconds * 2, seed)
                bench.measure(f"consume/{burst} at 50 %/http", http, partial(bench.run, *load))
                readers["carry"].measure_open(bench, EQUAL_RATES, peak / 2, seed)
        ours = results.rows[f"consume/{burst}/carry"]
        for name in (*names, "http", "quix"):
            if name != "carry" and (theirs := results.rows.get(f"consume/{burst}/{name}")):
                results.compare(f"consume/{kind} {burst} over {name}", ours, theirs)
        if quix is not None:
            quix.end(bench, Bodies.random(1).rows)
        for reader in readers.values():
            reader.feed.check_oracle(bench)
            reader.process.kill()
    measure_rebalance(bench, runtime)


def measure_rebalance(bench: Bench, runtime: str) -> None:
    """The longest time without an output of a topic, among those of all partitions, where one of
    two consumers is killed, and where another one is added."""
    topics = PartitionedTopics(bench)
    command = consume_command(bench, "shared", "shared", "--partitioned")
    consumers = [start_process(bench, command, runtime) for _ in range(2)]
    topics.add_until_shared(consumers)

    def kill() -> None:
        consumers.pop().kill()

    def add() -> None:
        consumers.append(start_process(bench, command, runtime))

    gaps_s: dict[str, list[float]] = {"killed": [], "added": []}
    for _ in range(bench.options.rounds):
        gaps_s["killed"].append(topics.add_until_shared(consumers, kill))
        gaps_s["added"].append(topics.add_until_shared(consumers, add))
    for what, found_s in gaps_s.items():
        bench.results.figure(f"consume/rebalance: a consumer is {what}, s", found_s)


class PartitionedTopics:
    """The topics of all partitions, and streams in some of them."""

    def __init__(self, bench: Bench):
        space = KeySpace("carry", PARTITIONS)
        self._client = bench.store.client()
        self._prefixes = [space.partition_prefix(number) for number in range(PARTITIONS)]
        names = [f"s{number}" for number in range(SHARED_STREAMS)]
        # one of each partition, so that the outputs of a topic are those of a stream
        by_partition = {space.partition(StreamKey("bench", name)): name for name in names}
        self._streams = {self._prefixes[at]: name for at, name in by_partition.items()}
        self._event = orjson.dumps(Bodies.random(1).rows[0][0].tolist())
        self._added = 0

    def add_until_shared(
        self, consumers: list[subprocess.Popen[bytes]], change: Callable[[], None] | None = None
    ) -> float:
        """Add events until each consumer owns its share of the topics, and for a second more; the
        longest time without an output of a topic meanwhile.

        Args:
            change: is called after the first events, and changes the consumers.

        Raises:
            WrongReplyError: an output is missing or repeated.
        """
        first, shared, ends_s = self._added, False, time.monotonic() + ENDS_WITHIN_S
        while not shared or time.monotonic() < ends_s:
            with self._client.pipeline(transaction=False) as pipe:
                for prefix, stream in self._streams.items():
                    fields = {"stream": stream, "event": self._event, "position": self._added}
                    pipe.xadd(f"{prefix}:in:shared", fields)
                pipe.execute()
            self._added += 1
            time.sleep(EVENT_INTERVAL_S)
            if shared or (self._added - first) % LOOK_EVERY:
                continue
            if change is not None:
                change()
                change = None
                continue
            owners = self._owners()
            assert all(each.poll() is None for each in consumers), "a consumer has ended"
            if shared := owners == {each.pid: PARTITIONS // len(consumers) for each in consumers}:
                ends_s = time.monotonic() + SETTLED_S
            assert shared or time.monotonic() < ends_s, f"not shared: {owners}"
        return max(self._longest_gap_s(f"{each}:out:shared", first) for each in self._streams)

    def _longest_gap_s(self, sink: str, first: int) -> float:
        """Check all outputs of a stream; the longest time between two, from the n-th on."""
        until(lambda: self._client.xlen(sink) >= self._added, sink, ENDS_WITHIN_S)
        outputs = self._client.xrange(sink)
        if [int(fields[b"position"]) for _, fields in outputs] != [*range(self._added)]:
            raise WrongReplyError(f"{sink}: expected each of {self._added} outputs once")
        times_ms = [int(entry_id.partition(b"-")[0]) for entry_id, _ in outputs]
        return float(np.diff(times_ms[first:]).max()) / 1000

    def _owners(self) -> Counter[int]:
        """How many topics each process owns, by its pid."""
        with self._client.pipeline(transaction=False) as pipe:
            for prefix in self._prefixes:
                pipe.hget(f"{prefix}:in:shared:lease:carry", "owner")
            owners = pipe.execute()
        return Counter(int(owner.split(b":")[1]) for owner in owners if owner)
