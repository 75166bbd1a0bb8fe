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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.decoding.losses import (
    Floats,
    RankedProbabilities,
    Scored,
    score_binary,
    score_classes,
    score_forecast,
    score_predictions,
)
from models.events.columns import EventColumns
from models.events.schema import NumericField
from models.spec.heads import AnomalyHead, Head, LabelHead
from models.spec.layout import event_field
from models.spec.model import ModelSpec
from models.training.data import Labels, Streams

NO_SCALES: Mapping[str, Floats] = {}


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
    return score_predictions(spec, head, output[at - 1], columns, at)


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
