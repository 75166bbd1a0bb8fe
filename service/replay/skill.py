"""Scores of the outputs: each output against the event that came after it.

    classification of two    AUC, log loss, Brier score, and how often it happened
    classification of many   log loss and accuracy
    forecast                 mean pinball loss per target over the quantiles, in the field's
                             own unit; mean absolute error without quantiles

An output counts if it was received and its stream's next event was replayed and has the target.
Other heads predict nothing that could be scored. Pure NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.events.columns import EventColumns
from models.events.encode import categorical_codes, standardise
from models.events.schema import CategoricalField, EventField, NumericField
from models.spec.heads import ClassificationHead, ForecastHead, Head
from models.spec.layout import event_field, output_spec
from models.spec.model import ModelSpec
from service.replay.client import FloatRows

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SMALLEST = 1e-7
"""Probabilities are kept this far from 0 and 1, as a float32 sigmoid would be."""


@dataclass(frozen=True, slots=True)
class Skill:
    """One head's scores by name, over `count` outputs."""

    output: str
    count: int
    scores: dict[str, float]


def skill_of(spec: ModelSpec, streams: Sequence[tuple[EventColumns, FloatRows]]) -> list[Skill]:
    """Score every head that can be scored.

    Args:
        spec: the model, with a fitted schema.
        streams: events and their outputs float32 [T, O], NaN if none was received.
    """
    slices = output_spec(spec).slices
    skills = []
    for head in spec.heads:
        if not isinstance(head, (ClassificationHead, ForecastHead)):
            continue
        skill = _score(spec, head, [(c, o[:, slices[head.name]]) for c, o in streams if len(c)])
        if skill is not None:
            skills.append(skill)
    return skills


def _score(
    spec: ModelSpec, head: Head, streams: Sequence[tuple[EventColumns, FloatRows]]
) -> Skill | None:
    if isinstance(head, ForecastHead):
        return _forecast(head, streams)
    if not isinstance(head, ClassificationHead):
        return None
    field = event_field(spec, head.target)
    pairs = [_next(columns, rows, (head.target,)) for columns, rows in streams]
    outputs = np.concatenate([rows for rows, _ in pairs]).astype(np.float64) if pairs else None
    if outputs is None or len(outputs) == 0:
        return None
    values = np.concatenate([targets[0] for _, targets in pairs])
    if isinstance(field, CategoricalField):
        codes = categorical_codes(field, np.ones(len(values), np.bool_), values)
        return Skill(head.name, len(values), multiclass_scores(codes, outputs))
    return Skill(
        head.name, len(values), binary_scores(_happened(field, head, values), outputs[:, 0])
    )


def _happened(field: EventField, head: ClassificationHead, values: NDArray[Any]) -> Bools:
    if isinstance(field, NumericField) and head.above is not None:
        # As training compares: both sides as the encoder writes them.
        return np.asarray(standardise(field, values) > standardise(field, head.above))
    return values.astype(np.bool_)


def _forecast(
    head: ForecastHead, streams: Sequence[tuple[EventColumns, FloatRows]]
) -> Skill | None:
    width = max(1, len(head.quantiles))
    scores: dict[str, float] = {}
    count = 0
    for index, target in enumerate(head.targets):
        columns_of_target = slice(index * width, (index + 1) * width)
        pairs = [_next(columns, rows[:, columns_of_target], (target,)) for columns, rows in streams]
        if not sum(len(rows) for rows, _ in pairs):
            continue
        outputs = np.concatenate([rows for rows, _ in pairs]).astype(np.float64)
        truth = np.concatenate([values[0] for _, values in pairs]).astype(np.float64)
        count = max(count, len(truth))
        error = truth[:, None] - outputs
        if head.quantiles:
            level = np.array(head.quantiles)
            scores[f"pinball({target})"] = float(
                np.maximum(level * error, (level - 1) * error).mean()
            )
        else:
            scores[f"mae({target})"] = float(np.abs(error).mean())
    return Skill(head.name, count, scores) if scores else None


def _next(
    columns: EventColumns, rows: FloatRows, targets: tuple[str, ...]
) -> tuple[FloatRows, list[NDArray[Any]]]:
    """Outputs that were received, and the targets' values one event later."""
    counts = ~np.isnan(rows[:-1]).any(axis=1)
    for name in targets:
        counts &= columns.present[name][1:]
    return rows[:-1][counts], [columns.values[name][1:][counts] for name in targets]


def binary_scores(happened: Bools, probability: Floats) -> dict[str, float]:
    """AUC, log loss, Brier score and base rate of the probability of something.

    Args:
        happened: bool [n].
        probability: float64 [n].
    """
    p = np.clip(probability, SMALLEST, 1 - SMALLEST)
    scores = {
        "log_loss": float(-np.where(happened, np.log(p), np.log1p(-p)).mean()),
        "brier": float(np.square(probability - happened).mean()),
        "base_rate": float(happened.mean()),
    }
    if 0 < happened.sum() < len(happened):
        return {"auc": auc(happened, probability), **scores}
    return scores


def auc(happened: Bools, probability: Floats) -> float:
    """Area under the ROC curve, by the ranks of Mann and Whitney; ties count half."""
    _, inverse, counts = np.unique(probability, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    yes = int(happened.sum())
    no = len(happened) - yes
    return float((ranks[happened].sum() - yes * (yes + 1) / 2) / (yes * no))


def multiclass_scores(codes: NDArray[np.int64], probabilities: Floats) -> dict[str, float]:
    """Log loss and accuracy.

    Args:
        codes: int64 [n].
        probabilities: float64 [n, codes].
    """
    of_true_class = probabilities[np.arange(len(codes)), codes]
    return {
        "log_loss": float(-np.log(np.clip(of_true_class, SMALLEST, 1)).mean()),
        "accuracy": float((probabilities.argmax(axis=1) == codes).mean()),
    }
