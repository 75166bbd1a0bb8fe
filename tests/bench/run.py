"""One run of the benchmark: its options, the servers and stores it starts, and its rounds.

Carry runs as `carry serve` with its default settings; set are only the runtime, the models, the
port and the store's address. The store is a Valkey with the options of the service's embedded one
(append-only file, written `everysec`, unix socket), on a core of its own.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

from models.artifact.artifact import Artifact
from tests.bench.answers import TOLERANCE, check_answers
from tests.bench.generator import HOST, Load, make_streams, run_closed
from tests.bench.processes import await_start, helper_process, running_process
from tests.bench.results import Results, Sample
from tests.bench.traffic import TrafficSpec
from tests.bench.workloads import STEPS, Bodies, make_traffic, standard_model
from tests.support.machine import REPOSITORY, Cores, pin_child, read_usage
from tests.support.servers import RealServer, free_port, real_server

RUNTIMES = ("tensorflow", "onnxruntime")
FLOORS = ("asgi", "fastapi")
"""The servers that do nothing but answer a constant."""

UVICORN = (
    *(sys.executable, "-m", "uvicorn", "--log-level", "warning", "--no-access-log"),
    # The naive service blocks its loop for seconds, and would lose its waiting connections.
    *("--no-server-header", "--no-date-header", "--timeout-keep-alive", "60"),
)
CONNECTIONS = 32
WARM_S = 0.5
REST_S, REST_SHARE = 0.5, 0.2
"""A server that used less than this share of a core for so long is at rest."""

RESTS_WITHIN_S = 180.0


@dataclass
class Options:
    """What is measured, how long and how much: the command's arguments."""

    only: list[str] | None = None
    rounds: int = 3
    seconds: float = 1.0
    streams: int = 1000
    many_streams: int = 100_000
    runtimes: Sequence[str] = RUNTIMES
    baselines: Sequence[str] = (*FLOORS, "naive", "competent")
    beside: Path | None = None
    jsonl: Path | None = None
    report: bool = False


