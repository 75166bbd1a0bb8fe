"""Consumes the topics of a configuration on a pipeline, and shares them with other consumers.

store = TopicStore(settings.store)
async with build_pipeline(settings, store=store) as service:
    consumer = Consumer(service, store, config)
    await consumer.check_topics()
    await consumer.run()
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections import Counter, deque
from functools import partial
from typing import Final

import structlog

from service.access.caller import ANYONE
from service.build import PipelineService
from service.codec.media import Media
from service.consumers.assignment import assign_topics
from service.consumers.config import ConsumerConfig
from service.consumers.events import EventReader
from service.consumers.outputs import OutputWriter
from service.consumers.store import TopicStore
from service.consumers.topic import OnReply, OwnedTopic
from service.core.errors import CarryError, OperatorError
from service.core.values import Check, Chunk, Reply, StreamHead, StreamKey
from service.store.topics import TopicKeys, TopicStatus

JOIN_INTERVAL_S: Final = 0.5
MEMBER_VALID_S: Final = 2.0
"""How long a consumer counts as a member after its last announcement."""

RENEWALS: Final = 3
"""How often a lease is renewed in its duration."""

MOVES_AT_ONCE: Final = 64
"""Most topics that are released to other members in one `JOIN_INTERVAL_S`, so that none waits until
all others are acquired."""

ACQUIRE_PAUSE_S: Final = 0.3
EXPIRY_PAUSE_S: Final = 1.0
"""Longest pauses between two attempts to acquire a topic: of a member, which releases it soon; of
an owner that died, whose lease has to expire."""

STATUS_AT_ONCE: Final = 16
"""Topics whose status is read at a time."""

EVENTS_PER_CHUNK: Final = 8
"""Most entries in memory for each chunk that the batcher may have."""

IDLE_POLL_S: Final = 0.0003
"""Longest pause between two reads of topics without entries, for each of them; at least
`MIN_IDLE_POLL_S`."""

MIN_IDLE_POLL_S: Final = 0.01

log = structlog.get_logger(__name__)


class Consumer:
    """Consumes topics; `run` once, `stop` at any time.

    Args:
        store: the store of the service.

    Attributes:
        counts: events by result: `committed`, `duplicates`, `dead_letters`, `deleted`;
            and `losses` of topics.
        topics: the topics that are assigned to this consumer, by name.

    Raises:
        OperatorError: there is no such model, `where` is invalid, or a cluster needs partitions.
        ChunksUnsupported: the model needs whole sequences.
    """

    def __init__(self, service: PipelineService, store: TopicStore, config: ConsumerConfig):
        settings, pipeline = service.settings, service.pipeline
        served = pipeline.models.get(config.model)
        if served is None:
            raise OperatorError(
                f"model: expected one of {', '.join(sorted(pipeline.models))}, got {config.model!r}"
            )
        self.counts: Counter[str] = Counter()
        self.topics: dict[str, OwnedTopic] = {}
        self.longest_poll_s = MIN_IDLE_POLL_S
        self._pipeline = pipeline
        self._store = store
        self._config = config
        self._served = served
        self._space = settings.store.keys
        self._keys = {
            keys.topic: keys
            for keys in config.topics(self._space, is_cluster=settings.store.is_cluster)
        }
        self._reader = EventReader(served.artifact, config, settings.requests)
        media = Media.JSON if config.outputs == "json" else Media.MSGPACK
        self._writer = OutputWriter(served.artifact, media, config.where)
        self._timeout_s = settings.requests.timeout_s
        self._name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._pool = f"{config.group}:{config.source}"
        batching = settings.batching
        self._places = 2 * pipeline.max_batch_rows(served) * batching.batches_in_flight
        self._places = min(self._places, batching.max_queue)
        self._room = EVENTS_PER_CHUNK * self._places
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._ready: deque[tuple[OwnedTopic, str]] = deque()
        self._stopped = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._members: set[str] = set()

    async def run(self) -> None:
        """Consume until `stop`; then commit what was submitted, and release the topics.

        Raises:
            StoreUnavailable, StoreRefused: the store cannot be used at the start.
        """
        members = await self._join(MEMBER_VALID_S)
        log.info("consumer_joined", consumer=self._name, members=len(members))
        renewing = asyncio.create_task(self._renew_leases())
        try:
            while not self._stopped.is_set():
                self._assign(members)
                if renewing.done():
                    # raises what ended it
                    renewing.result()
                try:
                    async with asyncio.timeout(JOIN_INTERVAL_S):
                        await self._stopped.wait()
                except TimeoutError:
                    members = await self._try_join(members)
        finally:
            for topic in self.topics.values():
                topic.release()
            await asyncio.gather(*self._tasks.values())
            renewing.cancel()
            await self._try_join([], 0)

    def stop(self) -> None:
        """Shut down gracefully."""
        self._stopped.set()

    async def check_topics(self) -> None:
        """Check that the topics are streams, and that the source exists unless it may be created.

        Raises:
            OperatorError, StoreUnavailable, StoreRefused
        """
        if len(self._keys) > 1:
            return
        (keys,) = self._keys.values()
        names = {"from": keys.topic, "to": keys.outputs, "dead_letters": keys.dead_letters}
        for member, name in names.items():
            kind = await self._store.topics.type_of(name)
            may_be_missing = member != "from" or self._config.create
            if kind != "stream" and not (kind == "none" and may_be_missing):
                hint = ", or --create" if kind == "none" else ""
                got = "nothing" if kind == "none" else f"a {kind}"
                raise OperatorError(
                    f"{member}: expected a stream {name!r} in the store{hint}; got {got}"
                )

    async def _join(self, valid_s: float) -> list[str]:
        return [*await self._store.topics.join(self._pool, self._name, valid_s)]

    async def _try_join(self, members: list[str], valid_s: float = MEMBER_VALID_S) -> list[str]:
        """Join; returns the earlier members if the store does not answer."""
        try:
            return await self._join(valid_s)
        except CarryError as error:
            log.warning("members_unknown", reason=error.detail)
            return members

    def _assign(self, members: list[str]) -> None:
        """Acquire the topics that are assigned to this consumer, and release all others."""
        self._members = {*members, self._name}
        owners, moves = assign_topics([*self._keys], self._members), 0
        for name, owner in owners.items():
            task = self._tasks.get(name)
            if task is not None and task.done():
                # raises what ended it
                task.result()
                del self._tasks[name], self.topics[name]
                task = None
            if owner == self._name and task is None:
                topic = self.topics[name] = self._topic(self._keys[name])
                self._tasks[name] = asyncio.create_task(topic.run())
            elif owner != self._name and task is not None and moves < MOVES_AT_ONCE:
                self.topics[name].release()
                moves += 1
        self.longest_poll_s = max(MIN_IDLE_POLL_S, IDLE_POLL_S * len(self.topics))

    def _topic(self, keys: TopicKeys) -> OwnedTopic:
        return OwnedTopic(
            keys,
            self._store.topics,
            self,
            self._config,
            self._reader,
            self._writer,
            owner=self._name,
            is_of_topic=partial(self._is_of_topic, keys.topic),
            output_start=self._output_start,
        )

    def _is_of_topic(self, topic: str, key: StreamKey) -> bool:
        """Whether entries of a stream may be in a topic: any, unless there are partitions."""
        return len(self._keys) == 1 or topic.startswith(
            f"{self._space.partition_prefix(self._space.partition(key))}:"
        )

    def _output_start(self, chunk: Chunk, head: StreamHead) -> int:
        start = self._served.output_position(chunk, head)
        return head.position - chunk.steps.length if start is None else start

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(self._config.lease_s / RENEWALS)
            await asyncio.gather(*[topic.renew() for topic in self.topics.values()])

    def count_owned(self) -> int:
        """Count the topics that this consumer owns."""
        return sum(topic.fence is not None for topic in self.topics.values())

    def check(self) -> Check:
        """Check readiness: whether it owns the topics that are assigned to it."""
        owned, assigned = self.count_owned(), len(self.topics)
        return Check("topics", owned == assigned, f"{owned} of {assigned} assigned topics owned")

    async def read_status(self) -> list[TopicStatus]:
        """Read how far the topics that it owns were read."""
        owned = [topic.keys for topic in self.topics.values() if topic.fence is not None]
        found: list[TopicStatus | None] = []
        # no commit waits long behind them
        for at in range(0, len(owned), STATUS_AT_ONCE):
            topics = owned[at : at + STATUS_AT_ONCE]
            found += await asyncio.gather(*map(self._store.topics.status, topics))
        return [status for status in found if status is not None]

    # `service.consumers.topic.Queue`

    def acquire_pause_s(self, owner: str) -> float:
        """Longest pause between two attempts to acquire a topic of another owner."""
        return ACQUIRE_PAUSE_S if owner in self._members else EXPIRY_PAUSE_S

    async def reserve(self, most: int) -> int:
        """Wait until entries may be read; returns how many, which are reserved."""
        while self._room <= 0:
            self._has_room.clear()
            await self._has_room.wait()
        reserved = min(self._room, most)
        self._room -= reserved
        return reserved

    def release(self, count: int) -> None:
        """Free the memory of entries."""
        self._room += count
        if self._room > 0:
            self._has_room.set()

    def add(self, topic: OwnedTopic, stream: str) -> None:
        """Let a stream submit a chunk as soon as the batcher has room."""
        self._ready.append((topic, stream))
        self._submit_ready()

    def _submit_ready(self) -> None:
        while self._ready and len(self._store.committers) < self._places:
            topic, stream = self._ready.popleft()
            topic.submit(stream)

    def submit(self, topic: OwnedTopic, chunk: Chunk, on_result: OnReply) -> None:
        """Queue a chunk."""
        key, committers = chunk.key, self._store.committers

        def finish(result: Reply | CarryError) -> None:
            del committers[key]
            on_result(result)
            self._submit_ready()

        committers[key] = topic
        self._pipeline.enqueue(ANYONE, chunk, time.monotonic() + self._timeout_s, finish)
