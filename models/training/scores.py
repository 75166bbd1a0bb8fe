"""Scores of outputs: a loss per event, from which means and differences by day are computed.

Every head is scored on the events that it predicts, each seen from the event before it in its
stream; a stream's first event is nobody's target. A label head labels the event itself.
Lower is better in every loss, and only the area under the ROC curve (AUC) is better when larger.

    classification  `log_loss` (nats), `brier`; AUC if there are two classes
    label           the same
    forecast        `pinball`, the mean over quantiles of max(q e, (q - 1) e), and `mae` of the
                    median or point, both in the fields' own units; `pinball` needs quantiles
                    a target with `normalisation` and no transform adds `scaled_pinball` and
                    `scaled_mae`, in the stream's own deviations, so that streams count alike
    dense           `mae`, in standard deviations
    anomaly         `nll`, the nats that the output gives; of a target with `normalisation` those of
                    the value in units of its field's `std`, as of any other

Intervals resample days with replacement (the bootstrap of Efron, 1979): events of one day
share weather and congestion and are not independent. The same draws serve every model, so
that differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.events.columns import EventColumns
from models.events.encode import categorical_codes, standardise
from models.events.schema import CategoricalField, NumericField
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
from models.training.data import Labels, Streams

Floats = NDArray[np.float64]
MIN_PROBABILITY = 1e-6
NO_SCALES: Mapping[str, Floats] = {}


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


def score_outputs(
    spec: ModelSpec,
    head: Head,
    output: NDArray[Any],
    columns: EventColumns,
    labels: Labels,
    at: NDArray[np.int64],
    scales: Mapping[str, Floats] = NO_SCALES,
) -> Scored:
    """Score one head of a model.

    Args:
        output: [rows, ...], the head's output at every row.
        columns: the events of all rows.
        labels: of all rows.
        at: int64 [n], the events predicted or labelled; each has its label if the head is a label
            head, otherwise a predecessor in its stream.
        scales: by target with `normalisation`, as `stream_scales` gives them.
    """
    if isinstance(head, AnomalyHead):
        nats = np.asarray(output[at], np.float64)
        for name in scales.keys() & set(head.targets):
            nats += np.where(columns.present[name][at], np.log(scales[name][at]), 0.0)
        return Scored({"nll": nats})
    if isinstance(head, LabelHead):
        return score_label(head, np.asarray(output[at], np.float64), labels[head.name][at])
    previous = np.asarray(output[at - 1], np.float64)
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


def stream_scales(spec: ModelSpec, streams: Streams) -> dict[str, Floats]:
    """The deviation that standardises each event's value, in units of its field's `std`.

    Returns:
        By field with `normalisation`, float64 [rows].
    """
    if spec.events is None:
        return {}
    fields = [
        each
        for each in spec.events.fields
        if isinstance(each, NumericField) and each.normalisation is not None
    ]
    if not fields:
        return {}
    rows, index = streams.encoded(spec.events), spec.events.column_index
    scales = {}
    for each in fields:
        after = rows[:, index[f"{each.name}.std"]].astype(np.float64) / (each.std or 1.0)
        before = np.append(1.0, after[:-1])
        before[[start for start, _ in streams.sessions]] = 1.0
        scales[each.name] = before
    return scales


def deviations_of(
    spec: ModelSpec, targets: Sequence[str], scales: Mapping[str, Floats]
) -> dict[str, Floats]:
    """The deviation of each event's stream before it, in units, by target, float64 [rows].

    That of the training data for a target without `normalisation`. Empty if no target has it, or if
    one is transformed, whose deviation is not in its units.

    Args:
        scales: as `stream_scales` gives them.
    """
    found = {}
    for name in targets if scales.keys() & set(targets) else ():
        target = event_field(spec, name)
        if not isinstance(target, NumericField) or target.transform != "none":
            return {}
        rows = len(next(iter(scales.values())))
        found[name] = scales.get(name, np.ones(rows)) * (target.std or 1.0)
    return found


def add_scaled(
    spec: ModelSpec, head: Head, scored: Scored, scales: Mapping[str, Floats], at: NDArray[np.int64]
) -> Scored:
    """The scores of a forecast with its losses in the streams' own deviations, which come first.

    Unchanged without a target with `normalisation`, and with a transformed one, whose deviation is
    not in its units.

    Args:
        scales: as `stream_scales` gives them.
        at: int64 [n], the events that were predicted.
    """
    targets = getattr(head, "targets", ())
    own = deviations_of(spec, targets, scales)
    if scored.values is None or scored.truth is None or not own:
        return scored
    scale = np.stack([own[name][at] for name in targets], axis=1)
    quantiles = getattr(head, "quantiles", ())
    values, truth = scored.values / scale[..., None], scored.truth / scale
    scaled = score_forecast(quantiles, values, truth).losses
    first = {f"scaled_{name}": loss for name, loss in scaled.items()}
    return replace(scored, losses={**first, **scored.losses})


def score_label(head: LabelHead, predictions: Floats, label: NDArray[np.float32]) -> Scored:
    """Probabilities [n] or [n, K] of labels [n], every one of them known."""
    truth = label.astype(np.float64)
    return score_classes(predictions, truth) if head.classes else score_binary(predictions, truth)


def auc(probability: Floats, truth: Floats, weight: Floats | None = None) -> float:
    """Area under the ROC curve, ties counted half; NaN if a class is missing.

    Args:
        probability: [n].
        truth: 1, 0, or NaN to leave the event out, [n].
        weight: [n], how often each event counts; once by default.
    """
    return RankedProbabilities(probability, truth).auc(
        np.ones(len(truth)) if weight is None else weight
    )


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


@dataclass(frozen=True)
class DayDraws:
    """Days drawn with replacement.

    Attributes:
        day: int64 [n], the day's index of each event.
        counts: float64 [draws, days], how often each draw holds each day.
    """

    day: NDArray[np.int64]
    counts: Floats

    @classmethod
    def make(cls, days: NDArray[Any], draws: int, seed: int) -> DayDraws:
        """Draw as many days as there are, `draws` times."""
        names, day = np.unique(days, return_inverse=True)
        random = np.random.default_rng(seed)
        share = np.full(len(names), 1 / len(names))
        counts = random.multinomial(len(names), share, size=draws)
        return cls(day.astype(np.int64), counts.astype(np.float64))

    def means(self, loss: Floats) -> Floats:
        """The mean loss of every draw, [draws]."""
        present = ~np.isnan(loss)
        days = self.counts.shape[1]
        sums = np.bincount(self.day[present], loss[present], days)
        sizes = np.bincount(self.day[present], minlength=days)
        return np.asarray((self.counts @ sums) / (self.counts @ sizes), np.float64)

    def aucs(self, probability: Floats, truth: Floats) -> Floats:
        """The AUC of every draw, [draws]."""
        ranked = RankedProbabilities(probability, truth)
        return np.array([ranked.auc(count[self.day]) for count in self.counts])


def interval(draws: Floats) -> list[float]:
    """The middle 95% of the draws."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return [float(low), float(high)]
