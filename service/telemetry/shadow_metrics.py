"""Metrics of challengers in the shadow, and the report on one of them that is read from these.

Everything is a sum, so that the workers of a service add up; the report covers all of them, since
they were started. The series of a challenger are labelled by its version, those of a comparison
also by `side`: `champion` or `challenger`, on the same events.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry, Metric, Summary

from service.pipeline.comparison import BOUNDS, Comparison
from service.pipeline.recorder import (
    CalibrationReport,
    DifferenceReport,
    LossReport,
    ShadowBatch,
    ShadowReport,
)
from service.telemetry.series import makers_of, observe_all

PREFIX: Final = "carry_shadow_"
LABELS: Final = ("model", "challenger")
ORDER: Final = ("side", "head", "loss", "bin", "sum", "output", "outcome", "le")
"""The order of other labels; files of several workers sort them by name."""

Samples = dict[str, dict[tuple[str, ...], float]]
"""Samples by name and labels in this order."""


class ShadowMetrics:
    """The series of one process; added to once a second, from any thread but not from two."""

    def __init__(self, registry: CollectorRegistry):
        counter, _, histogram = makers_of(registry)
        self._chunks = counter(
            "carry_shadow_chunks", "Chunks offered to a challenger.", (*LABELS, "outcome")
        )
        self._events = counter(
            "carry_shadow_events", "Events computed of the chunks compared.", (*LABELS, "side")
        )
        self._seconds = counter(
            "carry_shadow_compute_seconds", "Time of their inference calls.", (*LABELS, "side")
        )
        self._caught_up = counter(
            "carry_shadow_caught_up_events", "Events computed from the history of streams.", LABELS
        )
        self._lag = histogram(
            "carry_shadow_lag_seconds", "From a chunk's answer to the challenger's state.", LABELS
        )
        self._differences = histogram(
            "carry_shadow_difference",
            "Absolute differences of outputs.",
            (*LABELS, "output"),
            buckets=BOUNDS,
        )
        self._losses = Summary(
            "carry_shadow_loss",
            "Losses of predictions of events that came later.",
            (*LABELS, "side", "head", "loss"),
            registry=registry,
        )
        self._reliability = counter(
            "carry_shadow_reliability",
            "Predicted probabilities, and how many came true.",
            (*LABELS, "side", "head", "bin", "sum"),
        )

    def add(self, key: tuple[str, str], batches: Sequence[ShadowBatch]) -> None:
        """Add some batches of a model and its challenger's version."""
        for name, metric in (
            ("outcomes", self._chunks),
            ("events", self._events),
            ("seconds", self._seconds),
        ):
            totals: Tally[str] = Tally()
            for batch in batches:
                totals.update(getattr(batch, name))
            for label, total in totals.items():
                metric.labels(*key, label).inc(total)
        self._caught_up.labels(*key).inc(sum(batch.caught_up for batch in batches))
        observe_all(self._lag.labels(*key), [lag_s for batch in batches for lag_s in batch.lags_s])
        for batch in batches:
            if batch.comparison is not None:
                self._add_comparison(key, batch.comparison)

    def _add_comparison(self, key: tuple[str, str], comparison: Comparison) -> None:
        for output, (counts, total) in comparison.differences.items():
            # as `observe_all`: one addition per bucket, to the library's own values
            histogram = self._differences.labels(*key, output)
            histogram._sum.inc(total)
            for bucket, count in zip(histogram._buckets, counts, strict=True):
                if count:
                    bucket.inc(count)
        for labels, (total, events) in comparison.losses.items():
            summary = self._losses.labels(*key, *labels)
            summary._sum.inc(total)
            summary._count.inc(events)
        for labels, sums in comparison.reliability.items():
            for name, value in sums._asdict().items():
                self._reliability.labels(*key, *labels, name).inc(value)


def read_report(metrics: Iterable[Metric], model: str, challenger: str) -> ShadowReport:
    """The report on a challenger, from the samples of all workers."""
    found: Samples = defaultdict(dict)
    for metric in metrics:
        for sample in metric.samples if metric.name.startswith(PREFIX) else ():
            labels = sample.labels
            if (labels["model"], labels["challenger"]) == (model, challenger):
                key = tuple([labels[name] for name in ORDER if name in labels])
                found[sample.name.removeprefix(PREFIX)][key] = sample.value
    seconds, differences = found["compute_seconds_total"], found["difference_count"]
    return {
        "challenger": challenger,
        "chunks": {outcome: int(count) for (outcome,), count in found["chunks_total"].items()},
        "events": int(found["events_total"].get(("challenger",), 0)),
        "caught_up_events": int(found["caught_up_events_total"].get((), 0)),
        "us_per_event": {
            side: 1e6 * seconds[side,] / events
            for (side,), events in found["events_total"].items()
            if events
        },
        "lag_s": _mean(found, "lag_seconds") if found["lag_seconds_count"].get(()) else None,
        "differences": {output: _difference(found, output) for (output,) in differences},
        "losses": _losses(found),
        "calibration": _calibration(found["reliability_total"]),
    }


def _mean(found: Samples, name: str, *labels: str) -> float:
    return found[f"{name}_sum"][labels] / found[f"{name}_count"][labels]


def _difference(found: Samples, output: str) -> DifferenceReport:
    """Mean and quantiles of an output's differences."""
    buckets = found["difference_bucket"].items()
    bounds, counts = np.array(
        sorted([(float(bound), count) for (each, bound), count in buckets if each == output])
    ).T

    def quantile(share: float) -> float:
        at = int(np.searchsorted(counts, share * counts[-1]))
        # the middle of a bucket, which ends at twice its beginning
        return float(bounds[min(at, len(BOUNDS) - 1)] / 2**0.5) if at else 0.0

    return {
        "mean": _mean(found, "difference", output),
        "p50": quantile(0.5),
        "p90": quantile(0.9),
        "p99": quantile(0.99),
    }


def _losses(found: Samples) -> dict[str, dict[str, LossReport]]:
    losses: dict[str, dict[str, LossReport]] = {}
    for (side, head, loss), events in found["loss_count"].items():
        if events and side == "champion":
            losses.setdefault(head, {})[loss] = {
                "champion": _mean(found, "loss", "champion", head, loss),
                "challenger": _mean(found, "loss", "challenger", head, loss),
                "events": int(events),
            }
    return losses


def _calibration(
    sums: dict[tuple[str, ...], float],
) -> dict[str, dict[str, CalibrationReport]]:
    heads: dict[str, dict[str, CalibrationReport]] = {}
    for (side, head, each, name), events in sums.items():
        if name == "events" and events:
            predicted, true = (sums[side, head, each, other] for other in ("predicted", "true"))
            own = heads.setdefault(head, {}).setdefault(side, {"error": 0.0, "bins": {}})
            own["bins"][each] = {
                "events": int(events),
                "predicted": predicted / events,
                "true": true / events,
            }
    for own in [own for sides in heads.values() for own in sides.values()]:
        bins = own["bins"].values()
        gaps = [each["events"] * abs(each["predicted"] - each["true"]) for each in bins]
        own["error"] = sum(gaps) / sum([each["events"] for each in bins])
    return heads
