"""Levels and joint nats of a stream, compared with their means over thousands of events.

An anomaly that lasts changes a short mean and spread, and so becomes usual while it lasts. These
have the memory `tail_memory_events`. For each numeric target and for the joint nats, the sum over
the targets of the nats of their forecasts, each at most `NATS_LIMIT`:

    mean     m_t = sum_t / W_t,     sum_t = r sum_(t-1) + v_t,   W_t = r W_(t-1) + 1
    spread   (q / c)^2,  c = E sqrt|N(0, 1)|,  where q is the mean of sqrt|v - m_before|, and of the
             usual spread with weight `prior_events`
    z        (v - m_before) / spread

as `models.detection.statistics` has them. A new stream's level is compared with no usual mean, and
its z is shrunk by W / (W + prior_events) instead; joint nats are comparable between streams, so
that their mean starts from the usual one, with weight `prior_events`.

Levels of values as they come (`raw_levels`) have the units of their streams, so that there is no
usual spread: the spread of each is the fourth root of the stream's mean (v - m_before)^4. It is
large where the stream is often far from its mean, and small where it never is, so that what is far
from there is beyond all of the past (its tail is light) rather than as unusual as in other streams.
Their mean is stored as two float32, and followed relative to that before the chunk, so that a large
offset of a stream costs no digits. One value that is far out of all others makes the spread large
for several times the memory.

The statistics are |z| of each level, and of the joint nats z and its means over `JOINT_SCALES`,
plus `SHIFT`, at least 0.
"""

from __future__ import annotations

from typing import Any, Final

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
    sums,
)
from models.events.schema import NumericField
from models.spec.detection import JOINT_SCALES, ROOT_OF_NORMAL
from models.spec.heads import DEVIATION_LIMIT
from models.spec.layout import detection_columns, detection_of
from models.spec.model import ModelSpec

NATS_LIMIT: Final = 50.0
LEAST_Z: Final = -10.0
SHIFT: Final = 3.0
RESOLVED: Final = 1e-7
"""Smallest spread of values as they come, as a share of their size: float32 resolves no less."""
LEAST_SPREAD: Final = 1e-12


