"""A pipelined connection: commands are written at once and replies are matched in order.

A command does not wait for the reply to the one before it. The server executes commands in the
order of the calls of `send`, so a commit sees every earlier commit, and a load behind a commit
sees what that commit wrote.

If the connection breaks, or a reply takes longer than the response timeout, it is opened again
with exponential backoff and jitter, and every unanswered command that a caller still waits for is
resent in order. The same happens if the server replies that it is loading or busy with a script.
The reply to a command that may have been executed at an earlier attempt says so (`is_retry`).
Closing a connection discards its unsent bytes; bytes already sent may be executed after the retry,
but then find another head than they expect. A command that the server rejects permanently is never
retried. Redirects of a cluster are passed to the redirect handler.

The client library opens a connection and authenticates; then commands are written to its transport,
and replies parsed as they arrive, without the library's streams.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import hiredis
import structlog
from redis.asyncio.connection import AbstractConnection, DefaultParser
from redis.backoff import EqualJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, NoScriptError, RedisError

from service.core.errors import CarryError, StoreUnavailable
from service.core.values import StreamKey
from service.store.capabilities import StoreTelemetry
from service.store.redis.commands import Command, PendingCommand, pack_command
from service.store.redis.connections import (
    ConnectionFactory,
    OnConnect,
    abort,
    describe_error,
    drop_unsent_on_close,
    end_tasks,
    is_error_reply,
    is_transient,
    transport_of,
)
from service.store.redis.outcomes import Outcome, ReplyLost, ServerReply, read_value
from service.store.settings import StoreSettings

BACKOFF_BASE_S: Final = 0.01
BACKOFF_CAP_S: Final = 0.5
_NOT_ENOUGH: Final = object()
ASKING: Final = pack_command(("ASKING",))

log = structlog.get_logger(__name__)


class RedirectHandler(Protocol):
    """Takes over commands that a node redirects; a connection to one of several nodes has one."""

    def handle_redirect(self, command: PendingCommand, error: RedisError) -> bool:
        """Take over a command that the node did not execute; False if the error is no redirect."""

    def handle_disconnect(self) -> None:
        """The node is unavailable; called after every failed attempt to connect."""


class ReplyReader(asyncio.Protocol):
    """Parses the replies that arrive on one connection, in place of the client library's reader.

    Args:
        on_reply: called with each reply, in order; an error reply is an instance of RedisError. If
            it raises, the connection ends.
        on_push: called with each push message of RESP3, which is no reply; None to ignore them.

    Attributes:
        ended: resolved once with the reason; no reply is passed on afterwards.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        on_reply: Callable[[Any], None],
        on_push: Callable[[list[Any]], None] | None = None,
    ):
        transport.set_protocol(self)
        self.transport = transport
        self.ended: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._on_reply = on_reply
        self._on_push = on_push
        self._parser = hiredis.Reader(
            protocolError=InvalidResponse,
            replyError=DefaultParser.parse_error,
            notEnoughData=_NOT_ENOUGH,
        )

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        parser.feed(data)
        try:
            while not self.ended.done() and (reply := parser.gets()) is not _NOT_ENOUGH:
                if type(reply) is not hiredis.PushNotification:
                    self._on_reply(reply)
                elif self._on_push is not None:
                    self._on_push(reply)
        except Exception as error:
            self.end(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.end(error or RedisConnectionError("the server closed the connection"))

    def end(self, error: BaseException) -> None:
        """End the connection, unless it has ended."""
        if not self.ended.done():
            self.ended.set_result(error)


class PipelinedConnection:
    """One ordered connection to a server; it is opened by the first command.

    Invariant, by which replies find their commands: `_pending` holds the commands in the order in
    which they are written.

    Attributes:
        generation: the sequence number of the first command on the present connection. Commands
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
        self._pending: deque[PendingCommand] = deque()
        self._has_work = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._reply_due_since_s: float | None = None
        self._response_timer: asyncio.TimerHandle | None = None
        self._unavailable_since_s: float | None = None
        self._telemetry = telemetry or StoreTelemetry()
        # round trips are measured on one command at a time
        self._measured_command: PendingCommand | None = None
        self._measured_since_s = 0.0
        self._sequence = 0
        self.generation = 1
        self.last_error: BaseException | None = None

    @property
    def redacted_url(self) -> str:
        """The server's address without secrets."""
        return self._factory.redacted_url

    def send(self, commands: Sequence[PendingCommand]) -> None:
        """Send commands behind all that were sent before; opens the connection if it is closed."""
        queued: list[PendingCommand] = []
        for command in commands:
            command.connection = self
            if command.needs_asking:
                # It shares the future: dropped together with its command; its reply is counted.
                queued.append(PendingCommand(ASKING, command.future, is_asking=True))
            queued.append(command)
        self._pending += queued
        if self._is_open:
            self._write(queued)
        else:
            self._has_work.set()
            if self._runner is None:
                self._runner = asyncio.get_running_loop().create_task(self._run())

    def reconnect(self) -> None:
        """Open the connection again and resend what is pending: the server's role has changed."""
        self._end(ConnectionError("the server's role has changed"))

    async def close(self) -> None:
        """Close the connection; once, after the last command was resolved."""
        await end_tasks(self._runner)

    @property
    def _is_open(self) -> bool:
        return self._replies is not None and not self._replies.ended.done()

    @property
    def is_responsive(self) -> bool:
        """Whether the present connection has replied, so that it may keep its pending commands."""
        return self._is_open and self._has_replied

    @property
    def is_idle(self) -> bool:
        """Whether no command is pending."""
        return not self._pending

    def take_pending(self) -> list[PendingCommand]:
        """Remove the pending commands, in order, for another connection, and close this one."""
        taken: list[PendingCommand] = []
        for command in self._pending:
            command.is_retry = command.is_retry or command.is_sent
            if command.is_connection_bound:
                command.resolve(ReplyLost(f"{self.redacted_url}: the node has no slots any more"))
            elif not command.future.done() and not command.is_asking:
                taken.append(command)
        self._pending.clear()
        # Replies that still arrive on it belong to no command.
        self._end(ConnectionError("the node has no slots any more"))
        return taken

    def _write(self, commands: Sequence[PendingCommand]) -> None:
        """Write commands to the present connection.

        It does not wait for the server: a cancelled caller must not close a shared connection.
        Unsent bytes are bounded by what callers wait for and by the response timeout.
        """
        # Never to a closing transport: some versions of CPython would register its socket again,
        # whose file descriptor the next connection may reuse (python/cpython#136234).
        if self._replies is None or self._replies.transport.is_closing() or not commands:
            return
        for command in commands:
            self._sequence += 1
            command.is_sent = True
            command.generation, command.sequence = self.generation, self._sequence
        now_s = time.monotonic()
        if self._reply_due_since_s is None:
            self._reply_due_since_s = now_s
        if self._response_timer is None:
            self._check_response_time()
        if self._measured_command is None:
            self._measured_command, self._measured_since_s = commands[0], now_s
        try:
            self._replies.transport.writelines([command.packed for command in commands])
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
                transport = transport_of(self._connection)
                self._replies = ReplyReader(transport, self._handle_reply)
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
        for command in self._pending:
            if command.is_connection_bound and command.is_sent:
                command.resolve(ReplyLost(f"{self.redacted_url}: the connection broke"))
        self._drop_abandoned()
        for command in self._pending:
            command.is_retry = command.is_retry or command.is_sent
        self.generation = self._sequence + 1
        self._measured_command = None
        self._has_replied = False
        self._write(self._pending)

    def _handle_reply(self, value: Any) -> None:
        """Resolve the first pending command with a reply.

        Raises:
            RedisError: an error after which everything pending is resent.
        """
        if isinstance(value, RedisError):
            if not self._pending:
                raise value
            self._handle_error_reply(value)
        else:
            if self._unavailable_since_s is not None:
                unavailable_s = round(time.monotonic() - self._unavailable_since_s, 3)
                self._unavailable_since_s = None
                log.info("store_available", store=self.redacted_url, unavailable_s=unavailable_s)
            command = self._pending.popleft()
            if command is self._measured_command:
                self._measured_command = None
                self._telemetry.round_trips_s.append(time.monotonic() - self._measured_since_s)
            if not command.future.done() and not command.is_asking:
                command.future.set_result(ServerReply(value, command.is_retry))
        self._has_replied = True
        self._reply_due_since_s = time.monotonic() if self._pending else None

    def _handle_error_reply(self, error: RedisError) -> None:
        """Reject, resend or redirect the command whose reply is an error.

        Raises:
            RedisError: a transient error, after which everything pending is resent.
        """
        command = self._pending[0]
        if command is self._measured_command:
            self._measured_command = None
        if is_error_reply(error):
            command.mark_not_executed()
        if isinstance(error, NoScriptError) and command.script is not None:
            self._pending.popleft()
            if command.is_retry or not command.future.done():
                command.send_script()
                self.send([command])
        elif self._redirect_handler is not None and self._redirect_handler.handle_redirect(
            command, error
        ):
            self._pending.popleft()
        elif is_transient(error):
            raise error
        else:
            self._pending.popleft()
            self._reject(command, error)

    def _reject(self, command: PendingCommand, error: BaseException) -> None:
        rejection: ReplyLost | CarryError = self._factory.rejection_error(error)
        if command.is_retry:
            # An earlier attempt may have been executed.
            rejection = ReplyLost(f"{self.redacted_url}: {describe_error(error)}")
        rejection.__cause__ = error
        command.resolve(rejection)

    def _reject_all(self, error: BaseException) -> None:
        while self._pending:
            command = self._pending.popleft()
            command.is_retry = command.is_retry or command.is_sent
            self._reject(command, error)

    def _drop_abandoned(self) -> None:
        """Drop the commands whose callers gave up, while there is no connection.

        A script that was sent is kept while a caller waits for a later one on the same streams,
        which expects what the first one writes. Sent alone, the later one would conflict; if bytes
        of the old connection then arrived, the server would apply both after all.
        """
        awaited: set[StreamKey] = set()
        pending: deque[PendingCommand] = deque()
        for command in reversed(self._pending):
            is_needed = command.is_sent and not awaited.isdisjoint(command.streams)
            if not command.future.done() or is_needed:
                awaited.update(command.streams)
                pending.appendleft(command)
        self._pending = pending

    def _check_response_time(self) -> None:
        """End the connection if a reply is overdue; one timer at a time, while one is due."""
        self._response_timer = None
        if self._reply_due_since_s is None:
            return
        timeout_s = self._factory.response_timeout_s
        remaining_s = self._reply_due_since_s + timeout_s - time.monotonic()
        if remaining_s > 0:
            loop = asyncio.get_running_loop()
            self._response_timer = loop.call_later(remaining_s, self._check_response_time)
        else:
            self._end(TimeoutError(f"no reply for {timeout_s:g} s"))

    def _end(self, error: Exception) -> None:
        """End the present connection, which is then opened again."""
        if self._replies is not None:
            self._replies.end(error)

    def _handle_failure(self, error: BaseException) -> None:
        """Keep what is pending if the server may accept it later, otherwise reject it."""
        if not is_transient(error):
            if not isinstance(error, (RedisError, OSError)):
                log.error("store_connection_failed", store=self.redacted_url, exc_info=error)
            self._reject_all(error)
            return
        # the timeout of a connect has no message
        error = error if str(error) or self.last_error is None else self.last_error
        self.last_error = error
        for command in self._pending:
            if command.is_once:
                command.resolve(StoreUnavailable(f"{self.redacted_url}: {describe_error(error)}"))
        if self._redirect_handler is not None:
            self._redirect_handler.handle_disconnect()
        if self._unavailable_since_s is None:
            self._unavailable_since_s = time.monotonic()
            log.warning("store_unavailable", store=self.redacted_url, reason=describe_error(error))


class RedisServer:
    """One server: a pipelined connection for chunks, and another for everything that is only read.

    Loads, commits and deletions use the first one, so that a load sees every earlier commit.
    Listings, counts and checks may take long and must not delay them. None is opened before the
    first call.

    Args:
        settings: their address is this server's.
        redirect_handler: takes over redirected commands, if the server is a node of a cluster.
        telemetry: what the connection for chunks counts, of the whole store.
        on_connect: of `ConnectionFactory`.
    """

    def __init__(
        self,
        settings: StoreSettings,
        redirect_handler: RedirectHandler | None = None,
        telemetry: StoreTelemetry | None = None,
        on_connect: OnConnect | None = None,
    ):
        self.factory = ConnectionFactory(settings, on_connect)
        self.redacted_url = self.factory.redacted_url
        self.connection = PipelinedConnection(self.factory, redirect_handler, telemetry)
        self._reads = PipelinedConnection(self.factory)

    async def close(self) -> None:
        """Close both connections; once, after the last call returned."""
        await self.connection.close()
        await self._reads.close()

    async def execute_once(self, timeout_s: float, *command: str | bytes | int) -> Any:
        """Send a command once, without retries; returns the reply.

        Raises:
            StoreUnavailable: no reply in time.
            StoreRefused: the server rejects the command.
        """
        pending = PendingCommand.of(*command)
        pending.is_once = True
        (outcome,) = await self._execute([pending], timeout_s)
        return read_value(outcome)

    async def read(self, *command: str | bytes | int) -> Any:
        """Send a read-only command and return its reply; it is sent again if a connection breaks.

        Raises:
            StoreUnavailable: no reply in time.
            StoreRefused: the server rejects the command.
        """
        (outcome,) = await self._execute([PendingCommand.of(*command)], self.factory.wait_s)
        return read_value(outcome)

    async def read_many(self, commands: Sequence[Command]) -> list[Any]:
        """Send read-only commands in one round trip; the reply to a rejected one is its error.

        Raises:
            StoreUnavailable: no reply in time.
        """
        pending = [PendingCommand.of(*command) for command in commands]
        replies: list[Any] = []
        for outcome in await self._execute(pending, self.factory.wait_s):
            try:
                replies.append(read_value(outcome))
            except CarryError as error:
                replies.append(error)
        return replies

    async def _execute(self, commands: Sequence[PendingCommand], timeout_s: float) -> list[Outcome]:
        self._reads.send(commands)
        try:
            async with asyncio.timeout(timeout_s):
                return [await command.future for command in commands]
        except TimeoutError as timeout:
            error = self._reads.last_error or timeout
            raise self.factory.unavailable_error(error, timeout_s) from error
        finally:
            for command in commands:
                command.future.cancel()
