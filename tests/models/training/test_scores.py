import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from models.decoding.losses import RankedProbabilities, auc, score_binary, score_forecast
from models.training.scores import DayDraws, interval


@pytest.fixture
def scored_pairs():
    random = np.random.default_rng(7)
    truth = random.integers(0, 2, 300).astype(float)
    probability = np.round(np.clip(0.3 * truth + random.uniform(0, 0.7, 300), 0.01, 0.99), 1)
    return probability, truth


def test_probabilities_are_scored_as_in_scikit_learn(scored_pairs):
    probability, truth = scored_pairs
    scored = score_binary(probability, truth)
    assert scored.losses["log_loss"].mean() == pytest.approx(log_loss(truth, probability))
    assert scored.losses["brier"].mean() == pytest.approx(brier_score_loss(truth, probability))
    assert auc(probability, truth) == pytest.approx(roc_auc_score(truth, probability))


def test_weighted_events_count_like_repeated_ones(scored_pairs):
    probability, truth = scored_pairs
    weight = np.random.default_rng(8).integers(0, 4, 300).astype(float)
    repeats = np.repeat(np.arange(300), weight.astype(int))
    assert RankedProbabilities(probability, truth).auc(weight) == pytest.approx(
        roc_auc_score(truth[repeats], probability[repeats])
    )


def test_absent_targets_do_not_count(scored_pairs):
    probability, truth = scored_pairs
    holes = truth.copy()
    holes[::3] = np.nan
    present = ~np.isnan(holes)
    scored = score_binary(probability, holes)
    assert np.nanmean(scored.losses["log_loss"]) == pytest.approx(
        log_loss(truth[present], probability[present])
    )
    assert auc(probability, holes) == pytest.approx(
        roc_auc_score(truth[present], probability[present])
    )


def test_pinball_loss_equals_a_hand_calculation():
    scored = score_forecast((0.1, 0.5), np.array([[[1.0, 4.0]]]), np.array([[3.0]]))
    # 2 above the first quantile: 0.1 * 2; 1 below the second: 0.5 * 1.
    assert scored.losses["pinball"][0] == pytest.approx((0.2 + 0.5) / 2)
    assert scored.losses["mae"][0] == 1.0


def test_the_bootstrap_draws_whole_days():
    days = np.repeat([11, 12, 13], [5, 1, 4])
    loss = np.repeat([1.0, 10.0, 100.0], [5, 1, 4])
    draws = DayDraws.make(days, 50, seed=3)
    assert (draws.counts.sum(axis=1) == 3).all()
    sizes = np.array([5, 1, 4])
    expected = (draws.counts @ (sizes * [1.0, 10.0, 100.0])) / (draws.counts @ sizes)
    np.testing.assert_allclose(draws.means(loss), expected)
    low, high = interval(draws.means(loss))
    assert 1.0 <= low < high <= 100.0
