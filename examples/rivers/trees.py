"""Gradient-boosted trees on the last days and running aggregates: LightGBM, not part of Carry.

pip install lightgbm==4.7.0
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
from numpy.typing import NDArray

from examples.rivers.windows import CLASSES, codes, tree_features
from models.errors import ModelsError

LAGS = (5, 20, 100)
LEAVES = (31, 127)
"""The candidates: leaves of a tree."""
MOST_TREES = 500
PATIENCE = 30
EVERY = 2
"""Trees are fitted to every second day: neighbours are nearly the same."""


@dataclass(frozen=True, slots=True)
class Trees:
    """A fitted ensemble.

    Attributes:
        lags: events looked back on, the event itself included.
        leaves, rounds: most leaves of a tree, and trees of each class.
        selected: its log loss on the catchments that choose.
        booster: a LightGBM booster.
    """

    lags: int
    leaves: int
    rounds: int
    selected: float
    booster: Any

    def probabilities(self, frame: pl.DataFrame) -> NDArray[np.float64]:
        """Of every event, [rows, classes]."""
        features = tree_features(frame, self.lags)
        return np.asarray(self.booster.predict(features, num_threads=1), np.float64)

    def cpu_us(self, frame: pl.DataFrame, batch: int = 64, calls: int = 50) -> float:
        """Processor time of one event in a batch, without that of its features."""
        features = tree_features(frame, self.lags)[:batch]
        self.booster.predict(features, num_threads=1)
        start = time.process_time()
        for _ in range(calls):
            self.booster.predict(features, num_threads=1)
        return (time.process_time() - start) / calls / batch * 1e6

    def save(self, folder: Path) -> None:
        """Write it to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.booster.save_model(str(folder / f"{self.lags}.txt"), num_iteration=self.rounds)
        settings = {"leaves": self.leaves, "rounds": self.rounds, "selected": self.selected}
        (folder / f"{self.lags}.json").write_bytes(orjson.dumps(settings))

    @classmethod
    def load(cls, folder: Path, lags: int) -> Trees:
        """Read what `save` wrote."""
        settings = orjson.loads((folder / f"{lags}.json").read_bytes())
        booster = _lightgbm().Booster(model_file=str(folder / f"{lags}.txt"))
        return cls(lags, booster=booster, **settings)


def tune_trees(train: pl.DataFrame, select: pl.DataFrame, lags: int) -> Trees:
    """Fit every candidate until the catchments that choose want no more trees; keep the best."""
    lightgbm = _lightgbm()
    fitted = lightgbm.Dataset(tree_features(train, lags)[::EVERY], codes(train)[::EVERY])
    chosen = lightgbm.Dataset(tree_features(select, lags), codes(select), reference=fitted)
    tried = []
    for leaves in LEAVES:
        options = {
            "objective": "multiclass",
            "num_class": len(CLASSES),
            "learning_rate": 0.08,
            "num_leaves": leaves,
            "min_data_in_leaf": 50,
            "feature_fraction": 0.3,
            "lambda_l2": 1.0,
            "max_bin": 63,
            "num_threads": 1,
            "seed": 1,
            "deterministic": True,
            "verbose": -1,
        }
        booster = lightgbm.train(
            options,
            fitted,
            MOST_TREES,
            valid_sets=[chosen],
            callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
        )
        loss = float(booster.best_score["valid_0"]["multi_logloss"])
        tried.append(Trees(lags, leaves, booster.best_iteration, loss, booster))
    return min(tried, key=lambda one: one.selected)


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError as error:
        raise ModelsError(
            "the comparison needs LightGBM, which Carry does not: pip install lightgbm==4.7.0"
        ) from error
    return lightgbm
