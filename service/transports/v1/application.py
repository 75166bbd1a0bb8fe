"""The HTTP application over a pipeline: routes, errors, documentation.

A thin transport: bytes become chunks, chunks go to the pipeline, replies become bytes. It
decides nothing about streams and keeps nothing between requests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route as StarletteRoute

from service.access.key_cache import AccessKeys
from service.codec.long_bodies.admission import LongBodyAdmission
from service.codec.settings import RequestSettings
from service.core.tracing import Tracer
from service.pipeline.pipeline import Pipeline
from service.pipeline.recorder import Recorder
from service.server.connections import Connections
from service.server.http_protocol import HttpState
from service.server.origins import AcceptsHost, accept_any_host, parse_origins
from service.server.settings import ConnectionSettings
from service.telemetry.logs import RequestIds
from service.transports.v1.context import ApiContext, api_of, caller_of
from service.transports.v1.error_handling import InternalErrorMiddleware, add_error_handlers
from service.transports.v1.error_responses import ConnectionErrors
from service.transports.v1.fast_path import FastPath
from service.transports.v1.openapi.document import DESCRIPTION, openapi_document
from service.transports.v1.openapi.documentation_page import ASSETS, documentation_html
from service.transports.v1.openapi.error_reference import reference_html
from service.transports.v1.openapi.page_security import page_headers
from service.transports.v1.problems import REFERENCE
from service.transports.v1.request_log import RequestLogMiddleware
from service.transports.v1.route import Route
from service.transports.v1.table import HEALTH, METRICS, ROUTES

RenderMetrics = Callable[[], tuple[bytes, str]]
"""Returns the body of /metrics and its content type; called in a thread."""

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any] | None]]

MAX_DOCUMENTS = 64
"""Documents that are kept, one for each set of models that some key may use."""


def create_api(
    pipeline: Pipeline,
    limits: RequestSettings,
    recorder: Recorder,
    keys: AccessKeys,
    *,
    lifespan: Lifespan | None = None,
    metrics: RenderMetrics | None = None,
    connections: ConnectionSettings | None = None,
    fast_path: bool = True,
    docs: bool = True,
    tracer: Tracer | None = None,
    origins: str = "",
    accepts_host: AcceptsHost = accept_any_host,
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
) -> FastAPI:
    """The application. Nothing is started here: the lifespan starts what it needs.

    Args:
        pipeline: answers every request; started before the first of them.
        keys: name the callers; started before the first request.
        lifespan: entered before the first request and left after the last.
        metrics: gives the body and the content type of `/metrics`; without it there is none.
        connections: bounds on the connections of this worker.
        fast_path: whether chunk requests may skip uvicorn's parser and FastAPI.
        docs: whether it has the documentation: `/docs`, `/docs/errors` and `/openapi.json`.
        tracer: makes spans of requests; None makes none.
        origins: whose pages may change streams of an open service, besides its own host, separated
            by commas; `*` allows all.
        accepts_host: as of `host_rule`.
        now_ms: wall clock in epoch milliseconds.
    """
    ids = RequestIds()
    app = create_application(ROUTES, ids, metrics=metrics, docs=docs, lifespan=lifespan)
    api = ApiContext(
        pipeline,
        keys,
        limits,
        recorder,
        now_ms,
        LongBodyAdmission(limits.max_waiting_bytes),
        tracer,
        parse_origins(origins),
        accepts_host,
    )
    app.state.api = api
    for served in pipeline.models.values():
        api.codec(served)

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = openapi_document(app, api, pipeline.models)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
    if docs:
        _check_access_to_document(app)
    app.state.http = HttpState(
        Connections(connections),
        ConnectionErrors(recorder, ids).response,
        (FastPath(api, ids),) if fast_path else (),
        accepts_host=accepts_host,
    )
    return app


def create_application(
    routes: Iterable[Route],
    ids: RequestIds,
    *,
    metrics: RenderMetrics | None,
    docs: bool,
    **options: Any,
) -> FastAPI:
    """An application of these routes and those of health, whose errors are problem documents.

    Args:
        metrics: renders `/metrics`; without it there is none.
        docs: whether it has the documentation.
        options: of FastAPI.
    """
    table = [*routes, *HEALTH, *([METRICS] if metrics is not None else [])]
    options = {
        "title": "Carry",
        "version": version("carry"),
        "summary": "Stateful recurrent networks over event streams.",
        "description": DESCRIPTION,
        "license_info": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        "redoc_url": None,
        "redirect_slashes": False,
        # `include_router` would wrap each route once more, 8 us a request
        "routes": [served for route in table for served in route.served()],
        # reads the environment at every request, 3 us
        "telemetry": {"tracing": False, "metrics": False, "logs": False},
        **options,
    }
    if docs:
        app = FastAPIOffline(docs_url=None, static_url=ASSETS, **options)
        page = documentation_html(app.swagger_ui_parameters or {})
        app.add_route("/docs", lambda _: _page(page), include_in_schema=False)
        app.add_api_route(
            REFERENCE, _error_reference, include_in_schema=False, response_class=HTMLResponse
        )
    else:
        app = FastAPI(docs_url=None, openapi_url=None, **options)
    app.state.render_metrics = metrics
    add_error_handlers(app)
    app.add_middleware(InternalErrorMiddleware)
    app.add_middleware(RequestLogMiddleware, ids=ids)
    return app


def _check_access_to_document(app: FastAPI) -> None:
    """Let `/openapi.json`, which describes the models, show those that a key may use.

    Making a document takes a tenth of a second of the event loop, so each is made once.
    """
    documents: dict[frozenset[str], bytes] = {}

    async def get_document(request: Request) -> Response:
        models = api_of(request).pipeline.describe(caller_of(request))
        names = frozenset(models)
        if names not in documents:
            if len(documents) >= MAX_DOCUMENTS:
                documents.clear()
            document = openapi_document(app, api_of(request), models)
            documents[names] = json.dumps(document, ensure_ascii=False).encode()
        return Response(documents[names], media_type="application/json")

    for index, route in enumerate(app.router.routes):
        if isinstance(route, StarletteRoute) and route.path == app.openapi_url:
            app.router.routes[index] = StarletteRoute(
                route.path, get_document, include_in_schema=False
            )


def _error_reference() -> HTMLResponse:
    return _page(reference_html())


def _page(page: str) -> HTMLResponse:
    return HTMLResponse(page, headers=page_headers(page))
