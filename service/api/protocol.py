"""uvicorn's HTTP protocol, with an express way past it for requests that are plainly good.

Every connection is uvicorn's. Between its requests, bytes are first shown to `Express`: what that
takes is answered with one write; all else is uvicorn's, with every byte that came. While either
has a request under way, the other gets nothing. So a connection's answers keep their order.

The application offers its `Express` through the lifespan's state, under `express`; without one this
is uvicorn's protocol and nothing else.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.express import EXPRESS, MAX_BYTES, Begun, Express, More, Refused, Taken


class ExpressProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._express: Express | None = self.app_state.get(EXPRESS)
        self._ours: tuple[Taken, Begun] | None = None
        self._held = b""
        self._theirs = False
        self._message_whole = True
        self._leaving = False
        self._idle_since_s: float | None = None

    def data_received(self, data: bytes) -> None:
        """Take in what came."""
        self._idle_since_s = None
        if self._theirs or self._express is None:
            super().data_received(data)
            return
        if self._held:
            data = self._held + data
            self._held = b""
        while data:
            data = self._taken(data, self._express)

    def _taken(self, data: bytes, express: Express) -> bytes:
        """Do with the bytes what can be done now; what is left of them is the next request."""
        if self._ours is not None or self.flow.write_paused:
            self._hold(data)
            return b""
        found = express.take(data)
        if found is None:
            self._theirs = True
            super().data_received(data)
            return b""
        if isinstance(found, More):
            self._hold(data)
            return b""
        if isinstance(found, Refused):
            self.transport.write(express.refuse(found))
            self._rest()
        else:
            self._begin(found, express)
        return data[found.whole_bytes :]

    def _hold(self, data: bytes) -> None:
        self._held = data
        if len(data) > MAX_BYTES:
            # a client that sends on before it has its answers; it has to wait
            self.transport.pause_reading()

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
        if len(held) > MAX_BYTES:
            self.transport.resume_reading()
        if held:
            self.data_received(held)

    def resume_writing(self) -> None:
        """The client reads its answers again; what it sent meanwhile was held."""
        super().resume_writing()
        if self._ours is None and not self._theirs:
            self._go_on()

    def on_message_begin(self) -> None:
        """uvicorn's parser has met the beginning of a request."""
        self._message_whole = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """uvicorn's parser has met the end of a request."""
        self._message_whole = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """uvicorn has answered a request; if no other has begun, the next one may be ours."""
        super().on_response_complete()
        self._theirs = not self._message_whole or bool(self.pipeline)
        self._idle_since_s = None if self._theirs else self.loop.time()

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