@dataclass(frozen=True, slots=True)
class Server:
    """A running server with the store and the load generator beside it.

    Attributes:
        artifact: the network that it serves.
    """

    name: str
    port: int
    pid: int
    artifact: Artifact
    store: RealServer
    driver: ProcessPoolExecutor

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in its load generator."""
        return self.driver.submit(function, *arguments).result()

    @property
    def has_positions(self) -> bool:
        """Whether its replies give the position."""
        return self.name not in FLOORS


class Row(NamedTuple):
    """A server under one closed loop: the streams that its generator has under a key."""

    name: str
    server: Server
    key: str
    connections: int = CONNECTIONS


def is_installed(kind: str) -> bool:
    """Whether the package is there that a server of this kind computes with."""
    package = {"competent": "onnxruntime", "naive": "tensorflow"}.get(
        kind, kind.removeprefix("carry-")
    )
    return kind in FLOORS or importlib.util.find_spec(package) is not None


def carry_command(models: Path, port: int, *options: str) -> list[str]:
    """`carry serve` on one model, or a folder of them."""
    return [
        *(sys.executable, "-m", "service.cli", "serve", "--port", str(port)),
        *("--models", str(models), *options),
    ]


def _is_ready(port: int) -> bool:
    """Whether a server answers: Carry with readiness, the others with anything."""
    try:
        urllib.request.urlopen(f"http://{HOST}:{port}/health/ready", timeout=5).close()
    except HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


@dataclass
class Bench:
    """One run; `say` shows progress; what is started is ended with the `scope`, a `with` block."""

    options: Options
    cores: Cores
    folder: Path
    results: Results
    say: Callable[[str], None] = print
    scope: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def artifact(self) -> Artifact:
        """The standard network."""
        return standard_model(self.folder / "models")

    @cached_property
    def bodies(self) -> Bodies:
        """The standard chunks."""
        return Bodies.random(STEPS)

    def carry_kinds(self) -> list[str]:
        """Carry's servers that can run here; the others get a note."""
        return self.available([f"carry-{name}" for name in self.options.runtimes])

    def available(self, kinds: Sequence[str]) -> list[str]:
        """Those that can run here; the others get a note."""
        for kind in kinds:
            if not is_installed(kind):
                self.note(f"{kind} is left out: its runtime is not installed")
        return [kind for kind in kinds if is_installed(kind)]

    def note(self, text: str) -> None:
        """Keep and show a remark, once."""
        if text not in self.results.notes:
            self.results.notes.append(text)
            self.say(text)

    def start(self, context: AbstractContextManager[Any]) -> Any:
        """Enter a context, which is left with the scope."""
        return self.scope.enter_context(context)

    def start_server(
        self,
        kind: str,
        artifact: Artifact | None = None,
        *,
        beside: Server | None = None,
        cores: Cores | None = None,
        models: Path | None = None,
        workers: int = 1,
        reply_bytes: int = 1800,
        environment: Mapping[str, str] | None = None,
        name: str | None = None,
        checkout: Path = REPOSITORY,
    ) -> Server:
        """A ready server at rest: `asgi`, `fastapi`, `naive`, `competent`, or `carry-RUNTIME`.

        Args:
            beside: a server with which it shares the store and the generator.
            cores: of the server, and of its store and generator; by default those of the run.
            models: a folder of models that Carry serves, instead of the one.
            workers: of Carry.
            reply_bytes: of the floors' fixed reply.
            environment: further variables, for Carry's other settings.
            checkout: whose code it runs, on this one's packages.

        Raises:
            CannotStartError
        """
        self.say(f"starting {name or kind}")
        artifact, cores, port = artifact or self.artifact, cores or self.cores, free_port()
        if beside is None:
            store = self.start(real_server("valkey", prepare=pin_child(cores.others)))
            driver = self.start(helper_process(cores.others))
        else:
            store, driver = beside.store, beside.driver
        if kind.startswith("carry-"):
            command = carry_command(models or artifact.path, port, "--redis-url", store.url)
            command += ["--workers", str(workers)] if workers > 1 else []
            variables = {"CARRY_RUNTIME": kind.removeprefix("carry-"), **(environment or {})}
        else:
            module = f"echo_{kind}" if kind in FLOORS else kind
            command = [*UVICORN, "--port", str(port), f"tests.bench.baselines.{module}:app"]
            variables = {"BENCH_ARTIFACT": str(artifact.path), "BENCH_SOCKET": store.socket}
            variables |= {"BENCH_REPLY_BYTES": str(reply_bytes), "TF_CPP_MIN_LOG_LEVEL": "2"}
        log = self.folder / f"{kind}-{port}.log"
        process = self.start(running_process(command, cores.servers, log, variables, checkout))
        await_start(process, lambda: _is_ready(port), log)
        server = Server(name or kind, port, process.pid, artifact, store, driver)
        self._await_rest(server)
        return server

    def _await_rest(self, server: Server) -> None:
        """Wait until a server has finished its work beside requests, such as compiling."""
        ends_s = time.monotonic() + RESTS_WITHIN_S
        used_s, busy = read_usage(server.pid).cpu_s, True
        while busy:
            time.sleep(REST_S)
            before_s, used_s = used_s, read_usage(server.pid).cpu_s
            busy = used_s - before_s > REST_S * REST_SHARE
            if busy and time.monotonic() > ends_s:
                self.note(f"{server.name} was still busy by itself after {RESTS_WITHIN_S:g} s")
                return

    def prepare(
        self,
        server: Server,
        key: str,
        bodies: Bodies | None = None,
        *,
        tolerance: float = TOLERANCE,
        **options: Any,
    ) -> Load:
        """Make a server's streams at its generator, warm it up, and check some of its outputs.

        Returns:
            The warming load, with sampled replies.

        Raises:
            WrongOutputsError
        """
        bodies, has_positions = bodies or self.bodies, server.has_positions
        spec = make_traffic(
            server.artifact,
            bodies,
            key.replace("/", "-"),
            self.options.streams,
            positions=has_positions,
            sampled=int(has_positions and not options.get("items")),
            **options,
        )
        load = self.warm(server, key, spec)
        if spec.sampled:
            check_answers(server.artifact, spec, bodies.rows, load.sampled, tolerance)
        return load

    def warm(self, server: Server, key: str, spec: TrafficSpec) -> Load:
        """Make streams at a generator and load a server with them for a moment, unmeasured."""
        server.run(make_streams, key, spec)
        return server.run(run_closed, key, server.port, min(CONNECTIONS, spec.streams), WARM_S)

    def measure_rounds(self, rows: Sequence[Row]) -> None:
        """Every row in every round, each round beginning with the next one."""
        for turn in range(self.options.rounds):
            first = turn % len(rows)
            for row in (*rows[first:], *rows[:first]):
                self.measure_closed(row)

    def measure_closed(self, row: Row, share: float = 1.0) -> Load:
        """One more round of a row; `share` is of a round's usual seconds."""
        name, server, key, connections = row
        seconds = self.options.seconds * share
        return self.measure(
            name, server, partial(server.run, run_closed, key, server.port, connections, seconds)
        )

    def measure(self, row: str, server: Server, run: Callable[[], Load]) -> Load:
        """Run one load as one more round of a row."""
        before, store_before = read_usage(server.pid), read_usage(server.store.pid)
        load = run()
        after, store_after = read_usage(server.pid), read_usage(server.store.pid)
        if load.unsent:
            self.note(f"{row}: did not keep up, {load.unsent} requests were not sent in time")
        cpu_s, store_cpu_s = after.cpu_s - before.cpu_s, store_after.cpu_s - store_before.cpu_s
        sample = Sample.of(load, cpu_s, store_cpu_s, after.rss_bytes)
        self.results.add(row, sample)
        self.say(
            f"  {row}: {sample.chunks_per_s:,.0f} chunks/s, {sample.cpu_us_per_chunk:,.0f} us CPU,"
            f" p50 {sample.p50_ms:.2f} ms, p99 {sample.p99_ms:.2f} ms"
            f" (generator {sample.generator_cpu:.0%}, store {sample.store_cpu:.0%} of their core)"
        )
        return load
