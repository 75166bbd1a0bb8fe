"""V2 over HTTP: the routes below `/v2`, on the application of the HTTP API."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from service.access.caller import PREDICT, Caller, Verb
from service.codec.decoding import detached, invalid
from service.codec.media import Media, dumps
from service.core.errors import CarryError, UnsupportedMediaType
from service.pipeline.recorder import ModelStatistics
from service.pipeline.served_model import ServedModel
from service.server.errors import MethodNotAllowed, RouteNotFound
from service.server.http_protocol import HttpState
from service.telemetry.logs import RequestIds
from service.transports.common.disconnects import cancel_on_disconnect
from service.transports.common.failure_log import log_failure, log_unexpected_failure
from service.transports.v1.context import ApiContext, api_of, caller_of
from service.transports.v1.replies import Answer, reply
from service.transports.v1.request_fields import deadline, query, read_encoded_body
from service.transports.v2.http_body import (
    COMPRESSIONS,
    HEADER_LENGTH,
    BinaryOutputs,
    decode_request,
    decompress,
    encode_reply,
    reply_document,
)
from service.transports.v2.http_errors import JSON, error_answer
from service.transports.v2.http_fast_path import FastInferPath
from service.transports.v2.inference import Inference, ReadRequest
from service.transports.v2.metadata import (
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
)
from service.transports.v2.values import InferReply, InferRequest

Statistics = Callable[[], Mapping[str, ModelStatistics]]
"""Returns the totals of every model; called in a thread."""

Decode = Callable[[bytes], tuple[InferRequest, BinaryOutputs]]

_BINARY: Final = (b"content-type", b"application/octet-stream")
MODELS: Final = (Verb.MODELS,)
IDENTITY: Final = "identity"
_is_length = re.compile(r"[0-9]{1,10}", re.ASCII).fullmatch


def add_kserve(app: FastAPI, inference: Inference, statistics: Statistics) -> None:
    """Add the routes to an application of `create_api`; once, before it serves."""
    app.state.kserve = inference
    app.state.kserve_statistics = statistics
    app.router.routes.extend(router.routes)
    state: HttpState = app.state.http
    if state.fast_routes:
        fast = FastInferPath(inference, RequestIds())
        app.state.http = state._replace(fast_routes=(*state.fast_routes, fast))


class _V2Route(APIRoute):
    """Calls its endpoint with the request and the path parameters; errors are V2's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a request."""
        endpoint: Callable[..., Coroutine[Any, Any, Response]] = self.endpoint

        async def handle(request: Request) -> Response:
            try:
                return await endpoint(request, **request.path_params)
            except CarryError as error:
                log_failure(error)
                failure = error
            except ClientDisconnect:
                raise
            except Exception as error:
                failure = log_unexpected_failure(error)
            # it and its causes refer to this frame, which refers to it
            detached(failure)
            model = request.path_params.get("model", "-")
            api_of(request).recorder.record_error(model, failure)
            return error_answer(failure)

        return handle


router = APIRouter(route_class=_V2Route, include_in_schema=False)
_MODEL: Final = "/v2/models/{model}"
_VERSION: Final = "/v2/models/{model}/versions/{version}"


