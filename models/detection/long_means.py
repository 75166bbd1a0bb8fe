"""Levels and changes of values as they come, in units of the stream's own past.

An anomaly that lasts changes a short mean and spread, and so becomes usual while it lasts; and an
encoded value is limited, and follows what lasts. Here a value v has the unit of its stream and the
memory `tail_memory_events`. Equations, for one numeric target, with r = exp(-1 /
tail_memory_events); "before" means from the events before this one only:

    mean      m_t = sum_t / W_t,   sum_t = r sum_(t-1) + v_t,   W_t = r W_(t-1) + 1
    errors    e = v - m_before of the level, v - v_(the event before) of the change
    distance  d = the mean of |e|, with this event
    peak      p = the fourth root of the mean of e^4
    spread    s = the square root of the mean of min(|e|, LIMIT d)^2
    trust     a = W_before / (W_before + prior_events)

all with the weights of the mean. Where the stream is often far from its mean, the peak is large; so
a |e| / p_before has a light tail, which separates events beyond all of the past from others. One
outlier makes the peak large for several times the memory, but not the spread, so that a |e| /
s_before orders what follows it. Both are at most `Z_LIMIT`. The statistics, of levels and of
changes, over all numeric targets together so that they are not diluted by many, are

    single    the root of the mean over the targets of (a e / p_before)^2
    averages  for each of `LONG_SCALES`, g = exp(-1 / scale), the root of
              E_t = g E_(t-1) + (1 - g) mean over the targets of (a e / s_before)^2

A target that an event does not have counts as 0, and an event without any has no statistics. The
mean is stored as two float32, and followed relative to that before the chunk, so that a large
offset of a stream costs no digits.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.detection.statistics import (
    MAX_STEPS,
    SMALLEST,
    Z_LIMIT,
    Bools,
    Events,
    FloatRows,
    Floats,
    StateParts,
    averages,
    columns_of,
    decay_matrix,
    latest_values,
    sums,
)
from models.events.schema import NumericField
from models.spec.detection import LONG_SCALES
from models.spec.heads import DEVIATION_LIMIT
from models.spec.layout import detection_columns, detection_of
from models.spec.model import ModelSpec

LIMIT: Final = 5.0
LARGEST_SQUARE: Final = Z_LIMIT**2
RESOLVED: Final = 1e-7
"""Smallest peak and spread, as a share of the value: float32 resolves no less."""
LEAST_SPREAD: Final = 1e-12


class LongStatistics(NamedTuple):
    """Statistics of levels and changes of T events of B streams, with N numeric targets.

    Attributes:
        statistics: [2 (1 + scales), B, T], single and averages, of levels, then of changes.
        squares: [2 N, B, T], (a e / p_before)^2 of the level of each target, then of the changes.
        levels: [N, B, T], how far each value is from its mean, encoded, or in peaks where values as
            they come differ from encoded ones.
        state: float32 [B, S], after each stream's last event.
    """

    statistics: Floats
    squares: Floats
    levels: Floats
    state: FloatRows


class LongMeans:
    """Follows the long means of one model; see the module for the equations.

    Args:
        spec: a model whose `detection` has `tail_memory_events`.
        memory_events: these.
    """

    def __init__(self, spec: ModelSpec, memory_events: int):
        detection, head, events = detection_of(spec)
        self._memory_events, self._prior = memory_events, detection.prior_events
        fields = [events.field(name) for name in head.targets]
        numeric = [d for d, field in enumerate(fields) if isinstance(field, NumericField)]
        self._numeric = columns_of(numeric)
        self._is_in_peaks = np.array(
            [f.normalisation is not None for f in fields if isinstance(f, NumericField)], np.bool_
        )
        self._parts = detection_columns(spec)

    def follow(self, events: Events, lengths: NDArray[Any], state: FloatRows) -> LongStatistics:
        """Compute the statistics of the next events of each stream.

        Args:
            lengths: int [B], 1..T.
            state: [B, S].
        """
        values = np.clip(events.raw, -DEVIATION_LIMIT, DEVIATION_LIMIT)
        present = None if events.is_complete else events.present[self._numeric]
        if values.shape[-1] <= MAX_STEPS:
            return self._follow(values, present, lengths, state)
        computed: list[tuple[Floats, ...]] = []
        for at in range(0, values.shape[-1], MAX_STEPS):
            part = slice(at, at + MAX_STEPS)
            kept = np.clip(lengths - at, 0, values[..., part].shape[-1])
            own = None if present is None else present[..., part]
            *parts, state = self._follow(values[..., part], own, kept, state)
            computed.append(tuple(parts))
        whole = (np.concatenate(each, axis=-1) for each in zip(*computed, strict=True))
        statistics, squares, levels = whole
        return LongStatistics(statistics, squares, levels, state)

    def _follow(
        self, values: Floats, present: Bools | None, lengths: NDArray[Any], state: FloatRows
    ) -> LongStatistics:
        """The same of at most `MAX_STEPS` events. Without `present` all have all values."""
        count, batch, steps = values.shape
        parts = StateParts(state, lengths, steps, self._parts)
        decay = decay_matrix(self._memory_events, steps)
        latest = latest_values(values, present, parts.before("long_last"))
        parts.store("long_last", latest)
        start = (parts.before("long_mean") + parts.before("long_rest"))[..., np.newaxis]
        counted = np.empty((2, *values.shape))
        counted[0] = 1.0 if present is None else present
        np.multiply(values - start, counted[0], out=counted[1])
        before = np.zeros((2 * count, batch))
        before[:count] = parts.before("long_weight")
        weights, means = np.split(sums(decay, before, counted.reshape(-1, batch, steps)), 2)
        parts.store("long_weight", weights)
        means /= np.maximum(weights, SMALLEST)
        means += start
        mean = parts.last(means)
        parts.replace("long_mean", mean)
        parts.replace("long_rest", mean - mean.astype(np.float32))

        own = np.maximum(weights[..., :-1], SMALLEST)
        errors = np.empty((2, *values.shape))
        np.subtract(values, means[..., :-1], out=errors[0])
        np.subtract(values, latest[..., :-1], out=errors[1])
        has = weights[..., :-1] > SMALLEST
        if present is not None or not has.all():
            errors *= has * counted[0]
        distance = np.abs(errors).reshape(-1, batch, steps)
        distances = sums(decay, parts.before("long_distance"), distance)
        parts.store("long_distance", distances)
        limit = distances[..., 1:].reshape(errors.shape) * (
            LIMIT / np.maximum(weights[..., 1:], SMALLEST)
        )
        added = np.empty((4 * count, batch, steps))
        squared, limited = np.square(distance), added[2 * count :]
        np.square(squared, out=added[: 2 * count])
        np.minimum(distance, limit.reshape(distance.shape), out=limited)
        np.square(limited, out=limited)
        # stored as roots, since float32 has no fourth power of small values
        before = np.square(np.concatenate([parts.before("long_peak"), parts.before("long_spread")]))
        np.square(before[: 2 * count], out=before[: 2 * count])
        fourths, seconds = np.split(sums(decay, before, added), 2)
        parts.replace("long_peak", np.sqrt(np.sqrt(parts.last(fourths))))
        parts.replace("long_spread", np.sqrt(parts.last(seconds)))
        trust = own / (own + self._prior)
        squared = squared.reshape(errors.shape) * np.square(trust)
        least = np.square(RESOLVED * np.abs(values) + LEAST_SPREAD)
        peaks = np.sqrt(fourths[..., :-1].reshape(errors.shape) / own)
        single = np.minimum(squared / np.maximum(peaks, least), LARGEST_SQUARE)
        spreads = seconds[..., :-1].reshape(errors.shape) / own
        squares = np.minimum(squared / np.maximum(spreads, least), LARGEST_SQUARE)
        energy = sums(
            averages(LONG_SCALES, steps), parts.before("long_energy"), squares.mean(axis=1)
        )
        parts.store("long_energy", energy)
        statistics = np.empty((2, 1 + len(LONG_SCALES), batch, steps))
        statistics[:, 0] = single.mean(axis=1)
        statistics[:, 1:] = energy[..., 1:].reshape(-1, 2, batch, steps).swapaxes(0, 1)
        np.sqrt(np.maximum(statistics, 0.0, out=statistics), out=statistics)
        if present is not None:
            statistics *= present.any(axis=0)
        levels = errors[0]
        levels[self._is_in_peaks] = (np.sqrt(single[0]) * np.sign(levels))[self._is_in_peaks]
        return LongStatistics(
            statistics.reshape(-1, batch, steps),
            single.reshape(-1, batch, steps),
            levels,
            parts.after,
        )
