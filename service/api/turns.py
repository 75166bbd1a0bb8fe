"""Who reads a long body, and when: one at a time, in turns with everything else on the loop.

Validation is work of the event loop's thread, whoever waits for it. Two bodies at once would both
take twice as long and keep twice as much; so they are admitted one by one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.errors import DeadlineExceeded, Overloaded


class Turns:
    """The turns that reading a long body takes, until its deadline.

    Args:
        deadline_s: until when the client waits, of the monotonic clock.
    """

    def __init__(self, deadline_s: float):
        self._deadline_s = deadline_s

    async def next(self) -> None:
        """Let everything else have its turn.

        Raises:
            DeadlineExceeded
        """
        await asyncio.sleep(0)
        if time.monotonic() > self._deadline_s:
            raise DeadlineExceeded("the time for the request was up while its body was validated")


class LongBodies:
    """Admission of long bodies: one is read at a time, the others wait, first come, first served.

    Args:
        max_waiting_bytes: of the bodies that wait; one that would exceed it is rejected.
    """

    def __init__(self, max_waiting_bytes: int):
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def admitted(self, body: bytes, deadline_s: float) -> AsyncIterator[Turns]:
        """The turn to read a body.

        Args:
            deadline_s: until when its client waits, of the monotonic clock.

        Raises:
            Overloaded, DeadlineExceeded
        """
        if self._lock.locked() and self._waiting_bytes + len(body) > self._max_waiting_bytes:
            raise Overloaded(
                f"{self._waiting_bytes} bytes of long bodies wait to be validated, of at most "
                f"{self._max_waiting_bytes}",
                retry_after_s=1,
            )
        self._waiting_bytes += len(body)
        try:
            async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                await self._lock.acquire()
        except TimeoutError as error:
            raise DeadlineExceeded(
                "the time for the request was up before its long body was validated"
            ) from error
        finally:
            self._waiting_bytes -= len(body)
        try:
            yield Turns(deadline_s)
        finally:
            self._lock.release()
