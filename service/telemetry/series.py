"""Makers of metrics in a registry, and what adds many values to one at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10,
)  # fmt: skip

MODEL = ("model",)
VERSION = ("model", "version")

Makers = tuple[Callable[..., Counter], Callable[..., Gauge], Callable[..., Histogram]]


def makers_of(registry: CollectorRegistry) -> Makers:
    """Make functions that create counters, gauges and histograms of times in a registry. The gauges
    of several workers are summed, unless their `multiprocess_mode` is another one."""
    return (
        partial(Counter, registry=registry),
        partial(Gauge, registry=registry, multiprocess_mode="livesum"),
        partial(Histogram, registry=registry, buckets=SECONDS),
    )


def observe_all(histogram: Histogram, values: Sequence[float]) -> None:
    """Observe several values, like `observe` of each, with one addition per affected bucket.

    It adds to the library's own values, as `observe` does, and so works in multiprocess mode too.

    Args:
        histogram: a child, if the histogram has labels.
    """
    bounds, buckets = histogram._upper_bounds, histogram._buckets
    histogram._sum.inc(sum(values))
    indexes, counts = np.unique(np.searchsorted(bounds, values), return_counts=True)
    for bucket, count in zip(indexes.tolist(), counts.tolist(), strict=True):
        buckets[bucket].inc(count)
