"""Consumes the topics of a configuration on a pipeline, and shares them with other consumers.

store = TopicStore(settings.store)
async with build_pipeline(settings, store=store, model=config.model) as service:
    consumer = Consumer(service, store, config)
    await consumer.check_topics()
    await consumer.run()
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import Final

import msgspec
import structlog

from service.access.caller import ANYONE
from service.build import PipelineService
from service.codec.media import Media
from service.consumers.config import ConsumerConfig
from service.consumers.events import EventReader
from service.consumers.outputs import OutputWriter
from service.consumers.shared_topics import SharedTopics
from service.consumers.store import TopicStore
from service.consumers.topic import OnReply, OwnedTopic
from service.core.errors import CarryError
from service.core.values import Chunk, Reply, StreamHead, StreamKey
from service.store.topics import TopicKeys

EVENTS_PER_CHUNK: Final = 8
"""Most entries in memory for each chunk that the batcher may have."""

log = structlog.get_logger(__name__)


class Consumer(SharedTopics[OwnedTopic]):
    """Computes the outputs of topics of events.

    Args:
        service: has the model.
        store: the store of the service.

    Attributes:
        counts: events by result: `committed`, `duplicates`, `skipped` (in a state that was loaded
            from a history), `dead_letters`, `deleted`; and `losses` of topics.
        topics: the topics that are assigned to this consumer, by name.

    Raises:
        OperatorError: `where` is invalid, or a cluster needs partitions.
        ChunksUnsupported: the model needs whole sequences.
    """

    def __init__(self, service: PipelineService, store: TopicStore, config: ConsumerConfig):
        settings, pipeline = service.settings, service.pipeline
        served = pipeline.models[config.model]
        self._registration = config.registration(is_cluster=settings.store.is_cluster)
        batching = settings.batching
        places = 2 * pipeline.max_batch_rows(served) * batching.batches_in_flight
        self._places = min(places, batching.max_queue)
        super().__init__(
            store.topics,
            self._registration.keys(settings.store.keys, config.keep, deletes=config.deletes),
            config,
            pool=f"{config.group}:{config.input}",
            room=EVENTS_PER_CHUNK * self._places,
        )
        self._pipeline = pipeline
        self._committers = store.committers
        self._config = config
        self._served = served
        self._space = settings.store.keys
        self._reader = EventReader(served.artifact, config, settings.requests)
        media = Media.JSON if config.outputs == "json" else Media.MSGPACK
        self._writer = OutputWriter(served.artifact, media, served.warm_events, config.where)
        self._timeout_s = settings.requests.timeout_s
        self._ready: deque[tuple[OwnedTopic, str]] = deque()

    async def run(self) -> None:
        """Announce what is read and written, and process entries as `SharedTopics.run`."""
        registration = self._registration
        earlier = await self.store.register(registration)
        if earlier not in (None, registration):
            log.warning(
                "topics_changed",
                topic=registration.source,
                group=registration.group,
                earlier=msgspec.to_builtins(earlier),
                now=msgspec.to_builtins(registration),
            )
        await super().run()

    async def check_topics(self) -> None:
        """Check that the topics are streams, and that the source exists unless it may be created.

        Raises:
            OperatorError, StoreUnavailable
        """
        if len(self._keys) > 1:
            return
        (keys,), config = self._keys.values(), self._config
        names = {"from": keys.topic, "to": keys.outputs, "dead_letters": keys.dead_letters}
        for member, name in names.items():
            may_be_missing = member != "from" or config.create or config.kafka_source is not None
            await self.check_is_stream(member, name, may_be_missing=may_be_missing)

    def _make_topic(self, keys: TopicKeys) -> OwnedTopic:
        return OwnedTopic(
            keys,
            self,
            self,
            self._config,
            self._reader,
            self._writer,
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

    # `service.consumers.topic.Queue`

    def add(self, topic: OwnedTopic, stream: str) -> None:
        """Let a stream submit a chunk as soon as the batcher has room."""
        self._ready.append((topic, stream))
        self._submit_ready()

    def _submit_ready(self) -> None:
        while self._ready and len(self._committers) < self._places:
            topic, stream = self._ready.popleft()
            topic.submit(stream)

    def submit(self, topic: OwnedTopic, chunk: Chunk, on_result: OnReply) -> None:
        """Queue a chunk."""
        key = chunk.key

        def finish(result: Reply | CarryError) -> None:
            del self._committers[key]
            on_result(result)
            self._submit_ready()

        self._committers[key] = topic
        self._pipeline.enqueue(ANYONE, chunk, time.monotonic() + self._timeout_s, finish)
