"""Detection on the outputs of a network with an anomaly head: tail probabilities and alarms.

Each event's deviations (`models.detection.deviations`) have a tail probability
(`models.detection.probability`), which is comparable between streams: of a thousand usual events,
one has a probability below 0.001. Alarms (`models.detection.alarms`) open below a threshold of it,
which each chunk may choose: as a rate of false alarms in its state, which the pipeline writes
there. The state also has a record of the latest alarm, for which `models.detection.causes` has
words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import AlarmRecord, AlarmState, follow_alarm, record_alarm
from models.detection.causes import SMALL_Z
from models.detection.deviations import Channels, Deviations
from models.detection.forecasts import DESCRIBED, LARGEST_OUTPUT
from models.detection.probability import Scorer, Scores
from models.detection.recurrences import Bools, FloatRows, Floats, StateParts
from models.errors import SpecError
from models.events.schema import NumericField
from models.events.values import unstandardise
from models.spec.detection import ALARM_RATE, OF_THE_ALARM
from models.spec.layout import (
    anomaly_size,
    detection_columns,
    detection_of,
    network_outputs,
    network_state,
    output_spec,
)
from models.spec.model import ModelSpec

BACKOFF: Final = ("alarm_since", "alarm_excess")
"""Parts of the state of `AlarmSpec.backoff_nats`."""
MANY_EVENTS: Final = 1 << 20
"""`alarm_since` counts up to this number of events, far below those that float32 counts."""
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
        self._channels = Channels(spec)
        self._scorer = Scorer(spec, fit.tails, fit.combined)
        self._alarm, self._fit = detection.alarm, fit
        self._threshold = fit.threshold(detection.alarm.false_alarms_per_day)
        self._parts = detection_columns(spec)
        self._alarm_at, self._rate_at = self._parts["alarm"], self._parts[ALARM_RATE].start
        backoff = [self._parts[name].start for name in BACKOFF if name in self._parts]
        self._backoff, self._events_per_day = backoff, fit.events_per_day
        self._fields = [events.field(name) for name in head.targets]
        self._numeric = [f.name for f in self._fields if isinstance(f, NumericField)]
        columns = events.column_index
        # of the stream's running mean and deviation, after each event
        self._normalised = {
            name: [columns[f"{name}.mean"], columns[f"{name}.std"]]
            for name in self._numeric
            if f"{name}.mean" in columns
        }
        self._of_channel = detection.channels_of(head.targets, events)
        self._targets = head.targets
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
        self._of_alarms = ("alarm", *(each for each in detection.outputs if each in OF_THE_ALARM))
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
        scored = np.empty((*outputs.shape[:2], self._size), np.float32)
        for source, place in self._copied:
            scored[..., place] = outputs[..., source]
        size, parameters = self._channels.max_steps, outputs[..., self._parameters]
        for at in range(0, rows.shape[1], size):
            part = slice(at, min(at + size, rows.shape[1]))
            kept = lengths
            if part.stop - at < rows.shape[1]:
                kept = np.minimum(np.maximum(lengths - at, 0), part.stop - at)
            parts = StateParts(state, kept, part.stop - at, self._parts)
            for name, values in self._scores(rows[:, part], parameters[:, part], parts).items():
                scored[:, part, self._places[name]] = values.transpose(1, 2, 0)
            state = parts.after
        return scored, state

    def _scores(
        self, rows: FloatRows, parameters: FloatRows, parts: StateParts
    ) -> dict[str, Floats]:
        """The outputs [size, B, T] of at most `Channels.max_steps` events; updates the states."""
        deviations = self._channels.follow(rows, parameters, parts)
        scores = self._scorer.score(deviations, parts)
        events, order = deviations.events, self._channels.order
        probability = np.exp(-scores.nats)
        outputs: dict[str, Floats] = {"probability": probability[np.newaxis]}
        if "deviation" in self._outputs:
            outputs["deviation"] = deviations.signed()[order]
        if "share" in self._outputs:
            weights = self._scorer.weights(deviations.squares, scores.cubes)[order]
            outputs["share"] = weights / weights.sum(axis=0)
        outputs |= self._follow_alarms(deviations, scores, probability, rows, parts)
        described = self._channels.forecasts.describe(
            self._described, events.values, events.present, events.parameters
        )
        outputs.update((name, values) for name, values in described.items())
        return outputs

    def _follow_alarms(
        self,
        deviations: Deviations,
        scores: Scores,
        probability: Floats,
        rows: FloatRows,
        parts: StateParts,
    ) -> dict[str, Floats]:
        """The outputs [1, B, T] of alarms, which are updated in the state after the events."""
        after, lengths = parts.after, parts.lengths
        thresholds, rates = np.full(len(after), self._threshold), after[:, self._rate_at]
        for row in rates.nonzero()[0].tolist():
            thresholds[row] = self._fit.threshold(float(rates[row]))
        outputs = {name: np.zeros((1, *probability.shape)) for name in self._of_alarms}
        active = after[:, self._alarm_at.start] != 0
        active |= probability.min(axis=1) <= thresholds
        for row in active.nonzero()[0].tolist():
            own = AlarmState(after[row, self._alarm_at], *after[row, self._backoff].tolist())
            length, threshold = lengths[row], float(thresholds[row])
            per_event = self._alarms_per_event(float(rates[row]))
            codes = follow_alarm(self._alarm, probability[row, :length], threshold, own, per_event)
            outputs["alarm"][0, row, :length] = codes
            after[row, self._alarm_at] = own.values()
            if self._backoff:
                after[row, self._backoff] = own.since, own.excess
            if self._alarm.close_above is None or not codes.any():
                continue
            record = self._record(codes, scores.nats[row, :length], after[row])
            if record.opened_at is not None:
                cause = self._cause(rows, deviations, scores, row, record.opened_at)
                after[row, self._parts["alarm_cause"]] = cause
            by_threshold = record.peaks / -np.log(threshold)
            for name, values in (("severity", by_threshold), ("since", record.since)):
                if name in outputs:
                    outputs[name][0, row, record.events] = values
        if self._backoff:
            self._count_events(after, lengths, ~active)
        return outputs

    def _alarms_per_event(self, rate: float) -> float:
        """The specified alarms per event of a stream, given the rate in its state."""
        return max(rate or self._alarm.false_alarms_per_day, 0.0) / self._events_per_day

    def _count_events(self, after: FloatRows, lengths: NDArray[Any], is_counted: Bools) -> None:
        """Count events since the latest alarm. At `MANY_EVENTS` the excess alarms are lowered by as
        many, and the count restarts, so that it stays exact in float32."""
        since, excess = self._backoff
        counts = after[:, since]
        np.add(counts, lengths, out=counts, where=is_counted)
        for row in (counts >= MANY_EVENTS).nonzero()[0].tolist():
            counts[row] -= MANY_EVENTS
            per_event = self._alarms_per_event(float(after[row, self._rate_at]))
            lowered = after[row, excess] - per_event * MANY_EVENTS
            after[row, excess] = max(lowered, 0.0)

    def _record(
        self, codes: NDArray[np.int64], nats: Floats, after: NDArray[np.float32]
    ) -> AlarmRecord:
        """Update the record of the latest alarm in the state of one stream."""
        since, peaks = self._parts["alarm_events"], self._parts["alarm_nats"]
        record = record_alarm(codes, nats, float(after[since][0]), float(after[peaks][0]))
        after[since] = record.since[-1]
        after[peaks] = record.peaks[-1], nats[record.events[-1]]
        return record

    def _cause(
        self, rows: FloatRows, deviations: Deviations, scores: Scores, row: int, at: int
    ) -> tuple[int, float]:
        """The channel that counts most at an event, and how far its value was off, in the field's
        unit, or for how many events it has been the same; 0 if it has no order, or if it is no
        level and was unusual over the last events rather than at this one."""
        event = slice(None), row, at
        weights = self._scorer.weights(deviations.squares[event], scores.cubes[event])
        channel = int(np.argmax(weights[self._channels.order]))
        own, place = self._of_channel[channel], int(self._channels.order[channel])
        field = self._fields[self._targets.index(own.target)]
        is_small = deviations.squares[place, row, at] < SMALL_Z**2 and own.kind != "level"
        if own.kind == "run":
            return channel, float(deviations.errors[place, row, at])
        if not isinstance(field, NumericField) or is_small:
            return channel, 0.0
        events = deviations.events
        value = events.raw[self._numeric.index(own.target), row, at]
        usual = value - deviations.errors[place, row, at]
        if own.kind == "forecast":
            target = self._targets.index(own.target)
            usual = self._channels.forecasts.mean(target, events.parameters)[row, at]
            if field.normalisation is not None:
                mean, std = rows[row, at, self._normalised[own.target]].astype(np.float64)
                usual = (usual * std + mean - (field.mean or 0.0)) / (field.std or 1.0)
        excess = unstandardise(field, value) - unstandardise(field, usual)
        return channel, float(np.clip(excess, -LARGEST_OUTPUT, LARGEST_OUTPUT))


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
        own, detection = states[:, : self._size], states[:, self._size :]
        outputs, stepped = self._network(rows, lengths, np.ascontiguousarray(own))
        detected, after = self._detector.step(rows, lengths, outputs, detection)
        return detected, np.concatenate([stepped, after], axis=1)
