"""The HTTP application over a pipeline: routes, errors, documentation.

A thin transport: bytes become chunks, chunks go to the pipeline, replies become bytes. It
decides nothing about streams and keeps nothing between requests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from service.access.key_cache import AccessKeys
from service.codec.settings import RequestSettings
from service.core.tracing import Tracer
from service.pipeline.pipeline import Pipeline
from service.pipeline.recorder import Recorder
from service.server.connections import Connections
from service.server.http_protocol import HttpState
from service.server.origins import host_rule, parse_origins
from service.server.settings import ConnectionSettings, HttpSettings
from service.telemetry.logs import RequestIds
from service.transports.common.long_bodies import LongBodies
from service.transports.v1.context import ApiContext, api_of, caller_of
from service.transports.v1.error_handling import InternalErrorMiddleware, add_error_handlers
from service.transports.v1.error_responses import ConnectionErrors
from service.transports.v1.fast_path import FastPath
from service.transports.v1.openapi.document import openapi_document
from service.transports.v1.openapi.documentation_page import ASSETS, documentation_html
from service.transports.v1.openapi.error_reference import reference_html
from service.transports.v1.openapi.page_security import page_headers
from service.transports.v1.problems import REFERENCE
from service.transports.v1.request_log import RequestLogMiddleware
from service.transports.v1.route import Route
from service.transports.v1.table import HEALTH, METRICS, ROUTES

RenderMetrics = Callable[[], tuple[bytes, str]]
"""Returns the body of /metrics and its content type; called in a thread."""

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]

MAX_DOCUMENTS = 64
"""Documents that are kept, one for each set of models that some key may use."""


def create_api(
    pipeline: Pipeline,
    limits: RequestSettings,
    recorder: Recorder,
    keys: AccessKeys,
    http: HttpSettings,
    *,
    lifespan: Lifespan | None = None,
    metrics: RenderMetrics | None = None,
    connections: ConnectionSettings | None = None,
    tracer: Tracer | None = None,
    origins: str = "",
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
) -> FastAPI:
    """The application. Nothing is started here: the lifespan starts what it needs.

    Args:
        pipeline: answers every request; started before the first of them.
        keys: name the callers; started before the first request.
        http: what is served, and for which names of the host.
        lifespan: entered before the first request and left after the last.
        metrics: gives the body and the content type of `/metrics`; without it there is none.
        connections: bounds on the connections of this worker.
        tracer: makes spans of requests; None makes none.
        origins: whose pages may change streams of an open service, besides its own host, separated
            by commas; `*` allows all.
        now_ms: wall clock in epoch milliseconds.
    """
    ids = RequestIds()
    app = create_application(ROUTES, ids, metrics=metrics, lifespan=lifespan)
    if http.docs and http.admin_port is None:
        add_documentation(app, app)
    accepts_host = host_rule(http.host, http.allowed_hosts)
    api = ApiContext(
        pipeline,
        keys,
        limits,
        recorder,
        now_ms,
        LongBodies(limits.max_body_bytes),
        tracer,
        parse_origins(origins),
        accepts_host,
    )
    app.state.api = api
    for served in pipeline.models.values():
        api.codec(served)

    app.state.http = HttpState(
        Connections(connections),
        ConnectionErrors(recorder, ids).response,
        (FastPath(api, ids),) if http.http_fast_path else (),
        accepts_host=accepts_host,
    )
    return app


def create_application(
    routes: Iterable[Route],
    ids: RequestIds,
    *,
    metrics: RenderMetrics | None,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """An application of these routes and those of health, whose errors are problem documents.

    Args:
        metrics: renders `/metrics`; without it there is none.
    """
    table = [*routes, *HEALTH, *([METRICS] if metrics is not None else [])]
    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
        # `include_router` would wrap each route once more, 8 us a request
        routes=[served for route in table for served in route.fastapi_routes],
        # reads the environment at every request, 3 us
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.render_metrics = metrics
    app.state.has_documentation = False
    add_error_handlers(app)
    app.add_middleware(InternalErrorMiddleware)
    app.add_middleware(RequestLogMiddleware, ids=ids)
    return app


def add_documentation(app: FastAPI, documented: FastAPI, **parameters: Any) -> None:
    """Add the pages `/docs` and `/docs/errors`, and `/openapi.json`.

    The document describes the models that the caller may use. Making one takes a tenth of a second
    of the event loop, so each is made once.

    Args:
        documented: the application whose routes are described.
        parameters: of Swagger UI.
    """
    documents: dict[frozenset[str], bytes] = {}

    async def get_document(request: Request) -> Response:
        api = api_of(request)
        models = api.pipeline.describe(caller_of(request))
        names = frozenset(models)
        if names not in documents:
            if len(documents) >= MAX_DOCUMENTS:
                documents.clear()
            document = openapi_document(documented.routes, api, models)
            documents[names] = json.dumps(document, ensure_ascii=False).encode()
        return Response(documents[names], media_type="application/json")

    def add_page(path: str, page: str) -> None:
        app.add_route(path, lambda _: HTMLResponse(page, headers=page_headers(page)))

    app.add_route("/openapi.json", get_document)
    add_page("/docs", documentation_html(parameters))
    add_page(REFERENCE, reference_html())
    app.mount(ASSETS, StaticFiles(packages=[("fastapi_offline", "static")]))
    app.state.has_documentation = True
