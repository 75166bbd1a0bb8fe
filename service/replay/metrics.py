"""What the service counted during the replay: the growth of its /metrics.

Sampled before, during and after, because a service that dies takes its counts along: a count
that is lower than before was reset, and all of it is growth. What was counted between the
last sample and the death is missed, so the numbers are at least what they say. A service
without these metrics, or without /metrics, gives an empty growth.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from service.replay.client import Service

PERIOD_S = 1.0
_SUFFIXES = ("_total", "_bucket", "_sum", "_count")

SampleKey = tuple[str, tuple[tuple[str, str], ...]]


class CounterGrowth:
    """How much each counter of one model grew at one address, from successive `/metrics` pages."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._last: dict[SampleKey, float] | None = None
        self.grown: dict[SampleKey, float] = defaultdict(float)

    def sample(self, text: str) -> None:
        """Take one scrape in Prometheus' text format; one that cannot be parsed is skipped."""
        try:
            samples = {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if sample.name.endswith(_SUFFIXES) and sample.labels.get("model") == self._model
            }
        except ValueError:
            return
        if self._last is not None:
            for key, value in samples.items():
                before = self._last.get(key, 0.0)
                self.grown[key] += value if value < before else value - before
        self._last = samples


@dataclass(frozen=True, slots=True)
class Counted:
    """The growth of the service's counters during the run; None for those it does not report.

    Attributes:
        mean_batch: streams per batch.
        largest_batch: no batch was larger; the upper bound of the largest used bucket.
        shared_batches: batches of more than one stream.
        refusals: counts by error code.
    """

    chunks: float | None = None
    replays: float | None = None
    conflicts: float | None = None
    cache_hits: float | None = None
    cache_misses: float | None = None
    batches: float | None = None
    shared_batches: float | None = None
    mean_batch: float | None = None
    largest_batch: float | None = None
    refusals: dict[str, float] | None = None


class MetricsWatch:
    """Samples every URL until it is stopped; one per replay."""

    def __init__(self, service: Service, model: str) -> None:
        self._service = service
        self._growth = {url: CounterGrowth(model) for url in service.urls}

    async def sample(self) -> None:
        """Take one sample of each URL; call it before and after the replay."""
        for url, growth in self._growth.items():
            text = await self._service.metrics(url)
            if text is not None:
                growth.sample(text)

    async def run(self) -> None:
        """Sample periodically until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            await self.sample()

    def counted(self) -> Counted:
        """The growth so far, over all URLs."""
        return counted(list(self._growth.values()))


def counted(growths: list[CounterGrowth]) -> Counted:
    """Sum the growth at several addresses."""
    grown: dict[SampleKey, float] = defaultdict(float)
    for growth in growths:
        for key, value in growth.grown.items():
            grown[key] += value
    by_name: dict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(dict)
    for (name, labels), value in grown.items():
        by_name[name][labels] = value

    def total(name: str) -> float | None:
        return sum(by_name[name].values()) if name in by_name else None

    buckets: dict[float, float] = defaultdict(float)
    for labels, value in by_name["carry_batch_rows_bucket"].items():
        buckets[float(dict(labels)["le"])] += value
    batches, rows = total("carry_batch_rows_count"), total("carry_batch_rows_sum")
    refusals = {
        dict(labels).get("code", ""): value
        for labels, value in by_name["carry_refusals_total"].items()
        if value
    }
    return Counted(
        chunks=total("carry_chunks_total"),
        replays=total("carry_replays_total"),
        conflicts=total("carry_conflicts_total"),
        cache_hits=total("carry_cache_hits_total"),
        cache_misses=total("carry_cache_misses_total"),
        batches=batches,
        shared_batches=None if batches is None or 1.0 not in buckets else batches - buckets[1.0],
        mean_batch=rows / batches if batches and rows is not None else None,
        largest_batch=_largest(buckets),
        refusals=refusals if grown else None,
    )


def _largest(buckets: dict[float, float]) -> float | None:
    """The lowest bound that holds all observations."""
    if not buckets or not max(buckets.values()):
        return None
    return min(bound for bound, value in buckets.items() if value == max(buckets.values()))
