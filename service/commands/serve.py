"""`carry serve`: the parent process, which owns the port, the embedded store and the workers.

With one worker the service runs in this process; with several, a pool keeps that many child
processes on the one listening socket (`service.server.workers`). On Linux they are forks of this
process, which imports the application and the runtime but loads no model. The embedded store
belongs to the parent, so that all workers share it and it survives each of them.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from typing import Literal, NoReturn

import structlog
import uvicorn

from models.artifact.graphs import ONNXRUNTIME
from models.errors import ModelsError
from service.access.key_cache import requires_keys
from service.core.errors import CarryError
from service.core.settings import PREFIX
from service.engine.runtimes.loading import AUTO, RuntimeUnavailableError, import_runtime
from service.server.connections import CHECK_INTERVAL_S
from service.server.graceful_server import LATE_S, SIGHUP, Periods
from service.server.open_files import raise_open_files_limit
from service.server.worker_process import CAN_FORK, Fork, StartProcess, WorkerConfig, spawn
from service.server.workers import SingleWorker, WorkerPool, WorkersFailedError
from service.settings import Settings, SettingsError, service_links
from service.store.embedded import EmbeddedValkey
from service.store.redis.redis_store import RedisStore
from service.telemetry.logs import flush_logs
from service.telemetry.metrics import WorkerRestarts, share_metrics

log = structlog.get_logger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals for a graceful shutdown."""

OPTIONS = {
    "http": "carry serve --port ",
    "grpc": "carry serve --grpc-port ",
    "admin": "CARRY_ADMIN_PORT=",
}
"""How to set each port, followed by its number."""

GRPC_MODULES = ("grpc", "grpc_health")
TRACING_MODULES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")


WORKER_MODULES = (
    "service.app",
    "service.server.http_protocol",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
    "uvicorn.middleware.message_logger",
)
"""Modules that every worker imports, beside its runtime; few settings need others."""

START_ERRORS = (ModelsError, CarryError, RuntimeUnavailableError, SettingsError)
"""Errors of a worker's start that need no traceback."""


class CannotServeError(Exception):
    """The service cannot start; the message is one line for its operator."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP is a rolling restart, unless it is ignored.

    The workers get the effective settings through the environment.

    Raises:
        CannotServeError: the port is taken, the store is not usable, or no worker starts.
    """
    # Until the workers or uvicorn install their own handlers. SystemExit unwinds the stack, which
    # stops the embedded store.
    for number in _stop_signals():
        signal.signal(number, _exit)
    if links := service_links(os.environ):
        log.info("service_links_ignored", variables=links)
    raise_open_files_limit()
    check_packages(settings)
    with ExitStack() as stack:
        listener = stack.enter_context(bind_port(settings.http.host, settings.http.port))
        log.info("port_bound", url=_url(listener), answers="when the models are ready")
        # the address itself: gRPC would listen on every address of a name, also on those that
        # `may_be_open` does not check
        settings = settings.changed(host=listener.getsockname()[0])
        if settings.v2.grpc_port is not None:
            port = stack.enter_context(
                _reserve_port(settings.http.host, settings.v2.grpc_port, "grpc")
            )
            settings = settings.changed(grpc_port=port)
        if settings.http.admin_port is not None:
            host = settings.http.admin_host or settings.http.host
            port = stack.enter_context(_reserve_port(host, settings.http.admin_port, "admin"))
            settings = settings.changed(admin_port=port)
        fork = Fork()
        if settings.store.redis_url is None:
            check_embedded(settings)
            valkey = EmbeddedValkey(
                settings.store.data_dir, fsync=settings.store.durability == "fsync"
            )
            stack.callback(valkey.stop)
            valkey.start()
            fork = Fork(valkey.without_thread)
            settings = settings.changed(redis_url=valkey.url)
        if settings.processes.workers > 1:
            share_metrics(stack.enter_context(tempfile.TemporaryDirectory(prefix="carry-metrics-")))
        os.environ.update(settings.environment())
        if asyncio.run(_requires_keys(settings)) or not may_be_open(settings, settings.http.host):
            # a worker that starts later requires them too, even if the keys are lost
            os.environ[f"{PREFIX}REQUIRE_KEYS"] = "True"

        def exit_process() -> NoReturn:
            """Exit the process without waiting for threads that are still compiling a network."""
            _ignore_stop_signals()
            stack.close()
            flush_logs()
            os._exit(0)

        _run(settings, listener, exit_process, fork)


def _run(
    settings: Settings,
    listener: socket.socket,
    exit_process: Callable[[], NoReturn],
    fork: Fork,
) -> None:
    config = uvicorn.Config(
        "service.app:create_app",
        factory=True,
        workers=settings.processes.workers,
        log_config=None,
        http="service.server.http_protocol:HttpProtocol",
        # named, so that a missing uvloop is an error and does not halve the rate
        loop="auto" if sys.platform == "win32" else "uvloop",
        ws="none",
        # nothing depends on a client's address
        proxy_headers=False,
        access_log=False,
        server_header=False,
        date_header=False,
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(settings.processes.drain_s)),
    )
    worker = WorkerConfig(config, listener, periods_of(settings), START_ERRORS)
    size, fill = settings.processes.workers, settings.processes.worker_fill
    if size == 1:
        SingleWorker(worker, exit_process).serve_and_exit()
        return
    start: StartProcess = spawn
    if CAN_FORK:
        import_for_workers(settings.models.runtime)
        start = fork
    restarts = WorkerRestarts()
    try:
        WorkerPool(worker, start, size=size, fill=fill, on_restart=restarts.count).run()
    except WorkersFailedError as error:
        raise CannotServeError(f"no worker could be started: {error}") from error