def _get(*paths: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Route GET and HEAD of these paths to an endpoint."""

    def add(endpoint: Callable[..., Any]) -> Callable[..., Any]:
        for path in paths:
            router.add_api_route(path, endpoint, methods=["GET", "HEAD"])
        return endpoint

    return add


@_get("/v2", "/v2/")
async def get_server(request: Request) -> Response:
    """Name, version and extensions."""
    api_of(request).pipeline.describe(caller_of(request))
    query(request)
    return _answer(server_metadata())


@_get("/v2/health/live")
async def get_live(request: Request) -> Response:
    """Whether the process answers."""
    return _answer({"live": True})


@_get("/v2/health/ready")
async def get_ready(request: Request) -> Response:
    """Whether requests should be sent here: 200, or 503."""
    is_ready = await _is_ready(request)
    return _answer({"ready": is_ready}, 200 if is_ready else 503)


@_get("/v2/models/stats")
async def get_all_statistics(request: Request) -> Response:
    """Totals of every model, of all workers together."""
    models = api_of(request).pipeline.describe(caller_of(request))
    query(request)
    return await _statistics(request, models.values())


@_get(_MODEL, _VERSION)
async def get_model(request: Request, model: str, version: str = "") -> Response:
    """The tensors of a model."""
    served = _described(request, model, version)
    query(request)
    return _answer(model_metadata(served))


@_get(f"{_MODEL}/ready", f"{_VERSION}/ready")
async def get_model_ready(request: Request, model: str, version: str = "") -> Response:
    """Whether a model can be used: 200, or 503."""
    served = _described(request, model, version)
    is_ready = await _is_ready(request)
    return _answer({"name": served.name, "ready": is_ready}, 200 if is_ready else 503)


@_get(f"{_MODEL}/config", f"{_VERSION}/config")
async def get_config(request: Request, model: str, version: str = "") -> Response:
    """The configuration of a model."""
    served = _described(request, model, version)
    query(request)
    return _answer(model_config(served, api_of(request).limits.max_items))


@_get(f"{_MODEL}/stats", f"{_VERSION}/stats")
async def get_statistics(request: Request, model: str, version: str = "") -> Response:
    """Totals of a model, of all workers together."""
    served = _described(request, model, version)
    query(request)
    return await _statistics(request, [served])


@router.post("/v2/repository/index")
async def post_index(request: Request) -> Response:
    """The served models; all of them are ready."""
    models = api_of(request).pipeline.describe(caller_of(request))
    query(request)
    await read_encoded_body(request, api_of(request).limits.max_body_bytes)
    return _answer(repository_index(models.values()))


@router.post(f"{_VERSION}/infer")
@router.post(f"{_MODEL}/infer")
async def post_infer(request: Request, model: str, version: str = "") -> Response:
    """A chunk of a stream, or without a sequence id a stateless prediction."""
    caller, inference = caller_of(request), _inference(request)
    inference.served(caller, PREDICT, model, version)
    query(request)
    deadline_s = deadline(request, inference.api.limits)
    json_bytes = _json_bytes(request)
    body = await _receive(request, inference.api, deadline_s)
    decode = partial(decode_request, json_bytes=json_bytes, model=model, version=version)
    inferring = _infer(inference, caller, body, decode, deadline_s)
    result, binary = await cancel_on_disconnect(request, inferring)
    if not binary.has_any(output.name for output in result.outputs):
        return reply(Media.JSON, reply_document(result, binary))
    content, json_length = encode_reply(result, binary)
    return Answer(content, _BINARY, 200, [(HEADER_LENGTH.encode(), b"%d" % json_length)])


@router.api_route(
    "/v2/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
)
async def reject(request: Request, path: str) -> Response:
    """The error for an address or a method that no route above has."""
    methods: set[str] = set()
    for route in router.routes[:-1]:
        match, _ = route.matches(request.scope)
        if match is not Match.NONE:
            methods.update(getattr(route, "methods", None) or ())
    if not methods:
        raise RouteNotFound(
            f"expected an address of the V2 protocol that Carry serves, got {path[:300]!r}"
        )
    allowed = sorted(methods)
    raise MethodNotAllowed(
        f"expected {' or '.join(allowed)}, got {request.method}",
        expected=allowed,
        got=request.method,
    )


async def _infer(
    inference: Inference,
    caller: Caller,
    body: bytes,
    decode: Decode,
    deadline_s: float,
) -> tuple[InferReply, BinaryOutputs]:
    def read() -> tuple[ReadRequest, BinaryOutputs]:
        request, binary = decode(body)
        return inference.read(caller, request, deadline_s), binary

    ready, binary = await inference.api.long_bodies.read(len(body), deadline_s, read)
    return await inference.answer(caller, ready), binary


def _inference(request: Request) -> Inference:
    inference: Inference = request.app.state.kserve
    return inference


def _described(request: Request, model: str, version: str) -> ServedModel:
    """The model of a request for what describes it.

    Raises:
        Unauthenticated, Forbidden, ModelNotFound
    """
    return _inference(request).served(caller_of(request), MODELS, model, version)


def _answer(document: Any, status: int = 200) -> Answer:
    return Answer(dumps(Media.JSON, document), JSON, status)


async def _is_ready(request: Request) -> bool:
    query(request)
    return all(check.ok for check in await api_of(request).pipeline.readiness())


async def _statistics(request: Request, models: Iterable[ServedModel]) -> Response:
    statistics: Statistics = request.app.state.kserve_statistics
    return _answer(model_statistics(models, await asyncio.to_thread(statistics)))


def _json_bytes(request: Request) -> int | None:
    """The length of the JSON before binary tensors; None without the header."""
    lengths = request.headers.getlist(HEADER_LENGTH)
    if not lengths:
        return None
    text = ", ".join(lengths)
    if not _is_length(text):
        raise invalid("Inference-Header-Content-Length", "a number of bytes", text[:300])
    return int(text)


async def _receive(request: Request, api: ApiContext, deadline_s: float) -> bytes:
    """The body of a request, decompressed.

    Raises:
        BodyTooLarge, UnsupportedMediaType, MalformedBody, ClientDisconnect
        Overloaded, DeadlineExceeded: a compressed body was not admitted in time.
    """
    encoding = request.headers.get("content-encoding", IDENTITY).lower()
    if encoding != IDENTITY and encoding not in COMPRESSIONS:
        expected = ", ".join(COMPRESSIONS)
        raise UnsupportedMediaType(
            f"Content-Encoding: expected {expected} or none, got {encoding[:300]!r}",
            expected=[*COMPRESSIONS],
            got=encoding[:300],
        )
    limit_bytes = api.limits.max_body_bytes
    body = await read_encoded_body(request, limit_bytes)
    if encoding == IDENTITY:
        return body
    # one at a time: a small body may become a large one
    return await api.long_bodies.run_in_thread(
        len(body), deadline_s, partial(decompress, body, encoding, limit_bytes)
    )
