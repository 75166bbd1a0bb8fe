"""Baselines of label heads: label frequencies, and stateless classifiers.

    base rate            how often each class was in training
    logistic regression  on the event itself, standardised; its penalty chosen by validation
    trees, this event    boosted trees on the event itself
    trees, last events   the same on the event and those before it in its stream
    trees, both sides    the same on the event and those before and after it; only beside a
                         network that sees later events too

All see encoded events, are fitted on training labels, and are chosen by validation labels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from models.decoding.losses import Floats, Scored
from models.spec.chunking import non_causal_layers
from models.spec.heads import LabelHead
from models.training.scores import score_label
from models.training.table import Baseline, Table, rows_around
from models.training.trees import Grid, TimeBudget, Trees

PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the logistic regression's penalty."""
MOST_CATEGORIES = 64
"""A categorical with more codes is left out of the logistic regression."""
SINGLE = Grid((0,), (1,), (15, 31), (20,), 0.1, 300)
SEVERAL = Grid((0,), (3, 8), (15, 31), (20,), 0.1, 300)
"""What trees on one event and on several try; the second number is events a side."""

Score = Callable[[Floats, NDArray[np.int64]], Scored]

BASE, LOGISTIC = "base rate", "logistic regression"
THIS, LAST_EVENTS, BOTH = "trees, this event", "trees, last events", "trees, both sides"


def label_baselines(table: Table, head: LabelHead) -> list[Baseline]:
    """The baselines of one label head but trees."""
    truth, count, score = _task(table, head)
    share = np.bincount(truth[table.train].astype(np.int64), minlength=count) + 1.0
    share /= share.sum()
    base = score(np.tile(share, (len(table.test), 1)), table.test)
    return [Baseline(BASE, base, {}), _logistic(table, truth, count, score)]


def label_trees(table: Table, head: LabelHead, budget: TimeBudget) -> list[Baseline]:
    """The baselines of one label head with trees."""
    truth, count, score = _task(table, head)
    tried = [(THIS, SINGLE, False), (LAST_EVENTS, SEVERAL, False)]
    if head.input in non_causal_layers(table.spec.layers):
        tried.append((BOTH, SEVERAL, True))
    return [
        _trees(
            table, name, truth, count, grid, score, ahead=ahead, budget=budget.part(len(tried) - at)
        )
        for at, (name, grid, ahead) in enumerate(tried)
    ]


def _task(table: Table, head: LabelHead) -> tuple[Floats, int, Score]:
    """The labels, the number of classes, and what scores probabilities [n, classes] at rows."""

    def score(probabilities: Floats, at: NDArray[np.int64]) -> Scored:
        predicted = probabilities if head.classes else probabilities[:, 1]
        return score_label(head, predicted, table.labels[head.name][at])

    return table.labels[head.name].astype(np.float64), len(head.classes) or 2, score


def _logistic(table: Table, truth: Floats, count: int, score: Score) -> Baseline:
    features = _plain(table)
    tried = []
    for penalty in PENALTIES:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))
        model.fit(features[table.train], truth[table.train])
        classes = model.classes_.astype(np.int64)
        validated, tested = (
            for_all_classes(model.predict_proba(features[at]), classes, count)
            for at in (table.validate, table.test)
        )
        loss = float(score(validated, table.validate).losses["log_loss"].mean())
        tried.append((loss, penalty, tested))
    loss, penalty, probabilities = min(tried, key=lambda item: item[0])
    settings = {"inverse_penalty": penalty, "validation": loss}
    return Baseline(LOGISTIC, score(probabilities, table.test), settings)


def _plain(table: Table) -> NDArray[np.float64]:
    """The encoded columns, each category as a column of its own."""
    columns = []
    for index, column in enumerate(table.spec.columns):
        values = table.rows[:, index]
        if column.codes is None:
            columns.append(values[:, None])
        elif column.codes <= MOST_CATEGORIES:
            columns.append(values[:, None] == np.arange(column.codes))
    return np.concatenate(columns, axis=1).astype(np.float64)


def _trees(
    table: Table,
    name: str,
    truth: Floats,
    count: int,
    grid: Grid,
    score: Score,
    *,
    ahead: bool,
    budget: TimeBudget,
) -> Baseline:
    def features(events: int, categorical: bool) -> tuple[NDArray[np.float32], list[bool]]:
        around = rows_around(table, events - 1, events - 1 if ahead else 0)
        # `Trees` reads the row before its target: here that is the target's own.
        return np.roll(around, -1, axis=0), [False] * around.shape[1]

    model = Trees.tune("log_loss", features, truth, table.train, table.validate, grid, budget)
    probabilities = for_all_classes(model.probabilities(table.test), model.classes, count)
    return Baseline(name, score(probabilities, table.test), model.settings)


def for_all_classes(probabilities: Floats, classes: NDArray[np.int64], count: int) -> Floats:
    """Probabilities of all classes, those that training never saw included."""
    all_probabilities = np.full((len(probabilities), count), 1e-6)
    all_probabilities[:, classes] = probabilities
    return np.asarray(all_probabilities / all_probabilities.sum(axis=1, keepdims=True), np.float64)