def periods_of(settings: Settings) -> Periods:
    """The periods of a worker's graceful shutdown."""
    return Periods(
        lame_duck_s=settings.processes.lame_duck_s,
        # an idle connection is closed at the second check after its time
        retire_s=settings.connections.keep_alive_s + 2 * CHECK_INTERVAL_S,
        drain_s=settings.processes.drain_s + LATE_S,
    )


def import_for_workers(runtime: str) -> None:
    """Import what the workers need, before they are forked from this process."""
    for name in WORKER_MODULES:
        import_module(name)
    # a worker reports a runtime that is missing
    with suppress(ModuleNotFoundError):
        import_runtime(ONNXRUNTIME if runtime == AUTO else runtime)
    # a collection in a worker would write to the objects that it visits, and so copy their memory
    gc.freeze()


def _stop_signals() -> list[signal.Signals]:
    """The signals that stop the service; without SIGHUP if it is ignored, as under `nohup`."""
    if SIGHUP is None or signal.getsignal(SIGHUP) is signal.SIG_IGN:
        return [*STOP_SIGNALS]
    return [*STOP_SIGNALS, SIGHUP]


def _exit(number: int, frame: object) -> None:
    """Exit by unwinding the stack; further signals are ignored."""
    _ignore_stop_signals()
    raise SystemExit(0)


def _ignore_stop_signals() -> None:
    for number in _stop_signals():
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def bind_port(host: str, port: int, option: str = OPTIONS["http"]) -> Iterator[socket.socket]:
    """The listening socket, bound before models are loaded; errors name the port's option."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise _listen_error(error, host, port, option) from error
        listener.set_inheritable(True)
        yield listener


@contextmanager
def _reserve_port(host: str, port: int, kind: Literal["grpc", "admin"]) -> Iterator[int]:
    """Reserve a second port, and yield it: each worker listens on it by itself (SO_REUSEPORT).

    Without SO_REUSEPORT a port that another service listens on is an error, as it should be; so it
    is bound in that way first.
    """
    option = OPTIONS[kind]
    with bind_port(host, port, option) as unused:
        address = unused.getsockname()[:2]
    with socket.socket(unused.family, socket.SOCK_STREAM) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            reserved.bind(address)
        except OSError as error:
            # this service's own HTTP port, which is bound and not yet listened on
            raise _listen_error(error, host, address[1], option) from error
        log.info(f"{kind}_port_bound", host=address[0], port=address[1])
        yield address[1]


def check_packages(settings: Settings) -> None:
    """Check that the packages of gRPC and of traces are installed, if the settings need them.

    Raises:
        CannotServeError: they are not.
    """
    needed = {
        "CARRY_GRPC_PORT": (settings.v2.grpc_port is not None, GRPC_MODULES, "grpc"),
        "CARRY_TRACING": (settings.telemetry.tracing, TRACING_MODULES, "otel"),
    }
    for variable, (is_needed, modules, extra) in needed.items():
        try:
            is_installed = not is_needed or all(map(importlib.util.find_spec, modules))
        except ModuleNotFoundError:
            is_installed = False
        if not is_installed:
            raise CannotServeError(
                f"{variable} needs packages that are not installed: "
                f"pip install ./client '.[{extra}]'"
            )


def check_embedded(settings: Settings) -> None:
    """Check that the embedded Valkey can be as durable as the settings require.

    Raises:
        CannotServeError: it has no replicas.
    """
    if settings.store.durability == "replicated":
        raise CannotServeError(
            "CARRY_DURABILITY=replicated needs a store that has replicas: set "
            "CARRY_REDIS_URL, or CARRY_DURABILITY=fsync for the service's own Valkey"
        )


def _listen_error(error: OSError, host: str, port: int, option: str) -> CannotServeError:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        setting = "CARRY_ADMIN_HOST" if option == OPTIONS["admin"] else "CARRY_HOST"
        remedy = f"set {setting} to an address of this machine, for example 127.0.0.1"
    else:
        remedy = f"choose another port, for example `{option}{port + 1}`"
        if option == OPTIONS["http"]:
            remedy += f" or `make run PORT={port + 1}`"
    return CannotServeError(f"cannot listen on {host}:{port} ({error.strerror}); {remedy}")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _requires_keys(settings: Settings) -> bool:
    """Whether requests need an access key; fails the start, in one line, on a store that the
    workers would reject."""
    store = RedisStore(settings.store)
    try:
        await store.start()
        stored = await store.keys.read(None) or (b"", {})
    finally:
        await store.close()
    required = requires_keys(settings.access.require_keys, stored)
    if required and not stored[1]:
        log.warning(
            "no_access_key",
            reason="every request is rejected: make a key with `carry keys create NAME`, or set "
            "CARRY_REQUIRE_KEYS=false to answer requests without one",
        )
    return required


def may_be_open(settings: Settings, host: str) -> bool:
    """Whether a service without access keys may answer requests without one.

    Args:
        host: the address that it listens on.

    Raises:
        CannotServeError: it would be open to others.
    """
    if settings.access.require_keys:
        return False
    if ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        return True
    if not settings.access.insecure:
        raise CannotServeError(
            f"{host} is reachable from other machines, and there is no access key: whoever reaches "
            "it could read and delete every stream. Make one with `carry keys create NAME`, or set "
            "CARRY_REQUIRE_KEYS=1 to make it later; or, behind something that checks access, set "
            "CARRY_INSECURE=1"
        )
    log.warning(
        "insecure",
        host=host,
        reason="there is no access key: whoever reaches the port may do everything",
    )
    return True
