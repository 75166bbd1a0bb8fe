"""Pauses and resumes the reading of sockets; long bodies are read round robin.

In one turn of the event loop, every socket with input is read. With a hundred uploads, a turn
processes megabytes, and a chunk that arrived meanwhile waits for all of it. So a connection whose
body is long is paused after each read, and the paused ones are resumed one by one, the one that has
waited longest first. In the pauses between them the loop serves other requests: a chunk takes
several turns, each of which would otherwise also copy a part of a body. A body in tiny chunks (of
HTTP's chunked encoding) is costly however short it is: it waits for its turn after a thousand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from uvicorn.protocols.http.flow_control import FlowControl

LONG_BODY_BYTES: Final = 64 * 1024
"""A body is read in turns once more than this has arrived; few chunks are longer."""

MAX_CHUNKS: Final = 1000
"""About the most chunks of a body that are parsed at once; each takes some 3 us."""

PAUSE_S: Final = 0.002
"""Time between two reads, of at most 256 KiB, while several connections wait: 128 MiB a second."""

UNCONSUMED: Final = 1
"""Reason not to read: the application has not consumed what was received."""

BUFFER_FULL: Final = 2
"""Reason not to read: too many bytes of pipelined requests are buffered."""

OTHERS_TURN: Final = 4
"""Reason not to read: other connections have their turn."""


class ReadingFlow(FlowControl):
    """uvicorn's flow control, which reads once there is no reason left to pause.

    Attributes:
        pauses: the reasons, as bits.
    """

    pauses = 0

    def pause_reading(self, reason: int = UNCONSUMED) -> None:
        """Pause reading for a reason."""
        self.pauses |= reason
        super().pause_reading()

    def resume_reading(self, reason: int = UNCONSUMED) -> None:
        """Resume reading if there is no other reason to pause."""
        self.pauses &= ~reason
        if not self.pauses:
            super().resume_reading()


class ReadingTurns:
    """The connections of a worker that wait for their turn; use from one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[ReadingFlow, Callable[[], None] | None] = {}
        self._is_scheduled = False

    def wait(self, flow: ReadingFlow, on_turn: Callable[[], None] | None = None) -> None:
        """Pause a connection until its turn, and then call `on_turn`."""
        flow.pause_reading(OTHERS_TURN)
        self._waiting[flow] = on_turn or self._waiting.get(flow)
        self._schedule()

    def forget(self, flow: ReadingFlow) -> None:
        """Remove a connection that was closed."""
        self._waiting.pop(flow, None)

    def _schedule(self) -> None:
        if self._waiting and not self._is_scheduled:
            self._is_scheduled = True
            pause_s = PAUSE_S if len(self._waiting) > 1 else 0.0
            asyncio.get_running_loop().call_later(pause_s, self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        if self._waiting:
            flow = next(iter(self._waiting))
            on_turn = self._waiting.pop(flow)
            self._schedule()
            flow.resume_reading(OTHERS_TURN)
            if on_turn is not None:
                on_turn()
