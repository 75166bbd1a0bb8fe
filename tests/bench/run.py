"""One run of the benchmark: its options, the servers and stores it starts, and its rounds.

Carry runs as `carry serve` with its default settings; set are only the runtime, the models, the
port and the store's address. The store is a Valkey with the options of the service's embedded one
(append-only file, written `everysec`, unix socket), on a core of its own.
"""

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from models.artifact.artifact import Artifact
from tests.bench import workloads
from tests.bench.generator import Connection, Load, make_streams, run_closed, try_connect
from tests.bench.results import Results, Sample
from tests.bench.traffic import Traffic, TrafficSpec
from tests.bench.workloads import Bodies, make_traffic
from tests.support.machine import REPOSITORY, Cores, is_running, pin_child, read_usage
from tests.support.servers import RealServer, free_port, real_server, until
from tests.support.service import running

CONNECTIONS = 32
WARM_S = 0.5
REST_S, REST_SHARE = 0.5, 0.2
"""A server that used less than this share of a core for so long is at rest."""

RESTS_WITHIN_S = 180.0
PR_SET_TIMERSLACK = 29
UNANSWERED = "requests were not answered in time"


@dataclass
class Options:
    """What is measured, how long and how much: the command's arguments."""

    only: list[str] | None = None
    rounds: int = 3
    seconds: float = 1.0
    streams: int = 1000
    many_streams: int = 100_000
    runtimes: Sequence[str] = ("tensorflow", "onnxruntime")
    beside: Path | None = None
    loads: Sequence[str] = ("json",)
    strict: bool = False
    instructions: bool = True
    peer: str | None = None
    peer_grpc: str = ""
    peer_model: str = "bench"
    lines: Path | None = None


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and its store."""

    name: str
    port: int
    pid: int
    artifact: Artifact  # the network that it serves
    store: RealServer


class Row(NamedTuple):
    """A server under one closed loop: the streams that the generator has under a key."""

    name: str
    server: Server
    key: str
    connections: int = CONNECTIONS


@dataclass
class Bench:
    """One run. What is started is ended with the `scope`, a `with` block; the store and the
    generator are started once in it."""

    options: Options
    cores: Cores
    folder: Path
    results: Results
    scope: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def artifact(self) -> Artifact:
        """The standard network."""
        return workloads.standard_model(self.folder / "models")

    @cached_property
    def bodies(self) -> Bodies:
        """The standard chunks."""
        return Bodies.random(workloads.STEPS)

    @cached_property
    def driver(self) -> ProcessPoolExecutor:
        """The process of the load generator."""
        driver: ProcessPoolExecutor = self.start(helper_process(self.cores.others))
        self.scope.callback(self.__dict__.pop, "driver")
        return driver

    @cached_property
    def store(self) -> RealServer:
        """The store that servers share."""
        store: RealServer = self.start_store()
        self.scope.callback(self.__dict__.pop, "store")
        return store

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the load generator."""
        return self.driver.submit(function, *arguments).result()

    def note(self, text: str) -> None:
        """Keep and show a remark, once."""
        if text not in self.results.notes:
            self.results.notes.append(text)
            print(text)

    def start(self, context: AbstractContextManager[Any]) -> Any:
        """Enter a context, which is left with the scope."""
        return self.scope.enter_context(context)

    def start_store(self, *options: str) -> RealServer:
        """An empty store."""
        # the tests' servers leave the sync to the kernel, but a service's store does not
        options = ("--appendfsync", "everysec", *options)
        server = real_server("valkey", *options, prepare=prepare_store(self.cores.others))
        store: RealServer = self.start(server)
        return store

    def start_server(
        self,
        kind: str,
        artifact: Artifact | None = None,
        *,
        store: RealServer | None = None,
        models: Path | None = None,
        workers: int = 1,
        reply_bytes: int = 1800,
        environment: Mapping[str, str] | None = None,
        name: str | None = None,
        checkout: Path | None = None,
    ) -> Server:
        """A ready server at rest: `fastapi`, `competent`, or `carry-RUNTIME`. AssertionError with
        its log where it does not start.

        Args:
            store: another one than the shared one.
            models: a folder of models that Carry serves, instead of the one.
            reply_bytes: of the floor's fixed reply.
            environment: further variables, for Carry's other settings.
            checkout: whose code it runs, on this one's packages; by default this one's.
        """
        print(f"starting {name or kind}")
        artifact, store, port = artifact or self.artifact, store or self.store, free_port()
        folder = self.folder / f"{kind}-{port}"
        folder.mkdir()
        if kind.startswith("carry-"):
            service = running(
                folder,
                models or artifact.path,
                *(("--workers", str(workers)) if workers > 1 else ()),
                *("--port", str(port)),
                redis_url=store.url,
                checkout=checkout,
                prepare=pin_child(self.cores.servers),
                CARRY_RUNTIME=kind.removeprefix("carry-"),
                **(environment or {}),
            )
            process = self.start(service).process
        else:
            module = f"tests.bench.baselines.{'echo' if kind == 'fastapi' else kind}:app"
            command = [*(sys.executable, "-m", "uvicorn", "--port", str(port), module)]
            command += ["--log-level", "warning", "--no-server-header", "--no-date-header"]
            variables = {"BENCH_ARTIFACT": str(artifact.path), "BENCH_SOCKET": store.socket}
            variables |= {"BENCH_REPLY_BYTES": str(reply_bytes)}
            log = folder / "log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    cwd=REPOSITORY,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **variables},
                    preexec_fn=pin_child(self.cores.servers),
                )
            self.start(process)
            self.scope.callback(process.terminate)
            connected = until(lambda: process.poll() is not None or try_connect(port), kind)
            assert isinstance(connected, Connection), log.read_text()
            connected.close()
        server = Server(name or kind, port, process.pid, artifact, store)
        self._await_rest(server)
        return server

    def _await_rest(self, server: Server) -> None:
        """Wait until a server has finished its work beside requests, such as compiling."""
        ends_s = time.monotonic() + RESTS_WITHIN_S
        used_s, busy = read_usage(server.pid).cpu_s, True
        while busy:
            time.sleep(REST_S)
            before_s, used_s = used_s, read_usage(server.pid).cpu_s
            # on a busy machine a server that compiles gets little of its core
            busy = used_s - before_s > REST_S * REST_SHARE or is_running(server.pid)
            if busy and time.monotonic() > ends_s:
                self.note(f"{server.name} was still busy by itself after {RESTS_WITHIN_S:g} s")
                return

    def prepare(
        self,
        server: Server,
        key: str,
        bodies: Bodies | None = None,
        *,
        streams: int | None = None,
        tolerance: float = workloads.TOLERANCE,
        **options: Any,
    ) -> Load:
        """Make a server's streams at the generator, warm it up, and check some of its outputs; the
        warming load, with sampled replies. Raises WrongReplyError where an output is wrong."""
        bodies, artifact = bodies or self.bodies, server.artifact
        if server.name == "fastapi":
            # its replies are constant
            options["positions"] = False
        options["is_sampled"] = server.name != "fastapi" and not options.get("items")
        count, prefix = streams or self.options.streams, key.replace("/", "-")
        spec = make_traffic(artifact, bodies, prefix, count, **options)
        if not spec.moves:
            # a stream that is forecast has had one chunk: all of them in one request
            traffic = Traffic(make_traffic(artifact, bodies, prefix, count, items=count))
            request, ticket = traffic.request()
            with closing(Connection(server.port)) as connection:
                traffic.accept(ticket, connection.ask(request))
        load = self.warm(server, key, spec)
        if spec.is_sampled:
            workloads.check_answers(artifact, spec, bodies.rows, load.sampled, tolerance)
        return load

    def warm(self, server: Server, key: str, spec: TrafficSpec) -> Load:
        """Make streams at the generator and load a server with them for a moment, unmeasured."""
        self.run(make_streams, key, spec)
        load: Load = self.run(run_closed, key, server.port, min(CONNECTIONS, spec.streams), WARM_S)
        return load

    def measure_rounds(self, rows: Sequence[Row]) -> list[list[Sample]]:
        """Every row in every round, each round beginning with the next one; the rounds by row."""
        rounds = self.options.rounds
        for turn in range(rounds):
            first = turn % len(rows)
            for row in (*rows[first:], *rows[:first]):
                self.measure_closed(row)
        return [self.results.rows[row.name][-rounds:] for row in rows]

    def measure_closed(self, row: Row) -> Load:
        """One more round of a row."""
        name, server, key, connections = row
        arguments = (run_closed, key, server.port, connections, self.options.seconds)
        return self.measure(name, server, partial(self.run, *arguments))

    def measure(self, row: str, server: Server, run: Callable[[], Load]) -> Load:
        """Run one load as one more round of a row."""
        before, store_before = read_usage(server.pid), read_usage(server.store.pid)
        load = run()
        after, store_after = read_usage(server.pid), read_usage(server.store.pid)
        if load.unanswered:
            self.note(f"{row}: did not keep up, {load.unanswered} {UNANSWERED}")
        cpu_s, store_cpu_s = after.cpu_s - before.cpu_s, store_after.cpu_s - store_before.cpu_s
        sample = Sample.of(load, cpu_s, store_cpu_s, after.memory_bytes)
        self.results.rows.setdefault(row, []).append(sample)
        print(
            f"  {row}: {sample.chunks_per_s:,.0f} chunks/s, {sample.cpu_us_per_chunk:,.0f} us CPU,"
            f" p50 {sample.p50_ms:.2f} ms, p99 {sample.p99_ms:.2f} ms"
            f" (generator {sample.generator_cpu:.0%}, store {sample.store_cpu:.0%} of their core)"
        )
        return load


def prepare_store(cores: Sequence[int]) -> Callable[[], None]:
    """A `preexec_fn`: pins the store; in a run with real-time priority its own is higher, so that
    it need not wait until the generator on its core pauses."""
    pin = pin_child(cores)

    def prepare() -> None:
        pin()
        if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_FIFO:
            priority = os.sched_getparam(0).sched_priority + 1
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))

    return prepare


def helper_process(cores: Sequence[int]) -> ProcessPoolExecutor:
    """An executor of one process on these cores, without garbage collection, timers exact."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare, initargs=(cores,))


def _prepare(cores: Sequence[int]) -> None:
    pin_child(cores)()
    gc.disable()
    if sys.platform == "linux":
        # Otherwise the kernel may send each request of an open loop 50 us late.
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
