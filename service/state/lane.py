"""Requests on one connection, sent at once and answered in order.

A request does not wait for the answer of the one before it: what was asked first is carried
out first, and many are under way at a time. So a commit sees every commit that was made before
it, and a load behind a commit sees what that commit wrote.

A connection that breaks, or that is silent for too long while something is asked of it, is
made anew, with growing and jittered pauses, and all that was not answered is sent again in its
order, until the time of each request is up. A request that may have been carried out at an
earlier try says so by its answer (`repeated`), and by `ReplyLost` where no answer came. What
the server itself refuses is never tried again.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import hiredis
import structlog
from redis.asyncio.connection import AbstractConnection
from redis.backoff import EqualJitterBackoff
from redis.exceptions import BusyLoadingError, NoScriptError, RedisError

from service.state.connections import Backend, is_passing, text

PAUSE_S: Final = 0.01
MAX_PAUSE_S: Final = 0.5

Command = tuple[str | bytes | int, ...]

log = structlog.get_logger(__name__)


class ReplyLost(Exception):
    """The request was sent, perhaps carried out, and no try was answered in time; or a later
    try was refused, which says nothing about the earlier ones."""


class Answer(NamedTuple):
    """The server's reply.

    Attributes:
        value: as the protocol gives it: bytes, int, None or a list of these.
        repeated: an earlier try of the same request may have been carried out.
    """

    value: Any
    repeated: bool


@dataclass(slots=True, eq=False)
class _Request:
    """One request on its way.

    Attributes:
        fallback: what is sent where the server does not know the script.
        sent: it went out at least once since it was last known not to be carried out.
        repeated: it went out again after a try that may have been carried out.
    """

    command: Command
    fallback: Command | None
    future: asyncio.Future[Answer]
    sent: bool = False
    repeated: bool = False


class Lane:
    """One ordered connection to a server; nothing is opened before the first request.

    The invariant that answers find their requests: `_pending` holds the requests in the order
    in which they were written, and between putting one there and writing it nothing is awaited.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        self._connection: AbstractConnection = backend.connection()
        self._open = False
        self._pending: deque[_Request] = deque()
        self._work = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._reading = asyncio.timeout(None)
        self._owed_since_s: float | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._last: BaseException | None = None
        self._away_since_s: float | None = None

    async def ask(self, command: Command, fallback: Command | None = None) -> Answer:
        """Send a request behind all that were asked before, and wait for its answer.

        Raises:
            StoreUnavailable: the server could not be reached in time, nothing was sent.
            ReplyLost: it was sent, and whether it was carried out is not known.
            StoreRefused: the server refuses it, and carried nothing out.
        """
        loop = asyncio.get_running_loop()
        request = _Request(command, fallback, loop.create_future())
        self._pending.append(request)
        try:
            async with asyncio.timeout(self._backend.wait_s):
                if self._open:
                    await self._write(request)
                else:
                    self._work.set()
                    if self._runner is None:
                        self._runner = loop.create_task(self._run())
                return await request.future
        except TimeoutError as error:
            cause = self._last or error
            if request.sent:
                raise ReplyLost(f"{self._backend.where}: {text(cause)}") from cause
            raise self._backend.unavailable(cause) from cause

    def reconnect(self) -> None:
        """Make the connection anew, and send again what it owes: the server's role has changed."""
        if self._open:
            self._last = ConnectionError("the server's role has changed")
            self._reading.reschedule(asyncio.get_running_loop().time())

    async def close(self) -> None:
        """Close the connection; once, after the last request was answered."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait({self._runner})

    async def _write(self, *requests: _Request) -> None:
        """Write requests; that the connection broke is noticed where it is read."""
        if not self._connection.is_connected:
            return
        packed: list[bytes] = []
        for request in requests:
            # The client library packs in Python, at four times the cost.
            packed.append(hiredis.pack_command(request.command))  # type: ignore[arg-type]
            request.sent = True
        self._owe()
        try:
            await self._connection.send_packed_command(packed, check_health=False)
        except (RedisError, OSError) as error:
            self._last = error

    async def _run(self) -> None:
        """Keep the connection while there is work, and read its answers; one task."""
        backoff, failures = EqualJitterBackoff(cap=MAX_PAUSE_S, base=PAUSE_S), 0
        while True:
            await self._work.wait()
            try:
                async with asyncio.timeout(self._backend.silence_s):
                    await self._connection.connect()
                async with asyncio.timeout(None) as self._reading:
                    await self._resend()
                    async for _ in self._answers():
                        failures = 0
            except (RedisError, OSError) as error:
                if is_passing(error):
                    self._note_away(error)
                else:
                    self._refuse_all(error)
            except Exception as error:
                log.exception("lane_failed", store=self._backend.where)
                self._refuse_all(error)
            finally:
                self._open = False
                self._owed_since_s = None
                await self._connection.disconnect(nowait=True)
            self._forget_abandoned()
            if not self._pending:
                self._work.clear()
                continue
            await asyncio.sleep(backoff.compute(failures))
            failures += 1

    async def _resend(self) -> None:
        """Send what was not answered yet; what is asked from now on is sent at once, behind it."""
        self._forget_abandoned()
        for request in self._pending:
            request.repeated = request.repeated or request.sent
        self._open = True
        if self._pending:
            await self._write(*self._pending)

    async def _answers(self) -> AsyncIterator[None]:
        """Give every answer to the request that is next in order, until the connection ends."""
        connection = self._connection
        while True:
            try:
                value = await connection.read_response(timeout=math.inf, disconnect_on_error=False)
            except RedisError as error:
                if is_passing(error) or not self._pending:
                    if isinstance(error, BusyLoadingError) and self._pending:
                        # Refused while it loads: this try was not carried out.
                        self._pending[0].sent = self._pending[0].repeated
                    raise
                await self._settle_refusal(self._pending.popleft(), error)
            else:
                self._note_back()
                request = self._pending.popleft()
                if not request.future.done():
                    request.future.set_result(Answer(value, request.repeated))
            self._owed_since_s = time.monotonic() if self._pending else None
            yield

    async def _settle_refusal(self, request: _Request, error: RedisError) -> None:
        if isinstance(error, NoScriptError) and request.fallback is not None:
            request.command, request.fallback = request.fallback, None
            self._pending.append(request)
            await self._write(request)
        else:
            self._refuse(request, error)

    def _refuse(self, request: _Request, error: BaseException) -> None:
        if request.future.done():
            return
        refusal: Exception = self._backend.refused(error)
        if request.repeated:
            # An earlier try may have been carried out.
            refusal = ReplyLost(f"{self._backend.where}: {text(error)}")
        refusal.__cause__ = error
        request.future.set_exception(refusal)

    def _refuse_all(self, error: BaseException) -> None:
        while self._pending:
            request = self._pending.popleft()
            request.repeated = request.repeated or request.sent
            self._refuse(request, error)

    def _forget_abandoned(self) -> None:
        """Drop the requests whose callers' time was up, while no answer to them can come."""
        self._pending = deque(r for r in self._pending if not r.future.done())

    def _owe(self) -> None:
        """The server owes an answer from now on; look after it, with one timer at a time."""
        if self._owed_since_s is None:
            self._owed_since_s = time.monotonic()
        if self._watch is None:
            self._watch_for(self._backend.silence_s)

    def _watch_for(self, seconds: float) -> None:
        self._watch = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        self._watch = None
        if self._owed_since_s is None:
            return
        left_s = self._owed_since_s + self._backend.silence_s - time.monotonic()
        if left_s > 0:
            self._watch_for(left_s)
        elif self._open:
            self._last = TimeoutError(f"silent for {self._backend.silence_s:g} s")
            self._reading.reschedule(asyncio.get_running_loop().time())

    def _note_away(self, error: BaseException) -> None:
        # The end of `_reading` has no words of its own: what ended it has said why.
        error = error if str(error) or self._last is None else self._last
        self._last = error
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            log.warning("store_away", store=self._backend.where, reason=text(error))

    def _note_back(self) -> None:
        if self._away_since_s is not None:
            away_s = round(time.monotonic() - self._away_since_s, 3)
            self._away_since_s = None
            log.info("store_back", store=self._backend.where, away_s=away_s)
