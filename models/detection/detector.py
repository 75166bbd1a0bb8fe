"""Detection on the outputs of a network with an anomaly head: tail probabilities and alarms.

Each event has a tail probability (`models.detection.kernel`), which is comparable between streams:
of a thousand usual events, one has a probability below 0.001. Alarms (`models.detection.alarms`)
open below a threshold of it, which each chunk may choose: as a rate of false alarms in its state,
which the pipeline writes there. The state also has a record of the latest alarm, for which
`models.detection.causes` has words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import OPENED, Columns
from models.detection.causes import SMALL_Z
from models.detection.forecasts import DESCRIBED, LARGEST_OUTPUT, Forecasts
from models.detection.kernel import FloatRows, Floats, Kernel, KernelOutputs
from models.detection.library import address_of
from models.detection.targets import targets_of
from models.errors import SpecError
from models.events.schema import NumericField
from models.events.values import unstandardise
from models.spec.detection import ALARM_RATE
from models.spec.heads import DEVIATION_LIMIT
from models.spec.layout import (
    anomaly_size,
    detection_columns,
    detection_of,
    network_outputs,
    network_state,
    output_spec,
)
from models.spec.model import ModelSpec

NetworkStep = Callable[[FloatRows, NDArray[np.int32], FloatRows], tuple[FloatRows, FloatRows]]


class Detector:
    """Detection of one model.

    Args:
        spec: a model with a fitted `detection`.

    Raises:
        SpecError: it has none.
    """

    def __init__(self, spec: ModelSpec):
        detection, head, events = detection_of(spec)
        fit = detection.fit
        if fit is None:
            raise SpecError(f"model {spec.name!r}: expected a fitted `detection`")
        rate, columns = detection.alarm.false_alarms_per_day, detection_columns(spec)
        self._fit = fit
        self._own_threshold = -math.log(fit.threshold(rate)), rate / fit.events_per_day
        self._rate_at, self._cause_at = columns[ALARM_RATE].start, columns.get("alarm_cause")
        self._channels = detection.channels_of(head.targets, events)
        self._targets = {each.field.name: each for each in targets_of(spec)}
        network, public = network_outputs(spec), output_spec(spec)
        start, size = network.slices[head.name].stop, anomaly_size(spec, head)
        self._parameters = slice(start, start + size)
        self._places = {
            name: public.slices[f"{head.name}.{name}"]
            for name in ("probability", "alarm", *detection.outputs)
        }
        # the network's outputs but the forecast; detection's come before the weights of attention
        source = np.delete(np.arange(network.size, dtype=np.int32), self._parameters)
        at, new = len(source) - len(network.attention), np.full(public.size - len(source), -1)
        self._source, self._size = np.insert(source, at, new), public.size
        names = "probability", "alarm", "severity", "since"
        own = [self._places[name].start if name in self._places else -1 for name in names]
        written = Columns(public.size, *own, address_of(self._source), self._own_threshold)
        self._kernel = Kernel(spec, fit.tails, fit.combined, written)
        self._forecasts = Forecasts(spec)
        self._is_kept = not {"deviation", "share"}.isdisjoint(detection.outputs)
        self._described = frozenset(detection.outputs) & DESCRIBED

    def step(
        self,
        rows: FloatRows,
        lengths: NDArray[Any],
        outputs: FloatRows,
        states: FloatRows,
        after: FloatRows | None = None,
        part: int = 0,
    ) -> tuple[FloatRows, FloatRows]:
        """Score the events of a batch.

        Args:
            rows: [B, T, F], encoded.
            lengths: int [B], 1..T.
            outputs: [B, T, O'], the network's, as `models.spec.layout.network_outputs` says.
            states: [B, W], from the column `part` on as `models.spec.layout.detection_state` says.
            after: float32 [B, W], contiguous, with these columns of `states`, which are updated;
                None: a copy of `states`.

        Returns:
            Outputs [B, T, O], as `models.spec.layout.output_spec` says, 0 of events beyond a
            length, and `after`.
        """
        if after is None:
            after = np.array(states, np.float32, order="C")
        batch, steps = rows.shape[:2]
        scored = np.zeros((batch, steps, self._size), np.float32)
        kept = self._kernel.zeros(batch, steps) if self._is_kept else None
        first, rates = self._parameters.start, after[:, part + self._rate_at]
        thresholds = self._thresholds(rates) if np.count_nonzero(rates) else None
        given = rows, lengths, outputs, first, after, part, scored, thresholds, kept
        opened, parameters = self._kernel.follow(*given), outputs[..., self._parameters]
        if opened and self._cause_at is not None:
            found = (scored[..., self._places["alarm"].start] == OPENED).nonzero()
            # of each row the last event that opened an alarm
            for row, at in dict(zip(*(each.tolist() for each in found), strict=True)).items():
                # follow the stream again for the details of this event
                one, own = slice(row, row + 1), self._kernel.zeros(1, steps)
                of_one = rows[one], lengths[one], outputs[one], first
                before = np.array(states[one], np.float32, order="C")
                self._kernel.follow(*of_one, before, part, kept=own)
                event = KernelOutputs(*(each[0, at] for each in own))
                cause = self._cause(rows[row, at], parameters[row, at], event)
                after[row, part:][self._cause_at] = cause
        if kept is not None and "deviation" in self._places:
            scored[..., self._places["deviation"]] = kept.deviations[..., self._kernel.order]
        if kept is not None and "share" in self._places:
            scored[..., self._places["share"]] = self._kernel.shares(kept.squares, kept.cubes)
        described = self._forecasts.describe(self._described, rows, lengths, parameters)
        for name, values in described.items():
            scored[..., self._places[name]] = values
        return scored, after

    def _thresholds(self, rates: NDArray[np.float32]) -> Floats:
        """For `Kernel.follow`, of alarms at the rates [B] in states, where 0 is the model's."""
        found = np.tile(self._own_threshold, (len(rates), 1))
        for row in (rates > 0).nonzero()[0].tolist():
            rate = float(rates[row])
            found[row] = -math.log(self._fit.threshold(rate)), rate / self._fit.events_per_day
        return found

    def _cause(
        self, row: FloatRows, parameters: FloatRows, event: KernelOutputs
    ) -> tuple[int, float]:
        """The channel that counts most at an event, and how far its value was off, in the field's
        unit, or for how many events it has been the same; 0 if it has no order, or if it is no
        level and was unusual over the last events rather than at this one."""
        channel = int(np.argmax(self._kernel.shares(event.squares, event.cubes)))
        own, place = self._channels[channel], int(self._kernel.order[channel])
        error = float(event.errors[place])
        if own.kind == "run":
            return channel, error
        target = self._targets[own.target]
        is_small = event.squares[place] < SMALL_Z**2 and own.kind != "level"
        if not isinstance(target.field, NumericField) or is_small:
            return channel, 0.0
        value = np.clip(np.float64(row[target.raw]), -DEVIATION_LIMIT, DEVIATION_LIMIT)
        usual = value - error
        if own.kind == "forecast":
            usual = np.float64(parameters[target.parameters.start])
            if (field := target.field).normalisation is not None:
                mean, std = row[target.normalised].astype(np.float64)
                usual = (usual * std + mean - (field.mean or 0.0)) / (field.std or 1.0)
        values = unstandardise(target.field, np.array([value, usual]))
        excess = float(values[0] - values[1])
        return channel, min(max(excess, -LARGEST_OUTPUT), LARGEST_OUTPUT)


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
        after, network = np.array(states, np.float32, order="C"), np.s_[:, : self._size]
        own = np.ascontiguousarray(after[network])
        outputs, after[network] = self._network(rows, lengths, own)
        return self._detector.step(rows, lengths, outputs, states, after, self._size)
