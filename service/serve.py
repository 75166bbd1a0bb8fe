"""`carry serve`: the parent process, which owns the port, the embedded store and the workers.

With one worker the service runs in this process; with several, a pool keeps that many child
processes on the one listening socket (`service.server.workers`). On Linux they are forks of this
process, which imports the application and the runtime but loads no model. The embedded store
belongs to the parent, so that all workers share it and it survives each of them.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import structlog
import uvicorn

from models.artifact.graphs import ONNXRUNTIME
from models.errors import ModelsError
from service.access.key_cache import requires_keys
from service.core.errors import CarryError, OperatorError
from service.core.settings import PREFIX
from service.engine.runtimes.loading import AUTO, import_runtime
from service.server.connections import raise_open_files_limit
from service.server.worker import CAN_FORK, WithoutThreads, WorkerConfig
from service.server.workers import SingleWorker, WorkerPool, WorkersFailedError
from service.settings import Settings, service_links
from service.start_checks import (
    CannotServeError,
    bind_port,
    check_embedded,
    check_packages,
    may_be_open,
    periods_of,
    reserve_port,
)
from service.store.embedded import EmbeddedValkey
from service.store.redis.redis_store import RedisStore
from service.telemetry.logs import flush_logs
from service.telemetry.metrics import WorkerRestarts, share_metrics

log = structlog.get_logger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals for a graceful shutdown."""

WORKER_MODULES = (
    "service.app",
    "service.server.http_protocol",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
    "uvicorn.middleware.message_logger",
)
"""Modules that every worker imports, beside its runtime; few settings need others."""

DEMO_REQUEST = """\
curl -s URL/v1/models/flights/streams/demo/chunks -H 'content-type: application/json' \
-d '{"events": [{"departed": "2013-01-01T05:17:00-05:00", "dep_delay": 2, "scheduled": "05:10", \
"origin": "EWR", "carrier": "UA", "destination": "IAH", "distance": 1400}]}'"""
"""One line of a shell: it sends the next event of a stream."""

START_ERRORS = (ModelsError, CarryError, OperatorError)
"""Errors of a worker's start that need no traceback."""


def serve(settings: Settings, *, demo: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP is a rolling restart, unless it is ignored.

    The workers get the effective settings through the environment.

    Args:
        demo: print a request to the example `flights`, and keep the embedded store in a temporary
            folder unless the settings have another one.

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
        if demo:
            listener.listen()  # a request that is sent at once waits until the models are ready
            print(DEMO_REQUEST.replace("URL", _url(listener)), flush=True)
            if "data_dir" not in settings.origins:
                folder = tempfile.TemporaryDirectory(prefix="carry-", ignore_cleanup_errors=True)
                settings = settings.changed(data_dir=Path(stack.enter_context(folder)))
        # the address instead of a name: gRPC would listen on every address of the name, also on
        # those that `may_be_open` does not check
        settings = settings.changed(host=listener.getsockname()[0])
        if settings.v2.grpc_port is not None:
            port = reserve_port(settings.http.host, settings.v2.grpc_port, "grpc")
            settings = settings.changed(grpc_port=stack.enter_context(port))
        if settings.http.admin_port is not None:
            host = settings.http.admin_host or settings.http.host
            port = reserve_port(host, settings.http.admin_port, "admin")
            settings = settings.changed(admin_port=stack.enter_context(port))
        without_threads: WithoutThreads = nullcontext
        if settings.store.redis_url is None:
            check_embedded(settings)
            valkey = EmbeddedValkey(
                settings.store.data_dir, fsync=settings.store.durability == "fsync"
            )
            stack.callback(valkey.stop)
            valkey.start()
            without_threads = valkey.without_thread
            settings = settings.changed(redis_url=valkey.url)
        if settings.processes.workers > 1:
            share_metrics(stack.enter_context(tempfile.TemporaryDirectory(prefix="carry-metrics-")))
        os.environ.update(settings.environment())
        requires_keys = asyncio.run(store_requires_keys(settings))
        if requires_keys or not may_be_open(settings, settings.http.host):
            # a worker that starts later requires them too, even if the keys are lost
            os.environ[f"{PREFIX}REQUIRE_KEYS"] = "True"

        def exit_process() -> NoReturn:
            """Exit the process without waiting for threads that are still compiling a network."""
            _ignore_stop_signals()
            stack.close()
            flush_logs()
            os._exit(0)

        _run(settings, listener, exit_process, without_threads)


def _run(
    settings: Settings,
    listener: socket.socket,
    exit_process: Callable[[], NoReturn],
    without_threads: WithoutThreads,
) -> None:
    config = uvicorn.Config(
        "service.app:create_app",
        factory=True,
        workers=settings.processes.workers,
        log_config=None,
        http="service.server.http_protocol:HttpProtocol",
        # named, so that a missing uvloop is an error and does not halve the rate
        loop="uvloop",
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
    if CAN_FORK:
        import_for_workers(settings.models.runtime)
        worker = worker._replace(without_threads=without_threads)
    restarts = WorkerRestarts()
    try:
        WorkerPool(worker, size=size, fill=fill, on_restart=restarts.count).run()
    except WorkersFailedError as error:
        raise CannotServeError(f"no worker could be started: {error}") from error


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
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return [*STOP_SIGNALS]
    return [*STOP_SIGNALS, signal.SIGHUP]


def _exit(number: int, frame: object) -> None:
    """Exit by unwinding the stack; further signals are ignored."""
    _ignore_stop_signals()
    raise SystemExit(0)


def _ignore_stop_signals() -> None:
    for number in _stop_signals():
        signal.signal(number, signal.SIG_IGN)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def store_requires_keys(settings: Settings) -> bool:
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
