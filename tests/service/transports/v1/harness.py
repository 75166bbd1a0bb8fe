"""The real application over the real pipeline, with the oracle as runtime, on a unix socket."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
import ormsgpack
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from uvicorn.server import ServerState

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.access.key_cache import AccessKeys
from service.codec.settings import RequestSettings
from service.core.tracing import Tracer
from service.core.values import StreamKey
from service.pipeline.model_aliases import VersionLoader
from service.pipeline.pipeline import Pipeline
from service.pipeline.recorder import Audit, no_audit
from service.server.http_protocol import HttpProtocol
from service.server.interface import HTTP_STATE, HttpState
from service.server.settings import HttpSettings
from service.settings import Settings
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from service.telemetry.logs import RequestIds
from service.transports.v1.application import create_api
from service.transports.v1.fast_path import FastPath
from tests.service.transports.v1.faulty_store import FaultyStore, StoredStates
from tests.support.access import new_authorization
from tests.support.numpy_runtime import numpy_served
from tests.support.pipelines import UNBOUNDED, Counts
from tests.support.servers import RealServer

FAST_PATH = os.environ.get("CARRY_HTTP_FAST_PATH", "1") != "0"
"""`CARRY_HTTP_FAST_PATH=0 make test ARGS=tests/service/transports/v1` tests the slow path."""

JSON = {"content-type": "application/json"}
MSGPACK = {"content-type": "application/msgpack"}
NOW_MS = 1_700_000_000_000
ANY_HOST = HttpSettings(allowed_hosts="*")
LIMITS = RequestSettings(
    max_body_bytes=20_000, max_chunk_steps=20, max_predict_steps=30, max_items=5
)

EVENT_MS = 1_357_035_420_000
EVENT = {"load": 12.5, "at": "2013-01-01T05:17:00-05:00", "carrier": "UA", "heavy": True}
LATER = {
    "load": 7,
    "delay": -3.25,
    "at": EVENT_MS - 60_000,
    "carrier": "nobody knows",
    "gate": None,
    "heavy": False,
    "late": True,
}


@dataclass
class Harness:
    """One application and what lies behind it."""

    app: FastAPI
    client: httpx.AsyncClient
    pipeline: Pipeline
    store: FaultyStore
    counts: Counts
    models: Mapping[str, Artifact]
    clock: list[int]
    keys: AccessKeys

    async def key(self, **scope: Any) -> str:
        """The Authorization of a new access key, which the application knows."""
        authorization = await new_authorization(self.store.keys, **scope)
        await self.refresh_keys()
        return authorization

    async def refresh_keys(self) -> None:
        """Read the access keys again, as the service does twice a second."""
        await self.keys.refresh()

    async def chunk(
        self, body: Any, *, stream: str = "s", model: str = "probe", **request: Any
    ) -> httpx.Response:
        """Post one chunk: bytes as they are, anything else as JSON."""
        content = {"content": body, "headers": JSON} if isinstance(body, bytes | str) else {}
        return await self.client.post(
            f"/v1/models/{model}/streams/{stream}/chunks",
            **{**(content or {"json": body}), **request},
        )

    async def packed(self, body: Any, *, stream: str = "s", model: str = "probe") -> Any:
        """Post one chunk as MessagePack and read the answer."""
        response = await self.client.post(
            f"/v1/models/{model}/streams/{stream}/chunks",
            content=ormsgpack.packb(body),
            headers=MSGPACK,
        )
        assert response.headers["content-type"] == "application/msgpack"
        return ormsgpack.unpackb(response.content)

    def http_state(self, *, fast_path: bool = True) -> HttpState:
        """What the application's connections share."""
        state: HttpState = self.app.state.http
        if bool(state.fast_routes) == fast_path:
            return state
        routes = (FastPath(self.app.state.api, RequestIds()),) if fast_path else ()
        return state._replace(fast_routes=routes)

    def position(self, stream: str = "s", model: str = "probe") -> int | None:
        """Where the store has the stream."""
        found = self.store.states.get(StreamKey(model, stream))
        return found.head.position if found else None


@asynccontextmanager
async def harness(
    server: RealServer,
    models: Mapping[str, Artifact],
    *,
    limits: RequestSettings = LIMITS,
    fast_path: bool = FAST_PATH,
    requires_keys: bool | None = None,
    tracer: Tracer | None = None,
    audit: Audit = no_audit,
    load_version: VersionLoader | None = None,
    extend: Callable[[FastAPI], None] = lambda app: None,
    history: HistorySpec | None = None,
    **pipeline: Any,
) -> AsyncIterator[Harness]:
    """An application of its own, on a server that is emptied first.

    Args:
        requires_keys: whether requests need an access key before there is one; None for a service
            that has no keys at all.
        extend: adds routes to the application.
        history: what is kept of the streams of every model.
    """
    settings = StoreSettings(server.url, store_wait_s=60)
    peek = server.client()
    peek.flushall()
    store = FaultyStore(RedisStore(settings), StoredStates(peek, settings.keys))
    counts, clock = Counts(), [NOW_MS]
    await store.start()
    built = Pipeline(
        [numpy_served(artifact, history) for artifact in models.values()],
        store,
        counts,
        settings=replace(UNBOUNDED, **pipeline),
        now_ms=lambda: clock[0],
        audit=audit,
        tracer=tracer,
        load_version=load_version,
    )
    await built.start()
    required = requires_keys or False
    keys = AccessKeys(
        store.keys,
        store.rates,
        store.usage,
        required=required,
        now_ms=lambda: clock[0],
        on_change=audit,
    )
    renewing = asyncio.create_task(keys.limiters.run())
    if requires_keys is not None:
        await keys.refresh()
    app = create_api(
        built,
        counts,
        keys,
        Settings(requests=limits, http=replace(ANY_HOST, http_fast_path=fast_path)),
        metrics=lambda: (b"carry_chunks_total 0\n", "text/plain; version=1.0.0"),
        tracer=tracer,
        now_ms=lambda: clock[0],
    )
    extend(app)
    async with listening(app) as path:
        transport = httpx.AsyncHTTPTransport(uds=path, verify=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://carry", timeout=60
        ) as client:
            try:
                yield Harness(app, client, built, store, counts, models, clock, keys)
            finally:
                renewing.cancel()
                await built.stop()
                await store.close()
                peek.close()


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[str]:
    """The application behind the service's HTTP protocol, on a unix socket."""
    loop = asyncio.get_running_loop()
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, server_header=False,
        date_header=False, proxy_headers=False,
    )  # fmt: skip
    shared = ServerState()
    state = {HTTP_STATE: app.state.http}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/http.sock"
        server = await loop.create_unix_server(
            lambda: HttpProtocol(config, shared, state, loop), path
        )
        try:
            yield path
        finally:
            server.close()
            for connection in list(shared.connections):
                connection.transport.abort()
            for task in shared.tasks:
                task.cancel()
            await asyncio.gather(*shared.tasks, return_exceptions=True)


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of a response, checked to be one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["code"] == code
    assert document["status"] == status
    assert document["type"] == f"/docs/errors#{code}"
    assert document["request_id"] == response.headers["x-request-id"]
    assert document["detail"]
    return document


def rows(count: int, seed: int = 3, features: int = 3) -> NDArray[np.float32]:
    """Random rows of the probe model."""
    return np.random.default_rng(seed).normal(size=(count, features)).astype(np.float32)
