"""Detection on the outputs of a network with an anomaly head: tail probabilities and alarms.

Each event's statistics (`models.detection.statistics`) have tail probabilities by the fitted tails
(`models.detection.alarms`), which are combined into one (`models.detection.probability`). It is
comparable between streams: of a thousand usual events, one has a probability below 0.001. Alarms
open below a threshold of it, which each chunk may choose: as a rate of false alarms in its state,
which the pipeline writes there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import AlarmState, follow_alarm
from models.detection.forecasts import DESCRIBED
from models.detection.probability import PooledScorer, StreamScorer
from models.detection.statistics import Channels, Deviations
from models.errors import SpecError
from models.spec.detection import ALARM_RATE
from models.spec.layout import (
    anomaly_size,
    detection_of,
    detection_state,
    network_outputs,
    network_state,
    output_spec,
)
from models.spec.model import ModelSpec

Floats = NDArray[np.float64]
FloatRows = NDArray[np.float32]
NetworkStep = Callable[[FloatRows, NDArray[np.int32], FloatRows], tuple[FloatRows, FloatRows]]


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
        self._channels = Channels(spec, np.array(fit.spreads), np.array(fit.squares))
        memory = detection.tail_memory_events
        self._scorer: PooledScorer | StreamScorer
        if memory is not None and fit.streams is not None:
            self._scorer = StreamScorer(spec, memory, self._channels, fit.tails, fit.streams)
        elif fit.combined is not None:
            self._scorer = PooledScorer(self._channels, fit.tails, fit.combined)
        self._alarm, self._fit = detection.alarm, fit
        self._threshold = fit.threshold(detection.alarm.false_alarms_per_day)
        parts = detection_state(spec).slices
        self._alarm_at = parts[f"{head.name}.alarm"]
        self._rate_at = parts[f"{head.name}.{ALARM_RATE}"].start
        network, public = network_outputs(spec), output_spec(spec)
        start, size = network.slices[head.name].stop, anomaly_size(spec, head)
        attention = len(network.attention)
        self._parameters = slice(start, start + size)
        self._size = public.size
        # what stays the same: before the forecast, behind it, and the weights of attention
        copied = (
            (slice(0, start), 0),
            (slice(start + size, network.size - attention), start),
            (slice(network.size - attention, network.size), public.size - attention),
        )
        self._copied = [
            (source, slice(at, at + source.stop - source.start))
            for source, at in copied
            if source.stop > source.start
        ]
        self._outputs = detection.outputs
        self._places = {
            name: public.slices[f"{head.name}.{name}"]
            for name in ("probability", "alarm", *detection.outputs)
        }
        self._described = frozenset(detection.outputs) & DESCRIBED

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
        parameters = outputs[..., self._parameters]
        deviations = self._channels.follow(rows, lengths, parameters, state)
        scored = np.empty((*outputs.shape[:2], self._size), np.float32)
        for source, place in self._copied:
            scored[..., place] = outputs[..., source]
        described, after = self._scores(deviations, lengths, state)
        for name, values in described.items():
            scored[..., self._places[name]] = values.transpose(1, 2, 0)
        return scored, after

    def _scores(
        self, deviations: Deviations, lengths: NDArray[Any], state: FloatRows
    ) -> tuple[dict[str, Floats], FloatRows]:
        """The outputs [size, B, T], and the state after them."""
        z, _, _, events = deviations
        nats, weights, after = self._scorer.score(deviations, lengths)
        probability = np.exp(-nats)
        outputs: dict[str, Floats] = {
            "probability": probability[np.newaxis],
            "alarm": self._follow_alarms(probability, lengths, state, after),
        }
        if "deviation" in self._outputs:
            outputs["deviation"] = z
        if "share" in self._outputs:
            by_channel = weights()
            outputs["share"] = by_channel / by_channel.sum(axis=0)
        described = self._channels.forecasts.describe(
            self._described, events.values, events.present, events.parameters
        )
        outputs.update((name, values) for name, values in described.items())
        return outputs, after

    def _follow_alarms(
        self, probability: Floats, lengths: NDArray[Any], state: FloatRows, after: FloatRows
    ) -> Floats:
        """The alarms [1, B, T], which are updated in the state after the events."""
        thresholds = np.full(len(state), self._threshold)
        for index in np.flatnonzero(state[:, self._rate_at]):
            thresholds[index] = self._fit.threshold(float(state[index, self._rate_at]))
        alarms = np.zeros((1, *probability.shape))
        active = state[:, self._alarm_at.start] != 0
        active |= (probability <= thresholds[:, np.newaxis]).any(axis=1)
        for index in np.flatnonzero(active):
            length, own = lengths[index], AlarmState(state[index, self._alarm_at])
            codes = follow_alarm(self._alarm, probability[index, :length], thresholds[index], own)
            alarms[0, index, :length] = codes
            after[index, self._alarm_at] = own.values()
        return alarms


class DetectingStep:
    """The step of a network with detection behind it.

    Args:
        spec: a model with a fitted `detection`.
        network: rows [B, T, F], lengths [B] of 1..T, states [B, N] -> outputs [B, T, O'], states.
    """

    def __init__(self, spec: ModelSpec, network: NetworkStep):
        self._network, self._detector = network, Detector(spec)
        self._size = network_state(spec).float_size

    def __call__(
        self, rows: FloatRows, lengths: NDArray[np.int32], states: FloatRows
    ) -> tuple[FloatRows, FloatRows]:
        """Run the network and score its events.

        Args:
            states: float32 [B, W], as `models.spec.layout.runtime_state` says.

        Returns:
            Outputs [B, T, O], as `models.spec.layout.output_spec` says, and the states after them.
        """
        own, detection = np.split(states, [self._size], axis=1)
        outputs, stepped = self._network(rows, lengths, np.ascontiguousarray(own))
        detected, after = self._detector.step(rows, lengths, outputs, detection)
        return detected, np.concatenate([stepped, after], axis=1)
