"""A pipelined connection: requests are written at once and replies are matched in order.

A request does not wait for the reply to the one before it. The server executes requests in the
order in which they were enqueued, so a commit sees every earlier commit, and a load behind a commit
sees what that commit wrote.

If the connection breaks, or a reply takes longer than the response timeout, it is opened again
with exponential backoff and jitter, and every unanswered request that a caller still waits for is
resent in order. The same happens if the server replies that it is loading or busy with a script.
The reply to a request that may have been executed at an earlier attempt says so (`is_retry`).
Closing a connection discards its unsent bytes; bytes already sent may be executed after the retry,
but then find another head than they expect. A request that the server rejects permanently is never
retried. Redirects of a cluster are passed to the redirect handler.

The client library opens a connection and authenticates; then requests are written to its transport,
and replies parsed as they arrive, without the library's streams.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol

import structlog
from redis.asyncio.connection import AbstractConnection
from redis.backoff import EqualJitterBackoff
from redis.exceptions import NoScriptError, RedisError

from service.core.errors import CarryError
from service.core.values import StreamKey
from service.store.observation import StoreTelemetry
from service.store.redis.connections import (
    ConnectionFactory,
    ReplyReader,
    abort,
    describe_error,
    drop_unsent_on_close,
    is_error_reply,
    is_transient,
    read_replies,
)
from service.store.redis.outcomes import Reply, ReplyLost
from service.store.redis.requests import StoreRequest, pack_command

BACKOFF_BASE_S: Final = 0.01
BACKOFF_CAP_S: Final = 0.5
ASKING: Final = pack_command(("ASKING",))

log = structlog.get_logger(__name__)


class RedirectHandler(Protocol):
    """Takes over requests that a node redirects; a connection to one of several nodes has one."""

    def handle_redirect(self, request: StoreRequest, error: RedisError) -> bool:
        """Take over a request that the node did not execute; False if the error is no redirect."""

    def handle_disconnect(self) -> None:
        """The node is unavailable; called after every failed attempt to connect."""


class PipelinedConnection:
    """One ordered connection to a server; it is opened by the first request.

    Invariant, by which replies find their requests: `_pending` holds the requests in the order in
    which they were enqueued and are written, and a write sends all that was enqueued before.

    Attributes:
        generation: the sequence number of the first request on the present connection. Requests
            are numbered as they are written, again at each attempt.
        last_error: the last error, for callers whose deadline expires.
    """

    def __init__(
        self,
        factory: ConnectionFactory,
        redirect_handler: RedirectHandler | None = None,
        telemetry: StoreTelemetry | None = None,
    ):
        self._factory = factory
        self._redirect_handler = redirect_handler
        self._connection: AbstractConnection = factory.create_connection()
        self._replies: ReplyReader | None = None
        self._has_replied = False
        self._pending: deque[StoreRequest] = deque()
        self._unwritten: list[StoreRequest] = []
        self._has_work = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._reply_due_since_s: float | None = None
        self._response_timer: asyncio.TimerHandle | None = None
        self._unavailable_since_s: float | None = None
        self._telemetry = telemetry or StoreTelemetry()
        self._timed: StoreRequest | None = None
        self._timed_since_s = 0.0
        self._sequence = 0
        self.generation = 1
        self.last_error: BaseException | None = None

    @property
    def redacted_url(self) -> str:
        """The server's address without secrets."""
        return self._factory.redacted_url

    @property
    def peer(self) -> tuple[str, int]:
        """Host and port of the last attempt to connect over TCP."""
        connection: Any = self._connection
        return connection.host, connection.port

    def enqueue(self, requests: Sequence[StoreRequest]) -> None:
        """Append requests behind all that were enqueued before; `flush` sends them."""
        for request in requests:
            request.connection = self
            if request.needs_asking:
                # It shares the future: dropped together with its request; its reply is counted.
                asking = StoreRequest(ASKING, request.future, is_asking=True)
                self._pending.append(asking)
                self._unwritten.append(asking)
            self._pending.append(request)
            self._unwritten.append(request)

    def flush(self) -> None:
        """Send what was enqueued; opens the connection if it is closed."""
        if self._is_open:
            self._write()
        elif self._pending:
            self._has_work.set()
            if self._runner is None:
                self._runner = asyncio.get_running_loop().create_task(self._run())

    def reconnect(self) -> None:
        """Open the connection again and resend what is pending: the server's role has changed."""
        self._end(ConnectionError("the server's role has changed"))

    async def close(self) -> None:
        """Close the connection; once, after the last request was resolved."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait({self._runner})

    @property
    def _is_open(self) -> bool:
        return self._replies is not None and not self._replies.ended.done()

    @property
    def is_responsive(self) -> bool:
        """Whether the present connection has replied, so that it may keep its pending requests."""
        return self._is_open and self._has_replied

    @property
    def is_idle(self) -> bool:
        """Whether no request is pending."""
        return not self._pending

    def take_pending(self) -> list[StoreRequest]:
        """Remove the pending requests, in order, for another connection, and close this one."""
        taken: list[StoreRequest] = []
        for request in self._pending:
            request.is_retry = request.is_retry or request.is_sent
            if request.is_connection_bound:
                request.resolve(ReplyLost(f"{self.redacted_url}: the node has no slots any more"))
            elif not request.future.done() and not request.is_asking:
                taken.append(request)
        self._pending.clear()
        self._unwritten.clear()
        # Replies that still arrive on it belong to no request.
        self._end(ConnectionError("the node has no slots any more"))
        return taken

    def _write(self) -> None:
        """Write what was enqueued; the reader detects a broken connection.

        It does not wait for the server: a cancelled caller must not close a shared connection.
        Unsent bytes are bounded by what callers wait for and by the response timeout.
        """
        replies = self._replies
        # Never to a closing transport: some versions of CPython would register its socket again,
        # whose file descriptor the next connection may reuse (python/cpython#136234).
        if replies is None or replies.transport.is_closing() or not self._unwritten:
            return
        packed: list[bytes] = []
        dropped: list[StoreRequest] = []
        first: StoreRequest | None = None
        sequence, generation = self._sequence, self.generation
        for request in self._unwritten:
            if request.future.done() and not request.is_sent:
                dropped.append(request)
                continue
            packed.append(request.packed)
            sequence += 1
            first = first or request
            request.is_sent, request.generation, request.sequence = True, generation, sequence
        self._sequence = sequence
        if dropped:
            # Only unsent requests may be dropped: the others still get their reply.
            self._pending = deque(r for r in self._pending if r not in dropped)
        self._unwritten.clear()
        self._expect_reply()
        if self._timed is None:
            self._timed, self._timed_since_s = first, time.monotonic()
        try:
            replies.transport.writelines(packed)
        except (OSError, RuntimeError) as error:
            # uvloop raises RuntimeError for a transport it closed before the reader was notified.
            self._end(ConnectionError(str(error)))

    async def _run(self) -> None:
        """Keep the connection open while there is work; one task."""
        backoff, failures = EqualJitterBackoff(cap=BACKOFF_CAP_S, base=BACKOFF_BASE_S), 0
        while True:
            await self._has_work.wait()
            try:
                async with asyncio.timeout(self._factory.response_timeout_s):
                    await self._connection.connect()
                if self._sequence:
                    self._telemetry.reconnects += 1
                drop_unsent_on_close(self._connection)
                self._replies = read_replies(self._connection, self._handle_reply)
                self._resend()
                error: BaseException = await self._replies.ended
                failures = 0 if self._has_replied else failures
            except Exception as failure:
                error = failure
            finally:
                self._replies = None
                self._reply_due_since_s = None
                await abort(self._connection)
            self._handle_failure(error)
            self._drop_abandoned()
            if not self._pending:
                self._has_work.clear()
                continue
            await asyncio.sleep(backoff.compute(failures))
            failures += 1

    def _resend(self) -> None:
        """Resend what is pending; what is enqueued from now on is sent at once, behind it."""
        for request in self._pending:
            if request.is_connection_bound and request.is_sent:
                request.resolve(ReplyLost(f"{self.redacted_url}: the connection broke"))
        self._drop_abandoned()
        for request in self._pending:
            request.is_retry = request.is_retry or request.is_sent
        self._unwritten = list(self._pending)
        self.generation = self._sequence + 1
        self._timed = None
        self._has_replied = False
        self._write()

    def _handle_reply(self, value: Any) -> None:
        """Resolve the first pending request with a reply.

        Raises:
            RedisError: an error after which everything pending is resent.
        """
        if isinstance(value, RedisError):
            if not self._pending:
                raise value
            self._handle_error_reply(value)
        else:
            self._record_available()
            request = self._pending.popleft()
            if request is self._timed:
                self._timed = None
                self._telemetry.round_trips_s.append(time.monotonic() - self._timed_since_s)
            if not request.future.done() and not request.is_asking:
                request.future.set_result(Reply(value, request.is_retry))
        self._has_replied = True
        self._reply_due_since_s = time.monotonic() if self._pending else None

    def _handle_error_reply(self, error: RedisError) -> None:
        """Reject, resend or redirect the request whose reply is an error.

        Raises:
            RedisError: a transient error, after which everything pending is resent.
        """
        request = self._pending[0]
        if request is self._timed:
            self._timed = None
        if is_error_reply(error):
            request.mark_not_executed()
        if isinstance(error, NoScriptError) and request.script is not None:
            self._pending.popleft()
            request.send_script()
            self.enqueue([request])
            self._write()
        elif self._redirect_handler is not None and self._redirect_handler.handle_redirect(
            request, error
        ):
            self._pending.popleft()
        elif is_transient(error):
            raise error
        else:
            self._pending.popleft()
            self._reject(request, error)

    def _reject(self, request: StoreRequest, error: BaseException) -> None:
        rejection: ReplyLost | CarryError = self._factory.refused_error(error)
        if request.is_retry:
            # An earlier attempt may have been executed.
            rejection = ReplyLost(f"{self.redacted_url}: {describe_error(error)}")
        rejection.__cause__ = error
        request.resolve(rejection)

    def _reject_all(self, error: BaseException) -> None:
        while self._pending:
            request = self._pending.popleft()
            request.is_retry = request.is_retry or request.is_sent
            self._reject(request, error)

    def _drop_abandoned(self) -> None:
        """Drop the requests whose callers gave up, while there is no connection.

        A script that was sent is kept while a caller waits for a later one on the same streams,
        which expects what the first one writes. Sent alone, the later one would conflict; if bytes
        of the old connection then arrived, the server would apply both after all.
        """
        awaited: set[StreamKey] = set()
        pending: deque[StoreRequest] = deque()
        for request in reversed(self._pending):
            is_needed = request.is_sent and not awaited.isdisjoint(request.streams)
            if not request.future.done() or is_needed:
                awaited.update(request.streams)
                pending.appendleft(request)
        self._pending = pending
        self._unwritten = [r for r in self._unwritten if not r.future.done()]

    def _expect_reply(self) -> None:
        """Start the response timeout, unless it runs; one timer at a time."""
        if self._reply_due_since_s is None:
            self._reply_due_since_s = time.monotonic()
        if self._response_timer is None:
            self._start_response_timer(self._factory.response_timeout_s)

    def _start_response_timer(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._response_timer = loop.call_later(seconds, self._check_response_time)

    def _check_response_time(self) -> None:
        self._response_timer = None
        if self._reply_due_since_s is None:
            return
        timeout_s = self._factory.response_timeout_s
        remaining_s = self._reply_due_since_s + timeout_s - time.monotonic()
        if remaining_s > 0:
            self._start_response_timer(remaining_s)
        else:
            self._end(TimeoutError(f"no reply for {timeout_s:g} s"))

    def _end(self, error: Exception) -> None:
        """End the present connection, which is then opened again."""
        if self._replies is not None:
            self._replies.end(error)

    def _handle_failure(self, error: BaseException) -> None:
        """Keep what is pending if the server may accept it later, otherwise reject it."""
        if not isinstance(error, (RedisError, OSError)):
            log.error("store_connection_failed", store=self.redacted_url, exc_info=error)
            self._reject_all(error)
            return
        if not is_transient(error):
            self._reject_all(error)
            return
        # the timeout of a connect has no message
        error = error if str(error) or self.last_error is None else self.last_error
        self.last_error = error
        if self._redirect_handler is not None:
            self._redirect_handler.handle_disconnect()
        if self._unavailable_since_s is None:
            self._unavailable_since_s = time.monotonic()
            log.warning("store_unavailable", store=self.redacted_url, reason=describe_error(error))

    def _record_available(self) -> None:
        if self._unavailable_since_s is not None:
            unavailable_s = round(time.monotonic() - self._unavailable_since_s, 3)
            self._unavailable_since_s = None
            log.info("store_available", store=self.redacted_url, unavailable_s=unavailable_s)
