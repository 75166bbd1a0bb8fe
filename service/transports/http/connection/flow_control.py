"""Flow control of an HTTP connection: whether its socket is read."""

from __future__ import annotations

from uvicorn.protocols.http.flow_control import FlowControl


class BackpressureFlow(FlowControl):
    """uvicorn's flow control, which does not resume reading while buffered requests exceed a bound,
    nor before its turn.

    Attributes:
        buffer_is_full: whether they do.
    """

    buffer_is_full = False
    _waits_for_turn = False
    _is_resumed = False

    def resume_reading(self) -> None:
        """Read on, if the buffer has room and no other connection is to be read first."""
        if self._waits_for_turn:
            self._is_resumed = True
        elif not self.buffer_is_full:
            super().resume_reading()

    def wait_for_turn(self) -> None:
        """Do not read until `take_turn`."""
        self._waits_for_turn, self._is_resumed = True, not self.read_paused
        self.pause_reading()

    def take_turn(self) -> None:
        """Read on, unless the application has not taken what was received."""
        self._waits_for_turn = False
        if self._is_resumed:
            self.resume_reading()
