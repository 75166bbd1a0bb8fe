"""V2 over HTTP: the routes below `/v2`, on the application of the HTTP API."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from service.access.caller import PREDICT, Caller
from service.codec.decoding import invalid
from service.codec.media import Media
from service.core.errors import UnsupportedMediaType
from service.server.interface import HttpState
from service.telemetry.logs import RequestIds
from service.transports.common.disconnects import cancel_on_disconnect
from service.transports.v1.call import deadline, query, read_encoded_body
from service.transports.v1.context import ApiContext, api_of, caller_of
from service.transports.v1.replies import Answer, reply
from service.transports.v1.route import NamedRoute
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
from service.transports.v2.inference import Inference
from service.transports.v2.metadata import Document, Metadata, Statistics
from service.transports.v2.replies import InferReply
from service.transports.v2.request import InferCall

Endpoint = Callable[[Any], Coroutine[Any, Any, Response]]

_BINARY: Final = (b"content-type", b"application/octet-stream")
PREFIX: Final = "/v2"
IDENTITY: Final = "identity"
_is_length = re.compile(r"[0-9]{1,10}", re.ASCII).fullmatch


def add_kserve(app: FastAPI, inference: Inference, statistics: Statistics) -> None:
    """Add the routes to an application of `create_api`; once, before it serves."""
    app.state.v2_inference = inference
    app.state.v2_metadata = Metadata(inference, statistics)
    app.state.error_answers[PREFIX] = error_answer
    app.router.routes.extend(_ROUTES)
    state: HttpState = app.state.http
    if state.fast_routes:
        fast = FastInferPath(inference, RequestIds())
        app.state.http = state._replace(fast_routes=(*state.fast_routes, fast))


def _describe(
    describe: Callable[..., Awaitable[Document]], *, member: str = "", is_open: bool = False
) -> Endpoint:
    """Make the endpoint of a method of `Metadata`: 200, or 503 for what is not ready.

    Args:
        member: the one that is returned, instead of all.
        is_open: whether it needs no key.
    """

    async def endpoint(request: Request) -> Response:
        callers = [] if is_open else [caller_of(request)]
        metadata: Metadata = request.app.state.v2_metadata
        document = await describe(metadata, *callers, **request.path_params)
        query(request)
        await read_encoded_body(request, api_of(request).limits.max_body_bytes)
        status = 200 if document.get("ready", True) else 503
        return json_answer(document[member] if member else document, status)

    return endpoint


async def post_infer(request: Request) -> Response:
    """A chunk of a stream, or without a sequence id a stateless prediction."""
    model, version = request.path_params["model"], request.path_params.get("version", "")
    inference: Inference = request.app.state.v2_inference
    caller = caller_of(request)
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
    if not any(output.is_binary for output in result.outputs):
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
_BASES: Final = (_MODEL, f"{_MODEL}/versions/{{version}}")
_GET: Final[Mapping[str, Endpoint]] = {
    PREFIX: _describe(Metadata.server),
    f"{PREFIX}/": _describe(Metadata.server),
    f"{PREFIX}/health/live": _describe(Metadata.live, is_open=True),
    f"{PREFIX}/health/ready": _describe(Metadata.ready, is_open=True),
    f"{PREFIX}/models/stats": _describe(Metadata.statistics),
    **{base: _describe(Metadata.model) for base in _BASES},
    **{f"{base}/ready": _describe(Metadata.model_ready) for base in _BASES},
    **{f"{base}/config": _describe(Metadata.config, member="config") for base in _BASES},
    **{f"{base}/stats": _describe(Metadata.statistics) for base in _BASES},
}
_POST: Final[Mapping[str, Endpoint]] = {
    f"{PREFIX}/repository/index": _describe(Metadata.index, member="models"),
    **{f"{base}/infer": post_infer for base in _BASES},
}
_ROUTES: Final = [
    *(NamedRoute(path, endpoint) for path, endpoint in _GET.items()),
    *(NamedRoute(path, endpoint, methods=["POST"]) for path, endpoint in _POST.items()),
]
