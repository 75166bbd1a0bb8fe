"""Compares the outputs of two versions of a model on the same events.

Differences are absolute, of each output. Where a head predicts the next event, the event itself is
the label, and both versions are scored on it: losses as in training (`models.decoding.losses`), and
calibration: what share of the predicted probabilities came true. Labels that arrive otherwise
(label heads) are unknown here, and of a model with blocks, whose outputs come later, only
differences are compared. Pure: numbers in, sums out, which add up over batches and processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.decoding.losses import Floats, Scored, has_targets, score_predictions, truth_of
from models.events.columns import EventColumns
from models.spec.heads import (
    ClassificationHead,
    ForecastHead,
    Head,
    LabelHead,
    has_surprise,
    nats_output,
    scores_events,
)
from service.core.values import FloatRows
from service.pipeline.served_model import ServedModel

EXPONENTS: Final = (-24, 10)
"""Differences are counted between 2 to the power of the first (6e-8) and of the last (1,024)."""

BOUNDS: Final = tuple(2.0**exponent for exponent in range(EXPONENTS[0], EXPONENTS[1] + 1))
"""Upper bounds of the buckets of differences; larger ones are in one more."""

BINS: Final = 10
"""Bins of predicted probabilities, of equal width."""

SIDES: Final = ("champion", "challenger")


class ComparedChunk(NamedTuple):
    """A chunk that both versions computed.

    Attributes:
        outputs: float32 [T, O] of each side.
        before: of each side the output of the event before the chunk, float32 [O]; None if it is
            not known, or if there is none.
        columns: the events; None for `inputs`.
        resets: indexes of the events that nothing before them predicted.
    """

    outputs: tuple[FloatRows, FloatRows]
    before: tuple[FloatRows, FloatRows] | None = None
    columns: EventColumns | None = None
    resets: Sequence[int] = ()


class Differences(NamedTuple):
    """Absolute differences of one output: how many in each bucket of `BOUNDS`, and their sum."""

    counts: Sequence[int]
    total: float


class Reliability(NamedTuple):
    """Predicted probabilities of one bin: how many, their sum, and how many came true."""

    events: int
    predicted: float
    true: int


@dataclass(frozen=True)
class Comparison:
    """The sums of some compared chunks.

    Attributes:
        differences: by output.
        losses: by side, head and loss: sum, and number of events.
        reliability: by side, head and bin: `0.3` is [0.3, 0.4) of the probability of a true event,
            or of the most probable class; of a forecast the quantile.
    """

    differences: Mapping[str, Differences]
    losses: Mapping[tuple[str, str, str], tuple[float, int]] = field(default_factory=dict)
    reliability: Mapping[tuple[str, str, str], Reliability] = field(default_factory=dict)


class Comparator:
    """Compares the outputs of two versions, champion and challenger, which have the same layout."""

    def __init__(self, champion: ServedModel, challenger: ServedModel):
        self._outputs = champion.outputs
        self._specs = champion.spec, challenger.spec
        heads = [each.model_copy(update={"input": ""}) for each in challenger.spec.heads]
        self._heads = [
            head
            for head in champion.spec.heads
            if has_targets(head)
            and not isinstance(head, LabelHead)
            and head.model_copy(update={"input": ""}) in heads
        ]
        if champion.blocks is not None or champion.events is None:
            self._heads = []
        self._fields = {name for head in self._heads for name in _targets(head)}

    def compare(self, chunks: Sequence[ComparedChunk]) -> Comparison:
        """Compare the outputs of chunks, at least one."""
        sides = [np.concatenate([chunk.outputs[side] for chunk in chunks]) for side in (0, 1)]
        differences = self._differences(np.abs(sides[0] - sides[1]))
        labelled = [chunk for chunk in chunks if chunk.columns is not None]
        if not self._heads or not labelled:
            return Comparison(differences)
        columns = self._columns([chunk.columns for chunk in labelled if chunk.columns is not None])
        losses: dict[tuple[str, str, str], tuple[float, int]] = {}
        reliability: dict[tuple[str, str, str], Reliability] = {}
        for side, name in enumerate(SIDES):
            outputs, before, at = _align(labelled, side)
            own, predictions = map(self._outputs.by_name, (outputs, before[at]))
            for head in self._heads:
                if scores_events(head):
                    loss = "log_loss" if has_surprise(head) else "nll"
                    scored = Scored({loss: np.asarray(own[nats_output(head)], np.float64)})
                elif len(at):
                    predicted, spec = predictions[head.name], self._specs[side]
                    scored = score_predictions(spec, head, predicted, columns, at)
                    truth = truth_of(spec, head, columns, at)
                    for each, sums in _reliability(head, scored, predicted, truth):
                        reliability[name, head.name, each] = sums
                else:
                    continue
                for loss, values in scored.losses.items():
                    known = values[np.isfinite(values)]
                    losses[name, head.name, loss] = float(known.sum()), len(known)
        return Comparison(differences, losses, reliability)

    def _differences(self, values: FloatRows) -> dict[str, Differences]:
        """The differences [N, O] of each output."""
        # the exponent of a float is the bucket of its magnitude, without a search for each
        mantissas, exponents = np.frexp(values)
        buckets = np.clip(exponents - (mantissas == 0.5) - EXPONENTS[0], 0, len(BOUNDS))
        buckets[values == 0] = 0
        result = {}
        for name, part in self._outputs.slices.items():
            counts = np.bincount(buckets[:, part].ravel(), minlength=len(BOUNDS) + 1)
            result[name] = Differences(counts.tolist(), float(values[:, part].sum(dtype=float)))
        return result

    def _columns(self, parts: Sequence[EventColumns]) -> EventColumns:
        """The targets of several chunks, one after another."""
        return EventColumns(
            sum(map(len, parts)),
            {name: np.concatenate([each.present[name] for each in parts]) for name in self._fields},
            {name: np.concatenate([each.values[name] for each in parts]) for name in self._fields},
        )


def _align(
    chunks: Sequence[ComparedChunk], side: int
) -> tuple[FloatRows, FloatRows, NDArray[np.int64]]:
    """The outputs [N, O] of one side, those of the event before each, and the events [n] that have
    one before them."""
    outputs = np.concatenate([chunk.outputs[side] for chunk in chunks])
    before = np.concatenate([outputs[:1], outputs[:-1]])
    is_predicted = np.ones(len(outputs), np.bool_)
    start = 0
    for chunk in chunks:
        if chunk.before is None:
            is_predicted[start] = False
        else:
            before[start] = chunk.before[side]
        is_predicted[[start + reset for reset in chunk.resets]] = False
        start += len(chunk.outputs[side])
    return outputs, before, np.flatnonzero(is_predicted)


def _targets(head: Head) -> Sequence[str]:
    if scores_events(head):
        return ()
    return (head.target,) if isinstance(head, ClassificationHead) else getattr(head, "targets", ())


def _reliability(
    head: Head, scored: Scored, predictions: FloatRows, truth: Floats
) -> Iterator[tuple[str, Reliability]]:
    """The calibration of a head's predictions [n, ...], by bin or quantile."""
    if isinstance(head, ForecastHead) and scored.values is not None:
        known = np.isfinite(truth)
        for index, level in enumerate(head.quantiles):
            true = (truth <= scored.values[..., index])[known]
            yield str(level), Reliability(len(true), level * len(true), int(true.sum()))
    if not isinstance(head, ClassificationHead):
        return
    if predictions.ndim == 1:
        known = np.isfinite(truth)
        probability, came_true = predictions[known].astype(np.float64), truth[known] > 0.5
    else:
        probability = predictions.max(axis=1).astype(np.float64)
        came_true = predictions.argmax(axis=1) == truth
    bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    for number in np.unique(bins).tolist():
        own = bins == number
        predicted = float(probability[own].sum())
        yield str(number / BINS), Reliability(int(own.sum()), predicted, int(came_true[own].sum()))
