"""Gradient-boosted trees on the last few events, tuned on the validation events.

scikit-learn's histogram trees (after LightGBM). They look back on the last k events of the stream:
everything that the last two events hold, and of older ones what moves from event to event: the gap,
the time of day, the targets and the categories. Angles are given as one number, absent values as
NaN, categories as such or as numbers, whichever validates better.

An ensemble is doubled until its best size is at most half of it. When the time is over, the best
ensemble so far is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import log_loss, mean_absolute_error, mean_squared_error

from models.events.schema import CategoricalField, NumericField, TimestampField
from models.spec.layout import event_field
from models.spec.model import ModelSpec

Note = Callable[[str], None]


class OutOfTimeError(Exception):
    """A baseline would take longer than it may; it is left out."""


class TimeBudget:
    """A time limit, divided among parts of the work; it also reports their progress.

    Args:
        limit_s: from now; None is no limit.
        note: called with a line of progress.
        now_s: a monotonic clock.
    """

    def __init__(
        self,
        limit_s: float | None = None,
        note: Note = lambda text: None,
        now_s: Callable[[], float] = time.monotonic,
    ):
        self._now_s = now_s
        self._end_s = None if limit_s is None else now_s() + limit_s
        self.note = note

    @property
    def is_expired(self) -> bool:
        """Whether the time is over."""
        return self._end_s is not None and self._now_s() >= self._end_s

    def part(self, parts: int, name: str = "") -> TimeBudget:
        """The first of `parts` equal shares of the time left; its notes begin with `name`."""
        left_s = None if self._end_s is None else max(0.0, self._end_s - self._now_s()) / parts
        prefix = f"{name}, " if name else ""
        return TimeBudget(left_s, lambda text: self.note(f"{prefix}{text}"), self._now_s)


Features = Callable[[int, bool], tuple[NDArray[np.float32], list[bool]]]

MAX_CATEGORIES = 255
"""scikit-learn's bound on the categories of a feature; beyond it codes are plain numbers."""
WHOLE_EVENTS = 2


@dataclass(frozen=True, slots=True)
class Grid:
    """What is tried, one setting after the other, each from the best so far.

    Attributes:
        categories: 1 gives the last event's categories as categories, 0 all of them as
            numbers. Neither is always better: categories let trees learn names by heart.
        events, leaves, smallest_leaf: options, the first being where the search begins.
        rate: learning rate.
        most_trees: the largest number of trees.
    """

    categories: tuple[int, ...]
    events: tuple[int, ...]
    leaves: tuple[int, ...]
    smallest_leaf: tuple[int, ...]
    rate: float
    most_trees: int

    @property
    def options(self) -> dict[str, tuple[int, ...]]:
        """The settings in the order in which they are tried."""
        return {
            "categories": self.categories,
            "events": self.events,
            "leaves": self.leaves,
            "smallest_leaf": self.smallest_leaf,
        }


FULL = Grid((0, 1), (5, 20), (31, 63), (100, 20), 0.05, 1000)
SHORT = Grid((0,), (5, 20), (31, 63), (100,), 0.1, 500)
"""For numbers: each of them needs several ensembles."""
TREES_STEP = 20
FIRST_TREES = 60
"""Size of an ensemble before it is doubled."""


