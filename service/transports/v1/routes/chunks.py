"""Chunks of one stream, chunks of many streams, and whole sequences.

Each reads its request, calls the pipeline and writes the reply. An invalid request is rejected
before the pipeline is called.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from service.access.caller import Caller, Verb
from service.codec.field_rules import stream_name
from service.codec.pieces import CountedList
from service.codec.reply_writer import (
    ReplyOptions,
    server_timing,
)
from service.core.errors import CarryError, InvalidPrecondition
from service.core.values import NO_STREAM, Reply, StreamKey
from service.transports.common.disconnects import cancel_on_disconnect
from service.transports.v1.context import ApiContext, ModelCodec, allowed_model, api_of
from service.transports.v1.problems import problem
from service.transports.v1.replies import etag, reply
from service.transports.v1.reply_types import AppliedItem, FailedItem, ManyReply, PredictReply
from service.transports.v1.request_body import receive_body
from service.transports.v1.request_fields import (
    PREDICT_PARAMETERS,
    REPLY_PARAMETERS,
    body_media,
    deadline,
    flag,
    if_match,
    query,
    reply_media,
    reply_options,
)
from service.transports.v1.route import ModelPath, StreamPath


async def post_chunk(request: Request, model: ModelPath, stream: StreamPath) -> Response:
    """Send one chunk of a stream and get its outputs.

    Continue the stream from the state after its last chunk; every event gets its output.

    The first chunk creates the stream. With a `position`, the index of the chunk's first event,
    the chunk is applied exactly once: a retry of the stream's last chunk gets the stored reply,
    and a chunk that would skip or repeat events is rejected with the expected position.
    """
    caller, served = allowed_model(request, model, stream)
    api = api_of(request)
    codec = api.codec(served)
    deadline_s = deadline(request, api.limits)
    key = StreamKey(codec.served.name, stream_name(stream))
    options = _options(request, api, caller, codec, key.stream)
    media = body_media(request)
    answer = reply_media(request, media)
    precondition = if_match(request)
    body = await receive_body(request, media, deadline_s)
    body.check_capacity(caller, key.model, key)
    chunk = await body.read(codec.reader.chunk, key, precondition)
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
    caller, served = allowed_model(request, model)
    api = api_of(request)
    codec = api.codec(served)
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
    body.check_capacity(caller, codec.served.name, None)
    items = await body.read(codec.reader.items)
    processing = api.pipeline.process_many(caller, items, deadline_s)
    results = await cancel_on_disconnect(request, processing)
    return reply(answer, _outcomes(api, codec, results, options))


async def post_predict(request: Request, model: ModelPath) -> Response:
    """Run whole sequences, storing nothing.

    Each sequence starts from the initial state, or continues that of its `state_token`. No
    stream is read or changed.
    """
    caller, served = allowed_model(request, model)
    api = api_of(request)
    codec = api.codec(served)
    deadline_s = deadline(request, api.limits)
    parameters = query(request, PREDICT_PARAMETERS)
    options = reply_options(parameters, codec.writer)
    return_tokens = flag(parameters, "return_state_token", default=False)
    media = body_media(request)
    answer = reply_media(request, media)
    body = await receive_body(request, media, deadline_s)
    sequences = await body.read(codec.reader.sequences)
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


def _options(
    request: Request,
    api: ApiContext,
    caller: Caller,
    codec: ModelCodec,
    stream: str | None = None,
) -> ReplyOptions:
    parameters = query(request, REPLY_PARAMETERS)
    options = reply_options(parameters, codec.writer)
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
