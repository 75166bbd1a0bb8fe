"""A gRPC call on an HTTP/2 stream: its metadata, messages and status.

On the wire a message is a flag, its length and its bytes. Messages of clients may be compressed by
gzip or deflate, responses are not. A response begins with headers, and ends with trailers that have
the status.
"""

from __future__ import annotations

import asyncio
import re
import struct
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote

import msgspec
from structlog.contextvars import bound_contextvars

from service.core.errors import BodyTooLarge, CarryError, MalformedBody
from service.server.http2_headers import encode_headers
from service.server.http2_protocol import Http2Connection
from service.server.http2_stream import Http2Stream
from service.telemetry.logs import RequestIds
from service.transports.common.failure_log import log_client_disconnect
from service.transports.v1.request_log import is_request_id
from service.transports.v2.grpc.admission import MessageRoom
from service.transports.v2.grpc.status import (
    Metadata,
    StatusCode,
    status_code,
    status_details,
    trailing_metadata,
)
from service.transports.v2.http_body import COMPRESSIONS, decompress

REQUEST_ID: Final = b"x-request-id"

_PREFIX: Final = struct.Struct(">BI")
_TIMEOUT: Final = re.compile(rb"(\d{1,8})([HMSmun])")
_UNITS_S: Final = {b"H": 3600, b"M": 60, b"S": 1, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_PRINTABLE: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_OK: Final = b"\x88"  # the entry of HPACK's static table for `:status: 200`
_HEADERS: Final = _OK + encode_headers(
    [
        (b"content-type", b"application/grpc"),
        (b"grpc-accept-encoding", b"identity,deflate,gzip"),
    ]
)


class CallHead(msgspec.Struct, frozen=True):
    """The head of a call; shared by calls whose headers are the same.

    Attributes:
        path: of the method; empty if this is no call of gRPC.
        timeout_s: until the client's deadline, None without one.
        compression: of messages with the flag; empty for none.
    """

    path: str
    metadata: tuple[tuple[bytes, bytes], ...]
    timeout_s: float | None
    compression: str

    def values(self, name: bytes) -> list[bytes]:
        """The values of the metadata with this name."""
        return [value for key, value in self.metadata if key == name]


def read_head(headers: list[tuple[bytes, bytes]]) -> CallHead:
    """Read the head of a call from its headers."""
    fields = dict(headers)
    is_call = fields.get(b":method") == b"POST"
    is_call = is_call and fields.get(b"content-type", b"").startswith(b"application/grpc")
    timeout = _TIMEOUT.fullmatch(fields.get(b"grpc-timeout", b""))
    return CallHead(
        fields.get(b":path", b"").decode("latin-1") if is_call else "",
        tuple(headers),
        None if timeout is None else int(timeout[1]) * _UNITS_S[timeout[2]],
        fields.get(b"grpc-encoding", b"identity").decode("latin-1").replace("identity", ""),
    )


class Handler(ABC):
    """Handles one call of a method; nothing is called after the call has ended."""

    @abstractmethod
    def receive(self, message: bytes) -> None:
        """Process a message."""

    @abstractmethod
    def receive_end(self) -> None:
        """Process the end of the messages."""

    @abstractmethod
    def fail(self, error: CarryError) -> None:
        """End the call with an error: a message cannot be received."""

    @abstractmethod
    def cancel(self) -> None:
        """Stop: the client cancelled the call or disconnected."""

    def resume(self) -> None:  # noqa: B027
        """Continue to write: `Call.can_write` is true again."""


class Call(Http2Stream):
    """One call, an HTTP/2 stream.

    Attributes:
        max_bytes: length of the longest message.
        handler: of its method.
        room: bounds what it receives.
        request_id: the client's, if it is a token, else a new one; the trailing metadata has it.
        on_release: called when the call is over and its response is sent.
    """

    handler: Handler
    room: MessageRoom

    def __init__(
        self,
        connection: Http2Connection,
        stream_id: int,
        head: CallHead,
        ids: RequestIds,
        max_bytes: int,
    ):
        super().__init__(connection, stream_id)
        self.head = head
        sent = filter(is_request_id, head.values(REQUEST_ID))
        self.request_id = (next(sent, None) or ids.next()).decode()
        self.on_release: list[Callable[[], None]] = []
        self.max_bytes = max_bytes
        self._received = bytearray()
        self._needed_bytes = 0
        self._held_bytes = 0
        self._has_begun = False
        self._has_ended = False
        self._task: asyncio.Task[None] | None = None

    # what is received

    def receive(self, data: bytes) -> None:
        """Process bytes of messages."""
        if self._received or not self.reads:
            self._received += data
            if len(self._received) < self._needed_bytes or not self.reads:
                self._hold()
                return
            data = bytes(self._received)
            self._received.clear()
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        at, size = 0, len(data)
        needed_bytes = _PREFIX.size
        while self.reads and size - at >= _PREFIX.size:
            flag, length = _PREFIX.unpack_from(data, at)
            if length > self.max_bytes:
                return self._fail_too_long(length)
            needed_bytes = _PREFIX.size + length
            if size - at < needed_bytes:
                break
            message = data[at + _PREFIX.size : at + needed_bytes]
            at += needed_bytes
            needed_bytes = _PREFIX.size
            self.room.end(self)
            if flag:
                self.stop_reading()
                self._task = self.connection.loop.create_task(self._decompress(message))
            else:
                self.handler.receive(message)
            if self.trailers is not None or not self.is_open:
                return None
        self._needed_bytes = needed_bytes
        if at < size or self._held_bytes:
            self._received += data[at:]
            self._hold()
        return None

    def _hold(self) -> None:
        """Count the bytes of an incomplete message. A call that does not read counts none: its
        flow-control window bounds them."""
        held_bytes = len(self._received) if self.reads else 0
        if held_bytes:
            self.room.begin(self)
        if held_bytes != self._held_bytes:
            change, self._held_bytes = held_bytes - self._held_bytes, held_bytes
            self.room.count(change)

    def drop_received(self) -> None:
        """Drop what was received, and process no further message."""
        self.stop_reading()
        self._received.clear()
        self._hold()

    def _fail_too_long(self, length: int) -> None:
        limit = self.max_bytes
        self.drop_received()
        detail = f"message: expected at most {limit} bytes, got {length}"
        self.handler.fail(BodyTooLarge(detail, expected=limit, got=length))

    async def _decompress(self, data: bytes) -> None:
        """Process a compressed message."""
        compression = self.head.compression
        try:
            if compression not in COMPRESSIONS:
                known = ", ".join(COMPRESSIONS)
                raise MalformedBody(
                    f"grpc-encoding: expected one of {known}, got {compression[:100]!r}",
                    at="grpc-encoding",
                    expected=known,
                    got=compression[:100],
                )
            message = await asyncio.to_thread(decompress, data, compression, self.max_bytes)
        except CarryError as error:
            if self.is_open and self.trailers is None:
                self.handler.fail(error)
            return
        self._task = None
        if self.is_open and self.trailers is None:
            self.reads = True
            self.handler.receive(message)
            if self.reads:
                self.start_reading()

    def stop_reading(self) -> None:
        """Process no further message for now: the flow-control window stops the client."""
        self.reads = False

    def start_reading(self) -> None:
        """Process further messages, first those received meanwhile; after the one that is being
        decompressed, if there is one."""
        if self._task is not None:
            return
        self.reads = True
        data = bytes(self._received)
        self._received.clear()
        self._parse(data)
        if self.is_open and self.trailers is None:
            self.restore_window()
            self.receive_end()

    def receive_end(self) -> None:
        """Process the end of the messages, once all are processed."""
        if self.has_received_all and self.reads and not self._has_ended:
            self._has_ended = True
            if self._received:
                self.drop_received()
                detail = "message: expected all of it, got a part of it and the end of the call"
                self.handler.fail(MalformedBody(detail, at="message", got="a part of it"))
            else:
                self.handler.receive_end()

    def cancel(self) -> None:
        """Stop: the client cancelled the call or disconnected."""
        if self.trailers is None:
            self.handler.cancel()
        else:
            log_client_disconnect("GRPC")

    def resume(self) -> None:
        """Continue to write."""
        if self.trailers is None:
            self.handler.resume()

    def release(self) -> None:
        """Release its slot and the room of what it received."""
        self._received.clear()
        self._hold()
        self.room.end(self)
        for release in self.on_release:
            release()
        # the call is freed now, not by the garbage collector: its handler refers to it
        self.on_release.clear()
        vars(self).pop("handler", None)

    def end_at_deadline(self) -> None:
        """End the call once the client's deadline has expired, if it has one."""
        if self.head.timeout_s is not None:
            timer = self.connection.loop.call_later(self.head.timeout_s, self._expire)
            self.on_release.append(timer.cancel)

    def _expire(self) -> None:
        if self.trailers is None:
            self.handler.cancel()
            self.end(StatusCode.DEADLINE_EXCEEDED, "the deadline of the call expired")

    # what is sent

    def begin(self) -> None:
        """Send the headers of the response, once."""
        self._has_begun = True
        self.write_headers(_HEADERS)

    def respond(self, message: bytes) -> None:
        """Send a response."""
        if not self._has_begun:
            self.begin()
        self.write(_PREFIX.pack(0, len(message)) + message)

    def fail(self, error: CarryError) -> None:
        """End the call with the status of an error."""
        with bound_contextvars(request_id=self.request_id):
            self.end(status_code(error), status_details(error), trailing_metadata(error))

    def end(
        self,
        status: StatusCode = StatusCode.OK,
        details: str = "",
        metadata: Metadata = (),
    ) -> None:
        """End the call, if it has not ended."""
        if not self.is_open or self.trailers is not None:
            return
        if self._received:
            self.drop_received()
        trailers = [
            (b"grpc-status", str(int(status)).encode()),
            (REQUEST_ID, self.request_id.encode()),
        ]
        if details:
            trailers.append((b"grpc-message", quote(details, safe=_PRINTABLE).encode()))
        for name, value in metadata:
            encoded = value.encode() if isinstance(value, str) else b64encode(value).rstrip(b"=")
            trailers.append((name.encode(), encoded))
        self.room.end(self)
        self.finish((b"" if self._has_begun else _HEADERS) + encode_headers(trailers))


class ReadingHandler(Handler):
    """Runs a coroutine that reads the messages of its call one by one.

    Args:
        run: called with this.
    """

    def __init__(self, call: Call, run: Callable[[ReadingHandler], Any]):
        self.call = call
        self._message: bytes | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._error: CarryError | None = None
        self._has_all = False
        self._task = call.connection.loop.create_task(run(self))
        call.end_at_deadline()

    async def read(self) -> bytes | None:
        """Read the next message, once the client has received all responses; None at the end.

        Raises:
            CarryError: it does not arrive in time, or there is no room for it.
        """
        call, room = self.call, self.call.room
        if self._message is None and self._error is None:
            call.start_reading()
        while self._error is None:
            has_next = self._message is not None or self._has_all
            if has_next and call.can_write:
                break
            if not has_next:
                room.begin(call)
            self._waiting = call.connection.loop.create_future()
            await self._waiting
        room.end(call)
        if self._error is not None:
            raise self._error
        message, self._message = self._message, None
        return message

    async def read_only(self) -> bytes:
        """Read the message of a unary call.

        Raises:
            CarryError: as `read`.
            MalformedBody: the call has no message.
        """
        message = await self.read()
        if message is None:
            raise MalformedBody("message: expected one, got none", at="message", got="none")
        return message

    def receive(self, message: bytes) -> None:
        """Keep a message until it is read, and receive no other one before."""
        self._message = message
        self.call.stop_reading()
        self._wake()

    def receive_end(self) -> None:
        """The client has sent all."""
        self._has_all = True
        self._wake()

    def resume(self) -> None:
        """Continue to read: the client has received all responses."""
        self._wake()

    def fail(self, error: CarryError) -> None:
        """Raise this where the coroutine reads."""
        self._error = error
        self._wake()

    def cancel(self) -> None:
        """Cancel the coroutine."""
        self._task.cancel()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
