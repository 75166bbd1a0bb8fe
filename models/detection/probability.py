"""The nats of events, -log of their tail probabilities, from the quantities of their deviations.

Each quantity has a tail, pooled over streams, which the stream's own past replaces
(`models.detection.stream_tails`). The norm of order 3 of their nats has a pooled tail again:
several large ones count more than one, the largest ones most. There is one quantity for all targets
rather than one for each, since a bound for many of them hides what a few show.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from models.detection.deviations import Deviations
from models.detection.recurrences import Bools, Floats, StateParts
from models.detection.stream_tails import StreamTails
from models.detection.tails import Tails
from models.spec.detection import SCALES, Tail
from models.spec.layout import detection_of
from models.spec.model import ModelSpec

LEAST: Final = 1e-9
"""Of a weight, so that there are shares where all are 0."""


class Scores(NamedTuple):
    """The nats of events, and the cubes of those of their quantities.

    Attributes:
        nats: [B, T].
        cubes: [Q, B, T].
    """

    nats: Floats
    cubes: Floats


class Scorer:
    """Scores the events of one model.

    Args:
        spec: with `detection`.
        tails: pooled, of the quantities.
        combined: pooled, of the norm of the nats of all quantities; None: scores are this norm.
    """

    def __init__(self, spec: ModelSpec, tails: tuple[Tail, ...], combined: Tail | None):
        _, head, _ = detection_of(spec)
        self._pooled, self._own = Tails(tails), StreamTails(spec)
        self._combined = None if combined is None else Tails([combined])
        # of channels with averages, if there is a numeric target
        self._targets, self._kinds = len(head.targets), (len(tails) - 1) // (1 + len(SCALES))

    def score(self, deviations: Deviations, parts: StateParts) -> Scores:
        """Score events, given their deviations; updates the states."""
        quantities = deviations.quantities
        shape = quantities.shape[1:]
        pooled = self._pooled.nats(quantities.reshape(len(quantities), -1))
        own = self._own.follow(pooled.reshape(quantities.shape), self._present(deviations), parts)
        cubes = own * np.square(own)
        nats = np.cbrt(cubes.sum(axis=0)).ravel()
        if self._combined is not None:
            nats = self._combined.nats(nats[np.newaxis])[0]
        return Scores(nats.reshape(shape), cubes)

    def _present(self, deviations: Deviations) -> Bools | None:
        """Whether each event has each quantity, [Q, B, T]; None if all have."""
        events = deviations.events
        if events.is_complete:
            return None
        present = np.empty(deviations.quantities.shape, np.bool_)
        present[:] = events.has_numeric
        present[self._kinds * (1 + len(SCALES))] = events.present.any(axis=0)
        return present

    def weights(self, squares: Floats, cubes: Floats) -> Floats:
        """How much each row counts in the nats of events, [R, ...]: the cubes of each kind of
        channels, by how far each target is off.

        Args:
            squares: [R, ...], those of `Deviations`, of all or some events.
            cubes: [Q, ...], those of `Scores`, of the same ones.
        """
        weights, shape, averaged = squares + LEAST, cubes.shape[1:], self._kinds * (1 + len(SCALES))
        forecasts, others = weights[: self._targets], weights[self._targets :]
        forecasts *= (cubes[averaged] + LEAST) / forecasts.sum(axis=0)
        if self._kinds:
            by_kind = cubes[:averaged].reshape(self._kinds, -1, *shape).sum(axis=1)
            by_kind = np.concatenate([by_kind, cubes[-1:]]) + LEAST
            others = others.reshape(self._kinds + 1, -1, *shape)
            others *= (by_kind / others.sum(axis=1))[:, np.newaxis]
        return np.asarray(weights)
