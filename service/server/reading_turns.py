"""Reads long bodies round robin, so that many uploads at once hardly delay other requests.

In one turn of the event loop, every socket with input is read. With a hundred uploads, a turn
processes megabytes, and a chunk that arrived meanwhile waits for all of it. So a connection whose
body is long is paused after each read, and the paused ones are resumed one by one, the one that has
waited longest first. In the pauses between them the loop serves other requests: a chunk takes
several turns, each of which would otherwise also copy a part of a body.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

LONG_BODY_BYTES: Final = 64 * 1024
"""A body is read in turns once more than this has arrived; few chunks are longer."""

PAUSE_S: Final = 0.002
"""Time between two reads, of at most 256 KiB, while several connections wait: 128 MiB a second."""


class ReadingTurns:
    """The connections of a worker that wait for their turn; use from one event loop."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[object, Callable[[], None]] = OrderedDict()
        self._is_scheduled = False

    def wait(self, connection: object, resume: Callable[[], None]) -> None:
        """Call `resume` when it is this connection's turn; it waits once at a time."""
        self._waiting.setdefault(connection, resume)
        self._schedule()

    def forget(self, connection: object) -> None:
        """Remove a connection that was closed."""
        self._waiting.pop(connection, None)

    def _schedule(self) -> None:
        if self._waiting and not self._is_scheduled:
            self._is_scheduled = True
            pause_s = PAUSE_S if len(self._waiting) > 1 else 0.0
            asyncio.get_running_loop().call_later(pause_s, self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        if self._waiting:
            _, resume = self._waiting.popitem(last=False)
            resume()
            self._schedule()