class Trees:
    """A fitted ensemble with the settings chosen for it."""

    def __init__(
        self,
        kind: str,
        features: Features,
        truth: NDArray[np.float64],
        train: NDArray[np.int64],
        grid: Grid | None = None,
        level: float = 0.5,
    ):
        """Use `tune`, which has the arguments; `level` is that of a quantile."""
        self._kind, self._features, self._level = kind, features, level
        self._truth, self._train = truth, train[~np.isnan(truth[train])]
        self._model: Any = None
        self._grid = grid or (FULL if kind == "log_loss" else SHORT)
        self.settings: dict[str, Any] = {}

    @classmethod
    def tune(
        cls,
        kind: str,
        features: Features,
        truth: NDArray[np.float64],
        train: NDArray[np.int64],
        validate: NDArray[np.int64],
        grid: Grid | None = None,
        budget: TimeBudget | None = None,
    ) -> Trees:
        """Choose by validation loss and fit on the training targets.

        Args:
            kind: `log_loss` (classes), `quantile` (the median) or `squared_error`.
            features: events to look back on and whether categories are given as such -> features
                of every row, and which of them are categories.
            truth: float64 [rows], the target at its own row; NaN if absent.
            train, validate: int64, target rows; their features are those of the row before.
            grid: what is tried; `FULL` for probabilities and `SHORT` for numbers by default.
            budget: time limit, after which the best so far is kept: at least `FIRST_TREES` trees
                of the first setting.
        """
        budget = budget or TimeBudget()
        trees_model = cls(kind, features, truth, train, grid)
        validation_rows = validate[~np.isnan(truth[validate])]
        tried = trees_model._grid.options
        best_settings = {name: options[0] for name, options in tried.items()}
        best = trees_model._attempt(best_settings, validation_rows, budget)
        for name, options in tried.items():
            for option in options[1:]:
                if budget.is_expired:
                    break
                changed = {**best_settings, name: option}
                attempt = trees_model._attempt(changed, validation_rows, budget)
                if attempt[0] < best[0]:
                    best, best_settings = attempt, changed
        loss, trees_model._model, trees = best
        trees_model.settings = {**best_settings, "trees": trees, "validation": loss}
        return trees_model

    @property
    def classes(self) -> NDArray[np.int64]:
        """The classes in the order of `probabilities`."""
        return np.asarray(self._model.classes_, np.int64)

    def refit(self, level: float, budget: TimeBudget | None = None) -> Trees:
        """Fit trees with these settings to another quantile.

        Raises:
            OutOfTimeError: the time is over already.
        """
        if self._kind != "quantile" or level == self._level:
            return self
        if budget is not None:
            budget.note(f"quantile {level:g}")
            if budget.is_expired:
                raise OutOfTimeError
        own = self._kind, self._features, self._truth, self._train, self._grid
        trees = Trees(*own, level)
        trees.settings = dict(self.settings)
        trees._fit(trees.settings, int(trees.settings["trees"]))
        return trees

    def probabilities(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Probabilities of the classes at target rows, [n, classes]."""
        return np.asarray(self._stage(self._rows(at), "staged_predict_proba"))

    def values(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predictions at target rows, [n]."""
        return np.asarray(self._stage(self._rows(at), "staged_predict"))

    def _rows(self, at: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._features_of(self.settings)[0][at - 1]

    def _features_of(self, settings: dict[str, Any]) -> tuple[NDArray[np.float32], list[bool]]:
        return self._features(int(settings["events"]), bool(settings["categories"]))

    def _stage(self, rows: NDArray[np.float32], method: str) -> Any:
        stages = int(self.settings["trees"])
        for count, prediction in enumerate(getattr(self._model, method)(rows), start=1):
            if count == stages:
                return prediction
        raise ValueError(f"expected at least {stages} trees")

    def _fit(self, settings: dict[str, Any], trees: int) -> NDArray[np.float32]:
        """Fit a new ensemble; returns the features of every row."""
        rows, categories = self._features_of(settings)
        shared: dict[str, Any] = {
            "learning_rate": self._grid.rate,
            "max_leaf_nodes": int(settings["leaves"]),
            "min_samples_leaf": int(settings["smallest_leaf"]),
            "categorical_features": categories if any(categories) else None,
            "early_stopping": False,
            "random_state": 1,
            "warm_start": True,
        }
        if self._kind == "log_loss":
            self._model = HistGradientBoostingClassifier(**shared)
        elif self._kind == "quantile":
            self._model = HistGradientBoostingRegressor(
                loss="quantile", quantile=self._level, **shared
            )
        else:
            self._model = HistGradientBoostingRegressor(loss="squared_error", **shared)
        self._grow(rows, trees)
        return rows

    def _grow(self, rows: NDArray[np.float32], trees: int) -> None:
        """Add trees to the ensemble up to that many."""
        self._model.set_params(max_iter=trees)
        inputs = rows[self._train - 1]
        # features absent from every training event cannot be binned
        inputs[:, np.isnan(inputs).all(axis=0)] = 0
        self._model.fit(inputs, self._truth[self._train])

    def _attempt(
        self, settings: dict[str, Any], validation_rows: NDArray[np.int64], budget: TimeBudget
    ) -> tuple[float, Any, int]:
        """Loss, model and number of trees of the best stage."""
        count = min(FIRST_TREES, self._grid.most_trees)
        shown = ", ".join(f"{name} {value}" for name, value in settings.items())
        budget.note(f"{count} trees, {shown}")
        rows = self._fit(settings, count)
        while True:
            losses = self._stage_losses(rows, validation_rows)
            best = min(losses, key=losses.__getitem__)
            if 2 * best <= count or count == self._grid.most_trees or budget.is_expired:
                return losses[best], self._model, best
            count = min(2 * count, self._grid.most_trees)
            budget.note(f"{count} trees, {shown}, validation {losses[best]:.4f}")
            self._grow(rows, count)

    def _stage_losses(
        self, rows: NDArray[np.float32], validation_rows: NDArray[np.int64]
    ) -> dict[int, float]:
        """Validation loss by number of trees."""
        truth = self._truth[validation_rows]
        method = "staged_predict_proba" if self._kind == "log_loss" else "staged_predict"
        stages = getattr(self._model, method)(rows[validation_rows - 1])
        return {
            count: self._loss(truth, prediction)
            for count, prediction in enumerate(stages, start=1)
            if count % TREES_STEP == 0
        }

    def _loss(self, truth: NDArray[np.float64], prediction: Any) -> float:
        if self._kind == "log_loss":
            return float(log_loss(truth, prediction, labels=self._model.classes_))
        if self._kind == "quantile":
            return float(mean_absolute_error(truth, prediction))
        return float(mean_squared_error(truth, prediction))


def tree_features(
    spec: ModelSpec,
    rows: NDArray[np.float32],
    spans: tuple[tuple[int, int], ...],
    events: int,
    categorical: bool = True,
) -> tuple[NDArray[np.float32], list[bool]]:
    """The last events at every row, newest first.

    Args:
        spec: the fitted spec.
        rows: float32 [rows, F], encoded.
        spans: each stream's rows.
        events: k, how many to look back on.
        categorical: whether the last event's categories are given as categories; otherwise
            they are numbers, their places in the alphabet.

    Returns:
        float32 [rows, features], NaN before a stream's beginning; and which are categories.
    """
    age = np.concatenate([np.arange(stop - start) for start, stop in spans])
    targets = {
        name
        for head in spec.heads
        for name in (*getattr(head, "targets", ()), getattr(head, "target", None))
        if name is not None
    }
    features: list[NDArray[np.float32]] = []
    categories: list[bool] = []
    for values, moving, category in _columns(spec, rows, targets):
        steady = bool(np.all((values[1:] == values[:-1]) | (age[1:] == 0)))
        for lag in range(events):
            if lag >= (1 if steady else WHOLE_EVENTS) and (steady or not moving):
                break
            late = np.full(len(values), np.nan, np.float32)
            late[lag:] = values[: len(values) - lag]
            late[age < lag] = np.nan
            features.append(late)
            categories.append(category and categorical and lag == 0)
    return np.stack(features, axis=1), categories


def _columns(
    spec: ModelSpec, rows: NDArray[np.float32], targets: set[str]
) -> list[tuple[NDArray[np.float32], bool, bool]]:
    """Values, whether older events are looked at too, and whether they are categories."""
    index = {column.name: at for at, column in enumerate(spec.columns)}
    columns = []
    for name in dict.fromkeys(column.field for column in spec.columns if column.field):
        field = event_field(spec, name)
        missing = index.get(f"{name}.missing")
        absent = rows[:, missing] == 1 if missing is not None else np.zeros(len(rows), np.bool_)
        if isinstance(field, TimestampField):
            parts = [(rows[:, index[f"{name}.gap"]], True)]
            for angle in field.calendar:
                sine, cosine = (
                    rows[:, index[f"{name}.{angle}_sin"]],
                    rows[:, index[f"{name}.{angle}_cos"]],
                )
                parts.append((np.mod(np.arctan2(sine, cosine), 2 * np.pi), angle == "hour"))
            category = False
        else:
            categorical = isinstance(field, CategoricalField)
            numeric_target = isinstance(field, NumericField) and name in targets
            parts = [(rows[:, index[name]], categorical or numeric_target or name in targets)]
            category = isinstance(field, CategoricalField) and field.codes <= MAX_CATEGORIES
            if (season := index.get(f"{name}.season")) is not None:
                parts.append((rows[:, season], False))
        for values, moving in parts:
            column_values = values.astype(np.float32)
            if isinstance(field, CategoricalField):
                column_values = _alphabetic(field)[values.astype(np.int64)]
            column_values[absent] = np.nan
            columns.append((column_values, moving, category))
    return columns


def _alphabetic(field: CategoricalField) -> NDArray[np.float32]:
    """Code -> rank in alphabetical order, so that times of day, for example, keep their order."""
    order = np.argsort(np.array(field.labels), kind="stable")
    places = np.empty(len(order), np.float32)
    places[order] = np.arange(len(order), dtype=np.float32)
    return places
