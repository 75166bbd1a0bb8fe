"""The HTTP application over a pipeline: routes, errors, documentation.

A thin transport: bytes become chunks, chunks go to the pipeline, replies become bytes. It
decides nothing about streams and keeps nothing between requests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Match
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from service.access.key_cache import AccessKeys
from service.codec.decoding import detach_error
from service.core.errors import CarryError
from service.core.tracing import Tracer
from service.pipeline.model_versions import ModelVersions
from service.pipeline.pipeline import Pipeline
from service.pipeline.recorder import Recorder
from service.server.connections import Connections
from service.server.errors import MethodNotAllowed, RouteNotFound
from service.server.heads import host_rule, parse_origins
from service.server.interface import HttpState
from service.settings import Settings
from service.telemetry.logs import RequestIds
from service.transports.common.failure_log import log_failure, log_unexpected_failure
from service.transports.common.long_bodies import LongBodies
from service.transports.v1.context import ApiContext, ModelCodec, api_of, caller_of
from service.transports.v1.fast_path import FastPath
from service.transports.v1.openapi import openapi_document
from service.transports.v1.pages import (
    ASSETS,
    documentation_html,
    page_headers,
    reference_html,
)
from service.transports.v1.problems import (
    REFERENCE,
    connection_error_response,
    problem_response,
)
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
    recorder: Recorder,
    keys: AccessKeys,
    settings: Settings,
    *,
    lifespan: Lifespan | None = None,
    metrics: RenderMetrics | None = None,
    tracer: Tracer | None = None,
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
) -> FastAPI:
    """The application. Nothing is started here: the lifespan starts what it needs.

    Args:
        pipeline: answers every request; started before the first of them.
        keys: name the callers; started before the first request.
        lifespan: entered before the first request and left after the last.
        metrics: gives the body and the content type of `/metrics`; without it there is none.
        tracer: makes spans of requests; None makes none.
        now_ms: wall clock in epoch milliseconds.
    """
    ids, http = RequestIds(), settings.http
    app = create_application(ROUTES, ids, metrics=metrics, lifespan=lifespan)
    if http.docs and http.admin_port is None:
        add_documentation(app, app)
    accepts_host = host_rule(http.host, http.allowed_hosts)
    limits = settings.requests
    codecs = {name: ModelCodec(served, limits) for name, served in pipeline.models.items()}

    def renew_codec(versions: ModelVersions) -> None:
        champion = versions.route.champion
        if codecs[versions.name].served is not champion:
            codecs[versions.name] = ModelCodec(champion, limits)

    pipeline.aliases.on_switch.append(renew_codec)
    api = app.state.api = ApiContext(
        pipeline,
        keys,
        limits,
        recorder,
        now_ms,
        LongBodies(limits.max_body_bytes),
        codecs,
        tracer,
        parse_origins(settings.websocket.websocket_origins),
        accepts_host,
    )
    app.state.http = HttpState(
        Connections(settings.connections),
        partial(connection_error_response, recorder, ids),
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
    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
        # `include_router` would wrap each route once more, 8 us a request
        routes=[*routes, *HEALTH, *([METRICS] if metrics is not None else [])],
        # reads the environment at every request, 3 us
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.render_metrics = metrics
    app.state.has_documentation = False
    app.state.error_answers = {}
    app.add_exception_handler(CarryError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_routing_error)
    app.add_middleware(RequestLogMiddleware, answer_failure=_answer_failure, ids=ids)
    return app


async def _answer_error(request: Request, error: Any) -> Response:
    """Log and count an error of the service, and answer it with its problem document."""
    log_failure(error)
    response = _error_response(request, error)
    # a frame of its traceback may refer to it, and another one to the body
    detach_error(error)
    return response


async def _answer_routing_error(request: Request, error: Any) -> Response:
    """The answer if there is no such address, or not with this method."""
    path, method = request.url.path, request.method
    if error.status_code == 404:
        is_documented = request.app.state.has_documentation
        expected = "an address that GET /docs lists" if is_documented else "a known address"
        error = RouteNotFound(f"expected {expected}, got {path[:300]!r}")
    elif error.status_code == 405:
        # FastAPI would name the methods of the first route at this address only
        methods: set[str] = set()
        for route in request.app.routes:
            if route.matches(request.scope)[0] is not Match.NONE:
                methods.update(getattr(route, "methods", None) or ())
        allowed = sorted(methods)
        error = MethodNotAllowed(
            f"expected {' or '.join(allowed)}, got {method}", expected=allowed, got=method
        )
    else:
        raise error
    return await _answer_error(request, error)


async def _answer_failure(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer `internal_error`, which carries the id of the request and no internals."""
    response = _error_response(Request(scope), log_unexpected_failure(error))
    await response(scope, receive, send)


def _error_response(request: Request, error: CarryError) -> Response:
    # before routing there is no path parameter; the recorder bounds the names of models
    model = request.scope.get("path_params", {}).get("model", "-")
    api_of(request).recorder.record_error(model, error)
    # other protocols have a form of their own for the errors of their addresses
    for prefix, answer in request.app.state.error_answers.items():
        if f"{request.url.path}/".startswith(f"{prefix}/"):
            response: Response = answer(error)
            return response
    return problem_response(error, request)


def add_documentation(app: FastAPI, documented: FastAPI, **parameters: Any) -> None:
    """Add the pages `/docs` and `/docs/errors`, and `/openapi.json`.

    The document describes the models that the caller may use. Making one takes a tenth of a second
    of the event loop, so each is made once.

    Args:
        documented: the application whose routes are described.
        parameters: of Swagger UI.
    """
    documents: dict[frozenset[tuple[str, str]], bytes] = {}

    async def get_document(request: Request) -> Response:
        api = api_of(request)
        models = api.pipeline.describe(caller_of(request))
        names = frozenset((name, served.version) for name, served in models.items())
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
