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

from typing import Final, NamedTuple

import numpy as np

from models.detection.statistics import (
    SMALLEST,
    Z_LIMIT,
    Events,
    Floats,
    StateParts,
    averages,
    columns_of,
    decay_matrix,
    latest_values,
    sums,
    sums_of,
)
from models.events.schema import NumericField
from models.spec.detection import LONG_SCALES
from models.spec.heads import DEVIATION_LIMIT
from models.spec.layout import detection_of
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
        squares: [2, N, B, T], (a e / p_before)^2 of the level of each target, then of the changes.
        errors: [N, B, T], e of the levels.
    """

    statistics: Floats
    squares: Floats
    errors: Floats


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

    def follow(self, events: Events, parts: StateParts) -> LongStatistics:
        """Compute the statistics of the next events of each stream, at most `MAX_STEPS`.

        Args:
            parts: the states, of `models.spec.layout.detection_columns`; updated.
        """
        values = np.maximum(np.minimum(events.raw, DEVIATION_LIMIT), -DEVIATION_LIMIT)
        present = None if events.is_complete else events.present[self._numeric]
        count, batch, steps = values.shape
        if not count:
            return LongStatistics(values, values, values)
        decay = decay_matrix(self._memory_events, steps)
        latest = latest_values(values, present, parts.before("long_last"))
        parts.store("long_last", latest)
        start = (parts.before("long_mean") + parts.before("long_rest"))[..., np.newaxis]
        counted = np.empty((2, *latest.shape))
        counted[0, ..., 0], counted[1, ..., 0] = parts.before("long_weight"), 0.0
        counted[0, ..., 1:] = 1.0 if present is None else present
        np.subtract(values, start, out=counted[1, ..., 1:])
        if present is not None:
            counted[1, ..., 1:] *= present
        weights, means = sums_of(decay, counted)
        parts.store("long_weight", weights)
        known = np.maximum(weights, SMALLEST)
        means /= known
        means += start
        mean = parts.last(means)
        parts.replace("long_mean", mean)
        parts.replace("long_rest", mean - mean.astype(np.float32))

        own = known[..., :-1]
        errors = np.empty((2, *values.shape))
        np.subtract(values, means[..., :-1], out=errors[0])
        np.subtract(values, latest[..., :-1], out=errors[1])
        if present is not None or own.min() <= SMALLEST:
            errors *= (own > SMALLEST) * counted[0, ..., 1:]
        distance = np.abs(errors)
        flat = distance.reshape(-1, batch, steps)
        distances = sums(decay, parts.before("long_distance"), flat)
        parts.store("long_distance", distances)
        limited = distances.reshape(2, *latest.shape)[..., 1:] * (LIMIT / known[..., 1:])
        np.minimum(limited, distance, out=limited)
        # stored as roots, since float32 has no fourth power of small values
        powers = np.empty((2, 2 * count, batch, steps + 1))
        powers[0, ..., 0] = np.square(np.square(parts.before("long_peak")))
        powers[1, ..., 0] = np.square(parts.before("long_spread"))
        squared = np.square(distance, out=distance)
        np.square(flat, out=powers[0, ..., 1:])
        np.square(limited.reshape(flat.shape), out=powers[1, ..., 1:])
        fourths, seconds = powers = sums_of(decay, powers)
        parts.replace("long_peak", np.sqrt(np.sqrt(parts.last(fourths))))
        parts.replace("long_spread", np.sqrt(parts.last(seconds)))
        # (a e)^2 by the squares of peaks, and of spreads
        squares = powers[..., :-1].reshape(2, *errors.shape) / own
        np.sqrt(squares[0], out=squares[0])
        least = np.abs(values)
        least *= RESOLVED
        least += LEAST_SPREAD
        np.maximum(squares, np.square(least, out=least), out=squares)
        squared *= np.square(own / (own + self._prior))
        np.minimum(np.divide(squared, squares, out=squares), LARGEST_SQUARE, out=squares)
        single, limited = squares.sum(axis=2) / count
        energy = sums(averages(LONG_SCALES, steps), parts.before("long_energy"), limited)
        parts.store("long_energy", energy)
        statistics = np.empty((2, 1 + len(LONG_SCALES), batch, steps))
        statistics[:, 0] = single
        statistics[:, 1:] = energy[..., 1:].reshape(-1, 2, batch, steps).swapaxes(0, 1)
        np.sqrt(np.maximum(statistics, 0.0, out=statistics), out=statistics)
        if present is not None:
            statistics *= present.any(axis=0)
        return LongStatistics(statistics.reshape(-1, batch, steps), squares[0], errors[0])
