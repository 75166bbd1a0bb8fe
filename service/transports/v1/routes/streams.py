"""Streams: read, list, delete, restore, fork, rewind and forecast.

All is answered from the store. A request that overwrites a stream needs an If-Match header
with that stream's ETag.
"""

from __future__ import annotations

from urllib.parse import quote

from starlette.responses import Response

from models.artifact.fingerprint import version_of
from models.errors import DataError, StateError
from models.events.encode import MAX_RESTORED_SEEN, Clock
from models.events.values import check_rows
from models.spec.blocks import WAITING
from models.spec.state import State
from service.codec.body_types import ForkBody, RewindBody
from service.codec.decoding import invalid
from service.codec.field_rules import MAX_POSITION, stream_name, stream_prefix
from service.codec.media import Media
from service.core.errors import InvalidInput, StateIncompatible
from service.core.values import Feed, StreamKey, StreamState
from service.pipeline.rewind import available_positions
from service.pipeline.served_model import ServedModel
from service.store.history_codec import HistoryEntry
from service.transports.v1.call import Call, count
from service.transports.v1.replies import etag
from service.transports.v1.reply_types import (
    Deleted,
    HistoryReply,
    KeptChunk,
    StateReply,
    StreamInfo,
    StreamList,
    StreamRecord,
)

PAGE_STREAMS = 100
PAGE_EVENTS = 1000
MAX_DELETED = 100_000


async def get_stream(call: Call) -> Response:
    """Current state of a stream, without its values.

    Position, epoch, tag, age, size, and the version of the model that wrote its state.
    """
    streams = call.api.pipeline.streams
    record = await streams.read(call.caller, call.key, precondition=call.precondition)
    return call.reply(stream_info(call, call.key, record), headers=[etag(record.head)])


async def delete_stream(call: Call) -> Response:
    """Delete a stream.

    Deletes its state and its stored reply; its next chunk starts a new stream at position 0.
    """
    await call.api.pipeline.streams.delete(call.caller, call.key, call.precondition)
    return Response(status_code=204)


async def get_state(call: Call) -> Response:
    """The state of a stream, by name.

    The whole state with all that is needed to restore it.

    Rejected (`state_incompatible`) if a version wrote it that is not loaded. With `version`, the
    state of that version: it is computed if the version is not at the stream's position.
    """
    pipeline, name = call.api.pipeline, call.parameters.get("version")
    version = None if name is None else pipeline.aliases.find(call.key.model, name)
    reading = pipeline.streams.read_state(call.caller, call.key, call.precondition, version)
    record = await call.until_disconnect(reading)
    writer = pipeline.versions[call.key.model].writer(record.fingerprint)
    document: StateReply = {
        **_stream_record(call.key, record),
        "state": call.codec.writer.state(record.state, writer),
    }
    return call.reply(document, headers=[etag(record.head)])


async def put_state(call: Call) -> Response:
    """Restore a stream from a state.

    Accepts what `GET` returned, of this stream or another. The stream gets a new epoch.

    A stream that exists is overwritten only under `If-Match` with its ETag. 201 if the stream was
    created, 200 if it was overwritten.
    """
    call.codec.reader.check_accepts_chunks()
    fingerprint, feed, position, state, since = await call.read(_read_state, call)
    record = await call.api.pipeline.streams.restore(
        call.caller,
        call.key,
        feed=feed,
        position=position,
        fingerprint=fingerprint,
        state=state,
        since=since,
        precondition=call.precondition,
    )
    return _created_or_overwritten(call, call.key, record)


async def post_fork(call: Call) -> Response:
    """Start a second stream from the state of this one.

    The new stream has this one's state, position and kind of feed, and an epoch of its own.

    An existing stream of that name is overwritten only under `If-Match` with *its* ETag, that
    of the stream `to`. 201 if it was created, 200 if it was overwritten.
    """
    body = await call.read_as(ForkBody)
    to = StreamKey(call.key.model, stream_name(body.to, "to"))
    streams = call.api.pipeline.streams
    record = await streams.fork(call.caller, call.key, to.stream, call.precondition)
    return _created_or_overwritten(call, to, record)


