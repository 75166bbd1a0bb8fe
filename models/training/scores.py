"""Scores of outputs: a loss per event, from which means and differences by day are computed.

Every head is scored on the events that it predicts, each seen from the event before it in its
stream; a stream's first event is nobody's target. A label head labels the event itself.
Lower is better in every loss, and only the area under the ROC curve (AUC) is better when larger.

    classification  `log_loss` (nats), `brier`; AUC if there are two classes; with `top` k
                    `log_loss`, `error` (was not the most probable category) and `top_k_error`
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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
    truth_of,
)
from models.events.calendar import zone_table
from models.events.columns import EventColumns
from models.events.schema import NumericField
from models.spec.heads import (
    AnomalyHead,
    ClassificationHead,
    Head,
    LabelHead,
    has_surprise,
    nats_output,
)
from models.spec.layout import event_field
from models.spec.model import ModelSpec, schema_of
from models.training.data import Streams
from models.training.labels import Labels

MODEL = "model"
DRAWS = 1000
"""Number of resamples."""
MIN_DAYS, BLOCKS = 8, 20
"""With fewer days, so many blocks of equally many events are resampled."""
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
        output: [rows, ...], the head's output at every row, as `values_of` gives it.
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
    if has_surprise(head):
        return _score_top(spec, head, output, columns, at)
    if isinstance(head, LabelHead):
        return score_label(head, np.asarray(output[at], np.float64), labels[head.name][at])
    return score_predictions(spec, head, output[at - 1], columns, at)


def values_of(head: Head, outputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """A head's output out of all, [rows, ...]; its three outputs side by side with `top`."""
    if not has_surprise(head):
        return outputs[head.name]
    codes, nats = outputs[f"{head.name}.category"], outputs[nats_output(head)]
    return np.concatenate([outputs[head.name], codes, nats[:, np.newaxis]], axis=1)


def _score_top(
    spec: ModelSpec,
    head: ClassificationHead,
    output: NDArray[Any],
    columns: EventColumns,
    at: NDArray[np.int64],
) -> Scored:
    size = output.shape[1] // 2
    is_true = output[at - 1, size : 2 * size] == truth_of(spec, head, columns, at)[:, np.newaxis]
    losses = {
        "log_loss": np.asarray(output[at, -1], np.float64),
        "error": np.asarray(~is_true[:, 0], np.float64),
    }
    if size > 1:
        losses[f"top_{size}_error"] = np.asarray(~is_true.any(axis=1), np.float64)
    return Scored(losses)


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


class Units(NamedTuple):
    """The units that are resampled for intervals: days, or blocks of time.

    Attributes:
        of_event: int64 [rows], the unit of each event.
        days: days with scored events.
        kind: what the units are, in words.
    """

    of_event: NDArray[np.int64]
    days: int
    kind: str


def resampled_units(
    spec: ModelSpec, streams: Streams, scored: Iterable[NDArray[np.int64]], from_key: int | None
) -> Units:
    """Days of the schema's time zone, or blocks of time if the scored events span few days.

    Args:
        scored: the rows that are scored, of each head.
        from_key: the key of the split from which on events are scored.
    """
    days = zone_table(schema_of(spec).timezone).days(streams.moments_ms)
    count = len({day for rows in scored for day in days[rows].tolist()})
    if count >= MIN_DAYS:
        return Units(days, count, "days")
    first = np.iinfo(np.int64).min if from_key is None else from_key
    return Units(_blocks_of_time(streams, first), count, f"{BLOCKS} blocks of time")


def _blocks_of_time(streams: Streams, from_key: int) -> NDArray[np.int64]:
    """The block of each event from a key of the split on, in order of time; -1 before it."""
    blocks = np.full(streams.events, -1)
    rows = np.flatnonzero(streams.split_keys >= from_key)
    order = rows[np.argsort(streams.moments_ms[rows], kind="stable")]
    blocks[order] = np.arange(len(order)) * BLOCKS // len(order)
    return blocks


def compare_scored(scored: Scored, others: Mapping[str, Scored], days: DayDraws) -> dict[str, Any]:
    """The scores of a model and of others on the same events, with paired differences.

    Returns:
        `scores`: by model (`MODEL`, and the names of the others) and metric, `value` and its 95%
        `interval`; `difference`: the same of each other model minus this one.
    """
    draws = {MODEL: _resample(scored, days)}
    exact = {MODEL: scored.means()}
    for name, other in others.items():
        draws[name] = _resample(other, days)
        exact[name] = other.means()
    scores = {
        name: {
            metric: {"value": value, "interval": interval(draws[name][metric])}
            for metric, value in values.items()
        }
        for name, values in exact.items()
    }
    difference = {
        name: {
            metric: {
                "value": value - exact[MODEL][metric],
                "interval": interval(draws[name][metric] - draws[MODEL][metric]),
            }
            for metric, value in values.items()
            if metric in exact[MODEL]
        }
        for name, values in exact.items()
        if name != MODEL
    }
    return {"scores": scores, "difference": difference}


def _resample(scored: Scored, days: DayDraws) -> dict[str, NDArray[np.float64]]:
    draws = {name: days.means(loss) for name, loss in scored.losses.items()}
    if scored.probability is not None and scored.truth is not None and scored.has_both_classes:
        draws["auc"] = days.aucs(scored.probability, scored.truth)
    return draws


def score_cell(score: dict[str, Any] | None, sign: str = "") -> str:
    """A value with its interval as text; nothing if there is none."""
    if score is None:
        return ""
    low, high = score["interval"]
    return f"{score['value']:{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"
