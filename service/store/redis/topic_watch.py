"""Notices new entries of topics, so that owners read them at once, and idle topics rarely.

A server remembers which keys a connection has read, and tells it once when one of them changes
(CLIENT TRACKING, from Redis 6.0 on). So a topic is watched by looking behind the last known entry:
either there is another one by now, or the next change is announced. One connection to each server
watches all of its topics, also on a cluster, and each announcement is one short message.

It only saves time. An announcement may be lost with its connection, a topic may move to another
server, and a server may not permit tracking: owners read their topics again after a while in any
case.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

import structlog
from redis.exceptions import AskError, RedisError

from service.store.redis.commands import pack_command
from service.store.redis.connections import (
    ConnectionFactory,
    abort,
    describe_error,
    end_tasks,
    is_transient,
    transport_of,
)
from service.store.redis.pipelined_connection import RedisServer, ReplyReader
from service.store.redis.router import Router

RECONNECT_S: Final = 1.0
REJECTED_S: Final = 60.0
"""Pauses before the next attempt to connect, and after the server has rejected a command."""

log = structlog.get_logger(__name__)


class TopicWatch:
    """Watches topics; connections are opened when they are needed.

    Args:
        router: knows the server of each topic.
    """

    def __init__(self, router: Router):
        self._router = router
        self._servers: dict[RedisServer, _ServerWatch] = {}

    def watch(self, name: str, after: bytes, notification: asyncio.Future[bool]) -> bool:
        """Watch a topic once; as `Topics.watch`."""
        server = self._router.server_of(self._router.slot(name))
        if server is None:
            return False
        watch = self._servers.get(server)
        if watch is None:
            watch = self._servers[server] = _ServerWatch(server.factory)
        return watch.add(name, after, notification)

    async def close(self) -> None:
        """Close the connections."""
        for watch in self._servers.values():
            await watch.close()


class _ServerWatch:
    """Watches the topics of one server.

    Invariant: `_pending_replies` has, in order, the notifications of commands without a reply yet.
    """

    def __init__(self, factory: ConnectionFactory):
        self._factory = factory
        self._replies: ReplyReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._pending_replies: deque[asyncio.Future[bool]] = deque()
        self._watches: dict[bytes, asyncio.Future[bool]] = {}

    def add(self, name: str, after: bytes, notification: asyncio.Future[bool]) -> bool:
        """Watch a topic once, if the connection is open; otherwise open it."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        replies = self._replies
        if replies is None or replies.ended.done() or replies.transport.is_closing():
            return False
        self._pending_replies.append(notification)
        self._watches[name.encode()] = notification
        replies.transport.write(pack_command(("XREAD", "COUNT", 1, "STREAMS", name, after)))
        return True

    async def close(self) -> None:
        """Close the connection."""
        await end_tasks(self._task)

    async def _run(self) -> None:
        """Open the connection, wait until it ends, and pause."""
        connection = self._factory.create_connection(protocol=3)
        try:
            async with asyncio.timeout(self._factory.response_timeout_s):
                await connection.connect()
                await connection.send_command("CLIENT", "TRACKING", "ON")
                await connection.read_response()
            transport = transport_of(connection)
            self._replies = ReplyReader(transport, self._handle_reply, self._handle_push)
            error: BaseException = await self._replies.ended
        except (RedisError, OSError) as failure:
            error = failure
        finally:
            self._replies = None
            await abort(connection)
            for notification in (*self._pending_replies, *self._watches.values()):
                _resolve(notification, has_entries=False)
            self._pending_replies.clear()
            self._watches.clear()
        is_rejected = not is_transient(error) and not isinstance(error, AskError)
        if is_rejected:
            url, reason = self._factory.redacted_url, describe_error(error)
            log.warning("topics_not_watched", store=url, reason=reason)
        await asyncio.sleep(REJECTED_S if is_rejected else RECONNECT_S)

    def _handle_reply(self, reply: Any) -> None:
        """Process the entries behind an id, if there are any.

        Raises:
            RedisError: which the server replied; it ends the connection.
        """
        notification = self._pending_replies.popleft()
        if isinstance(reply, RedisError):
            raise reply
        if reply:
            _resolve(notification, has_entries=True)

    def _handle_push(self, message: list[Any]) -> None:
        """Process an announcement of changed keys: all keys, if it names none."""
        if message[0] == b"invalidate":
            for name in [*self._watches] if message[1] is None else message[1]:
                if (notification := self._watches.pop(name, None)) is not None:
                    _resolve(notification, has_entries=False)


def _resolve(notification: asyncio.Future[bool], *, has_entries: bool) -> None:
    if not notification.done():
        notification.set_result(has_entries)
