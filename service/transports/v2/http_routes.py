"""V2 over HTTP: the routes below `/v2`, on the application of the HTTP API."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any, Final

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from service.access.caller import PREDICT, Caller, Verb
from service.codec.decoding import invalid
from service.codec.media import Media
from service.core.errors import UnsupportedMediaType
from service.pipeline.recorder import ModelStatistics
from service.pipeline.served_model import ServedModel
from service.server.interface import HttpState
from service.telemetry.logs import RequestIds
from service.transports.common.disconnects import cancel_on_disconnect
from service.transports.v1.call import deadline, query, read_encoded_body
from service.transports.v1.context import ApiContext, api_of, caller_of
from service.transports.v1.replies import Answer, reply
from service.transports.v2.http_body import (
    COMPRESSIONS,
    HEADER_LENGTH,
    decode_request,
    decompress,
    encode_reply,
    error_answer,
    json_answer,
    reply_document,
)
from service.transports.v2.http_fast_path import FastInferPath
from service.transports.v2.inference import InferCall, Inference, InferReply
from service.transports.v2.metadata import (
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
)

Statistics = Callable[[], Mapping[str, ModelStatistics]]
"""Returns the totals of every model; called in a thread."""

Endpoint = Callable[..., Coroutine[Any, Any, Response]]

_BINARY: Final = (b"content-type", b"application/octet-stream")
MODELS: Final = (Verb.MODELS,)
PREFIX: Final = "/v2"
IDENTITY: Final = "identity"
_is_length = re.compile(r"[0-9]{1,10}", re.ASCII).fullmatch


def add_kserve(app: FastAPI, inference: Inference, statistics: Statistics) -> None:
    """Add the routes to an application of `create_api`; once, before it serves."""
    app.state.kserve = inference
    app.state.kserve_statistics = statistics
    app.state.error_answers[PREFIX] = error_answer
    app.router.routes.extend(_ROUTES)
    state: HttpState = app.state.http
    if state.fast_routes:
        fast = FastInferPath(inference, RequestIds())
        app.state.http = state._replace(fast_routes=(*state.fast_routes, fast))


class _Route(APIRoute):
    """Calls its endpoint with the request and the path parameters, without FastAPI's dependency
    resolution and exit stacks."""

    def get_route_handler(self) -> Endpoint:
        """The handler of a request."""
        endpoint: Endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            return await endpoint(request, **request.path_params)

        return handle


async def get_server(request: Request) -> Response:
    """Name, version and extensions."""
    _described_models(request)
    return json_answer(server_metadata())


async def get_live(request: Request) -> Response:
    """Whether the process answers."""
    return json_answer({"live": True})


async def get_ready(request: Request) -> Response:
    """Whether requests should be sent here: 200, or 503."""
    return await _readiness(request, {})


async def get_all_statistics(request: Request) -> Response:
    """Totals of every model, of all workers together."""
    return await _statistics(request, _described_models(request))


async def get_model(request: Request, model: str, version: str = "") -> Response:
    """The tensors of a model."""
    return json_answer(model_metadata(_described_model(request, model, version)))


async def get_model_ready(request: Request, model: str, version: str = "") -> Response:
    """Whether a model can be used: 200, or 503."""
    served = _described_model(request, model, version)
    return await _readiness(request, {"name": served.name})


async def get_config(request: Request, model: str, version: str = "") -> Response:
    """The configuration of a model."""
    served = _described_model(request, model, version)
    return json_answer(model_config(served, api_of(request).limits.max_items))


async def get_statistics(request: Request, model: str, version: str = "") -> Response:
    """Totals of a model, of all workers together."""
    return await _statistics(request, [_described_model(request, model, version)])


async def post_index(request: Request) -> Response:
    """The served models; all of them are ready."""
    models = _described_models(request)
    await read_encoded_body(request, api_of(request).limits.max_body_bytes)
    return json_answer(repository_index(models))


async def post_infer(request: Request, model: str, version: str = "") -> Response:
    """A chunk of a stream, or without a sequence id a stateless prediction."""
    caller, inference = caller_of(request), _inference(request)
    inference.served(caller, PREDICT, model, version)
    query(request)
    deadline_s = deadline(request, inference.api.limits)
    json_bytes = _json_bytes(request)
    body = await _receive(request, inference.api, deadline_s)

    def read() -> InferCall:
        decoded = decode_request(body, json_bytes, model, version)
        return inference.read(caller, decoded, deadline_s)

    inferring = _infer(inference, caller, len(body), deadline_s, read)
    result = await cancel_on_disconnect(request, inferring)
    if not result.binary.has_any(output.name for output in result.outputs):
        return reply(Media.JSON, reply_document(result))
    content, json_length = encode_reply(result)
    return Answer(content, _BINARY, 200, [(HEADER_LENGTH.encode(), b"%d" % json_length)])


async def _infer(
    inference: Inference,
    caller: Caller,
    size: int,
    deadline_s: float,
    read: Callable[[], InferCall],
) -> InferReply:
    call = await inference.api.long_bodies.read(size, deadline_s, read)
    return await inference.answer(caller, call)


def _inference(request: Request) -> Inference:
    inference: Inference = request.app.state.kserve
    return inference


def _described_model(request: Request, model: str, version: str) -> ServedModel:
    """The model of a request for what describes it; the request has no query.

    Raises:
        Unauthenticated, Forbidden, ModelNotFound, InvalidInput
    """
    served = _inference(request).served(caller_of(request), MODELS, model, version)
    query(request)
    return served


def _described_models(request: Request) -> Iterable[ServedModel]:
    """The models that the caller may use; the request has no query.

    Raises:
        Unauthenticated, Forbidden, InvalidInput
    """
    models = api_of(request).pipeline.describe(caller_of(request))
    query(request)
    return models.values()


async def _readiness(request: Request, names: Mapping[str, str]) -> Response:
    query(request)
    is_ready = all(check.ok for check in await api_of(request).pipeline.readiness())
    return json_answer({**names, "ready": is_ready}, 200 if is_ready else 503)


async def _statistics(request: Request, models: Iterable[ServedModel]) -> Response:
    statistics: Statistics = request.app.state.kserve_statistics
    return json_answer(model_statistics(models, await asyncio.to_thread(statistics)))


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


_MODEL: Final = f"{PREFIX}/models/{{model}}"
_VERSION: Final = f"{_MODEL}/versions/{{version}}"
_GET: Final[Mapping[str, Endpoint]] = {
    PREFIX: get_server,
    f"{PREFIX}/": get_server,
    f"{PREFIX}/health/live": get_live,
    f"{PREFIX}/health/ready": get_ready,
    f"{PREFIX}/models/stats": get_all_statistics,
    **{
        f"{base}{path}": endpoint
        for base in (_MODEL, _VERSION)
        for path, endpoint in (
            ("", get_model),
            ("/ready", get_model_ready),
            ("/config", get_config),
            ("/stats", get_statistics),
        )
    },
}
_POST: Final[Mapping[str, Endpoint]] = {
    f"{PREFIX}/repository/index": post_index,
    f"{_MODEL}/infer": post_infer,
    f"{_VERSION}/infer": post_infer,
}
_ROUTES: Final = [
    _Route(path, endpoint, methods=methods, include_in_schema=False)
    for methods, endpoints in ((["GET", "HEAD"], _GET), (["POST"], _POST))
    for path, endpoint in endpoints.items()
]
