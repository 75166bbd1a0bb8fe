"""Streams: read, list, delete, restore, fork and forecast.

All is answered from the store. A request that overwrites a stream needs an If-Match header
with that stream's ETag.
"""

from __future__ import annotations

import time
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from models.errors import DataError, StateError
from models.events.encode import MAX_RESTORED_SEEN, Clock, check_rows
from models.spec.blocks import WAITING
from models.spec.state import State
from service.codec.field_rules import stream_name, stream_prefix
from service.codec.media import Media
from service.core.errors import InvalidInput, StateIncompatible
from service.core.values import Feed, Precondition, StreamKey, StreamState
from service.pipeline.served_model import ServedModel
from service.transports.common.disconnects import cancel_on_disconnect
from service.transports.v1.context import ApiContext, allowed_model, api_of
from service.transports.v1.replies import etag, reply
from service.transports.v1.reply_types import (
    Deleted,
    StateReply,
    StreamInfo,
    StreamList,
    StreamRecord,
)
from service.transports.v1.request_body import receive_body
from service.transports.v1.request_fields import (
    body_media,
    count,
    deadline,
    if_match,
    query,
    reply_media,
    required,
)
from service.transports.v1.route import ModelPath, StreamPath

PAGE_STREAMS = 100
MAX_DELETED = 100_000
VERSION_DIGITS = 12


async def get_stream(request: Request, model: ModelPath, stream: StreamPath) -> Response:
    """Current state of a stream, without its values.

    Position, epoch, tag, age, size, and the version of the model that wrote its state.
    """
    caller, served = allowed_model(request, model, stream)
    api = api_of(request)
    query(request)
    answer = reply_media(request)
    key = StreamKey(served.name, stream_name(stream))
    record = await api.pipeline.streams.read(caller, key, precondition=if_match(request))
    return reply(answer, _info(request, key, record), headers=[etag(record.head)])


async def delete_stream(request: Request, model: ModelPath, stream: StreamPath) -> Response:
    """Delete a stream.

    Deletes its state and its stored reply; its next chunk starts a new stream at position 0.
    """
    caller, served = allowed_model(request, model, stream)
    api = api_of(request)
    query(request)
    await api.pipeline.streams.delete(
        caller, StreamKey(served.name, stream_name(stream)), if_match(request)
    )
    return Response(status_code=204)


async def get_state(request: Request, model: ModelPath, stream: StreamPath) -> Response:
    """The state of a stream, by name.

    The whole state with all that is needed to restore it.

    Rejected (`state_incompatible`) if another version of the model wrote it.
    """
    caller, served = allowed_model(request, model, stream)
    api = api_of(request)
    query(request)
    answer = reply_media(request)
    key = StreamKey(served.name, stream_name(stream))
    record = await api.pipeline.streams.read_state(caller, key, if_match(request))
    document: StateReply = {
        **_stream_record(key, record),
        "state": api.codec(served).writer.state(record.state),
    }
    return reply(answer, document, headers=[etag(record.head)])


async def put_state(request: Request, model: ModelPath, stream: StreamPath) -> Response:
    """Restore a stream from a state.

    Accepts what `GET` returned, of this stream or another. The stream gets a new epoch.

    A stream that exists is overwritten only under `If-Match` with its ETag. 201 if the stream was
    created, 200 if it was overwritten.
    """
    caller, served = allowed_model(request, model, stream)
    api = api_of(request)
    query(request)
    key = StreamKey(served.name, stream_name(stream))
    codec = api.codec(served)
    codec.reader.check_accepts_chunks()
    media = body_media(request)
    answer = reply_media(request, media)
    precondition = if_match(request)
    content = await receive_body(request, media, _deadline(api))
    body = await content.read(codec.reader.state)
    fingerprint = bytes.fromhex(body.fingerprint)
    if fingerprint != served.fingerprint:
        raise _fingerprint_mismatch(served, key.stream, fingerprint)
    try:
        state = served.state.from_names(body.state)
        Clock.from_ints(served.state, state.ints, MAX_RESTORED_SEEN)
        _check_waiting(served, state, body.position)
    except StateError as error:
        raise InvalidInput(f"state: {error}", at="state", stream=key.stream) from error
    feed = Feed(body.feed)
    if feed is Feed.EVENTS and served.events is None:
        raise InvalidInput(
            f"feed: expected inputs, since model {served.name!r} has no event schema, got events",
            at="feed",
            expected="inputs",
            got="events",
            stream=key.stream,
        )
    record = await api.pipeline.streams.restore(
        caller,
        key,
        feed=feed,
        position=body.position,
        fingerprint=fingerprint,
        state=state,
        precondition=precondition,
    )
    return _created_or_overwritten(request, answer, key, record, precondition)


async def post_fork(request: Request, model: ModelPath, stream: StreamPath) -> Response:
    """Start a second stream from the state of this one.

    The new stream has this one's state, position and kind of feed, and an epoch of its own.

    An existing stream of that name is overwritten only under `If-Match` with *its* ETag, that
    of the stream `to`. 201 if it was created, 200 if it was overwritten.
    """
    caller, served = allowed_model(request, model, stream)
    api = api_of(request)
    query(request)
    key = StreamKey(served.name, stream_name(stream))
    media = body_media(request)
    answer = reply_media(request, media)
    precondition = if_match(request)
    content = await receive_body(request, media, _deadline(api))
    codec = api.codec(served)
    body = await content.read(codec.reader.fork)
    to = StreamKey(key.model, stream_name(body.to, "to"))
    record = await api.pipeline.streams.fork(caller, key, to.stream, precondition)
    return _created_or_overwritten(request, answer, to, record, precondition)


