"""Scores against scikit-learn's, and against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss, mean_pinball_loss, roc_auc_score

from models.events.columns import EventColumns
from models.spec.model import parse_spec
from service.replay.skill import binary_scores, multiclass_scores, skill_of
from service.replay.source import StreamEvents
from tests.service.replay.standin import SPEC


def test_binary_scores_equal_scikit_learn() -> None:
    random = np.random.default_rng(7)
    probability = np.round(random.beta(2, 5, 500), 2)
    happened = random.random(500) < probability
    found = binary_scores(happened, probability)
    assert found["auc"] == pytest.approx(roc_auc_score(happened, probability))
    assert found["log_loss"] == pytest.approx(log_loss(happened, np.clip(probability, 1e-7, 1)))
    assert found["brier"] == pytest.approx(brier_score_loss(happened, probability))
    assert found["base_rate"] == pytest.approx(happened.mean())
    assert "auc" not in binary_scores(np.ones(3, bool), probability[:3])


def test_multiclass_scores_equal_scikit_learn() -> None:
    random = np.random.default_rng(8)
    probabilities = random.dirichlet(np.ones(4), 300)
    codes = random.integers(0, 4, 300)
    found = multiclass_scores(codes, probabilities)
    assert found["log_loss"] == pytest.approx(log_loss(codes, probabilities, labels=range(4)))
    assert found["accuracy"] == pytest.approx(np.mean(probabilities.argmax(1) == codes))


def test_output_is_scored_by_the_next_event_of_its_stream(streams: list[StreamEvents]) -> None:
    random = np.random.default_rng(9)
    outputs = [random.random((len(stream), 4)).astype(np.float32) for stream in streams]
    outputs[0][3] = np.nan
    delays = [stream.columns.values["delay"] for stream in streams]
    kept = [np.arange(len(delay) - 1) for delay in delays]
    kept[0] = np.delete(kept[0], 3)
    after = np.concatenate([d[1:][k] for d, k in zip(delays, kept, strict=True)])
    given = np.concatenate([o[:-1][k] for o, k in zip(outputs, kept, strict=True)])
    late, forecast = skill_of(SPEC, [(s.columns, o) for s, o in zip(streams, outputs, strict=True)])
    assert late.count == forecast.count == len(after)
    assert late.scores["auc"] == pytest.approx(roc_auc_score(after > 5, given[:, 0]))
    pinball = np.mean(
        [
            mean_pinball_loss(after, given[:, column], alpha=level)
            for column, level in ((1, 0.1), (2, 0.5), (3, 0.9))
        ]
    )
    assert forecast.scores["pinball(delay)"] == pytest.approx(pinball)


def test_categories_and_absent_targets() -> None:
    spec = parse_spec(
        {
            "name": "m",
            "events": {
                "fields": [
                    {
                        "kind": "categorical",
                        "name": "k",
                        "vocabulary": ["a", "b"],
                        "optional": True,
                    },
                    {"kind": "boolean", "name": "b", "optional": True},
                ]
            },
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [
                {"kind": "classification", "name": "k", "target": "k"},
                {"kind": "classification", "name": "b", "target": "b"},
                {"kind": "sequence", "name": "s"},
            ],
        }
    )
    columns = EventColumns(
        3,
        {"k": np.array([True, True, False]), "b": np.array([True, True, True])},
        {"k": np.array(["a", "b", ""], object), "b": np.array([False, True, False])},
    )
    outputs = np.full((3, 7), 0.125, np.float32)
    outputs[0, :4] = [0.1, 0.2, 0.6, 0.1]
    outputs[:2, 4] = [0.9, 0.4]
    categories, booleans = skill_of(spec, [(columns, outputs)])
    assert categories.count == 1
    assert categories.scores == {"log_loss": pytest.approx(-np.log(0.6)), "accuracy": 1.0}
    assert booleans.count == 2
    assert booleans.scores["auc"] == 1.0
