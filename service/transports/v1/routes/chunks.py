"""Chunks of one stream, chunks of many streams, and whole sequences.

Each reads its request, calls the pipeline and writes the reply. An invalid request is rejected
before the pipeline is called.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response

from service.codec.pieces import CountedList
from service.codec.reply_writer import ReplyOptions, server_timing
from service.core.errors import CarryError, InvalidPrecondition
from service.core.values import NO_STREAM, Reply
from service.transports.v1.call import Call, flag, reply_options
from service.transports.v1.problems import problem
from service.transports.v1.replies import etag
from service.transports.v1.reply_types import AppliedItem, FailedItem, ManyReply, PredictReply


async def post_chunk(call: Call) -> Response:
    """Send one chunk of a stream and get its outputs.

    Continue the stream from the state after its last chunk; every event gets its output.

    The first chunk creates the stream. With a `position`, the index of the chunk's first event,
    the chunk is applied exactly once: a retry of the stream's last chunk gets the stored reply,
    and a chunk that would skip or repeat events is rejected with the expected position.
    """
    options = call.reply_options()
    reader = call.codec.reader
    chunk = await call.read(reader.chunk, call.key, call.precondition, queues=True)
    processing = call.api.pipeline.process(call.caller, chunk, call.deadline_s)
    result = await call.until_disconnect(processing)
    headers = [(b"server-timing", server_timing(result))]
    if result.head is not NO_STREAM:
        headers.insert(0, etag(result.head))
    return call.reply(call.codec.writer.reply(result, options), headers=headers)


async def post_chunks(call: Call) -> Response:
    """Send chunks of many streams in one request.

    Each item is one chunk and has its own outcome, in the order of the request.

    Items of one stream are applied in their order. After an item that failed, later items of
    its stream are not applied (`previous_failed`); `already_applied` and `position_behind` let
    later items through if they carry a position, so that a whole request can be sent again.
    The status is 200 even if items fail.
    """
    options = call.reply_options()
    if call.header("if-match") is not None:
        raise InvalidPrecondition(
            "If-Match: expected none, since it would name one stream of many; send `if_match` in "
            "an item",
            at="If-Match",
            expected="none",
        )
    items = await call.read(call.codec.reader.items, queues=True)
    processing = call.api.pipeline.process_many(call.caller, items, call.deadline_s)
    results = await call.until_disconnect(processing)
    return call.reply(_outcomes(call, results, options))


async def post_predict(call: Call) -> Response:
    """Run whole sequences, storing nothing.

    Each sequence starts from the initial state, or continues that of its `state_token`. No
    stream is read or changed.
    """
    # the state of a whole sequence is no stream's, so it needs no right to read states
    options = reply_options(call.parameters, call.codec.writer)
    return_tokens = flag(call.parameters, "return_state_token", default=False)
    sequences = await call.read(call.codec.reader.sequences)
    predicting = call.api.pipeline.predict(
        call.caller, call.served.name, sequences, call.deadline_s, return_tokens=return_tokens
    )
    predictions = await call.until_disconnect(predicting)
    document: PredictReply = {
        "model": call.served.name,
        "version": call.served.version,
        "predictions": CountedList(
            [
                call.codec.writer.prediction(each, options, call.answer_media)
                for each in predictions
            ],
            [each.outputs.size for each in predictions],
        ),
    }
    return call.reply(document)


def _outcomes(
    call: Call, results: Sequence[Reply | CarryError], options: ReplyOptions
) -> ManyReply:
    name, writer = call.served.name, call.codec.writer
    outcomes: list[AppliedItem | FailedItem] = []
    for result in results:
        if isinstance(result, CarryError):
            call.api.recorder.record_error(name, result)
            error = problem(result)
            outcomes.append({"status": error["status"], "error": error})
        else:
            outcomes.append({"status": 200, "reply": writer.reply(result, options)})
    return {
        "model": name,
        "version": call.served.version,
        "results": CountedList(
            outcomes,
            [-1 if isinstance(each, CarryError) else each.outputs.size for each in results],
        ),
    }
