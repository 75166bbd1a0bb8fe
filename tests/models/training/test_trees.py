"""Boosted trees as baselines."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from models.training.trees import Grid, Trees


def test_features_absent_from_training_are_ignored() -> None:
    """A lag longer than any training stream; later streams may be longer."""
    random = np.random.default_rng(1)
    features = random.normal(size=(300, 2)).astype(np.float32)
    truth = np.append(0.0, features[:-1, 0] > 0).astype(np.float64)
    truth[7] = np.nan  # absent: not trained on
    train, validate, test = (np.arange(*span) for span in ((1, 200), (200, 250), (250, 300)))
    grid = Grid((0,), (1,), (7,), (5,), 0.3, 20)

    def probabilities(second: float) -> np.ndarray:
        history = features.copy()
        history[:200, 1] = second
        model = Trees.tune(
            "log_loss", lambda *_: (history, [False, False]), truth, train, validate, grid
        )
        return model.probabilities(test)

    without = probabilities(np.nan)
    np.testing.assert_array_equal(without, probabilities(0.0))
    assert ((without[:, 1] > 0.5) == (truth[test] == 1)).mean() > 0.9
