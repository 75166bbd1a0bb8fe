"""Handshakes of live sockets: from an upgrade request to an open socket, or to an HTTP error.

An address names one stream or a model. The request is checked, and a stream's position is read,
before the protocol is switched, so that a failure is a problem document as of any other request.
The hello that follows says where to continue.

A client shows its access key in the header Authorization. A browser cannot set it, and offers the
subprotocols `carry` and `carry.bearer.` with the key instead; the answer names the first only.

A browser sends cookies and reaches private networks with WebSockets of any page. So a request that
has an `Origin` is accepted from the service's own host only, or from origins that the settings
allow; programs send none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import structlog
from structlog.contextvars import bound_contextvars
from websockets.frames import CloseCode

from service.access.caller import PREDICT, Caller, Verb
from service.codec.media import Media
from service.codec.reply_writer import (
    EVERY_STEP,
    REPLY_PARAMETERS,
    ReplyOptions,
)
from service.core.errors import CarryError, InvalidInput, StreamNotFound
from service.core.tracing import PROPAGATED
from service.core.values import StreamKey
from service.server.errors import DuplicateField
from service.server.origins import check_origin
from service.server.websocket_protocol import Message, Receive, Send, WebSocketProtocol
from service.telemetry.access_log import RequestFacts, access_log, log_request
from service.telemetry.logs import RequestIds
from service.transports.common.failure_log import log_failure, log_unexpected_failure
from service.transports.live.frames import hello_frame
from service.transports.live.session import Session
from service.transports.v1.context import ApiContext
from service.transports.v1.error_responses import CLOSE, error_response
from service.transports.v1.problems import status_of
from service.transports.v1.request_fields import parse_query, parse_timeout, stream_name
from service.transports.v1.request_log import REQUEST_ID_HEADER, is_request_id

STREAM_ROUTE: Final = "/v1/models/{model}/streams/{stream}/live"
MODEL_ROUTE: Final = "/v1/models/{model}/live"
TIMEOUT_PARAMETER: Final = "timeout_s"
SUBPROTOCOL: Final = "carry"

_OFFERED_KEYS = re.compile(rb"(?:\A|,)[ \t]*carry\.bearer\.([^,]*)")
_ADDRESS = re.compile(
    rb"/v1/models/([^/?#\x80-\xff]+)(?:/streams/([^/?#\x80-\xff]+))?/live"
    rb"(?:\?([^#\x80-\xff]*))?"
)
serves = _ADDRESS.fullmatch
"""Whether an address is one of a live socket."""

Headers = Sequence[tuple[bytes, bytes]]

log = structlog.get_logger(__name__)


class Target(NamedTuple):
    """What a socket is for.

    Attributes:
        stream: None for a socket for many streams.
        timeout_s: deadline of each of its chunks.
    """

    model: str
    stream: str | None
    options: ReplyOptions
    timeout_s: float


@dataclass(frozen=True, slots=True)
class LiveSockets:
    """The live sockets of one application (`WebSockets.app`).

    Attributes:
        window: most unanswered chunks of a socket.
        origins: as of `check_origin`.
    """

    api: ApiContext
    ids: RequestIds
    window: int
    origins: frozenset[str]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a handshake, and serve the socket until it is closed."""
        await receive()
        socket: WebSocketProtocol = scope["socket"]
        headers: Headers = scope["headers"]
        request_id = self.ids.next()
        for name, value in headers:
            if name == REQUEST_ID_HEADER and is_request_id(value):
                request_id = value
        query = scope["query_string"]
        address = _ADDRESS.fullmatch(scope["raw_path"] + (b"?" + query if query else b""))
        if address is None:
            raise RuntimeError("the address is none of a live socket")
        route = MODEL_ROUTE if address[2] is None else STREAM_ROUTE
        began_s = time.monotonic()
        status, facts, session = 101, RequestFacts(), None
        with bound_contextvars(request_id=request_id.decode()):
            try:
                access = self.api.access
                caller = access.open_caller or access.caller(_authorization(headers))
                facts.key = caller.key_id
                _check_origin(headers, self.origins)
                target = self._target(caller, address)
                facts.model, facts.stream = target.model, target.stream
                hello = await self._hello(caller, target)
                session = Session(
                    self.api,
                    caller,
                    socket,
                    target.model,
                    target.stream,
                    window=self.window,
                    options=target.options,
                    timeout_s=target.timeout_s,
                    request_id=request_id,
                    route=route,
                    propagated=_propagated(headers),
                )
                offers = SUBPROTOCOL in scope["subprotocols"]
                await send(
                    {
                        "type": "websocket.accept",
                        "subprotocol": SUBPROTOCOL if offers else None,
                        "headers": [(REQUEST_ID_HEADER, request_id)],
                    }
                )
                socket.send_now(hello_frame(hello), is_text=True)
            except Exception as failure:
                error = (
                    failure if isinstance(failure, CarryError) else log_unexpected_failure(failure)
                )
                status = status_of(error)
                log_failure(error)
                facts.note_error(error)
                self.api.recorder.record_error(facts.model or "-", error)
                socket.reject(error_response(error, Media.JSON, request_id, CLOSE))
        ms = round((time.monotonic() - began_s) * 1000, 2)
        log_request(request_id.decode(), "GET", route, status, ms, facts)
        if session is None or status != 101:
            return
        # the rest is kept as long as the socket is open
        scope.clear()
        opened_s = time.monotonic()
        try:
            await session.serve()
        finally:
            session.close()
            _log_closed(session, socket, request_id, route, opened_s)

    def _target(self, caller: Caller, address: re.Match[bytes]) -> Target:
        """What an address names.

        Raises:
            ModelNotFound, InvalidName, InvalidInput, DuplicateField, ChunksUnsupported, Forbidden
        """
        model = _text(address[1])
        stream = None if address[2] is None else _text(address[2])
        codec = self.api.codec(self.api.pipeline.model(caller, PREDICT, model, stream))
        if stream is not None:
            stream_name(stream)
        codec.reader.check_accepts_chunks()
        query = address[3] or b""
        options, timeout_s = EVERY_STEP, self.api.limits.effective_timeout_s(None)
        if query:
            parameters = parse_query(query, (*REPLY_PARAMETERS, TIMEOUT_PARAMETER))
            if (text := parameters.pop(TIMEOUT_PARAMETER, None)) is not None:
                timeout_s = self.api.limits.effective_timeout_s(_seconds(text))
            options = codec.writer.options(parameters)
        if options.return_state:
            self.api.pipeline.model(caller, (Verb.READ_STATE,), model, stream)
        return Target(codec.served.name, stream, options, timeout_s)

    async def _hello(self, caller: Caller, target: Target) -> Mapping[str, Any]:
        """What a client has to know first: where its stream is, and what it may send.

        Raises:
            StoreUnavailable, StateDamaged
        """
        served = self.api.pipeline.models[target.model]
        facts: dict[str, Any] = {"model": served.name, "version": served.version}
        if target.stream is not None:
            key = StreamKey(served.name, target.stream)
            facts |= {"stream": target.stream, "position": 0}
            try:
                deadline_s = time.monotonic() + self.api.limits.effective_timeout_s(None)
                stored = await self.api.pipeline.streams.read(caller, key, deadline_s)
                head = stored.head
                facts |= {
                    "position": head.position, "epoch": head.epoch.hex(), "tag": head.tag.hex(),
                }  # fmt: skip
            except StreamNotFound:
                # the first chunk creates it
                pass
        return {
            **facts,
            "window": self.window,
            "max_frame_bytes": self.api.limits.max_body_bytes,
        }


