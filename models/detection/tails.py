"""Tail probabilities of quantities: how often one is at least this large on usual streams.

Peaks over threshold (Davison & Smith, 1990): beyond a high quantile u the excess follows a
generalised Pareto distribution,

    P(X > x) = P(X > u) (1 + k (x - u) / s)^(-1/k),      x > u

and up to u the logarithm of the probability falls linearly from 0. The parameters come from
probability-weighted moments (Hosking & Wallis, 1987), which need no iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.spec.detection import Tail

Floats = NDArray[np.float64]

EXCEEDED: Final = 0.05
"""Share of the events beyond the threshold of a tail."""
MIN_SHAPE: Final = 1e-6
"""In place of 0, an exponential tail."""
MAX_SHAPE: Final = 0.6
MIN_EXCESSES: Final = 20
MAX_NATS: Final = 60.0
"""Tail probabilities are no smaller than exp(-60)."""


class Tails:
    """The tails of K quantities."""

    def __init__(self, tails: Sequence[Tail]):
        threshold = np.array([tail.threshold for tail in tails])
        base = -np.log([tail.exceeded for tail in tails])
        scale = np.array([tail.scale for tail in tails])
        shape = np.maximum([tail.shape for tail in tails], MIN_SHAPE)
        self._parameters = np.stack([threshold, shape / scale, shape, base])
        self._base, self._slope = base[:, np.newaxis], (base / threshold)[:, np.newaxis]

    def nats(self, values: Floats) -> Floats:
        """-log P(X >= value) of values [K, n] that are not negative."""
        nats = values * self._slope
        above = (nats > self._base).ravel().nonzero()[0]
        if len(above):
            threshold, rate, k, base = self._parameters.take(above // values.shape[1], axis=1)
            beyond = base + np.log1p(rate * (values.ravel()[above] - threshold)) / k
            nats.ravel()[above] = np.minimum(beyond, MAX_NATS)
        return np.asarray(nats)


def fit_tail(values: Floats, exceeded: float) -> Tail:
    """The tail of values [n] >= 0 beyond their quantile 1 - `exceeded`."""
    values = np.sort(values)
    count = max(1, min(len(values) - 1, round(len(values) * exceeded)))
    threshold = max(float(values[-count - 1]), 1e-6)
    excesses = values[-count:] - threshold
    excesses = excesses[excesses > 0]
    share = min(max(len(excesses), 1) / len(values), 0.999)
    if len(excesses) < MIN_EXCESSES:
        scale = float(excesses.mean()) if len(excesses) else threshold
        return Tail(threshold=threshold, exceeded=share, scale=max(scale, 1e-9), shape=0.0)
    mean = float(excesses.mean())
    ranks = (np.arange(len(excesses)) + 0.65) / len(excesses)
    weighted = float(np.mean(excesses * (1.0 - ranks)))
    ratio = mean / max(mean - 2.0 * weighted, 1e-12)
    shape = min(max(2.0 - ratio, 0.0), MAX_SHAPE)
    return Tail(threshold=threshold, exceeded=share, scale=mean * (1.0 - shape), shape=shape)
