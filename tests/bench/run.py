"""One run of the benchmark: its options, the servers and stores it starts, and its rounds.

Carry runs as `carry serve` with its default settings; set are only the runtime, the models, the
port and the store's address. The store is a Valkey with the options of the service's embedded one
(append-only file, written `everysec`, unix socket), on a core of its own.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import redis

from models.artifact.artifact import Artifact
from service.store.embedded.valkey_process import server_arguments, server_binary
from tests.bench.generator import HOST, Driver, Load
from tests.bench.processes import await_start, running_process
from tests.bench.results import Results, Sample
from tests.bench.traffic import TrafficSpec
from tests.bench.workloads import STEPS, TOLERANCE, Bodies, check_answers, standard_model
from tests.support.machine import REPOSITORY, Cores, Usage, read_usage
from tests.support.servers import free_port

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


@dataclass(frozen=True, slots=True)
class Options:
    """How long and how much is measured.

    Attributes:
        rounds: of every row; medians and spreads are over them.
        seconds: of one closed-loop round; the others follow from it.
        streams: in the standard workload.
        many_streams: in the comparison of few and many.
        runtimes: of Carry.
        baselines: the servers that Carry is compared with.
        beside: another checkout of Carry to compare with.
    """

    rounds: int = 3
    seconds: float = 1.0
    streams: int = 1000
    many_streams: int = 100_000
    runtimes: tuple[str, ...] = RUNTIMES
    baselines: tuple[str, ...] = ("asgi", "fastapi", "naive", "competent")
    beside: Path | None = None


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; `has_positions`: whether its replies give the position."""

    name: str
    port: int
    pid: int
    has_positions: bool = True

    def usage(self) -> Usage:
        """Processor time so far and memory of all its processes."""
        return read_usage(self.pid)


@dataclass(frozen=True, slots=True)
class Store:
    """A running Valkey."""

    socket: str
    pid: int

    def client(self) -> redis.Redis:
        """A plain client."""
        return redis.Redis(unix_socket_path=self.socket, protocol=2, socket_timeout=120)

    def usage(self) -> Usage:
        """Processor time so far and memory."""
        return read_usage(self.pid)


def find_missing(kind: str, artifact: Artifact) -> str | None:
    """Why a server of this kind cannot run here, or None."""
    packages = {"competent": "onnxruntime", "naive": "tensorflow"}
    package = packages.get(kind, kind.removeprefix("carry-"))
    if package in RUNTIMES and importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    if package == "onnxruntime" and not (artifact.path / "graph.onnx").exists():
        return "the artifact has no graph.onnx"
    return None


@contextmanager
def running_store(cores: Sequence[int]) -> Iterator[Store]:
    """A store of its own.

    Raises:
        CannotStartError
    """
    folder = Path(tempfile.mkdtemp(prefix="carry-bench-"))
    path = str(folder / "store.sock")
    command = [str(server_binary()), *server_arguments(folder, path, 0)]
    try:
        with running_process(command, cores, folder / "out.log") as process:
            store = Store(path, process.pid)
            await_start(process, lambda: _is_pinged(store), folder / "valkey.log")
            yield store
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_pinged(store: Store) -> bool:
    try:
        with store.client() as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def carry_command(models: Path, port: int, *options: str) -> list[str]:
    """`carry serve` on one model, or a folder of them."""
    return [
        *(sys.executable, "-m", "service.cli", "serve", "--port", str(port)),
        *("--models", str(models), *options),
    ]


def _is_ready(port: int, path: str | None) -> bool:
    try:
        if path is None:
            socket.create_connection((HOST, port), 1).close()
        else:
            urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=5).close()
    except OSError:
        return False
    return True


