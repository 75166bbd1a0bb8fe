"""A live service on a port of its own, with the oracle as its runtime and faults on demand."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
import uvloop

from models.artifact.artifact import Artifact, write_artifact
from service.pipeline.pipeline import Pipeline, PipelineLimits
from service.pipeline.served_model import ServedModel
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from service.transports.http.application import ApiLimits, create_api
from tests.load.faulty_service import FaultyService
from tests.support.models import small_spec
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import contracting_weights
from tests.support.pipelines import Counts, make_artifact
from tests.support.servers import RealServer, real_server, until

LIMITS = ApiLimits(max_chunk_steps=200)


@dataclass(frozen=True)
class Live:
    """A running service."""

    url: str
    faults: FaultyService
    models: Mapping[str, Artifact]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    """`small` takes events, `probe` rows only."""
    folder = tmp_path_factory.mktemp("models")
    spec = small_spec()
    small = write_artifact(folder / "small", spec, contracting_weights(spec, 3))
    return {"small": small, "probe": make_artifact(folder)}


@pytest.fixture(scope="session")
def running_service(artifacts: Mapping[str, Artifact]) -> Iterator[Live]:
    """One service for all tests, in a thread of its own."""
    # asyncio sends small writes at once only where the socket says that it is TCP
    listening = socket.socket(proto=socket.IPPROTO_TCP)
    with real_server("valkey") as store, listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        faults = FaultyService()
        started, stop = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as thread:
            serving = thread.submit(
                lambda: uvloop.run(_serve(store, artifacts, faults, listening, started, stop))
            )
            try:
                until(lambda: started.is_set() or serving.done(), "the service")
                if not started.is_set():
                    serving.result()
                yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", faults, artifacts)
            finally:
                stop.set()
            serving.result()


@pytest.fixture
def live(running_service: Live) -> Live:
    """The service, without faults until the test chooses one."""
    running_service.faults.choose(None)
    return running_service


async def _serve(
    server: RealServer,
    artifacts: Mapping[str, Artifact],
    faults: FaultyService,
    listening: socket.socket,
    started: threading.Event,
    stop: threading.Event,
) -> None:
    counts = Counts()
    store = RedisStore(StoreSettings(server.url, wait_s=5))
    pipeline = Pipeline(
        [ServedModel(artifact, NumpyRuntime(artifact)) for artifact in artifacts.values()],
        store,
        counts,
        limits=PipelineLimits(),
        now_ms=lambda: time.time_ns() // 1_000_000,
    )
    await store.start()
    await pipeline.start()
    try:
        faults.correct = create_api(pipeline, LIMITS, counts)
        config = uvicorn.Config(
            _application(faults), log_config=None, access_log=False, lifespan="off"
        )
        http = uvicorn.Server(config)
        serving = asyncio.create_task(http.serve(sockets=[listening]))
        started.set()
        await asyncio.to_thread(stop.wait)
        http.should_exit = True
        await serving
    finally:
        await pipeline.stop()
        await store.close()


def _application(faults: FaultyService) -> Any:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await faults(scope, receive, send)

    return application
