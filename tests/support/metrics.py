"""Metrics in Prometheus' text format, as series and values."""

from __future__ import annotations

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from service.pipeline.comparison import BOUNDS, Comparison, Differences, Reliability
from service.pipeline.recorder import ShadowBatch

Series = tuple[str, frozenset[tuple[str, str]]]


def read(text: bytes) -> dict[Series, float]:
    """The value of each series of a page."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def series(name: str, **labels: str) -> Series:
    """A series by the name and the labels of its samples."""
    return name, frozenset(labels.items())


SHADOW_DIFFERENCES = np.array([0.0, 0.01, 0.011, 0.3, 0.31, 0.32, 0.33, 0.34, 0.35, 70.0])


def shadow_batch() -> ShadowBatch:
    """A batch of a challenger with every kind of sums."""
    counts = np.bincount(np.searchsorted(BOUNDS, SHADOW_DIFFERENCES), minlength=len(BOUNDS) + 1)
    losses = {
        ("champion", "late", "log_loss"): (3.0, 6),
        ("challenger", "late", "log_loss"): (1.5, 6),
        ("champion", "odd", "nll"): (-2.0, 4),
        ("challenger", "odd", "nll"): (-3.0, 4),
    }
    reliability = {
        ("champion", "late", "0.2"): Reliability(4, 1.0, 3),
        ("champion", "late", "0.9"): Reliability(2, 1.8, 2),
        ("challenger", "late", "0.5"): Reliability(6, 3.0, 3),
    }
    comparison = Comparison(
        {"late": Differences(counts.tolist(), float(SHADOW_DIFFERENCES.sum()))}, losses, reliability
    )
    return ShadowBatch(
        {"computed": 3, "dropped": 1, "failed": 0},
        {"challenger": 10},
        {"challenger": 0.002},
        caught_up=7,
        lags_s=[0.1, 0.2, 0.3],
        comparison=comparison,
    )
