"""Chunks of one stream, chunks of many streams, and whole sequences.

Each unpacks its request, calls the pipeline and repacks what comes back. Whatever is wrong with
a request is found before anything is asked of the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from service.api import openapi
from service.api.context import ApiContext, api_of
from service.api.leaving import unless_left
from service.api.long_bodies import read_in_turns
from service.api.problems import problem
from service.api.reading import (
    body_media,
    deadline,
    flag,
    if_match,
    query,
    read_body,
    reply_media,
    stream_name,
)
from service.api.replies import etag, reply, server_timing
from service.api.reply_writer import EVERY_STEP, ReplyOptions
from service.api.routing import plain_router
from service.api.wire import ModelWire
from service.domain import Reply
from service.errors import CarryError, InvalidPrecondition

router = plain_router("chunks")


@router.post(
    "/v1/models/{model}/streams/{stream}/chunks",
    summary="Send one chunk of a stream and get its outputs",
    **openapi.CHUNK,
)
async def post_chunk(request: Request) -> Response:
    """Continue the stream from the state its last chunk left; every event gets its output.

    The first chunk creates the stream. With a `position`, the index of the chunk's first event,
    the chunk is applied exactly once: a retry of the stream's last chunk gets the stored reply,
    and a chunk that would skip or repeat events is refused with the position that was expected.
    """
    api = api_of(request)
    deadline_s = deadline(request, api.limits)
    wire = api.wire(request.path_params["model"])
    stream = stream_name(request.path_params["stream"])
    options = _options(request, wire)
    media = body_media(request)
    answer = reply_media(request, media)
    precondition = if_match(request)
    body = await read_body(request, api.limits.max_body_bytes)
    chunk = await read_in_turns(wire.reader, body, media, stream, precondition)
    if chunk is None:
        chunk = wire.reader.chunk(body, media, stream, precondition)
    result = await unless_left(request, api.pipeline.process(chunk, deadline_s))
    timing = (b"server-timing", server_timing(result.timing).encode())
    return reply(answer, wire.writer.reply(result, options), headers=(etag(result.mark), timing))


@router.post(
    "/v1/models/{model}/chunks",
    summary="Send chunks of many streams in one request",
    **openapi.MANY,
)
async def post_chunks(request: Request) -> Response:
    """Each item is one chunk and has its own outcome, in the order of the request.

    Items of one stream are applied in their order. After an item that failed, later items of
    its stream are not applied (`previous_failed`); `already_applied` and `position_behind` let
    later items through if they carry a position, so that a whole request can be sent again.
    The status is 200 however the items fare.
    """
    api = api_of(request)
    deadline_s = deadline(request, api.limits)
    wire = api.wire(request.path_params["model"])
    options = _options(request, wire)
    media = body_media(request)
    answer = reply_media(request, media)
    if "if-match" in request.headers:
        raise InvalidPrecondition(
            "If-Match: expected none, since it would name one stream of many; send `if_match` in "
            "an item",
            at="If-Match",
            expected="none",
        )
    items = wire.reader.items(await read_body(request, api.limits.max_body_bytes), media)
    results = await unless_left(request, api.pipeline.process_many(items, deadline_s))
    return reply(answer, _outcomes(api, wire, results, options))


@router.post(
    "/v1/models/{model}/predict",
    summary="Run whole sequences, storing nothing",
    **openapi.PREDICT,
)
async def post_predict(request: Request) -> Response:
    """Each sequence starts from the zero state. No stream is read or changed."""
    api = api_of(request)
    deadline_s = deadline(request, api.limits)
    wire = api.wire(request.path_params["model"])
    options = _options(request, wire)
    media = body_media(request)
    answer = reply_media(request, media)
    sequences = wire.reader.sequences(await read_body(request, api.limits.max_body_bytes), media)
    predicting = api.pipeline.predict(wire.served.name, sequences, deadline_s)
    predictions = await unless_left(request, predicting)
    return reply(
        answer,
        {
            "model": wire.served.name,
            "version": wire.served.version,
            "predictions": [wire.writer.prediction(found, options) for found in predictions],
        },
    )


def _options(request: Request, wire: ModelWire) -> ReplyOptions:
    parameters = query(request, ("return_sequences", "return_state", "return_attention"))
    if not parameters:
        return EVERY_STEP
    options = ReplyOptions(
        return_sequences=flag(parameters, "return_sequences", default=True),
        return_state=flag(parameters, "return_state", default=False),
        return_attention=flag(parameters, "return_attention", default=False),
    )
    wire.writer.check_options(options)
    return options


def _outcomes(
    api: ApiContext,
    wire: ModelWire,
    results: Sequence[Reply | CarryError],
    options: ReplyOptions,
) -> dict[str, Any]:
    outcomes: list[dict[str, Any]] = []
    for result in results:
        if isinstance(result, CarryError):
            api.recorder.refusal(wire.served.name, result.code)
            error = problem(result)
            outcomes.append({"status": error["status"], "error": error})
        else:
            outcomes.append({"status": 200, "reply": wire.writer.reply(result, options)})
    return {
        "model": wire.served.name,
        "version": wire.served.version,
        "results": outcomes,
    }
