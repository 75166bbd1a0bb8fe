"""Boosted trees on the last days and aggregates of up to a year: LightGBM, not part of Carry.

pip install lightgbm==4.7.0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from examples.rivers.data import CATCHMENT, CLASSES, DAY, TEST, VALIDATE, codes
from models.errors import ModelsError

LAGGED = ("precipitation", "temperature", "evapotranspiration", "discharge", "relative")
AGGREGATED = (*LAGGED, "net", "snow", "warmth")
MADE = {
    "relative": pl.col("discharge")
    / pl.col("discharge").filter(pl.col(DAY) < VALIDATE).median().over(CATCHMENT),
    "net": pl.col("precipitation") - pl.col("evapotranspiration"),
    "snow": pl.when(pl.col("temperature") < 1).then("precipitation").otherwise(0.0),
    "warmth": pl.max_horizontal("temperature", pl.lit(0.0)),
}
"""What a hydrologist would add: discharge over the catchment's median, rain that is left, snowfall,
degree-days."""
AGGREGATED_DAYS = (7, 30, 90, 180, 365)
CANDIDATES = ((5, 31, 50), (20, 31, 50), (20, 15, 50), (20, 31, 200), (20, 15, 200), (60, 15, 200))
"""Days looked back on, leaves of a tree, and fewest days in a leaf."""
MOST_TREES, PATIENCE = 1000, 30
OPTIONS = {
    "objective": "multiclass",
    "num_class": len(CLASSES),
    "learning_rate": 0.05,
    "feature_fraction": 0.3,
    "lambda_l2": 1.0,
    "num_threads": 1,
    "seed": 1,
    "deterministic": True,
    "verbose": -1,
}
YEAR_DAYS = 365.25


@dataclass(frozen=True, slots=True)
class Trees:
    """A fitted ensemble.

    Attributes:
        lags: days looked back on, the day itself included.
        leaves, smallest_leaf: most leaves of a tree, and fewest days in a leaf.
        rounds: trees of each class.
        loss: log loss on the validation set.
        model: a LightGBM booster.
    """

    lags: int
    leaves: int
    smallest_leaf: int
    rounds: int
    loss: float
    model: Any

    def probabilities(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Of every row, [rows, classes]."""
        return np.asarray(self.model.predict(features, num_threads=1), np.float64)

    def __str__(self) -> str:
        return (
            f"{self.lags} days, {self.leaves} leaves of {self.smallest_leaf} or more days, "
            f"{self.rounds} trees a class: validation {self.loss:.4f}"
        )


def tree_features(frame: pl.DataFrame, lags: int) -> NDArray[np.float32]:
    """The last `lags` days and aggregates, [rows, features]; both include the day itself.

    Aggregates are mean, minimum and maximum of the last 7, 30, 90, 180 and 365 days, and
    exponential means with half of these as half-lives. Beside them are the season and, last, the
    catchment.
    """
    columns: list[pl.Expr] = []
    for name in AGGREGATED:
        value = pl.col(name)
        for days in AGGREGATED_DAYS:
            columns += [
                value.rolling_mean(days, min_samples=1).alias(f"{name}_mean_{days}"),
                value.ewm_mean(half_life=days / 2).alias(f"{name}_ewm_{days}"),
            ]
        if name in LAGGED:
            columns += [value.shift(lag).alias(f"{name}_{lag}") for lag in range(lags)]
            for days in AGGREGATED_DAYS:
                columns += [
                    value.rolling_min(days, min_samples=1).alias(f"{name}_min_{days}"),
                    value.rolling_max(days, min_samples=1).alias(f"{name}_max_{days}"),
                ]
    angle = pl.col(DAY).dt.ordinal_day() * (2 * np.pi / YEAR_DAYS)
    season = [angle.cos().alias("cos"), angle.sin().alias("sin")]
    catchment = pl.col(CATCHMENT).rank("dense")
    own = [column.over(CATCHMENT) for column in columns]
    return frame.with_columns(**MADE).select(*own, *season, catchment).to_numpy().astype(np.float32)


def tune_trees(frame: pl.DataFrame) -> Trees:
    """Fit candidates before `VALIDATE` until the validation set prefers no more; keep the best."""
    labels, day = codes(frame), frame[DAY]
    fitted = (labels >= 0) & (day < VALIDATE).to_numpy()
    chosen = (labels >= 0) & ((day >= VALIDATE) & (day < TEST)).to_numpy()
    try:
        import lightgbm
    except ImportError as error:
        raise ModelsError("expected LightGBM: pip install lightgbm==4.7.0") from error
    tried = []
    for lags, leaves, smallest_leaf in CANDIDATES:
        features = tree_features(frame, lags)
        catchment = features.shape[1] - 1
        train = lightgbm.Dataset(features[fitted], labels[fitted], categorical_feature=[catchment])
        validate = lightgbm.Dataset(features[chosen], labels[chosen], reference=train)
        options = {**OPTIONS, "num_leaves": leaves, "min_data_in_leaf": smallest_leaf}
        stop = lightgbm.early_stopping(PATIENCE, verbose=False)
        model = lightgbm.train(options, train, MOST_TREES, valid_sets=[validate], callbacks=[stop])
        loss = float(model.best_score["valid_0"]["multi_logloss"])
        tried.append(Trees(lags, leaves, smallest_leaf, model.best_iteration, loss, model))
        print(tried[-1], flush=True)
    return min(tried, key=lambda each: each.loss)