class LongMeans:
    """Follows the long means of one model; see the module for the equations.

    Args:
        spec: a model whose `detection` has `tail_memory_events`.
        memory_events: these.
        spreads: usual ones, of the level of each numeric target, without `raw_levels`, and of the
            joint nats.
        joint_mean: the usual joint nats; None if it is not known.
    """

    def __init__(
        self, spec: ModelSpec, memory_events: int, spreads: Floats, joint_mean: float | None
    ):
        detection, head, events = detection_of(spec)
        self._memory_events = memory_events
        fields = [events.field(name) for name in head.targets]
        numeric = [d for d, field in enumerate(fields) if isinstance(field, NumericField)]
        self._numeric, self._levels = columns_of(numeric), len(numeric)
        self._prior, self._is_raw = detection.prior_events, detection.raw_levels
        # 0 for values as they come, of which no spread is usual
        spreads = np.concatenate([np.zeros(self._levels + 1 - len(spreads)), spreads])
        self._is_in_spreads = np.array(
            [
                detection.raw_levels and field.normalisation is not None
                for field in fields
                if isinstance(field, NumericField)
            ]
        )
        self._roots = (np.sqrt(spreads) * ROOT_OF_NORMAL)[:, np.newaxis, np.newaxis]
        self._minimum = (spreads * detection.minimum_spread)[:, np.newaxis, np.newaxis]
        self._known = np.zeros((len(spreads), 1, 1))
        self._known[-1] = 0.0 if joint_mean is None else self._prior
        self._joint_mean = joint_mean or 0.0
        self._parts = detection_columns(spec)

    def follow(
        self, events: Events, nats: Floats, lengths: NDArray[Any], state: FloatRows
    ) -> tuple[Floats, Floats, FloatRows]:
        """The statistics [levels + 1 + scales, B, T] of the next events of each stream, how far
        each level [levels, B, T] is from its mean, encoded, or in spreads where values as they come
        differ from encoded ones; both 0 where an event has none; and the state after them.

        Args:
            nats: [D, B, T], of each target, 0 where it is missing.
            lengths: int [B], 1..T.
            state: [B, S].
        """
        values = np.empty((self._levels + 1, *nats.shape[1:]))
        _limit(events.levels, -DEVIATION_LIMIT, DEVIATION_LIMIT, values[:-1])
        np.minimum(nats, NATS_LIMIT).sum(axis=0, out=values[-1])
        present = None if events.is_complete else self.present(events)
        if values.shape[-1] <= MAX_STEPS:
            return self._follow(values, present, lengths, state)
        statistics = np.empty((len(values) + len(JOINT_SCALES), *values.shape[1:]))
        errors = np.empty((self._levels, *values.shape[1:]))
        for at in range(0, values.shape[-1], MAX_STEPS):
            part = slice(at, at + MAX_STEPS)
            kept = np.clip(lengths - at, 0, values[..., part].shape[-1])
            own = None if present is None else present[..., part]
            statistics[..., part], errors[..., part], state = self._follow(
                values[..., part], own, kept, state
            )
        return statistics, errors, state

    def present(self, events: Events) -> Bools:
        """Whether [levels + 1, B, T] each event has the level of each numeric target, and any."""
        any_target = events.present.any(axis=0, keepdims=True)
        return np.concatenate([events.present[self._numeric], any_target])

    def _follow(
        self, values: Floats, present: Bools | None, lengths: NDArray[Any], state: FloatRows
    ) -> tuple[Floats, Floats, FloatRows]:
        """The same of at most `MAX_STEPS` events. Without `present` all have all values."""
        steps, rows = values.shape[-1], len(values)
        parts = StateParts(state, lengths, steps, self._parts)
        decay = decay_matrix(self._memory_events, steps)
        start = np.zeros((rows, values.shape[1], 1))
        if self._is_raw:
            start[:-1, :, 0] = parts.before("long_mean")[:-1] + parts.before("long_rest")
            resolved = RESOLVED * np.abs(values[:-1]) + LEAST_SPREAD
            values = values - start
        counted = np.empty((2 * rows, *values.shape[1:]))
        if present is None:
            counted[:rows], counted[rows:] = 1.0, values
        else:
            counted[:rows] = present
            np.multiply(values, present, out=counted[rows:])
        before = np.concatenate([parts.before("long_weight"), parts.before("long_mean")])
        if self._is_raw:
            before[rows:-1] = 0.0
        both = sums(decay, before, counted)
        parts.store("long_weight", both[:rows])
        stored = both[rows:]
        if self._is_raw:
            stored = stored.copy()
            stored[:-1] /= np.maximum(both[: rows - 1], SMALLEST)
            stored += start
            parts.store("long_rest", stored[:-1] - stored[:-1].astype(np.float32))
        parts.store("long_mean", stored)
        own, total = both[:rows, :, :-1], both[rows:, :, :-1]
        known = own + self._known
        errors = total + self._known * self._joint_mean
        errors /= np.maximum(known, SMALLEST)
        np.subtract(values, errors, out=errors)
        if present is None and bool((known > SMALLEST).all()):
            roots = np.sqrt(np.abs(errors))
        else:
            has = known > SMALLEST
            if present is not None:
                has &= present
            errors *= has
            roots = np.sqrt(np.abs(errors))
            roots += (~has if present is None else present ^ has) * self._roots
        before = parts.before("long_spread")
        if self._is_raw:
            roots[:-1] = errors[:-1] ** 4
            # stored as the fourth root, since float32 has no fourth power of small values
            before[:-1] **= 4
        roots = sums(decay, before, roots)
        trusted = own + self._prior
        spread = roots[..., :-1] + self._prior * self._roots
        spread /= trusted * ROOT_OF_NORMAL
        np.square(spread, out=spread)
        if self._is_raw:
            fourth = roots[:-1, :, :-1] / np.maximum(own[:-1], SMALLEST)
            spread[:-1] = np.maximum(np.sqrt(np.sqrt(fourth)), resolved)
            roots[:-1] = np.sqrt(np.sqrt(roots[:-1]))
        parts.store("long_spread", roots)
        z = errors / np.maximum(spread, self._minimum, out=spread)
        level, joint = z[:-1], z[-1:]
        errors = errors[:-1]
        if self._is_raw:
            errors[self._is_in_spreads] = level[self._is_in_spreads]
        level *= own[:-1] / trusted[:-1]
        statistics = np.empty((rows + len(JOINT_SCALES), *z.shape[1:]))
        np.minimum(np.abs(level), Z_LIMIT, out=statistics[: self._levels])
        _limit(joint, LEAST_Z, Z_LIMIT, joint)
        means = sums(averages(JOINT_SCALES, steps), parts.before("joint_mean"), joint)
        parts.store("joint_mean", means)
        raised = statistics[self._levels :]
        raised[:1], raised[1:] = joint, means[..., 1:]
        raised += SHIFT
        np.maximum(raised, 0.0, out=raised)
        if present is not None:
            raised *= present[-1:]
        return statistics, errors, parts.after


def _limit(values: Floats, least: float, most: float, out: Floats) -> None:
    np.maximum(np.minimum(values, most, out=out), least, out=out)
