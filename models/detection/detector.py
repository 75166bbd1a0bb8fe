"""Detection on the outputs of a network with an anomaly head: tail probabilities and alarms.

Each event's statistics (`models.detection.statistics`) have tail probabilities by the fitted tails
(`models.detection.tails`), which are combined into one. It is comparable between streams: of a
thousand usual events, one has a probability below 0.001. Alarms open below a threshold of it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import AlarmState, follow_alarm
from models.detection.statistics import Channels, Deviations
from models.detection.tails import Tails, combine
from models.errors import SpecError
from models.spec.layout import anomaly_size, detection_of, detection_state, network_outputs
from models.spec.model import ModelSpec

Floats = NDArray[np.float64]
FloatRows = NDArray[np.float32]


class Detector:
    """Detection of one model.

    Args:
        spec: a model with a fitted `detection`.

    Raises:
        SpecError: it has none.
    """

    def __init__(self, spec: ModelSpec):
        detection, head, _ = detection_of(spec)
        fit = detection.fit
        if fit is None:
            raise SpecError(f"model {spec.name!r}: expected a fitted `detection`")
        self._channels = Channels(spec, np.array(fit.spreads))
        self._alarm, self._threshold = detection.alarm, fit.threshold
        self._tails, self._combined = Tails(fit.tails), Tails([fit.combined])
        self._alarm_at = detection_state(spec).slices[f"{head.name}.alarm"]
        outputs = network_outputs(spec)
        first = outputs.slices[head.name].start
        self._parameters = slice(first + 1, first + 1 + anomaly_size(spec, head))
        self._public = np.delete(np.arange(outputs.size), self._parameters)

    def step(
        self, rows: FloatRows, lengths: NDArray[Any], outputs: FloatRows, state: FloatRows
    ) -> tuple[FloatRows, FloatRows]:
        """Score the events of a batch.

        Args:
            rows: [B, T, F], encoded.
            lengths: int [B], 1..T.
            outputs: [B, T, O'], the network's, as `models.spec.layout.network_outputs` says.
            state: [B, S], as `models.spec.layout.detection_state` says.

        Returns:
            Outputs [B, T, O], as `models.spec.layout.output_spec` says, and the state after each
            row's last event.
        """
        deviations = self._channels.follow(rows, lengths, outputs[..., self._parameters], state)
        scored = self._score(deviations)
        after = deviations.state
        alarms = np.zeros((*scored.probability.shape, 1))
        active = state[:, self._alarm_at].any(axis=1)
        active |= (scored.probability <= self._threshold).any(axis=1)
        for index in np.flatnonzero(active):
            length, own = lengths[index], AlarmState(state[index, self._alarm_at])
            probability = scored.probability[index, :length]
            alarms[index, :length, 0] = follow_alarm(self._alarm, probability, self._threshold, own)
            after[index, self._alarm_at] = own.values()
        columns = (scored.probability[..., np.newaxis], alarms, deviations.z, scored.shares)
        added = np.concatenate(columns, axis=-1).astype(np.float32)
        return np.concatenate([outputs[..., self._public], added], axis=-1), after

    def _score(self, deviations: Deviations) -> EventScores:
        inverse = np.exp(self._tails.nats(deviations.statistics))
        combined = combine(inverse)
        probability = np.exp(-self._combined.nats(combined[..., np.newaxis])[..., 0])
        count = deviations.z.shape[-1]
        parts = np.split(inverse, inverse.shape[-1] // count, axis=-1)
        weights = functools.reduce(np.add, parts)
        return EventScores(probability, weights / weights.sum(axis=-1, keepdims=True))


class EventScores(NamedTuple):
    """Tail probabilities [B, T], and the share [B, T, C] that each channel has in them."""

    probability: Floats
    shares: Floats
