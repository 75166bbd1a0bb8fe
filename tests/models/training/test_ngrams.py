"""N-grams are distributions, count as Kneser-Ney does, and find what follows long histories."""

from __future__ import annotations

from math import log

import numpy as np
import pytest

from models.training.ngrams import Ngrams

SEQUENCES = [np.array(each) for each in ([0, 1, 2, 0, 1, 3], [1, 2, 0, 1, 2], [3, 0, 1, 2, 2])]
CATEGORIES = 5


@pytest.mark.parametrize("order", [0, 1, 3, 9])
def test_probabilities_of_all_categories_add_up_to_one(order: int) -> None:
    ngrams = Ngrams(SEQUENCES, CATEGORIES, order, 0.8)
    for past in ([], [1], [0, 1], [4, 0], [2, 2, 0, 1]):
        nats = [ngrams.losses(np.array([*past, code]))[-1] for code in range(CATEGORIES)]
        assert sum(np.exp(-np.array(nats))) == pytest.approx(1.0)


def test_bigrams_interpolate_with_the_categories_that_follow_most_different_ones() -> None:
    ngrams = Ngrams([np.array([0, 1, 0, 1, 0, 2])], 4, 1, 0.5)
    # after 0: 1 twice, 2 once; different predecessors: 0 has two (1, the start), 1 and 2 one each
    lower = (1 - 0.5) / 4 + 0.5 * 3 / 4 / 4
    expected = (2 - 0.5) / 3 + 0.5 * 2 / 3 * lower
    assert ngrams.losses(np.array([0, 1]))[1] == pytest.approx(-log(expected))


def test_a_longer_history_decides_what_a_shorter_one_does_not() -> None:
    sequences = [np.array([0, 2, 2, 0] * 9), np.array([1, 2, 2, 1] * 9)]
    short, long = (Ngrams(sequences, 3, order, 0.8).losses(sequences[1]) for order in (1, 3))
    assert long[3:].mean() < 0.2 < 0.5 < short[3:].mean()
