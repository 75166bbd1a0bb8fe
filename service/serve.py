"""`carry serve`: the parent process, which owns the port, the embedded store and the workers.

With one worker the service runs in this process; with several, uvicorn's supervisor keeps
that many child processes on the one listening socket and starts a new one where one died.
The embedded store belongs to the parent, so that all workers share it and none takes it along.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import structlog
import uvicorn
from uvicorn.supervisors import Multiprocess

from service.api.protocol import ExpressProtocol
from service.app import store_settings
from service.settings import PREFIX, Settings, service_links
from service.state.embedded import EmbeddedValkey
from service.state.open import open_store

log = structlog.get_logger(__name__)

STOPS = (signal.SIGTERM, signal.SIGINT)
"""What ends the service in good order."""

WORKER_ANSWERS_S = 30
"""A worker that does not answer its supervisor for this long is taken for hung: long enough
for compiling a large network, which holds the interpreter."""


class CannotServeError(Exception):
    """The service cannot start; the message is one line for the person who started it."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    The effective settings are handed to the workers through the environment.

    Raises:
        CannotServeError: the port is taken, or the store is not usable.
    """
    # uvicorn handles both while it runs, then raises them anew: this is where they arrive, and
    # before it runs. Leaving by an exception stops the embedded store on the way out.
    for number in STOPS:
        signal.signal(number, _leave)
    if links := service_links(os.environ):
        log.info("service_links_ignored", variables=links)
    with ExitStack() as stack:
        listener = stack.enter_context(_listening(settings.host, settings.port))
        if settings.redis_url is None:
            if settings.durability == "replicated":
                raise CannotServeError(
                    "CARRY_DURABILITY=replicated needs a store that has replicas: set "
                    "CARRY_REDIS_URL, or CARRY_DURABILITY=fsync for the service's own Valkey"
                )
            valkey = EmbeddedValkey(settings.data_dir, fsync=settings.durability == "fsync")
            stack.callback(valkey.stop)
            valkey.start()
            settings = settings.model_copy(update={"redis_url": valkey.url})
        if settings.workers > 1:
            metrics_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="carry-metrics-"))
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics_dir
        os.environ.update(_environment(settings))
        asyncio.run(_check_store(settings))
        _run(settings, listener)


def _run(settings: Settings, listener: socket.socket) -> None:
    config = uvicorn.Config(
        "service.app:create_app",
        factory=True,
        workers=settings.workers,
        log_config=None,
        http=ExpressProtocol,
        # named, so that a missing one is an error and not a service at half the speed
        loop="auto" if sys.platform == "win32" else "uvloop",
        ws="none",
        # nothing is told or decided by a client's address
        proxy_headers=False,
        access_log=False,
        server_header=False,
        date_header=False,
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        timeout_worker_healthcheck=WORKER_ANSWERS_S,
    )
    if settings.workers > 1:
        Multiprocess(config, sockets=[listener]).run()
    else:
        uvicorn.Server(config).run(sockets=[listener])


def _leave(number: int, frame: object) -> None:
    """Their handler: leave in good order, which another of them does not break off."""
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(0)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """The listening socket, bound before anything slow begins."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise CannotServeError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another port, for "
                f"example `carry serve --port {port + 1}` or `make run PORT={port + 1}`"
            ) from error
        listener.set_inheritable(True)
        log.info("port_bound", url=_url(listener), answers="when the models are ready")
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _check_store(settings: Settings) -> None:
    """Refuse to start on a store that the workers would refuse, in one line."""
    store = open_store(store_settings(settings))
    try:
        await store.start()
    finally:
        await store.close()


def _environment(settings: Settings) -> dict[str, str]:
    """The settings as the workers read them: what was set by a flag or here, by variable."""
    return {
        PREFIX + name.upper(): str(getattr(settings, name)) for name in settings.model_fields_set
    }
