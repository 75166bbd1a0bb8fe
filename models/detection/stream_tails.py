"""The tails of each stream: how often its own past had a statistic as large as this one.

The pooled tails (`models.detection.alarms`) say how unusual a statistic is among all fitted
streams, as u = -log P. A stream's own tail maps u to its own nats n. It counts the stream's events
above fixed levels l_0 = 0 < l_1 < ... of u. With the counts c_0 >= c_1 >= ..., which decay over
`tail_memory_events`, the share of the events above l_(i-1) that are also above l_i is

    q_i = (c_i + a_i exp(-(l_i - l_(i-1)))) / (c_(i-1) + a_i),

the mean of a beta distribution whose prior, of weight a_i, is the pooled tail; and n at l_i is
-log (q_1 ... q_i), linear in between, and beyond the last level as before it. So a new stream has
the pooled tail, its own past replaces it as there is evidence at each level, and n increases with
u.

The counts of a stream change after every `BLOCK` of its events. Those of the unfinished block are
pending and have no effect yet. They are whole numbers, so that counts do not depend on how a stream
is cut into chunks, and a chunk needs no loop over its steps.
"""

from __future__ import annotations

from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import MAX_NATS
from models.detection.statistics import MAX_STEPS, Bools, FloatRows, Floats, StateParts
from models.spec.detection import LEVEL_STEP
from models.spec.layout import detection_columns, detection_of
from models.spec.model import ModelSpec

BLOCK: Final = 32
"""At least `MAX_STEPS`, so that at most one block ends in as many events."""
KNOWN_NATS: Final = 3.0
KNOWN_WEIGHT: Final = 200.0
"""Weight of the pooled tail at levels up to `KNOWN_NATS`, where it is known best."""
WEIGHT: Final = 20.0
"""Weight of the pooled tail at each other level."""
SMALLEST: Final = 1e-12


class StreamTails:
    """The tails of K statistics, of each stream.

    Args:
        spec: a model whose `detection` has `tail_memory_events`.
        memory_events: these.
    """

    def __init__(self, spec: ModelSpec, memory_events: int):
        detection, _, _ = detection_of(spec)
        levels = np.array(detection.tail_levels)
        self._decay = float(np.exp(-BLOCK / memory_events))
        self._parts = detection_columns(spec)
        self._levels, self._distances = levels, np.diff(levels)
        self._weights = np.where(levels[1:] <= KNOWN_NATS, KNOWN_WEIGHT, WEIGHT)
        self._prior = self._weights * np.exp(-self._distances)
        # the last level below each multiple of LEVEL_STEP
        multiples = np.arange(0.0, MAX_NATS + 2 * LEVEL_STEP, LEVEL_STEP)
        self._level_of = np.searchsorted(levels, multiples, side="right") - 1

    def follow(
        self, nats: Floats, present: Bools | None, lengths: NDArray[Any], state: FloatRows
    ) -> tuple[Floats, FloatRows]:
        """The nats of the next events of each stream by its own tails, and the state after them.

        Args:
            nats: [K, B, T], by the pooled tails.
            present: bool [K, B, T], whether the event has the statistic; false beyond a length.
                None if every event has every one.
            lengths: int [B], 1..T.
            state: [B, S].
        """
        if nats.shape[-1] <= MAX_STEPS:
            return self._follow(nats, present, lengths, state)
        own = np.empty_like(nats)
        for at in range(0, nats.shape[-1], MAX_STEPS):
            part = slice(at, at + MAX_STEPS)
            kept = np.clip(lengths - at, 0, nats[..., part].shape[-1])
            counted = None if present is None else present[..., part]
            own[..., part], state = self._follow(nats[..., part], counted, kept, state)
        return own, state

    def _follow(
        self, nats: Floats, present: Bools | None, lengths: NDArray[Any], state: FloatRows
    ) -> tuple[Floats, FloatRows]:
        size, batch, steps = nats.shape
        parts = StateParts(state, lengths, steps, self._parts)
        counts, pending = (
            np.maximum(parts.before(name), 0.0).reshape(size, -1, batch).transpose(0, 2, 1)
            for name in ("tail_counts", "tail_pending")
        )
        filled = np.minimum(np.maximum(parts.before("tail_filled")[0], 0), BLOCK - 1)
        # the place of each event in a table [K, B, levels]
        multiple = (nats * (1.0 / LEVEL_STEP)).astype(np.intp)
        place = np.take(self._level_of, multiple, mode="clip")
        rows = np.arange(0, size * batch * len(self._levels), len(self._levels))
        place += rows.reshape(size, batch, 1)
        own = self._own_nats(counts, nats, place)
        is_ended = filled + lengths >= BLOCK
        if not is_ended.any():
            pending = pending + self._count(place, present, counts.shape)
        else:
            is_next = filled[:, np.newaxis] + np.arange(steps) >= BLOCK
            before, after = (
                ~is_next if present is None else present & ~is_next,
                is_next if present is None else present & is_next,
            )
            pending = pending + self._count(place, before, counts.shape)
            # as it is stored, wherever a chunk ends
            ended = (counts * self._decay + pending).astype(np.float32).astype(np.float64)
            own = np.where(is_next, self._own_nats(ended, nats, place), own)
            change = is_ended[:, np.newaxis]
            counts = np.where(change, ended, counts)
            pending = np.where(change, self._count(place, after, counts.shape), pending)
            parts.replace("tail_counts", counts.transpose(0, 2, 1).reshape(-1, batch))
        parts.replace("tail_pending", pending.transpose(0, 2, 1).reshape(-1, batch))
        parts.replace("tail_filled", ((filled + lengths) % BLOCK)[np.newaxis])
        return np.minimum(own, MAX_NATS, out=own), parts.after

    def _count(
        self, place: NDArray[np.intp], counted: Bools | None, shape: tuple[int, ...]
    ) -> Floats:
        """How many events [K, B, levels] of the counted ones are above each level."""
        if counted is not None:
            place = place[np.broadcast_to(counted, place.shape)]
        found = np.bincount(place.ravel(), minlength=prod(shape)).reshape(shape)
        return np.cumsum(found[..., ::-1], axis=-1, dtype=np.float64)[..., ::-1]

    def _own_nats(self, counts: Floats, nats: Floats, place: NDArray[np.intp]) -> Floats:
        """A stream's own nats [K, B, T] of pooled ones, given its counts [K, B, levels]."""
        # a restored state may have any counts
        shares = (counts[..., 1:] + self._prior) / (counts[..., :-1] + self._weights)
        np.minimum(np.maximum(shares, SMALLEST, out=shares), 1.0, out=shares)
        steps = np.negative(np.log(shares, out=shares), out=shares)
        slope = np.empty(counts.shape)
        np.divide(steps, self._distances, out=slope[..., :-1])
        slope[..., -1] = slope[..., -2]
        start = np.zeros(counts.shape)
        np.cumsum(steps, axis=-1, out=start[..., 1:])
        start -= slope * self._levels
        own = np.take(slope, place)
        own *= nats
        own += np.take(start, place)
        return own