async def get_history(call: Call) -> Response:
    """What is kept of a stream's past.

    Its recent events as they came, the positions of the snapshots of its state, and the positions
    to which it can be rewound. A model keeps a history if its `history` says so.
    """
    limits, parameters = call.api.limits, call.parameters
    start = count(parameters, "from", default=0, minimum=0, maximum=MAX_POSITION)
    limit = count(parameters, "limit", default=PAGE_EVENTS, maximum=limits.max_chunk_steps)
    streams = call.api.pipeline.streams
    histories = await streams.histories(call.caller, call.key, call.precondition)
    history = histories[0]
    chunks, next_position = history.cut(start, limit)
    document: HistoryReply = {
        **_stream_record(call.key, history.stream),
        "available": [[*each] for each in available_positions(histories)],
        "snapshots": sorted({at for each in histories for at in each.positions}),
        "start": history.start,
        "chunks": [_kept_chunk(each) for each in chunks],
        "next": next_position,
    }
    return call.reply(document, headers=[etag(history.stream.head)])


async def post_rewind(call: Call) -> Response:
    """Take a stream back to an earlier position.

    The stream gets the state that it had after `position` events, and a new epoch; later events
    and snapshots are dropped. The state is exact: rejected (`position_unavailable`, with the
    positions that are `available`) if it cannot be computed from what is kept.

    With `If-Match` only if the stream is in the state that it names, so that a repeated request is
    not applied to what came after it.
    """
    body = await call.read_as(RewindBody)
    record = await call.api.pipeline.streams.rewind(
        call.caller, call.key, body.position, call.precondition
    )
    return call.reply(stream_info(call, call.key, record), headers=[etag(record.head)])


async def post_forecast(call: Call) -> Response:
    """Forecast from the current state of a stream.

    The model's decoder starts from the stream's stored state and predicts `horizon` steps ahead.

    Nothing is stored and the stream does not change. The reply has the medians, quantiles of each
    step along them and, with `samples`, drawn paths; the same `seed` draws the same paths from
    the same state. With a `position` the stream has to be at that position, with
    `If-Match` in the state that it names.
    """
    call.served.require_decoder()
    parameters = await call.read(call.codec.reader.forecast_request, call.key.stream)
    parameters = parameters._replace(precondition=call.precondition)
    forecasting = call.api.pipeline.forecast(call.caller, call.key, parameters, call.deadline_s)
    forecast = await call.until_disconnect(forecasting)
    document = call.codec.writer.forecast(forecast, parameters)
    return call.reply(document, headers=[etag(forecast.head)])


async def get_streams(call: Call) -> Response:
    """List streams.

    One page of names, in no order; continue with its `cursor` until that is null.

    A stream that exists throughout a listing comes at least once; a name may come twice, and a
    page may be empty before the last.
    """
    name, parameters = call.served.name, call.parameters
    maximum = call.api.limits.max_items
    limit = count(parameters, "limit", default=PAGE_STREAMS, maximum=maximum)
    prefix = stream_prefix(parameters.get("prefix", ""))
    page = await call.api.pipeline.streams.page(
        call.caller, name, prefix, parameters.get("cursor") or None, limit
    )
    document: StreamList = {"model": name, "streams": list(page.streams), "cursor": page.cursor}
    return call.reply(document)


async def delete_streams(call: Call) -> Response:
    """Delete every stream whose name starts with a prefix.

    The parameter `prefix` is required; `?prefix=` alone deletes all streams of the model.

    With `limit`, the request ends after about that many; continue with its `cursor` until that is
    null. Streams that are created meanwhile may remain.
    """
    name, parameters = call.served.name, call.parameters
    if "prefix" not in parameters:
        expected = "this parameter, which selects the streams to delete (?prefix= for all)"
        raise invalid("?prefix", expected, "nothing")
    prefix = stream_prefix(parameters["prefix"])
    limit = None
    if "limit" in parameters:
        limit = count(parameters, "limit", default=MAX_DELETED, maximum=MAX_DELETED)
    deleted, cursor = await call.api.pipeline.streams.delete_prefix(
        call.caller, name, prefix, parameters.get("cursor") or None, limit
    )
    document: Deleted = {"model": name, "deleted": deleted, "cursor": cursor}
    return call.reply(document)


