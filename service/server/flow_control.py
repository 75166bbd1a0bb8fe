"""Flow control of an HTTP connection: whether its socket is read."""

from __future__ import annotations

from uvicorn.protocols.http.flow_control import FlowControl


class BackpressureFlow(FlowControl):
    """uvicorn's flow control, which also pauses reading while too many requests are buffered, and
    while other connections have their turn.

    Attributes:
        buffer_is_full: whether the buffered requests exceed their bound.
    """

    buffer_is_full = False
    _waits_for_turn = False
    _is_resumed = False

    def resume_reading(self) -> None:
        """Resume reading, if the buffer has room and this connection need not wait for its turn."""
        if self._waits_for_turn:
            self._is_resumed = True
        elif not self.buffer_is_full:
            super().resume_reading()

    def wait_for_turn(self) -> None:
        """Pause reading until `take_turn`."""
        self._waits_for_turn, self._is_resumed = True, not self.read_paused
        self.pause_reading()

    def take_turn(self) -> None:
        """Resume reading, unless the application has not consumed what was received."""
        self._waits_for_turn = False
        if self._is_resumed:
            self.resume_reading()
