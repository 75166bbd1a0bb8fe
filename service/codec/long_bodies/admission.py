"""Admission of long bodies: one at a time is validated, the others wait in order of arrival.

Validation runs on the event loop's thread. Two bodies at once would both take twice as long and
together take twice the memory, so they are admitted one by one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sized
from contextlib import asynccontextmanager

from service.core.errors import DeadlineExceeded, Overloaded


class Checkpoint:
    """Yields the event loop during long work, until its deadline.

    Args:
        deadline_s: when the client stops waiting, on the monotonic clock.
    """

    def __init__(self, deadline_s: float):
        self._deadline_s = deadline_s

    async def __call__(self) -> None:
        """Let other tasks run.

        Raises:
            DeadlineExceeded
        """
        await asyncio.sleep(0)
        if time.monotonic() > self._deadline_s:
            raise DeadlineExceeded("the deadline expired while the body was validated")


class LongBodyAdmission:
    """Admits long bodies one at a time, first come, first served.

    Args:
        max_waiting_bytes: most bytes of all bodies that wait; one that exceeds it is rejected.
    """

    def __init__(self, max_waiting_bytes: int):
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def admit(self, body: Sized, deadline_s: float) -> AsyncIterator[Checkpoint]:
        """Wait until this body may be validated, and block the others during the context.

        Args:
            deadline_s: when its client stops waiting, on the monotonic clock.

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
                "the deadline expired before the long body was validated"
            ) from error
        finally:
            self._waiting_bytes -= len(body)
        try:
            yield Checkpoint(deadline_s)
        finally:
            self._lock.release()
