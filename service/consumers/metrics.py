"""Metrics of consumers and relays, sampled once a second."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, Literal

import structlog
from prometheus_client import CollectorRegistry

from service.consumers.kafka import KafkaSource
from service.consumers.shared_topics import SharedTopics
from service.core.errors import CarryError
from service.store.topics import TopicStatus
from service.telemetry.series import makers_of

SAMPLE_INTERVAL_S: Final = 1.0
STATUS_INTERVAL_S: Final = 5.0
STATUS_S_PER_TOPIC: Final = 0.02
"""The status of the owned topics is read every `STATUS_INTERVAL_S`; of many topics less often, by
this time for each."""

TOPIC: Final = ("topic",)
Reader = Literal["consumer", "relay"]
ENTRY_COUNTERS: Final[dict[Reader, tuple[str, Sequence[str]]]] = {
    "consumer": ("events", ("committed", "duplicates", "skipped", "dead_letters", "deleted")),
    "relay": ("outputs", ("delivered", "dead_letters", "deleted")),
}
"""The entries of each reader, and their results."""

log = structlog.get_logger(__name__)


class TopicMetrics:
    """Metrics of a consumer or a relay, summed over the partitions; `run` in its event loop.

    Args:
        topic: the label of their series.
    """

    def __init__(
        self, registry: CollectorRegistry, shared: SharedTopics[Any], topic: str, reader: Reader
    ):
        entries, results = ENTRY_COUNTERS[reader]
        counter, gauge, _ = makers_of(registry)
        prefix = f"carry_{reader}"
        self._shared = shared
        self._before: Counter[str] = Counter()
        by_result = counter(
            f"{prefix}_{entries}",
            f"{entries.capitalize()} of a topic, by result.",
            ("topic", "result"),
        )
        self._counters = {result: by_result.labels(topic, result) for result in results}
        self._counters["losses"] = counter(
            f"{prefix}_topic_losses", "Times that a topic had to be acquired again.", TOPIC
        ).labels(topic)
        if reader == "relay":
            self._counters["failures"] = counter(
                f"{prefix}_failures", "Deliveries that failed, each attempt.", TOPIC
            ).labels(topic)
        self._owned = gauge(
            f"{prefix}_topics", "Partitions of a topic that this process owns.", TOPIC
        ).labels(topic)
        self._lag = gauge(
            f"{prefix}_lag", "Entries of a topic that were not read yet.", TOPIC
        ).labels(topic)
        self._pending = gauge(
            f"{prefix}_pending", "Entries that are not acknowledged yet.", TOPIC
        ).labels(topic)
        self._oldest = gauge(
            f"{prefix}_oldest_seconds", "Age of the oldest entry that is not acknowledged.", TOPIC
        ).labels(topic)

    async def run(self) -> None:
        """Sample until it is cancelled."""
        read_at_s = 0.0
        while True:
            self.sample()
            if time.monotonic() >= read_at_s:
                interval_s = max(STATUS_INTERVAL_S, STATUS_S_PER_TOPIC * len(self._shared.topics))
                read_at_s = time.monotonic() + interval_s
                try:
                    self.show(await self._shared.read_status())
                except CarryError as error:
                    log.warning("lag_unknown", reason=error.detail)
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    def sample(self) -> None:
        """Copy what the reader counts."""
        counts = Counter(self._shared.counts)
        for name, counter in self._counters.items():
            counter.inc(counts[name] - self._before[name])
        self._before = counts
        self._owned.set(self._shared.count_owned())

    def show(self, statuses: list[TopicStatus]) -> None:
        """Set the gauges of lag, pending entries and the oldest one."""
        self._lag.set(sum(status.lag or 0 for status in statuses))
        self._pending.set(sum(status.pending for status in statuses))
        oldest_ms = min((each.oldest_ms for each in statuses if each.oldest_ms), default=None)
        age_s = 0.0 if oldest_ms is None else time.time() - oldest_ms / 1000
        self._oldest.set(max(0.0, age_s))


class KafkaMetrics:
    """Metrics of a source that reads a topic of Kafka; `run` in its event loop.

    Args:
        topic: the label of their series.
    """

    def __init__(self, registry: CollectorRegistry, source: KafkaSource, topic: str):
        counter, gauge, _ = makers_of(registry)
        self._source = source
        self._topic = topic
        self._before: Counter[str] = Counter()
        records = counter(
            "carry_kafka_records", "Records that were read, by result.", ("topic", "result")
        )
        results = ("appended", "redelivered", "skipped")
        self._counters = {result: records.labels(topic, result) for result in results}
        self._lag = gauge(
            "carry_kafka_lag",
            "Records of a partition that this process reads, and has not read yet.",
            ("topic", "partition"),
        )

    async def run(self) -> None:
        """Sample until it is cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    def sample(self) -> None:
        """Copy what the source counts."""
        counts = Counter(self._source.counts)
        for name, counter in self._counters.items():
            counter.inc(counts[name] - self._before[name])
        self._before = counts
        self._lag.clear()
        for partition, lag in self._source.lags.items():
            self._lag.labels(self._topic, partition).set(lag)
