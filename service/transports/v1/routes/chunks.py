"""Chunks of one stream, chunks of many streams, and whole sequences.

Each reads its request, calls the pipeline and writes the reply. An invalid request is rejected
before the pipeline is called.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from service.access.caller import PREDICT, Caller, Verb
from service.codec.pieces import CountedList
from service.codec.replies import etag, reply
from service.codec.reply_types import (
    AppliedItem,
    FailedItem,
    ManyReply,
    PredictReply,
)
from service.codec.reply_writer import (
    EVERY_STEP,
    PREDICT_PARAMETERS,
    REPLY_PARAMETERS,
    ReplyOptions,
    server_timing,
)
from service.codec.request_body import RequestBody, receive_body
from service.core.errors import CarryError, InvalidPrecondition
from service.core.values import NO_STREAM, Reply, StreamKey
from service.server.disconnects import cancel_on_disconnect
from service.transports.v1.context import ApiContext, ModelCodec, api_of, caller_of
from service.transports.v1.problems import problem
from service.transports.v1.request_fields import (
    body_media,
    deadline,
    flag,
    if_match,
    query,
    reply_media,
    stream_name,
)
from service.transports.v1.route import ModelPath, StreamPath


async def post_chunk(request: Request, model: ModelPath, stream: StreamPath) -> Response:
    """Send one chunk of a stream and get its outputs.

    Continue the stream from the state after its last chunk; every event gets its output.

    The first chunk creates the stream. With a `position`, the index of the chunk's first event,
    the chunk is applied exactly once: a retry of the stream's last chunk gets the stored reply,
    and a chunk that would skip or repeat events is rejected with the expected position.
    """
    caller, api = caller_of(request), api_of(request)
    codec = api.codec(api.pipeline.model(caller, PREDICT, model, stream))
    deadline_s = deadline(request, api.limits)
    key = StreamKey(codec.served.name, stream_name(stream))
    options = _options(request, api, caller, codec, key.stream)
    media = body_media(request)
    answer = reply_media(request, media)
    precondition = if_match(request)
    body = await receive_body(request, media, deadline_s)
    _check_capacity(api, caller, key.model, key, body)
    chunk = await body.read(codec.reader.chunk, codec.long.chunk, key.stream, precondition)
    result = await cancel_on_disconnect(request, api.pipeline.process(caller, chunk, deadline_s))
    headers = [(b"server-timing", server_timing(result))]
    if result.head is not NO_STREAM:
        headers.insert(0, etag(result.head))
    return reply(answer, codec.writer.reply(result, options), headers=headers)


async def post_chunks(request: Request, model: ModelPath) -> Response:
    """Send chunks of many streams in one request.

    Each item is one chunk and has its own outcome, in the order of the request.

    Items of one stream are applied in their order. After an item that failed, later items of
    its stream are not applied (`previous_failed`); `already_applied` and `position_behind` let
    later items through if they carry a position, so that a whole request can be sent again.
    The status is 200 even if items fail.
    """
    caller, api = caller_of(request), api_of(request)
    codec = api.codec(api.pipeline.model(caller, PREDICT, model))
    deadline_s = deadline(request, api.limits)
    options = _options(request, api, caller, codec)
    media = body_media(request)
    answer = reply_media(request, media)
    if "if-match" in request.headers:
        raise InvalidPrecondition(
            "If-Match: expected none, since it would name one stream of many; send `if_match` in "
            "an item",
            at="If-Match",
            expected="none",
        )
    body = await receive_body(request, media, deadline_s)
    _check_capacity(api, caller, codec.served.name, None, body)
    items = codec.rows_items.items(body.content, media)
    if items is None:
        items = await body.read(codec.reader.items, codec.long.items)
    processing = api.pipeline.process_many(caller, items, deadline_s)
    results = await cancel_on_disconnect(request, processing)
    return reply(answer, _outcomes(api, codec, results, options))


async def post_predict(request: Request, model: ModelPath) -> Response:
    """Run whole sequences, storing nothing.

    Each sequence starts from the initial state, or continues that of its `state_token`. No
    stream is read or changed.
    """
    caller, api = caller_of(request), api_of(request)
    codec = api.codec(api.pipeline.model(caller, PREDICT, model))
    deadline_s = deadline(request, api.limits)
    parameters = query(request, PREDICT_PARAMETERS)
    options = codec.writer.options(parameters) if parameters else EVERY_STEP
    return_tokens = flag(parameters, "return_state_token", default=False)
    media = body_media(request)
    answer = reply_media(request, media)
    body = await receive_body(request, media, deadline_s)
    sequences = await body.read(codec.reader.sequences, codec.long.sequences)
    predicting = api.pipeline.predict(
        caller, codec.served.name, sequences, deadline_s, return_tokens=return_tokens
    )
    predictions = await cancel_on_disconnect(request, predicting)
    document: PredictReply = {
        "model": codec.served.name,
        "version": codec.served.version,
        "predictions": CountedList(
            [codec.writer.prediction(each, options, answer) for each in predictions],
            [each.outputs.size for each in predictions],
        ),
    }
    return reply(answer, document)


def _check_capacity(
    api: ApiContext, caller: Caller, model: str, key: StreamKey | None, body: RequestBody
) -> None:
    """Reject a long body before it is parsed, if the queue would reject its chunks afterwards.

    Raises:
        Overloaded
    """
    if not body.is_long:
        return
    left_s = body.deadline_s - time.monotonic()
    rejection = api.pipeline.check_admission(caller, model, key, left_s)
    if rejection is not None:
        raise rejection.copy()


def _options(
    request: Request,
    api: ApiContext,
    caller: Caller,
    codec: ModelCodec,
    stream: str | None = None,
) -> ReplyOptions:
    parameters = query(request, REPLY_PARAMETERS)
    options = codec.writer.options(parameters) if parameters else EVERY_STEP
    if options.return_state:
        api.pipeline.model(caller, (Verb.READ_STATE,), codec.served.name, stream)
    return options


def _outcomes(
    api: ApiContext,
    codec: ModelCodec,
    results: Sequence[Reply | CarryError],
    options: ReplyOptions,
) -> ManyReply:
    outcomes: list[AppliedItem | FailedItem] = []
    for result in results:
        if isinstance(result, CarryError):
            api.recorder.record_error(codec.served.name, result)
            error = problem(result)
            outcomes.append({"status": error["status"], "error": error})
        else:
            outcomes.append({"status": 200, "reply": codec.writer.reply(result, options)})
    return {
        "model": codec.served.name,
        "version": codec.served.version,
        "results": CountedList(
            outcomes,
            [-1 if isinstance(each, CarryError) else each.outputs.size for each in results],
        ),
    }
