"""Handshakes of live sockets: from an upgrade request to an open socket, or to an HTTP error.

An address names one stream or a model. The request is checked, and a stream's position is read,
before the protocol is switched, so that a failure is a problem document as of any other request.
The hello that follows names where to continue.

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
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from structlog.contextvars import bound_contextvars

from service.access.caller import PREDICT, Caller, Verb
from service.codec.field_rules import stream_name
from service.codec.media import Media, dumps
from service.core.errors import StreamNotFound
from service.core.values import StreamKey
from service.server.errors import DuplicateField, UpgradeRequired
from service.server.heads import check_origin
from service.server.interface import HttpState, WebSockets
from service.server.settings import WebSocketSettings
from service.server.websocket_protocol import WebSocketProtocol
from service.telemetry.access_log import RequestFacts, log_request
from service.telemetry.logs import RequestIds
from service.transports.common.failure_log import as_carry_error, log_failure
from service.transports.live.session import Session
from service.transports.v1.call import (
    REPLY_PARAMETERS,
    TIMEOUT_EXPECTED,
    invalid_value,
    parse_query,
    parse_timeout,
    reply_options,
)
from service.transports.v1.context import ApiContext, caller_of
from service.transports.v1.problems import CLOSE, error_response
from service.transports.v1.request_log import REQUEST_ID_HEADER, request_id_of, trace_headers

STREAM_ROUTE: Final = "/v1/models/{model}/streams/{stream}/live"
MODEL_ROUTE: Final = "/v1/models/{model}/live"
TIMEOUT_PARAMETER: Final = "timeout_s"
SUBPROTOCOL: Final = "carry"

_OFFERED_KEYS = re.compile(rb"(?:\A|,)[ \t]*carry\.bearer\.([^,]*)")
_ADDRESS = re.compile(
    rb"/v1/models/([^/?#\x80-\xff]+)(?:/streams/([^/?#\x80-\xff]+))?/live"
    rb"(?:\?([^#\x80-\xff]*))?"
)

Headers = Sequence[tuple[bytes, bytes]]


def add_live_sockets(app: FastAPI, settings: WebSocketSettings) -> None:
    """Serve the live sockets of an application that `create_api` made."""
    api: ApiContext = app.state.api
    state: HttpState = app.state.http
    serve = LiveSockets(api, RequestIds(), settings.pipelining_window).serve
    app.state.http = state._replace(
        websockets=WebSockets(
            _ADDRESS.fullmatch, serve, api.limits.max_body_bytes, settings.websocket_idle_s
        )
    )
    for route in (STREAM_ROUTE, MODEL_ROUTE):
        app.add_api_route(route, _require_upgrade, methods=["GET"], include_in_schema=False)


async def _require_upgrade(request: Request) -> Response:
    """Answer a request that reached HTTP: it is not the handshake of a WebSocket."""
    caller_of(request)
    raise UpgradeRequired("expected a WebSocket handshake, got an HTTP request")


@dataclass(frozen=True, slots=True)
class LiveSockets:
    """The live sockets of one application.

    Attributes:
        window: most unanswered chunks of a socket.
    """

    api: ApiContext
    ids: RequestIds
    window: int

    async def serve(self, socket: WebSocketProtocol) -> None:
        """Answer a handshake, and serve the socket until it is closed."""
        # a separate call, so that its values are freed while the socket is open
        session = await self._answer(socket)
        if session is not None:
            await session.serve(socket)

    async def _answer(self, socket: WebSocketProtocol) -> Session | None:
        """Answer a handshake; returns the session of a socket that it opened."""
        headers = socket.headers
        request_id = request_id_of(headers, self.ids)
        address = _ADDRESS.fullmatch(socket.url)
        if address is None:
            raise RuntimeError("expected the address of a live socket")
        route = MODEL_ROUTE if address[2] is None else STREAM_ROUTE
        began_s = time.monotonic()
        status, facts, session = 101, RequestFacts(), None
        with bound_contextvars(request_id=request_id.decode()):
            try:
                caller = self._caller(headers)
                facts.key = caller.key_id
                check_origin(headers, self.api.origins)
                of_request = (request_id.decode(), route, trace_headers(headers))
                opened, hello = await self._open(caller, address, facts, of_request)
                accepted = SUBPROTOCOL if _offers_subprotocol(headers) else None
                socket.accept(accepted, [(REQUEST_ID_HEADER, request_id)])
                socket.send_now(dumps(Media.JSON, {"hello": hello}), is_text=True)
                session = opened
            except Exception as failure:
                error = as_carry_error(failure)
                status = error.status
                log_failure(error)
                facts.note_error(error)
                self.api.recorder.record_error(facts.model or "-", error)
                socket.reject(error_response(error, Media.JSON, request_id, CLOSE))
        ms = round((time.monotonic() - began_s) * 1000, 2)
        log_request(request_id.decode(), "GET", route, status, ms, facts)
        return session

    def _caller(self, headers: Headers) -> Caller:
        """The caller who opens a socket.

        Raises:
            Unauthenticated, StoreUnavailable, DuplicateField
        """
        access = self.api.access
        return access.open_caller or access.caller(_authorization(headers))

    async def _open(
        self,
        caller: Caller,
        address: re.Match[bytes],
        facts: RequestFacts,
        of_request: tuple[str, str, Mapping[str, str]],
    ) -> tuple[Session, Mapping[str, Any]]:
        """Read what an address names; returns its session, and what the client has to know first:
        where its stream is, and what it may send.

        Args:
            of_request: the session's `request_id`, `route` and `propagated`.

        Raises:
            ModelNotFound, InvalidName, InvalidInput, DuplicateField, ChunksUnsupported, Forbidden,
            StoreUnavailable, StateDamaged
        """
        api = self.api
        model = _text(address[1])
        stream = None if address[2] is None else _text(address[2])
        served = api.pipeline.model(caller, PREDICT, model, stream)
        codec = api.codecs[served.name]
        if stream is not None:
            stream_name(stream)
        codec.reader.check_accepts_chunks()
        parameters = parse_query(address[3] or b"", (*REPLY_PARAMETERS, TIMEOUT_PARAMETER))
        text, requested_s = parameters.pop(TIMEOUT_PARAMETER, None), None
        if text is not None and (requested_s := parse_timeout(text)) is None:
            raise invalid_value(f"?{TIMEOUT_PARAMETER}", TIMEOUT_EXPECTED, text)
        timeout_s = api.limits.effective_timeout_s(requested_s)
        options = reply_options(parameters, codec.writer)
        if options.return_state:
            api.pipeline.model(caller, (Verb.READ_STATE,), model, stream)
        facts.model, facts.stream = model, stream
        hello: dict[str, Any] = {"model": model, "version": served.version}
        if stream is not None:
            hello |= {"stream": stream, "position": 0}
            deadline_s = time.monotonic() + api.limits.effective_timeout_s(None)
            # the first chunk creates a stream that does not exist
            with suppress(StreamNotFound):
                key = StreamKey(model, stream)
                head = (await api.pipeline.streams.read(caller, key, deadline_s)).head
                tag, epoch = head.tag.hex(), head.epoch.hex()
                hello |= {"position": head.position, "epoch": epoch, "tag": tag}
        hello |= {"window": self.window, "max_frame_bytes": api.limits.max_body_bytes}
        session = Session(api, caller, model, stream, self.window, options, timeout_s, *of_request)
        return session, hello


def _offers_subprotocol(headers: Headers) -> bool:
    """Whether a handshake offers the subprotocol of the service."""
    offered = [value for name, value in headers if name == b"sec-websocket-protocol"]
    return SUBPROTOCOL.encode() in map(bytes.strip, b",".join(offered).split(b","))


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