async def post_forecast(request: Request, model: ModelPath, stream: StreamPath) -> Response:
    """Forecast from the current state of a stream.

    The model's decoder starts from the stream's stored state and predicts `horizon` steps ahead.

    Nothing is stored and the stream does not change. The reply has the medians, quantiles of each
    step along them and, with `samples`, drawn paths; the same `seed` draws the same paths from
    the same state. With a `position` the stream has to be at that position, with
    `If-Match` in the state that it names.
    """
    caller, served = allowed_model(request, model, stream)
    api = api_of(request)
    codec = api.codec(served)
    deadline_s = deadline(request, api.limits)
    query(request)
    key = StreamKey(codec.served.name, stream_name(stream))
    codec.served.require_decoder()
    media = body_media(request)
    answer = reply_media(request, media)
    precondition = if_match(request)
    body = await receive_body(request, media, deadline_s)
    parameters = await body.read(codec.reader.forecast_request, key.stream)
    parameters = parameters._replace(precondition=precondition)
    forecasting = api.pipeline.forecast(caller, key, parameters, deadline_s)
    forecast = await cancel_on_disconnect(request, forecasting)
    return reply(answer, codec.writer.forecast(forecast, parameters), headers=[etag(forecast.head)])


async def get_streams(request: Request, model: ModelPath) -> Response:
    """List streams.

    One page of names, in no order; continue with its `cursor` until that is null.

    A stream that exists throughout a listing comes at least once; a name may come twice, and a
    page may be empty before the last.
    """
    caller, served = allowed_model(request, model)
    api, name = api_of(request), served.name
    parameters = query(request, ("prefix", "cursor", "limit"))
    answer = reply_media(request)
    maximum = api.limits.max_items
    limit = count(parameters, "limit", default=PAGE_STREAMS, maximum=maximum)
    prefix = stream_prefix(parameters.get("prefix", ""))
    page = await api.pipeline.streams.page(
        caller, name, prefix, parameters.get("cursor") or None, limit
    )
    document: StreamList = {"model": name, "streams": list(page.streams), "cursor": page.cursor}
    return reply(answer, document)


async def delete_streams(request: Request, model: ModelPath) -> Response:
    """Delete every stream whose name starts with a prefix.

    The parameter `prefix` is required; `?prefix=` alone deletes all streams of the model.

    With `limit`, the request ends after about that many; continue with its `cursor` until that is
    null. Streams that are created meanwhile may remain.
    """
    caller, served = allowed_model(request, model)
    api, name = api_of(request), served.name
    parameters = query(request, ("prefix", "cursor", "limit"))
    answer = reply_media(request)
    prefix = stream_prefix(
        required(parameters, "prefix", "which selects the streams to delete (?prefix= for all)")
    )
    limit = None
    if "limit" in parameters:
        limit = count(parameters, "limit", default=MAX_DELETED, maximum=MAX_DELETED)
    deleted, cursor = await api.pipeline.streams.delete_prefix(
        caller, name, prefix, parameters.get("cursor") or None, limit
    )
    document: Deleted = {"model": name, "deleted": deleted, "cursor": cursor}
    return reply(answer, document)


def _deadline(api: ApiContext) -> float:
    """The deadline of a request without `Carry-Timeout`, on the monotonic clock."""
    return time.monotonic() + api.limits.effective_timeout_s(None)


def _stream_record(key: StreamKey, record: StreamState) -> StreamRecord:
    fingerprint = record.fingerprint.hex()
    return {
        "model": key.model,
        "version": fingerprint[:VERSION_DIGITS],
        "fingerprint": fingerprint,
        "stream": key.stream,
        "feed": record.feed.value,
        "epoch": record.head.epoch.hex(),
        "position": record.head.position,
        "tag": record.head.tag.hex(),
        "updated_ms": record.updated_ms,
    }


def _info(request: Request, key: StreamKey, record: StreamState) -> StreamInfo:
    age_ms = max(0, api_of(request).now_ms() - record.updated_ms)
    return {
        **_stream_record(key, record),
        "age_s": age_ms / 1000,
        "state_bytes": record.state.floats.nbytes + record.state.ints.nbytes,
    }


def _created_or_overwritten(
    request: Request,
    answer: Media,
    key: StreamKey,
    record: StreamState,
    precondition: Precondition | None,
) -> Response:
    """The reply to a restore or a fork: without a precondition it can only have created."""
    status = 201 if precondition is None else 200
    headers = [etag(record.head)]
    if status == 201:
        location = f"/v1/models/{key.model}/streams/{quote(key.stream)}"
        headers.append((b"location", location.encode()))
    return reply(answer, _info(request, key, record), status, headers)


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


def _fingerprint_mismatch(
    served: ServedModel, stream: str, fingerprint: bytes
) -> StateIncompatible:
    expected, got = served.fingerprint.hex(), fingerprint.hex()
    return StateIncompatible(
        f"fingerprint: expected {expected} of the served version {served.version}, got {got}",
        at="fingerprint",
        expected=expected,
        got=got,
        stream=stream,
    )
