"""The servers and stores under test: how each is started, waited for, measured and ended.

Carry runs as `carry serve` with its default settings; set are only the runtime, the models,
the port and where the store is. The store runs beside it with the options of the service's
own embedded one (append-only file, written `everysec`, unix socket), so that it can be given
another core. Each process is ended by its own id, and with this one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from models.artifact.artifact import Artifact
from service.store.embedded.valkey_process import server_arguments, server_binary
from tests.bench.generator import HOST
from tests.support.machine import REPOSITORY, Usage, pin_child, read_usage, wait_until
from tests.support.servers import free_port

STARTS_WITHIN_S = 180.0
ENDS_WITHIN_S = 60.0
RUNTIMES = {"tensorflow": "tensorflow", "onnxruntime": "onnxruntime"}
"""Carry's runtimes, each with the package that it needs."""

FLOORS = {"asgi": "echo_asgi", "fastapi": "echo_fastapi"}
"""The servers that do nothing, each with its module."""

UVICORN = (
    *(sys.executable, "-m", "uvicorn", "--log-level", "warning", "--no-access-log"),
    # The naive service blocks its loop for seconds, and would lose its waiting connections.
    *("--no-server-header", "--no-date-header", "--timeout-keep-alive", "60"),
)


class CannotStartError(Exception):
    """A server did not start; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        name: as tables show it.
        positions: whether its replies tell the position.
    """

    name: str
    port: int
    pid: int
    positions: bool = True

    def usage(self) -> Usage:
        """What it used so far, with all its processes."""
        return read_usage(self.pid)


@dataclass(frozen=True, slots=True)
class Store:
    """A running Redis or Valkey server."""

    socket: str
    pid: int

    @property
    def url(self) -> str:
        """As Carry's setting has it."""
        return f"unix://{self.socket}"

    def client(self) -> redis.Redis:
        """A plain client."""
        return redis.Redis(unix_socket_path=self.socket, protocol=2, socket_timeout=120)

    def usage(self) -> Usage:
        """What it used so far."""
        return read_usage(self.pid)


def missing(kind: str, artifact: Artifact) -> str | None:
    """Why a server of this kind cannot run here, or None."""
    if kind in ("carry-onnxruntime", "competent"):
        if importlib.util.find_spec("onnxruntime") is None:
            return "the package onnxruntime is not installed"
        if not (artifact.path / "graph.onnx").exists():
            return "the artifact has no graph.onnx"
    if kind in ("carry-tensorflow", "naive") and importlib.util.find_spec("tensorflow") is None:
        return "the package tensorflow is not installed"
    return None


