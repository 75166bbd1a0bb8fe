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

import asyncio
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from structlog.contextvars import bound_contextvars
from uvicorn.server import ServerState
from websockets.datastructures import Headers as WebSocketHeaders
from websockets.exceptions import InvalidHeader, InvalidUpgrade
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from service.access.principal import Verb
from service.codec.media import Media
from service.codec.reply_writer import (
    EVERY_STEP,
    REPLY_PARAMETERS,
    ReplyOptions,
)
from service.core.errors import CarryError, InvalidInput, StreamNotFound
from service.core.tracing import PROPAGATED
from service.core.values import StreamKey
from service.pipeline.scoped_pipeline import PipelineInterface
from service.server.connections import Connections
from service.server.errors import DuplicateField, MalformedRequest, UpgradeRequired
from service.server.framing import Headers
from service.server.origins import check_origin
from service.server.settings import WebSocketSettings
from service.telemetry.logs import RequestIds
from service.telemetry.request_lines import RequestFacts, log_request
from service.transports.common.failure_log import log_failure, log_unexpected_failure
from service.transports.live.frames import hello_frame
from service.transports.live.live_socket import LiveSocket
from service.transports.live.session import Session
from service.transports.v1.context import ApiContext
from service.transports.v1.error_responses import CLOSE, error_response
from service.transports.v1.problems import status_of
from service.transports.v1.request_fields import parse_query, parse_timeout, stream_name
from service.transports.v1.request_log import REQUEST_ID_HEADER, is_request_id

STREAM_ROUTE: Final = "/v1/models/{model}/streams/{stream}/live"
MODEL_ROUTE: Final = "/v1/models/{model}/live"
TIMEOUT_PARAMETER: Final = "timeout_s"
SUBPROTOCOL: Final = Subprotocol("carry")

MAX_ITEMS: Final = 64
"""Maximum items of the lists in a handshake: the library takes a microsecond for each."""