def _propagated(headers: Headers) -> dict[str, str]:
    """The headers that carry the trace of the caller; none if they are repeated."""
    lines = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in headers
        if name.decode("latin-1") in PROPAGATED
    ]
    propagated = dict(lines)
    return propagated if len(propagated) == len(lines) else {}


def _authorization(headers: Headers) -> bytes | None:
    """The Authorization of a handshake, also from the subprotocols that a browser offers.

    Raises:
        DuplicateField
    """
    values = [value for name, value in headers if name == b"authorization"]
    offered = b",".join([value for name, value in headers if name == b"sec-websocket-protocol"])
    values += [b"Bearer " + key.rstrip() for key in _OFFERED_KEYS.findall(offered)]
    if len(values) > 1:
        raise DuplicateField(
            f"Authorization: expected one key, got {len(values)}", at="Authorization"
        )
    return values[0] if values else None


def _text(part: bytes) -> str:
    """A part of a path, without its percent encoding."""
    return unquote(part.decode("latin-1"))


def _seconds(text: str) -> float:
    seconds = parse_timeout(text)
    if seconds is None:
        at, expected = f"?{TIMEOUT_PARAMETER}", "decimal seconds above 0, such as 2.5"
        raise InvalidInput(
            f"{at}: expected {expected}, got {text[:300]!r}", at=at, expected=expected, got=text
        )
    return seconds


def _check_origin(headers: Headers, allowed: frozenset[str]) -> None:
    """Reject a handshake of a page of another site.

    Raises:
        OriginNotAllowed
    """
    texts: dict[bytes, list[str]] = {b"origin": [], b"host": [""]}
    for name, value in headers:
        if name in texts:
            texts[name].append(value.decode("latin-1"))
    check_origin(texts[b"origin"], texts[b"host"][-1], allowed)


def _log_closed(
    session: Session, socket: WebSocketProtocol, request_id: bytes, route: str, opened_s: float
) -> None:
    stream = session.stream and access_log.named(session.stream)
    close = socket.conn.close_sent or socket.conn.close_rcvd
    log.info(
        "websocket_closed",
        request_id=request_id.decode(),
        route=route,
        code=CloseCode.ABNORMAL_CLOSURE.value if close is None else close.code,
        model=session.model,
        **({} if stream is None else {"stream": stream}),
        chunks=session.chunks,
        errors=session.errors,
        received_bytes=socket.received_bytes,
        sent_bytes=socket.sent_bytes,
        ms=round((time.monotonic() - opened_s) * 1000, 2),
    )
