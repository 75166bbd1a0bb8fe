"""Requests on one connection, sent at once and answered in order.

A request does not wait for the answer of the one before it: what was asked first is carried
out first, and many are under way at a time. So a commit sees every commit that was made before
it, and a load behind a commit sees what that commit wrote.

A connection that breaks, or that is silent for too long while something is asked of it, is
made anew, with growing and jittered pauses, and all that was not answered is sent again in its
order, for as long as somebody waits for it. So is what a server refuses that is loading, or
busy with a script. A request that may have been carried out at an earlier try says so by its
answer (`repeated`). When a connection is given up, its unsent bytes are discarded; what it has sent
may be carried out after its repetition, but then finds another head than it expects. What the
server refuses permanently is never retried; what a node of a cluster redirects or defers is left to
the router.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

import hiredis
import structlog
from redis.asyncio.connection import AbstractConnection
from redis.backoff import EqualJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from service.core.errors import StoreRefused
from service.store.redis.connections import (
    Backend,
    abort,
    drop_unsent_on_close,
    is_passing,
    is_reply,
    text,
    writer_of,
)
from service.store.redis.store_request import Answer, ReplyLost, Request

PAUSE_S: Final = 0.01
MAX_PAUSE_S: Final = 0.5

log = structlog.get_logger(__name__)


class Router(Protocol):
    """What a lane tells whoever knows of other lanes."""

    def redirected(self, request: Request, error: RedisError) -> bool:
        """The node did not carry the request out; whether it is taken over from here."""

    def away(self) -> None:
        """The node does not answer now; told at every try."""


class Lane:
    """One ordered connection to a server; nothing is opened before the first request.

    The invariant that answers find their requests: `_pending` holds the requests in the order
    in which they were put and are written; whoever writes, writes all that was put before.

    Attributes:
        since: the number of the first request on the present connection; requests are numbered
            as they are written, again at each try.
        last: the trouble of last, for those whose time is up.
    """

    def __init__(self, backend: Backend, router: Router | None = None):
        self._backend = backend
        self._router = router
        self._connection: AbstractConnection = backend.connection()
        self._open = False
        self._answered = False
        self._pending: deque[Request] = deque()
        self._unwritten: list[Request] = []
        self._work = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._reading = asyncio.timeout(None)
        self._owed_since_s: float | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._away_since_s: float | None = None
        self._number = 0
        self.since = 1
        self.last: BaseException | None = None

    @property
    def where(self) -> str:
        """The server's address without secrets."""
        return self._backend.where

    def put(self, requests: Sequence[Request]) -> None:
        """Set the place of requests behind all that were put before; `flush` sends them."""
        for request in requests:
            request.lane = self
            if request.asking:
                # It shares the future: dropped when its request is, and counted as an answer.
                aside = Request(("ASKING",), request.future, aside=True)
                self._pending.append(aside)
                self._unwritten.append(aside)
            self._pending.append(request)
            self._unwritten.append(request)

    def flush(self) -> None:
        """Send all that was put, at once where there is a connection; else see that one is made."""
        if self._open:
            self._write()
        elif self._pending:
            self._work.set()
            if self._runner is None:
                self._runner = asyncio.get_running_loop().create_task(self._run())

    def reconnect(self) -> None:
        """Make the connection anew, and send again what it owes: the server's role has changed."""
        if self._open:
            self.last = ConnectionError("the server's role has changed")
            self._reading.reschedule(asyncio.get_running_loop().time())

    async def close(self) -> None:
        """Close the connection; once, after the last request was answered."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait({self._runner})

    @property
    def is_answering(self) -> bool:
        """Whether the present connection has answered; what it owes is then best left to it."""
        return self._open and self._answered

    @property
    def is_idle(self) -> bool:
        """Whether it owes nothing."""
        return not self._pending

    def hand_over(self) -> list[Request]:
        """What it owes, in order, for another lane to do; its connection is given up."""
        owed: list[Request] = []
        for request in self._pending:
            request.repeated = request.repeated or request.sent
            if request.bound:
                request.resolve(ReplyLost(f"{self.where}: the node has no slots any more"))
            elif not request.future.done() and not request.aside:
                owed.append(request)
        self._pending.clear()
        self._unwritten.clear()
        if self._open:
            # From now on its answers belong to nobody.
            self._open = False
            self.last = ConnectionError("the node has no slots any more")
            self._reading.reschedule(asyncio.get_running_loop().time())
        return owed

    def _write(self) -> None:
        """Write what was put; a broken connection is noticed by the reader.

        It does not wait for the server: a caller that is cancelled must not end a shared
        connection. Unsent bytes are bounded by what callers wait for, and by the watch.
        """
        writer = writer_of(self._connection)
        # Never to a closing transport: some versions of CPython would register its socket again,
        # whose file descriptor the next connection may reuse (python/cpython#136234).
        if writer is None or writer.is_closing() or not self._unwritten:
            return
        packed: list[bytes] = []
        dropped: list[Request] = []
        number, since = self._number, self.since
        for request in self._unwritten:
            if request.future.done() and not request.sent:
                dropped.append(request)
                continue
            # The client library packs in Python, at four times the cost.
            packed.append(hiredis.pack_command(request.command))  # type: ignore[arg-type]
            number += 1
            request.sent, request.since, request.number = True, since, number
        self._number = number
        if dropped:
            # What was never sent is never sent; what was, still gets its answer.
            self._pending = deque(r for r in self._pending if r not in dropped)
        self._unwritten.clear()
        self._owe()
        try:
            writer.writelines(packed)
        except (OSError, RuntimeError) as error:
            # The last is uvloop's, for a transport that it closed and whose reader is yet to hear.
            self.last = error

    async def _run(self) -> None:
        """Keep the connection while there is work, and read its answers; one task."""
        backoff, failures = EqualJitterBackoff(cap=MAX_PAUSE_S, base=PAUSE_S), 0
        while True:
            await self._work.wait()
            try:
                async with asyncio.timeout(self._backend.silence_s):
                    await self._connection.connect()
                drop_unsent_on_close(self._connection)
                async with asyncio.timeout(None) as self._reading:
                    self._resend()
                    async for _ in self._answers():
                        failures = 0
            except (RedisError, OSError) as error:
                if is_passing(error):
                    self._note_away(error)
                else:
                    self._refuse_all(error)
            except Exception as error:
                log.exception("lane_failed", store=self.where)
                self._refuse_all(error)
            finally:
                self._open = False
                self._owed_since_s = None
                await abort(self._connection)
            self._forget_abandoned()
            if not self._pending:
                self._work.clear()
                continue
            await asyncio.sleep(backoff.compute(failures))
            failures += 1

    def _resend(self) -> None:
        """Send what was not answered yet; what is put from now on is sent at once, behind it."""
        for request in self._pending:
            if request.bound and request.sent:
                request.resolve(ReplyLost(f"{self.where}: the connection broke"))
        self._forget_abandoned()
        for request in self._pending:
            request.repeated = request.repeated or request.sent
        self._unwritten = list(self._pending)
        self.since = self._number + 1
        self._open, self._answered = True, False
        self._write()

    async def _answers(self) -> AsyncIterator[None]:
        """Give every answer to the request that is next in order, until the connection ends."""
        connection = self._connection
        while True:
            try:
                value = await connection.read_response(timeout=math.inf, disconnect_on_error=False)
            except RedisError as error:
                if not self._open or not self._pending:
                    raise
                self._settle_refusal(error)
            else:
                if not self._open:
                    raise RedisConnectionError("handed over")
                self._note_back()
                request = self._pending.popleft()
                if not request.future.done() and not request.aside:
                    request.future.set_result(Answer(value, request.repeated))
            self._answered = True
            self._owed_since_s = time.monotonic() if self._pending else None
            yield

    def _settle_refusal(self, error: RedisError) -> None:
        """Resolve, repeat or redirect the request whose answer is an error.

        Raises:
            RedisError: the server is away or held up, and all is to be sent again.
        """
        request = self._pending[0]
        if is_reply(error):
            request.not_carried_out()
        if isinstance(error, NoScriptError) and request.fallback is not None:
            self._pending.popleft()
            request.command, request.fallback = request.fallback, None
            self.put([request])
            self._write()
        elif self._router is not None and self._router.redirected(request, error):
            self._pending.popleft()
        elif is_passing(error):
            raise error
        else:
            self._pending.popleft()
            self._refuse(request, error)

    def _refuse(self, request: Request, error: BaseException) -> None:
        refusal: ReplyLost | StoreRefused = self._backend.refused(error)
        if request.repeated:
            # An earlier try may have been carried out.
            refusal = ReplyLost(f"{self.where}: {text(error)}")
        refusal.__cause__ = error
        request.resolve(refusal)

    def _refuse_all(self, error: BaseException) -> None:
        while self._pending:
            request = self._pending.popleft()
            request.repeated = request.repeated or request.sent
            self._refuse(request, error)

    def _forget_abandoned(self) -> None:
        """Drop the requests whose callers gave up, while there is no connection.

        A script that was sent is kept while a caller waits for a later one on the same keys, which
        expects what the first one writes. Sent alone, the later one would conflict; if the bytes of
        the old connection then arrived, the server would apply both after all.
        """
        awaited_keys: set[str | bytes | int] = set()
        pending: deque[Request] = deque()
        for request in reversed(self._pending):
            follows = request.sent and not awaited_keys.isdisjoint(request.keys)
            if not request.future.done() or follows:
                awaited_keys.update(request.keys)
                pending.appendleft(request)
        self._pending = pending
        self._unwritten = [r for r in self._unwritten if not r.future.done()]

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
            self.last = TimeoutError(f"silent for {self._backend.silence_s:g} s")
            self._reading.reschedule(asyncio.get_running_loop().time())

    def _note_away(self, error: BaseException) -> None:
        # The end of `_reading` has no words of its own: what ended it has said why.
        error = error if str(error) or self.last is None else self.last
        self.last = error
        if self._router is not None:
            self._router.away()
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            log.warning("store_away", store=self.where, reason=text(error))

    def _note_back(self) -> None:
        if self._away_since_s is not None:
            away_s = round(time.monotonic() - self._away_since_s, 3)
            self._away_since_s = None
            log.info("store_back", store=self.where, away_s=away_s)
