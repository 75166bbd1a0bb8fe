"""Losses of outputs against the values that they predict: what training scores, and a service
where a later event is the label.

A head that predicts is compared with the next event of its stream. Lower is better in every loss.

    classification  `log_loss` (nats), `brier`
    forecast        `pinball`, the mean over quantiles of max(q e, (q - 1) e), and `mae` of the
                    median or point, both in the fields' own units; `pinball` needs quantiles
    dense           `mae`, in standard deviations
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.events.columns import EventColumns
from models.events.schema import CategoricalField, NumericField
from models.events.values import categorical_codes, standardise
from models.spec.heads import (
    AnomalyHead,
    ClassificationHead,
    DenseHead,
    ForecastHead,
    Head,
    LabelHead,
)
from models.spec.layout import event_field
from models.spec.model import ModelSpec

Floats = NDArray[np.float64]
MIN_PROBABILITY = 1e-6


@dataclass(frozen=True)
class Scored:
    """One model's losses on n events.

    Attributes:
        losses: by metric, float64 [n]; NaN if the event has no such target.
        probability: for two classes, the probability given to the second, float64 [n].
        truth: for two classes, 1, 0 or NaN; for forecasts, the values [n, targets].
        values: for forecasts, [n, targets, quantiles or 1].
    """

    losses: Mapping[str, Floats]
    probability: Floats | None = None
    truth: Floats | None = None
    values: Floats | None = field(default=None, repr=False)

    @property
    def has_losses(self) -> bool:
        """Whether any event has a target."""
        return any(np.isfinite(loss).any() for loss in self.losses.values())

    @property
    def has_both_classes(self) -> bool:
        """Whether the head is binary and both classes occur."""
        if self.probability is None or self.truth is None:
            return False
        return len(np.unique(self.truth[~np.isnan(self.truth)])) == 2

    def means(self) -> dict[str, float]:
        """Mean losses over the events that have a target, and `auc` if both classes occur."""
        means = {name: float(np.nanmean(loss)) for name, loss in self.losses.items()}
        if self.probability is not None and self.truth is not None and self.has_both_classes:
            means["auc"] = auc(self.probability, self.truth)
        return means


def is_binary(spec: ModelSpec, head: Head) -> bool:
    """Whether the head gives one probability per event."""
    if isinstance(head, LabelHead):
        return not head.classes
    return isinstance(head, ClassificationHead) and not isinstance(
        event_field(spec, head.target), CategoricalField
    )


def has_targets(head: Head) -> bool:
    """Whether there is something to score the head against."""
    if isinstance(head, DenseHead):
        return bool(head.targets)
    return isinstance(head, (ClassificationHead, ForecastHead, AnomalyHead, LabelHead))


def truth_of(spec: ModelSpec, head: Head, columns: EventColumns, at: NDArray[np.int64]) -> Floats:
    """The true values at the rows `at`: NaN if absent.

    Returns:
        Classification: 1 or 0, or the code, [n]. Forecast: values in their units
        [n, targets]; Dense: the same, standardised.
    """
    if isinstance(head, ClassificationHead):
        target = event_field(spec, head.target)
        present, values = columns.present[target.name][at], columns.values[target.name][at]
        if isinstance(target, CategoricalField):
            return categorical_codes(target, present, values).astype(np.float64)
        above = values > head.above if head.above is not None else values
        return np.where(present, np.asarray(above, np.float64), np.nan)
    truths = []
    for name in getattr(head, "targets", ()):
        target = event_field(spec, name)
        values = np.where(columns.present[name][at], columns.values[name][at], np.nan)
        if isinstance(head, DenseHead) and isinstance(target, NumericField):
            values = np.where(np.isnan(values), np.nan, standardise(target, values))
        truths.append(np.asarray(values, np.float64))
    return np.stack(truths, axis=1)


def score_binary(probability: Floats, truth: Floats) -> Scored:
    """Two classes; both [n]."""
    safe = np.clip(probability, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    log_loss = -np.where(truth > 0.5, np.log(safe), np.log1p(-safe))
    missing = np.isnan(truth)
    losses = {
        "log_loss": np.where(missing, np.nan, log_loss),
        "brier": np.square(probability - truth),
    }
    return Scored(losses, probability=probability, truth=truth)


def score_classes(probabilities: Floats, truth: Floats) -> Scored:
    """More classes: probabilities [n, K] and codes [n]."""
    true_probability = probabilities[np.arange(len(truth)), truth.astype(np.int64)]
    brier = np.square(probabilities).sum(axis=1) - 2 * true_probability + 1
    return Scored(
        {"log_loss": -np.log(np.maximum(true_probability, MIN_PROBABILITY)), "brier": brier}
    )


def pinball(levels: Floats, error: Floats) -> Floats:
    """The loss of each quantile: levels [Q], truth minus quantile [..., Q]."""
    return np.asarray(np.maximum(levels * error, (levels - 1) * error))


def score_forecast(quantiles: tuple[float, ...], values: Floats, truth: Floats) -> Scored:
    """Forecasts: values [n, targets, quantiles or 1], truth [n, targets]."""
    error = truth[..., None] - values
    losses: dict[str, Floats] = {}
    middle = 0
    if quantiles:
        level = np.array(quantiles)
        losses["pinball"] = pinball(level, error).mean(axis=(1, 2))
        middle = int(np.argmin(np.abs(level - 0.5)))
    losses["mae"] = np.abs(error[..., middle]).mean(axis=1)
    return Scored(losses, truth=truth, values=values)


def score_predictions(
    spec: ModelSpec,
    head: Head,
    predictions: NDArray[Any],
    columns: EventColumns,
    at: NDArray[np.int64],
) -> Scored:
    """Score what a head predicted for events: a head of classes or numbers with targets.

    Args:
        predictions: [n, ...], the head's output at the event before each.
        columns: the events, of which those at the rows `at`, int64 [n], were predicted.
    """
    previous = np.asarray(predictions, np.float64)
    truth = truth_of(spec, head, columns, at)
    match head:
        case ClassificationHead():
            return (
                score_binary(previous, truth)
                if previous.ndim == 1
                else score_classes(previous, truth)
            )
        case ForecastHead():
            values = previous if head.quantiles else previous[..., None]
            return score_forecast(head.quantiles, values, truth)
        case _:
            return score_forecast((), previous[..., None], truth)


def auc(probability: Floats, truth: Floats) -> float:
    """Area under the ROC curve, ties counted half; NaN if a class is missing.

    Args:
        probability: [n].
        truth: 1, 0, or NaN to leave the event out, [n].
    """
    return RankedProbabilities(probability, truth).auc(np.ones(len(truth)))


class RankedProbabilities:
    """Probabilities sorted once, for many weightings."""

    def __init__(self, probability: Floats, truth: Floats):
        """Sort; arguments as for `auc`."""
        self._kept = np.flatnonzero(~np.isnan(truth))
        values, self._group = np.unique(probability[self._kept], return_inverse=True)
        self._groups = len(values)
        self._truth = truth[self._kept]

    def auc(self, weight: Floats) -> float:
        """The area with each event counted `weight` [n] times."""
        weights = weight[self._kept]
        positive = np.bincount(self._group, weights * self._truth, self._groups)
        negative = np.bincount(self._group, weights * (1 - self._truth), self._groups)
        total = positive.sum() * negative.sum()
        if total == 0:
            return float("nan")
        below = np.cumsum(negative) - negative
        return float((positive * (below + 0.5 * negative)).sum() / total)
