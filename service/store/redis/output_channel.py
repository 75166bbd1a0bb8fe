"""The channel of outputs on Redis' publish/subscribe.

Each worker listens on one control channel, on which workers announce the streams that they watch.
An announcement is a lease: it is repeated, and forgotten some time after the last one. The outputs
of a watched stream are published on a channel of its own. A worker that connects asks for all
announcements. On a cluster any node serves, since publications reach every node.

The connection is replaced when it breaks, and the receivers then read their streams.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import NoPermissionError, RedisError

from service.core.errors import StoreRefused, StoreUnavailable
from service.core.values import StreamKey
from service.store.capabilities import OutputChannel, PublishedOutput, Receiver
from service.store.codec import FINGERPRINT_BYTES, decode_reply
from service.store.keys import join_name, split_name
from service.store.layout import CodecError
from service.store.redis.connections import (
    RETRY_AFTER_S,
    describe_error,
    end_tasks,
    finish_closing,
)
from service.store.redis.router import Router

ANNOUNCE_INTERVAL_S: Final = 5.0
LEASE_S: Final = 3 * ANNOUNCE_INTERVAL_S
RECONNECT_S: Final = 0.5
MAX_RECONNECT_S: Final = 30.0

MAX_UNSENT: Final = 1024
"""Publications that wait for the store; further ones are dropped, and receivers notice the gap."""

MAX_PER_ROUND_TRIP: Final = 64
_ASK: Final = b"?"
_POSITION_BYTES: Final = 8

log = structlog.get_logger(__name__)


class RedisOutputChannel(OutputChannel):
    """The channel on a single server or a cluster.

    Attributes:
        watched: the streams that any worker watches, and until when, on the monotonic clock.
    """

    def __init__(self, router: Router):
        self.watched: dict[StreamKey, float] = {}
        self._wait_s = router.settings.store_wait_s
        self._control = f"{router.settings.namespace}:watched"
        self._prefix = f"{router.settings.namespace}:outputs:"
        self._router = router
        self._receivers: dict[StreamKey, set[Receiver]] = {}
        self._requested: set[StreamKey] = set()
        self._confirmed: set[StreamKey] = set()
        self._waiting: dict[StreamKey, asyncio.Event] = {}
        self._rejection: StoreRefused | None = None
        self._pubsub: PubSub | None = None
        self._unsent: deque[tuple[str, bytes]] = deque()
        self._has_unsent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    async def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        self._is_closed = True
        self._has_unsent.set()
        # it may lose a cancellation, so that each loop below also ends by itself
        await end_tasks(self._task)

    def publish(self, key: StreamKey, start: int, reply: bytes, fingerprint: bytes) -> None:
        if key in self.watched:
            payload = start.to_bytes(_POSITION_BYTES, "little") + fingerprint + reply
            self._send(self._prefix + join_name(key), payload)

    async def subscribe(self, key: StreamKey, receiver: Receiver) -> None:
        self._receivers.setdefault(key, set()).add(receiver)
        announced = self._waiting.setdefault(key, asyncio.Event())
        try:
            async with asyncio.timeout(self._wait_s):
                # if it is not connected, it subscribes to all as soon as it is
                if self._pubsub is not None and key not in self._requested:
                    self._requested.add(key)
                    with suppress(RedisError, OSError):
                        await self._pubsub.subscribe(self._prefix + join_name(key))
                elif key in self._confirmed and not announced.is_set():
                    # received since an earlier subscription that ended
                    self._announce([key])
                if self._rejection is None:
                    await announced.wait()
        except TimeoutError:
            raise StoreUnavailable(
                "the store did not confirm the subscription in time", retry_after_s=RETRY_AFTER_S
            ) from None
        if self._rejection is not None:
            raise self._rejection

    def unsubscribe(self, key: StreamKey, receiver: Receiver) -> None:
        """Stop receiving; the announcement expires."""
        receivers = self._receivers.get(key, set())
        receivers.discard(receiver)
        if not receivers:
            self._receivers.pop(key, None)
            self._waiting.pop(key, None)

    async def _run(self) -> None:
        """Listen and publish until cancelled, with a new connection when one breaks."""
        is_degraded = False
        delay_s = RECONNECT_S
        while True:
            factory = self._router.any_server().factory
            pool = factory.create_pool()
            client: Redis = Redis(connection_pool=pool)
            try:
                async with client.pubsub() as pubsub:
                    await self._connect(pubsub)
                    delay_s = RECONNECT_S
                    if is_degraded:
                        log.info("outputs_recovered", store=factory.redacted_url)
                        is_degraded = False
                    await _run_until_error(
                        self._listen(pubsub),
                        self._publish_all(client),
                        self._announce_repeatedly(pubsub),
                    )
            except Exception as error:
                if isinstance(error, NoPermissionError):
                    self._reject(factory.rejection_error(error))
                if not is_degraded:
                    is_degraded = True
                    reason = describe_error(error)
                    log.warning("outputs_unavailable", store=factory.redacted_url, reason=reason)
            finally:
                self._pubsub = None
                await finish_closing(pool.disconnect())
            if self._is_closed:
                return
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_RECONNECT_S)

    def _reject(self, rejection: StoreRefused) -> None:
        """Fail the subscriptions that wait, and further ones until the store permits them."""
        self._rejection = StoreRefused(
            f"{rejection.detail}; to watch streams, the store's user needs the commands SUBSCRIBE, "
            f"UNSUBSCRIBE and PUBLISH on the channels {self._prefix}* and {self._control}",
            **rejection.facts,
        )
        for announced in self._waiting.values():
            announced.set()

    async def _connect(self, pubsub: PubSub) -> None:
        self._confirmed.clear()
        self._requested.clear()
        await pubsub.subscribe(self._control)
        if await pubsub.get_message(timeout=self._wait_s) is None:
            raise TimeoutError("no answer to a subscription")
        # more may be added meanwhile
        while missing := self._receivers.keys() - self._requested:
            self._requested |= missing
            await pubsub.subscribe(*[self._prefix + join_name(key) for key in missing])
        self._pubsub = pubsub
        self._send(self._control, _ASK)

    async def _listen(self, pubsub: PubSub) -> None:
        while not self._is_closed:
            message = await pubsub.get_message(timeout=ANNOUNCE_INTERVAL_S)
            if message is None:
                continue
            topic = message["channel"].decode()
            if message["type"] == "subscribe":
                self._on_subscribed(topic)
            elif message["type"] != "message":
                continue
            elif topic == self._control:
                self._on_announcement(message["data"])
            else:
                self._on_output(topic.removeprefix(self._prefix), message["data"])

    def _on_subscribed(self, topic: str) -> None:
        """Announce a stream once its outputs would be received."""
        key = split_name(topic.removeprefix(self._prefix))
        self._confirmed.add(key)
        self._announce([key])
        for receiver in tuple(self._receivers.get(key, ())):
            receiver.resynchronize()

    def _on_announcement(self, payload: bytes) -> None:
        self._rejection = None
        if payload == _ASK:
            self._announce(self._confirmed)
            return
        until_s = time.monotonic() + LEASE_S
        for name in payload.decode().split():
            key = split_name(name)
            self.watched[key] = until_s
            if key in self._waiting and key in self._confirmed:
                self._waiting[key].set()

    def _on_output(self, name: str, payload: bytes) -> None:
        key = split_name(name)
        start = int.from_bytes(payload[:_POSITION_BYTES], "little")
        end, reply = _POSITION_BYTES + FINGERPRINT_BYTES, None
        if len(payload) > end:
            with suppress(CodecError):
                reply = decode_reply(payload[end:])
        for receiver in tuple(self._receivers.get(key, ())):
            receiver.receive(PublishedOutput(key, start, reply, payload[_POSITION_BYTES:end]))

    async def _announce_repeatedly(self, pubsub: PubSub) -> None:
        while not self._is_closed:
            await asyncio.sleep(ANNOUNCE_INTERVAL_S)
            self._forget_expired()
            unused = self._confirmed - self._receivers.keys()
            if unused:
                self._confirmed -= unused
                self._requested -= unused
                await pubsub.unsubscribe(*[self._prefix + join_name(key) for key in unused])
            self._announce(self._confirmed)

    def _forget_expired(self) -> None:
        now_s = time.monotonic()
        for key in [key for key, until_s in self.watched.items() if until_s < now_s]:
            del self.watched[key]

    def _announce(self, keys: Iterable[StreamKey]) -> None:
        if names := " ".join(map(join_name, keys)):
            self._send(self._control, names.encode())

    def _send(self, topic: str, payload: bytes) -> None:
        if len(self._unsent) < MAX_UNSENT:
            self._unsent.append((topic, payload))
            self._has_unsent.set()

    async def _publish_all(self, client: Any) -> None:
        while not self._is_closed:
            await self._has_unsent.wait()
            pipeline = client.pipeline(transaction=False)
            for _ in range(min(len(self._unsent), MAX_PER_ROUND_TRIP)):
                pipeline.publish(*self._unsent.popleft())
            if not self._unsent:
                self._has_unsent.clear()
            await pipeline.execute()


async def _run_until_error(*works: Coroutine[Any, Any, None]) -> None:
    """Run all until the first one ends, and raise its error. A task group would wait forever for
    one that loses its cancellation."""
    tasks = [asyncio.get_running_loop().create_task(work) for work in works]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        await end_tasks(*tasks)
