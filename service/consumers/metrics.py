"""Metrics of a consumer, sampled once a second."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Final

import structlog
from prometheus_client import CollectorRegistry

from service.consumers.consumer import Consumer
from service.core.errors import CarryError
from service.store.topics import TopicStatus
from service.telemetry.metrics import makers_of

SAMPLE_INTERVAL_S: Final = 1.0
STATUS_INTERVAL_S: Final = 5.0
STATUS_S_PER_TOPIC: Final = 0.02
"""The status of the owned topics is read every `STATUS_INTERVAL_S`; of many topics less often, by
this time for each."""

TOPIC: Final = ("topic",)
RESULTS: Final = ("committed", "duplicates", "dead_letters", "deleted")

log = structlog.get_logger(__name__)


class ConsumerMetrics:
    """Metrics of one consumer, summed over the partitions of its topic; `run` in its event loop.

    Args:
        topic: the label of its series.
    """

    def __init__(self, registry: CollectorRegistry, consumer: Consumer, topic: str):
        counter, gauge, _ = makers_of(registry)
        self._topic = topic
        self._consumer = consumer
        self._before: Counter[str] = Counter()
        self._events = counter(
            "carry_consumer_events",
            "Events of a topic, by result.",
            ("topic", "result"),
        )
        self._losses = counter(
            "carry_consumer_topic_losses", "Times that a topic had to be acquired again.", TOPIC
        ).labels(topic)
        self._owned = gauge(
            "carry_consumer_topics", "Partitions of a topic that this consumer owns.", TOPIC
        ).labels(topic)
        self._lag = gauge(
            "carry_consumer_lag", "Entries of a topic that were not read yet.", TOPIC
        ).labels(topic)
        self._pending = gauge(
            "carry_consumer_pending", "Entries that are not acknowledged yet.", TOPIC
        ).labels(topic)
        self._oldest = gauge(
            "carry_consumer_oldest_seconds",
            "Age of the oldest entry that is not acknowledged.",
            TOPIC,
        ).labels(topic)
        for result in RESULTS:
            self._events.labels(topic, result)

    async def run(self) -> None:
        """Sample until it is cancelled."""
        read_at_s = 0.0
        while True:
            self.sample()
            if time.monotonic() >= read_at_s:
                interval_s = max(STATUS_INTERVAL_S, STATUS_S_PER_TOPIC * len(self._consumer.topics))
                read_at_s = time.monotonic() + interval_s
                try:
                    self.show(await self._consumer.read_status())
                except CarryError as error:
                    log.warning("lag_unknown", reason=error.detail)
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    def sample(self) -> None:
        """Copy what the consumer counts."""
        counts = Counter(self._consumer.counts)
        for result in RESULTS:
            self._events.labels(self._topic, result).inc(counts[result] - self._before[result])
        self._losses.inc(counts["losses"] - self._before["losses"])
        self._before = counts
        self._owned.set(self._consumer.count_owned())

    def show(self, statuses: list[TopicStatus]) -> None:
        """Set the gauges of lag, pending entries and the oldest one."""
        self._lag.set(sum(status.lag or 0 for status in statuses))
        self._pending.set(sum(status.pending for status in statuses))
        oldest_ms = min((each.oldest_ms for each in statuses if each.oldest_ms), default=None)
        age_s = 0.0 if oldest_ms is None else time.time() - oldest_ms / 1000
        self._oldest.set(max(0.0, age_s))