def _stream_record(key: StreamKey, record: StreamState) -> StreamRecord:
    fingerprint = record.fingerprint.hex()
    document: StreamRecord = {
        "model": key.model,
        "version": version_of(fingerprint),
        "fingerprint": fingerprint,
        "stream": key.stream,
        "feed": record.feed.value,
        "epoch": record.head.epoch.hex(),
        "position": record.head.position,
        "tag": record.head.tag.hex(),
        "updated_ms": record.updated_ms,
    }
    if record.since is not None:
        document["since"] = record.since
    return document


def stream_info(call: Call, key: StreamKey, record: StreamState) -> StreamInfo:
    """The current state of a stream, without its values."""
    age_ms = max(0, call.api.now_ms() - record.updated_ms)
    return {
        **_stream_record(key, record),
        "age_s": age_ms / 1000,
        "state_bytes": record.state.floats.nbytes + record.state.ints.nbytes,
    }


def _kept_chunk(chunk: HistoryEntry) -> KeptChunk:
    steps = chunk.steps
    kept: KeptChunk = {"position": chunk.start}
    if steps.columns is not None:
        kept["events"] = steps.columns.to_events()
    elif steps.rows is not None:
        kept["inputs"] = steps.rows.tolist()
    if steps.resets:
        kept["resets"] = [*steps.resets]
    if chunk.final:
        kept["final"] = True
    if steps.false_alarms_per_day is not None:
        kept["false_alarms_per_day"] = steps.false_alarms_per_day
    return kept


def _created_or_overwritten(call: Call, key: StreamKey, record: StreamState) -> Response:
    """The reply to a restore or a fork: without a precondition it can only have created."""
    document, headers = stream_info(call, key, record), [etag(record.head)]
    if call.precondition is not None:
        return call.reply(document, 200, headers)
    location = f"/v1/models/{key.model}/streams/{quote(key.stream)}"
    return call.reply(document, 201, [*headers, (b"location", location.encode())])


def _read_state(
    content: bytes, media: Media, call: Call
) -> tuple[bytes, Feed, int, State, int | None]:
    """Fingerprint, feed, position, state and `since` of a body, whose objects end here, before the
    garbage collector would traverse them.

    Raises:
        MalformedBody, InvalidInput, StateIncompatible
    """
    stream = call.key.stream
    body = call.codec.reader.state(content, media)
    served = call.api.pipeline.versions[call.key.model].writer(bytes.fromhex(body.fingerprint))
    expected = served.fingerprint.hex()
    if body.fingerprint != expected:
        raise StateIncompatible(
            f"fingerprint: expected {expected} of the served version {served.version}, got "
            f"{body.fingerprint}",
            at="fingerprint",
            expected=expected,
            got=body.fingerprint,
            stream=stream,
        )
    try:
        state = served.state.from_names(body.state)
        Clock.from_ints(served.state, state.ints, MAX_RESTORED_SEEN)
        _check_waiting(served, state, body.position)
    except StateError as error:
        raise InvalidInput(f"state: {error}", at="state", stream=stream) from error
    feed = Feed(body.feed)
    if feed is Feed.EVENTS and served.events is None:
        raise InvalidInput(
            f"feed: expected inputs, since model {served.name!r} has no event schema, got events",
            at="feed",
            expected="inputs",
            got="events",
            stream=stream,
        )
    if body.since is not None and body.since > body.position:
        raise invalid("since", f"at most the position, {body.position}", body.since)
    return served.fingerprint, feed, body.position, state, body.since


def _check_waiting(served: ServedModel, state: State, position: int) -> None:
    """Reject waiting rows that no stream at that position has, with a StateError."""
    if served.blocks is None:
        return
    served.blocks.check_at(state, position)
    try:
        check_rows(served.artifact.spec.columns, served.blocks.pending_rows(state))
    except DataError as error:
        raise StateError(
            f"part {WAITING!r}: row {error.index}, {error.field}: expected {error.expected}, got "
            f"{error.got}"
        ) from error
