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
from models.detection.kernel import FloatRows, Floats, Kernel
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
        self._fit, self._own = fit, (-math.log(fit.threshold(rate)), rate / fit.events_per_day)
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
        # the network's outputs but the forecast; the weights of attention are the last ones
        attention, kept = len(network.attention), network.size - size
        source = np.full(public.size, -1, np.int32)
        own = np.delete(np.arange(network.size), self._parameters)
        source[: kept - attention] = own[: kept - attention]
        source[public.size - attention :] = own[kept - attention :]
        names = "probability", "alarm", "severity", "since"
        at = [self._places[name].start if name in self._places else -1 for name in names]
        # the columns point to it
        self._source, self._size = source, public.size
        columns_of_outputs = Columns(public.size, *at, address_of(source), self._own)
        self._kernel = Kernel(spec, fit.tails, fit.combined, columns_of_outputs)
        self._forecasts = Forecasts(spec)
        self._is_kept = not {"deviation", "share"}.isdisjoint(detection.outputs)
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
        after = np.array(state, np.float32, order="C")
        return self.score(rows, lengths, outputs, state, after, 0), after

    def score(
        self,
        rows: FloatRows,
        lengths: NDArray[Any],
        outputs: FloatRows,
        states: FloatRows,
        after: FloatRows,
        part: int,
    ) -> FloatRows:
        """As `step`, of states [B, W] of which detection has the columns from `part` on; returns
        the outputs, 0 of events beyond a length.

        Args:
            after: float32, contiguous; `states` from `part` on, and updated there.
        """
        batch, steps = rows.shape[:2]
        scored = np.zeros((batch, steps, self._size), np.float32)
        given = rows, lengths, outputs, self._parameters.start, after, part, scored
        kept = self._kernel.zeros(batch, steps) if self._is_kept else None
        opened, thresholds = self._kernel.follow(*given, kept=kept), None
        if opened < 0:
            thresholds = self._thresholds(after[:, part + self._rate_at])
            opened = self._kernel.follow(*given, thresholds, kept)
        parameters = outputs[..., self._parameters]
        if opened and self._cause_at is not None:
            columns = slice(part + self._cause_at.start, part + self._cause_at.stop)
            is_open = scored[..., self._places["alarm"].start] == OPENED
            for row in is_open.any(axis=1).nonzero()[0].tolist():
                # again, for the details of the last event that opened an alarm
                one, own = slice(row, row + 1), self._kernel.zeros(1, steps)
                before = np.array(states[one], np.float32, order="C")
                of_one = rows[one], lengths[one], outputs[one], self._parameters.start, before, part
                limits = None if thresholds is None else thresholds[one]
                self._kernel.follow(*of_one, scored[one], limits, own)
                at = int(is_open[row].nonzero()[0][-1])
                details = own.errors[0, at], own.squares[0, at], own.cubes[0, at]
                cause = self._cause(rows[row, at], parameters[row, at], *details)
                after[row, columns] = cause
        if kept is not None and "deviation" in self._places:
            scored[..., self._places["deviation"]] = kept.deviations[..., self._kernel.order]
        if kept is not None and "share" in self._places:
            shares = self._kernel.shares(kept.squares, kept.cubes)
            scored[..., self._places["share"]] = shares
        described = self._forecasts.describe(self._described, rows, lengths, parameters)
        for name, values in described.items():
            scored[..., self._places[name]] = values
        return scored

    def _thresholds(self, rates: NDArray[np.float32]) -> Floats:
        """For `Kernel.follow`, of alarms at the rates [B] in states, where 0 is the model's."""
        found = np.tile(self._own, (len(rates), 1))
        for row in (rates > 0).nonzero()[0].tolist():
            rate = float(rates[row])
            found[row] = -math.log(self._fit.threshold(rate)), rate / self._fit.events_per_day
        return found

    def _cause(
        self,
        row: FloatRows,
        parameters: FloatRows,
        errors: Floats,
        squares: Floats,
        cubes: Floats,
    ) -> tuple[int, float]:
        """The channel that counts most at an event, and how far its value was off, in the field's
        unit, or for how many events it has been the same; 0 if it has no order, or if it is no
        level and was unusual over the last events rather than at this one."""
        channel = int(np.argmax(self._kernel.shares(squares, cubes)))
        own, place = self._channels[channel], int(self._kernel.order[channel])
        error = float(errors[place])
        if own.kind == "run":
            return channel, error
        target = self._targets[own.target]
        is_small = squares[place] < SMALL_Z**2 and own.kind != "level"
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
        return self._detector.score(rows, lengths, outputs, states, after, self._size), after