@dataclass
class Bench:
    """One run; `say` shows progress."""

    options: Options
    cores: Cores
    folder: Path
    results: Results
    say: Callable[[str], None] = print
    _said: set[str] = field(default_factory=set)

    @cached_property
    def artifact(self) -> Artifact:
        """The standard network."""
        return standard_model(self.folder / "models")

    @cached_property
    def bodies(self) -> Bodies:
        """The standard chunks."""
        return Bodies.random(STEPS)

    def carry_kinds(self, artifact: Artifact | None = None) -> list[str]:
        """Carry's servers that can run here; the others get a note."""
        return self.available([f"carry-{name}" for name in self.options.runtimes], artifact)

    def available(self, kinds: Sequence[str], artifact: Artifact | None = None) -> list[str]:
        """Those that can run here; the others get a note."""
        reasons = {kind: find_missing(kind, artifact or self.artifact) for kind in kinds}
        for kind, reason in reasons.items():
            if reason is not None:
                self.note(f"{kind} is left out: {reason}")
        return [kind for kind, reason in reasons.items() if reason is None]

    def note(self, text: str) -> None:
        """Keep and show a remark, once."""
        if text not in self._said:
            self._said.add(text)
            self.results.notes.append(text)
            self.say(text)

    def store(self, cores: Sequence[int] | None = None) -> Any:
        """A store beside the generator, or on other cores; a context manager."""
        return running_store(self.cores.others if cores is None else cores)

    def driver(self, cores: Sequence[int] | None = None) -> Driver:
        """A generator beside the store, or on other cores; a context manager."""
        return Driver(self.cores.others if cores is None else cores)

    @contextmanager
    def carry(
        self, kind: str, artifact: Artifact | None = None, **options: Any
    ) -> Iterator[tuple[Store, Driver, Server]]:
        """One of Carry's servers with a store and a generator of its own; see `server`."""
        with (
            self.store() as store,
            self.driver() as driver,
            self.server(kind, store, artifact, **options) as server,
        ):
            yield store, driver, server

    @contextmanager
    def server(
        self,
        kind: str,
        store: Store,
        artifact: Artifact | None = None,
        *,
        cores: Sequence[int] | None = None,
        models: Path | None = None,
        workers: int = 1,
        reply_bytes: int = 1800,
        environment: Mapping[str, str] | None = None,
        name: str | None = None,
        checkout: Path = REPOSITORY,
    ) -> Iterator[Server]:
        """A ready server at rest: `asgi`, `fastapi`, `naive`, `competent`, or `carry-RUNTIME`.

        Args:
            models: a folder of models that Carry serves, instead of the one.
            workers: of Carry.
            reply_bytes: of the floors' fixed reply.
            environment: further variables, for Carry's other settings.
            checkout: whose code it runs, on this one's packages.

        Raises:
            CannotStartError
        """
        self.say(f"starting {name or kind}")
        path, port = (artifact or self.artifact).path, free_port()
        is_carry, more = kind.startswith("carry-"), dict(environment or {})
        if is_carry:
            url = f"unix://{store.socket}"
            command = carry_command(models or path, port, "--redis-url", url)
            command += ["--workers", str(workers)] if workers > 1 else []
            more["CARRY_RUNTIME"] = kind.removeprefix("carry-")
        else:
            module = f"echo_{kind}" if kind in FLOORS else kind
            command = [*UVICORN, "--port", str(port), f"tests.bench.baselines.{module}:app"]
            more |= {"BENCH_ARTIFACT": str(path), "BENCH_SOCKET": store.socket}
            more |= {"BENCH_REPLY_BYTES": str(reply_bytes), "TF_CPP_MIN_LOG_LEVEL": "2"}
        log = self.folder / f"{kind}-{port}.log"
        where = self.cores.servers if cores is None else cores
        with running_process(command, where, log, more, checkout) as process:
            health = "/health/ready" if is_carry else None
            await_start(process, lambda: _is_ready(port, health), log)
            server = Server(name or kind, port, process.pid, kind not in FLOORS)
            self._await_rest(server)
            yield server

    def _await_rest(self, server: Server) -> None:
        """Wait until a server has finished its work beside requests, such as compiling."""
        ends_s = time.monotonic() + RESTS_WITHIN_S
        used_s, busy = server.usage().cpu_s, True
        while busy:
            time.sleep(REST_S)
            before_s, used_s = used_s, server.usage().cpu_s
            busy = used_s - before_s > REST_S * REST_SHARE
            if busy and time.monotonic() > ends_s:
                self.note(f"{server.name} was still busy by itself after {RESTS_WITHIN_S:g} s")
                return

    def measured(self, row: str, server: Server, store: Store, run: Callable[[], Load]) -> Load:
        """Run one load as one more round of a row."""
        before, store_before = server.usage(), store.usage()
        load = run()
        after, store_after = server.usage(), store.usage()
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

    def closed(
        self,
        row: str,
        driver: Driver,
        key: str,
        server: Server,
        store: Store,
        connections: int = CONNECTIONS,
        share: float = 1.0,
    ) -> Load:
        """One closed-loop round of a row, or a `share` of the time of one."""
        seconds = self.options.seconds * share
        return self.measured(
            row, server, store, lambda: driver.closed(key, server.port, connections, seconds)
        )

    def prepare(
        self,
        driver: Driver,
        key: str,
        server: Server,
        bodies: Bodies,
        *,
        artifact: Artifact | None = None,
        tolerance: float = TOLERANCE,
        **options: Any,
    ) -> Load:
        """Make a server's streams at a generator, warm it up, and check some of its outputs.

        Returns:
            The warming load, with sampled replies.

        Raises:
            WrongOutputsError
        """
        spec = bodies.traffic(
            key.replace("/", "-"),
            self.options.streams,
            positions=server.has_positions,
            sampled=0 if options.get("items") or not server.has_positions else 1,
            **options,
        )
        load = self.warm(driver, key, server, spec)
        if spec.sampled:
            check_answers(artifact or self.artifact, spec, bodies.rows, load.sampled, tolerance)
        return load

    def warm(self, driver: Driver, key: str, server: Server, spec: TrafficSpec) -> Load:
        """Make streams at a generator and load a server with them for a moment, unmeasured."""
        driver.traffic(key, spec)
        return driver.closed(key, server.port, min(CONNECTIONS, spec.streams), WARM_S)