@contextmanager
def running_store(kind: str, cores: Sequence[int]) -> Iterator[Store]:
    """A store of its own folder: `valkey`, the embedded one, or `redis`, from the PATH.

    Raises:
        CannotStartError
    """
    binary = str(server_binary()) if kind == "valkey" else shutil.which("redis-server")
    if binary is None:
        raise CannotStartError("redis-server is not on the PATH")
    folder = Path(tempfile.mkdtemp(prefix="carry-bench-"))
    path = str(folder / "store.sock")
    try:
        with _process(
            [binary, *server_arguments(folder, path, 0)], cores, folder / "out.log", {}
        ) as process:
            client = redis.Redis(unix_socket_path=path)
            _await(process, lambda: _pongs(client), folder / "valkey.log", kind)
            client.close()
            yield Store(path, process.pid)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pongs(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@contextmanager
def running_server(
    kind: str,
    artifact: Artifact,
    store: Store,
    cores: Sequence[int],
    folder: Path,
    *,
    models: Path | None = None,
    workers: int = 1,
    reply_bytes: int = 1800,
    environment: Mapping[str, str] | None = None,
    name: str | None = None,
    checkout: Path = REPOSITORY,
) -> Iterator[Server]:
    """A ready server: `asgi`, `fastapi`, `naive`, `competent`, or `carry-RUNTIME`.

    Args:
        models: a folder of models that Carry serves, instead of the one.
        workers: of Carry.
        reply_bytes: of the floors' fixed reply.
        environment: further variables, for Carry's other settings.
        checkout: whose code it runs, on this one's packages.

    Raises:
        CannotStartError
    """
    port = free_port()
    log = folder / f"{kind}-{port}.log"
    more = dict(environment or {})
    if kind.startswith("carry-"):
        command = carry_command(models or artifact.path, port, "--redis-url", store.url)
        if workers > 1:
            command += ["--workers", str(workers)]
        more["CARRY_RUNTIME"] = kind.removeprefix("carry-")
    else:
        module = FLOORS.get(kind, kind)
        command = [*UVICORN, "--port", str(port), f"tests.bench.baselines.{module}:app"]
        more |= {
            "BENCH_ARTIFACT": str(artifact.path),
            "BENCH_SOCKET": store.socket,
            "BENCH_REPLY_BYTES": str(reply_bytes),
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
    with _process(command, cores, log, more, checkout) as process:
        path = "/health/ready" if kind.startswith("carry-") else None
        _await(process, lambda: _answers(port, path), log, kind)
        yield Server(name or kind, port, process.pid, kind not in FLOORS)


def carry_command(models: Path, port: int, *options: str) -> list[str]:
    """`carry serve` on one model, or a folder of them."""
    return [
        *(sys.executable, "-m", "service.cli", "serve", "--port", str(port)),
        *("--models", str(models), *options),
    ]


@contextmanager
def _process(
    command: list[str],
    cores: Sequence[int],
    log: Path,
    more: Mapping[str, str],
    folder: Path = REPOSITORY,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a plain environment, ended with the block."""
    inherited = {name: value for name, value in os.environ.items() if name[:6] != "CARRY_"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**inherited, **more},
            preexec_fn=pin_child(cores),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(process: subprocess.Popen[bytes], condition: object, log: Path, what: str) -> None:
    assert callable(condition)
    try:
        wait_until(lambda: process.poll() is not None or condition(), what, STARTS_WITHIN_S)
    except TimeoutError as error:
        raise CannotStartError(f"{error}:\n{_tail(log)}") from error
    if process.poll() is not None:
        raise CannotStartError(f"{what} ended while it started:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:] if log.exists() else ""


def _answers(port: int, path: str | None) -> bool:
    try:
        if path is None:
            socket.create_connection((HOST, port), 1).close()
        else:
            urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=5).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class ColdStart:
    """A start from nothing to the first correct answer.

    Attributes:
        seconds: from the process's start to the whole first reply.
        reply: the first reply's body.
        rss_bytes: of the service's processes after it, the embedded store apart.
    """

    seconds: float
    reply: bytes
    rss_bytes: int


def cold_start(
    runtime: str, artifact: Artifact, cores: Sequence[int], folder: Path, request: bytes
) -> ColdStart:
    """Start `carry serve` with everything its own, the embedded store included, and ask once.

    Raises:
        CannotStartError: no answer with status 200 came.
    """
    port = free_port()
    log = folder / f"cold-{port}.log"
    command = carry_command(artifact.path, port, "--data-dir", str(folder / f"data-{port}"))
    began_s = time.perf_counter()
    with _process(command, cores, log, {"CARRY_RUNTIME": runtime}) as process:
        try:
            connection = wait_until(lambda: _connected(port), "a port", STARTS_WITHIN_S)
        except TimeoutError as error:
            raise CannotStartError(f"{error}:\n{_tail(log)}") from error
        with connection:
            # The port is bound before anything slow begins: the answer comes when it can.
            connection.settimeout(STARTS_WITHIN_S)
            connection.sendall(request)
            reply = b""
            while data := connection.recv(1 << 16):
                reply += data
        seconds = time.perf_counter() - began_s
        if not reply.startswith(b"HTTP/1.1 200 "):
            raise CannotStartError(f"expected status 200, got {reply[:300]!r}\n{_tail(log)}")
        return ColdStart(
            seconds, reply.partition(b"\r\n\r\n")[2], read_usage(process.pid).rss_bytes
        )


def _connected(port: int) -> socket.socket | None:
    try:
        return socket.create_connection((HOST, port), 1)
    except OSError:
        return None
