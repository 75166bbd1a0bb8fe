"""uvicorn's HTTP protocol, with an express way past it for requests that are plainly good.

Every connection is uvicorn's. Between its requests, bytes are first shown to `Express`: what that
takes is answered with one write; all else is uvicorn's, with every byte that came. While either
has a request under way, or answers wait for the client to read them, further requests are held,
and beyond a bound not even read. So a connection's answers keep their order, and what it makes the
process keep is bounded: held requests, one piece with uvicorn, answers that wait, and one head.

The application offers its `Express` through the lifespan's state, under `express`; without one this
is uvicorn's protocol and nothing else.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.express import EXPRESS, MAX_BYTES, Begun, Express, More, Refused, Taken

MAX_HEAD_BYTES: Final = 64 * 1024
"""Most that may come of a request's head, or of what follows its body, before it is whole."""

PIECE_BYTES: Final = 8 * 1024
"""What uvicorn is given at once: it makes something of every request therein."""


class HoldingFlow(FlowControl):
    """uvicorn's control of a connection, which reads nothing on while requests are held.

    Attributes:
        holds: whether there are more of them than may be.
    """

    holds = False

    def resume_reading(self) -> None:
        """Read on, if there is room."""
        if not self.holds:
            super().resume_reading()


class ExpressProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._express: Express | None = self.app_state.get(EXPRESS)
        self._ours: tuple[Taken, Begun] | None = None
        self._held = b""
        self._message_whole = True
        self._kept_bytes = 0
        self._leaving = False
        self._idle_since_s: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._flow = self.flow = HoldingFlow(transport)

    def data_received(self, data: bytes) -> None:
        """Take in what came."""
        if self._express is None:
            super().data_received(data)
            return
        if self._held:
            data = self._held + data
            self._held = b""
        self._take_in(data, self._express)

    def _take_in(self, data: bytes, express: Express) -> None:
        while data and not self.transport.is_closing():
            self._idle_since_s = None
            data = self._taken(data, express)

    def _taken(self, data: bytes, express: Express) -> bytes:
        """Do with the bytes what can be done now; what is left of them is the next request."""
        if self._has_to_wait:
            self._hold(data)
            return b""
        found = express.take(data) if self._message_whole else None
        if found is None:
            return self._parse(data)
        if isinstance(found, More):
            self._hold(data)
            return b""
        if isinstance(found, Refused):
            self.transport.write(express.refuse(found))
            self._rest()
        else:
            self._begin(found, express)
        return data[found.whole_bytes :]

    @property
    def _has_to_wait(self) -> bool:
        """Whether what comes next is not part of the request that is under way."""
        if self._theirs:
            return bool(self.pipeline) or not self.cycle.more_body
        return self._ours is not None or (self.flow.write_paused and self._message_whole)

    @property
    def _theirs(self) -> bool:
        """Whether uvicorn has a request to answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def _parse(self, data: bytes) -> bytes:
        """Give uvicorn what it can do something with now; the rest is left.

        Its parser keeps a line until it is whole, however long.
        """
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self._kept_bytes += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                break
            if self._kept_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"{MAX_HEAD_BYTES} bytes came without the end of a head.")
                break
            if self._message_whole or self._has_to_wait:
                return data[start + PIECE_BYTES :]
        return b""

    def _hold(self, data: bytes) -> None:
        self._held = data
        if len(data) > MAX_BYTES:
            # a client that sends on before it has its answers; it has to wait
            self._flow.holds = True
            self._flow.pause_reading()

    def _begin(self, taken: Taken, express: Express) -> None:
        begun = express.begin(taken)
        self._ours = taken, begun

        def answer(done: Begun) -> None:
            self._ours = None
            if done.cancelled() or self.transport.is_closing():
                return
            [result] = done.result()
            self.transport.write(express.reply(taken, result, last=self._leaving))
            if self._leaving:
                self.transport.close()
                return
            self._rest()
            self._go_on()

        begun.add_done_callback(answer)

    def _rest(self) -> None:
        """A request is answered, and none is under way. The timer that closes idle connections is
        left as it was set: to stop and start one for each request would cost more than to look
        when it goes off."""
        self.server_state.total_requests += 1
        self._idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wait_idle(self.timeout_keep_alive)

    def _wait_idle(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if it was idle for all the time."""
        self.timeout_keep_alive_task = None
        if self._idle_since_s is None or self.transport.is_closing():
            return
        left_s = self._idle_since_s + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._wait_idle(left_s)
        else:
            super().timeout_keep_alive_handler()

    def _go_on(self) -> None:
        """Take in what came while that could not be done."""
        held, self._held = self._held, b""
        if self._flow.holds:
            self._flow.holds = False
            self._flow.resume_reading()
        if self._express is not None:
            self._take_in(held, self._express)

    def resume_writing(self) -> None:
        """The client reads its answers again."""
        super().resume_writing()
        if not self._has_to_wait:
            self._go_on()

    def on_message_begin(self) -> None:
        """uvicorn's parser has met the beginning of a request."""
        self._message_whole = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """uvicorn's parser has met the end of a head."""
        self._kept_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """uvicorn's parser has met a part of a body."""
        self._kept_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """uvicorn's parser has met the end of a request."""
        self._kept_bytes = 0
        self._message_whole = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """uvicorn has answered a request, and begun the next one that it has."""
        super().on_response_complete()
        if not self._theirs:
            self._idle_since_s = self.loop.time()
        if not self._has_to_wait:
            self._go_on()

    def shutdown(self) -> None:
        """The server stops: finish the request that is under way, then close."""
        if self._ours is None:
            super().shutdown()
        else:
            self._leaving = True

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or the connection was closed."""
        if self._ours is not None and self._express is not None:
            self._express.leave(*self._ours)
        super().connection_lost(exc)
