"""Throttles tasks that one event wakes: a few continue in each iteration of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

AT_ONCE: Final = 8
"""Tasks that continue in one iteration of the loop, if each works for some tens of microseconds."""


class Turns:
    """Lets waiting tasks continue a few at a time, first come, first served.

    asyncio runs everything that is ready before it reads from a socket again, so a thousand tasks
    that one event wakes would delay every request by the work of all of them. Here at most
    `at_once` continue in one iteration of the loop, and then none for as long as it took, so that
    other work gets half of the time.
    """

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = at_once
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_scheduled = False

    def request(self, turn: asyncio.Future[None]) -> None:
        """Resolve a future when its turn comes; one that is done by then is skipped."""
        self._waiting.append(turn)
        if not self._is_scheduled:
            self._is_scheduled = True
            turn.get_loop().call_soon(self._begin, turn.get_loop())

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        count = 0
        while self._waiting and count < self._at_once:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                count += 1
        if count:
            # called after the tasks, which the loop runs in the order in which they became ready
            loop.call_soon(self._rest, loop, loop.time())
        else:
            self._is_scheduled = False

    def _rest(self, loop: asyncio.AbstractEventLoop, began_s: float) -> None:
        loop.call_later(loop.time() - began_s, self._begin, loop)
