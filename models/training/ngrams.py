"""N-grams with interpolated Kneser-Ney smoothing, the field's own predictor of the next category.

Kneser and Ney 1995 in the interpolated form of Chen and Goodman 1999, with one absolute discount d
of every order. With the count c(h, w) of category w after the history h, N(h) of different
categories after h, and h' = h without its oldest event:

    p(w | h) = (max(c(h, w) - d, 0) + d N(h) p(w | h')) / sum over v of c(h, v)

Below the longest order, c counts the different events before (h, w) instead of its occurrences. The
history ends at the beginning of the sequence, which is a category of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

START = -1
Codes: TypeAlias = NDArray[np.int64]


class Ngrams:
    """N-grams that were fitted to sequences.

    Args:
        sequences: codes from 0 on, [events] each.
        categories: number of codes; one that training never saw has its share of the last discount.
        order: most events of a history.
        discount: d, between 0 and 1.
    """

    def __init__(self, sequences: Sequence[Codes], categories: int, order: int, discount: float):
        self._order, self._discount, self._categories = order, discount, categories
        self._counts: list[dict[tuple[int, ...], Counter[int]]] = [
            defaultdict(Counter) for _ in range(order + 1)
        ]
        for sequence in sequences:
            padded = [START] * order + sequence.tolist()
            for at in range(order, len(padded)):
                self._counts[order][tuple(padded[at - order : at])][padded[at]] += 1
        for longer in range(order, 0, -1):
            for history, counts in self._counts[longer].items():
                for code in counts:
                    self._counts[longer - 1][history[1:]][code] += 1
        self._probability = cache(self._interpolate)

    def losses(self, sequence: Codes) -> NDArray[np.float64]:
        """-log p of every event of a sequence given those before it, [events]."""
        padded = [START] * self._order + sequence.tolist()
        probabilities = [
            self._probability(tuple(padded[at - self._order : at]), padded[at])
            for at in range(self._order, len(padded))
        ]
        return -np.log(np.array(probabilities, np.float64))

    def _interpolate(self, history: tuple[int, ...], code: int) -> float:
        shorter = self._probability(history[1:], code) if history else 1.0 / self._categories
        counts = self._counts[len(history)].get(history)
        if counts is None:
            return shorter
        kept = max(counts[code] - self._discount, 0.0) if code in counts else 0.0
        return (kept + self._discount * len(counts) * shorter) / counts.total()
