"""Watching a stream that others feed: its outputs as server-sent events.

The `id` of an event is the position up to which the client has all that can be delivered, so that a
browser that reconnects continues there (`Last-Event-ID`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Final

from fastapi import FastAPI
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.access.caller import Verb
from service.codec.field_rules import MAX_POSITION
from service.codec.media import Media, dumps
from service.codec.pieces import encode_in_turns
from service.codec.reply_writer import ReplyOptions
from service.core.values import StreamHead, StreamKey
from service.pipeline.model_versions import ModelVersions
from service.pipeline.watching import Gap, Idle, Outputs, Watch, Watched, Watches, WatchEvent
from service.transports.v1.call import Call, invalid_value
from service.transports.v1.context import ModelCodec
from service.transports.v1.route import Route, parameter
from service.transports.v1.table import RETURN_SEQUENCES

ROUTE: Final = "/v1/models/{model}/streams/{stream}/outputs"
HEARTBEAT_S: Final = 15.0
"""Time between two comments if nothing happens."""

RETRY_MS: Final = 1000
WRITE_BYTES: Final = 16 * 1024
"""Maximum bytes written before the client has to read again."""

LAST_EVENT_ID: Final = "last-event-id"
_HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no"}
_POSITION: Final = {"type": "integer", "minimum": 0}
_FROM: Final = parameter(
    "query",
    "from",
    "Deliver outputs from this position on, as far as they are known; by default from the current "
    "position.",
    _POSITION,
)
_LAST_EVENT_ID: Final = parameter(
    "header",
    "Last-Event-ID",
    "As `from`, and before it; browsers send it when they reconnect.",
    _POSITION,
)
_is_position = re.compile(r"[0-9]{1,19}", re.ASCII).fullmatch


def add_watching(app: FastAPI, watches: Watches) -> None:
    """Serve the outputs of streams to watchers, in an application that `create_api` made."""
    encoding = asyncio.Lock()

    async def watch_outputs(call: Call) -> Response:
        """Watch the outputs of a stream.

        They are streamed from now on or from a position.
        """
        start = _start(call.parameters.pop("from", None), call.header(LAST_EVENT_ID))
        options = call.reply_options()
        async with AsyncExitStack() as stack:
            watch = await stack.enter_async_context(watches.watch(call.caller, call.key, start))
            stack.callback(call.api.access.notify_end(call.caller, watch.end))
            versions = call.api.pipeline.versions[call.key.model]
            events = _EventWriter(call.codec, versions, call.key, options, encoding).encode(watch)
            return _WatchResponse(events, stack.pop_all())

    route = Route(
        "GET",
        ROUTE,
        watch_outputs,
        verbs=(Verb.WATCH,),
        replies={
            200: "Events `stream`, `outputs`, `gap` and `end`, until the client disconnects. The "
            "`id` of an event is a position."
        },
        content={"text/event-stream": {"schema": {"type": "string"}}},
        parameters=(_FROM, _LAST_EVENT_ID, RETURN_SEQUENCES),
        tag="streams",
    )
    app.router.routes.append(route)


class _WatchResponse(StreamingResponse):
    """The events of a watch, which ends with the response.

    A client may disconnect before the first event is asked for: then its iterator never runs, and
    cannot end the watch itself.
    """

    def __init__(self, events: AsyncIterator[bytes], watch: AsyncExitStack):
        super().__init__(events, headers=_HEADERS, media_type="text/event-stream")
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the watch ends or the client disconnects."""
        async with self._watch:
            await super().__call__(scope, receive, send)


def _start(parameter: str | None, last_event_id: str | None) -> int | None:
    """The position from which outputs are wanted; that of a reconnecting client comes first.

    Raises:
        InvalidInput
    """
    for at, text in (("Last-Event-ID", last_event_id), ("?from", parameter)):
        if text:
            if not _is_position(text) or int(text) > MAX_POSITION:
                raise invalid_value(at, "a position", text)
            return int(text)
    return None


class _EventWriter:
    """Encodes the events of one watch.

    Args:
        lock: held while outputs are encoded; other watches of the stream then need not encode
            them as well, even if they are long and the event loop runs between their pieces.
    """

    def __init__(
        self,
        codec: ModelCodec,
        versions: ModelVersions,
        key: StreamKey,
        options: ReplyOptions,
        lock: asyncio.Lock,
    ):
        self._writer = codec.writer
        self._versions = versions
        self._stream = key.stream
        self._options = options
        self._lock = lock

    def _names(self) -> dict[str, Any]:
        """The members that events begin with; the version is the one that answers now."""
        answering = self._versions.route.answering(self._stream)
        return {"model": answering.name, "version": answering.version, "stream": self._stream}

    async def encode(self, watch: Watch) -> AsyncIterator[bytes]:
        """The whole response, in pieces that each wait for the client to read."""
        yield b"retry: %d\n\n" % RETRY_MS
        async for events in watch.follow(HEARTBEAT_S):
            text = b"".join([await self._event(event) for event in events])
            for at in range(0, len(text), WRITE_BYTES):
                yield text[at : at + WRITE_BYTES]

    async def _event(self, event: WatchEvent) -> bytes:
        if isinstance(event, Outputs):
            if not self._versions.can_write(event.outputs, event.fingerprint):
                return await self._event(Gap(event.start, event.head.position))
            return event.encoded.get(self._options) or await self._encode_outputs(event)
        if isinstance(event, Idle):
            return b": idle\n\n"
        if isinstance(event, Watched):
            document = {**self._names(), **_head(event.head)}
            return _event_text(b"stream", event.position, dumps(Media.JSON, document))
        if isinstance(event, Gap):
            document = {"from": event.start, "to": event.end}
            return _event_text(b"gap", event.end, dumps(Media.JSON, document))
        return _event_text(b"end", None, dumps(Media.JSON, {"reason": event.reason}))

    async def _encode_outputs(self, event: Outputs) -> bytes:
        """An event of outputs, encoded once for all watches of the stream with these options."""
        outputs = self._writer.outputs(event.outputs, self._options)
        document = {**self._names(), "from": event.start, **_head(event.head), "outputs": outputs}
        async with self._lock:
            if (encoded := event.encoded.get(self._options)) is not None:
                return encoded
            data = await encode_in_turns(document)
            encoded = _event_text(b"outputs", event.head.position, data)
            event.encoded[self._options] = encoded
        return encoded


def _event_text(name: bytes, position: int | None, data: bytes) -> bytes:
    identity = b"" if position is None else b"id: %d\n" % position
    return b"event: %b\n%bdata: %b\n\n" % (name, identity, data)


def _head(head: StreamHead | None) -> dict[str, Any]:
    if head is None:
        return {"position": 0}
    return {"epoch": head.epoch.hex(), "position": head.position, "tag": head.tag.hex()}