_PROTOCOLS: Final = b"sec-websocket-protocol"
_OFFERED_KEYS = re.compile(rb"(?:\A|,)[ \t]*carry\.bearer\.([^,]*)")
_LISTS: Final = (b"connection", b"upgrade", _PROTOCOLS)
_READ: Final = frozenset(
    (*_LISTS, b"sec-websocket-key", b"sec-websocket-version", b"origin", b"host")
)
_ADDRESS = re.compile(rb"/v1/models/([^/?#]+)(?:/streams/([^/?#]+))?/live(?:\?([^#]*))?")


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
class LiveUpgrader:
    """Opens the live sockets of one application (`http_protocol.Upgrader`).

    Attributes:
        origins: as of `check_origin`.
    """

    api: ApiContext
    connections: Connections
    ids: RequestIds
    settings: WebSocketSettings
    origins: frozenset[str]
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def serves(self, url: bytes) -> bool:
        """Whether the address is one of a live socket."""
        return _ADDRESS.fullmatch(url) is not None

    def take_over(
        self, transport: asyncio.Transport, url: bytes, headers: Headers, server: ServerState
    ) -> None:
        """Open a live socket on a connection, or answer with an error."""
        request_id = self.ids.next()
        for name, value in headers:
            if name == REQUEST_ID_HEADER and is_request_id(value):
                request_id = bytes(value)
        address = _ADDRESS.fullmatch(url)
        is_of_stream = address is not None and address[2] is not None
        socket = LiveSocket(
            transport,
            server,
            self.connections,
            self.settings,
            self.api.limits.max_body_bytes,
            request_id=request_id,
            route=STREAM_ROUTE if is_of_stream else MODEL_ROUTE,
            logger=_library_logger(),
        )
        transport.set_protocol(socket)
        opening = self._open(socket, url, headers, request_id)
        task = asyncio.get_running_loop().create_task(opening)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(
        self, socket: LiveSocket, url: bytes, headers: Headers, request_id: bytes
    ) -> None:
        """Answer a handshake."""
        began_s = time.monotonic()
        status, facts = 101, RequestFacts()
        propagated = _propagated(headers)
        with bound_contextvars(request_id=request_id.decode()):
            try:
                # first, since it takes constant time, whatever the head
                access = self.api.access
                pipeline = access.open_pipeline or access.pipeline(_authorization(headers))
                facts.key = pipeline.key_id
                response = self._accept(url, headers)
                target = self._target(pipeline, url)
                facts.model, facts.stream = target.model, target.stream
                hello = await self._hello(pipeline, target)
                response.headers[REQUEST_ID_HEADER.decode()] = request_id.decode()
                session = Session(
                    self.api,
                    pipeline,
                    target.model,
                    target.stream,
                    options=target.options,
                    timeout_s=target.timeout_s,
                    request_id=request_id,
                    route=socket.route,
                    propagated=propagated,
                    send=socket.send,
                    on_progress=socket.on_progress,
                    on_end=socket.revoke,
                )
                socket.start(session, response.serialize(), hello_frame(hello))
            except Exception as failure:
                error = (
                    failure if isinstance(failure, CarryError) else log_unexpected_failure(failure)
                )
                status = status_of(error)
                log_failure(error)
                facts.note_error(error)
                self.api.recorder.record_error(facts.model or "-", error)
                lines = CLOSE + _upgrade_lines(error)
                socket.reject(error_response(error, Media.JSON, request_id, lines))
        ms = round((time.monotonic() - began_s) * 1000, 2)
        log_request(
            request_id.decode(),
            "GET",
            socket.route,
            status,
            ms,
            model=facts.model,
            stream=facts.stream,
            code=facts.code,
            key=facts.key,
            reason=facts.reason,
        )

    def _accept(self, url: bytes, headers: Headers) -> Response:
        """The response that switches the protocol.

        Raises:
            UpgradeRequired, MalformedRequest, OriginNotAllowed
        """
        items = sum([value.count(b",") + 1 for name, value in headers if name in _LISTS])
        if items > MAX_ITEMS:
            raise MalformedRequest(
                f"Connection, Upgrade, Sec-WebSocket-Protocol: expected at most {MAX_ITEMS} items, "
                f"got {items}"
            )
        received = WebSocketHeaders(
            [
                (name.decode("latin-1"), value.decode("latin-1"))
                for name, value in headers
                if name in _READ
            ]
        )
        library = ServerProtocol(logger=_library_logger(), select_subprotocol=_select_subprotocol)
        response = library.accept(Request(url.decode("latin-1"), received))
        failure = library.handshake_exc
        if failure is not None:
            versions = received.get_all("Sec-WebSocket-Version")
            is_other = len(versions) == 1 and versions != ["13"]
            wants_other = isinstance(failure, InvalidUpgrade) or is_other
            kind = UpgradeRequired if wants_other else MalformedRequest
            raise kind(f"expected a WebSocket handshake: {_reason(failure)}")
        check_origin(received.get_all("Origin"), received.get("Host", ""), self.origins)
        del response.headers["Date"]
        return response

    def _target(self, pipeline: PipelineInterface, url: bytes) -> Target:
        """What an address names.

        Raises:
            ModelNotFound, InvalidName, InvalidInput, DuplicateField, ChunksUnsupported, Forbidden
        """
        address = _ADDRESS.fullmatch(url)
        if address is None:
            raise RuntimeError("the address is none of a live socket")
        model = _text(address[1])
        stream = None if address[2] is None else _text(address[2])
        pipeline.require(Verb.PREDICT, model=model, stream=stream)
        codec = self.api.codec(pipeline.model(model))
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
            pipeline.require(Verb.READ_STATE, model=model, stream=stream)
        return Target(codec.served.name, stream, options, timeout_s)

    async def _hello(self, pipeline: PipelineInterface, target: Target) -> Mapping[str, Any]:
        """What a client has to know first: where its stream is, and what it may send.

        Raises:
            StoreUnavailable, StateDamaged
        """
        served = pipeline.model(target.model)
        facts: dict[str, Any] = {"model": served.name, "version": served.version}
        if target.stream is not None:
            key = StreamKey(served.name, target.stream)
            facts |= {"stream": target.stream, "position": 0}
            try:
                deadline_s = time.monotonic() + self.api.limits.effective_timeout_s(None)
                stored = await pipeline.streams.read(key, deadline_s)
                head = stored.head
                facts |= {
                    "position": head.position, "epoch": head.epoch.hex(), "tag": head.tag.hex(),
                }  # fmt: skip
            except StreamNotFound:
                # the first chunk creates it
                pass
        return {
            **facts,
            "window": self.settings.pipelining_window,
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
    values = [bytes(value) for name, value in headers if name == b"authorization"]
    offered = b",".join([value for name, value in headers if name == _PROTOCOLS])
    values += [b"Bearer " + key.rstrip() for key in _OFFERED_KEYS.findall(offered)]
    if len(values) > 1:
        raise DuplicateField(
            f"Authorization: expected one key, got {len(values)}", at="Authorization"
        )
    return values[0] if values else None


def _reason(failure: Exception) -> str:
    """What is wrong with a handshake, without the list of subprotocols, which may have a key."""
    if isinstance(failure, InvalidHeader) and failure.name.lower().encode() == _PROTOCOLS:
        return f"invalid {failure.name} header"
    return str(failure)[:300]


def _select_subprotocol(_: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return SUBPROTOCOL if SUBPROTOCOL in offered else None


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


def _upgrade_lines(error: CarryError) -> bytes:
    """The headers that a response to a wrong upgrade has to have."""
    is_wrong = isinstance(error, UpgradeRequired)
    return b"upgrade: websocket\r\nsec-websocket-version: 13\r\n" if is_wrong else b""


def _library_logger() -> logging.Logger:
    """The library's logger; it logs each connection at `info`, and the service does so itself."""
    logger = logging.getLogger("websockets.server")
    logger.setLevel(logging.WARNING)
    return logger
