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

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import MAX_NATS
from models.detection.statistics import MAX_STEPS, Bools, FloatRows, Floats, StateParts
from models.spec.detection import TAIL_LEVELS
from models.spec.layout import detection_columns
from models.spec.model import ModelSpec

BLOCK: Final = 32
"""At least `MAX_STEPS`, so that at most one block ends in as many events."""
FIRST_WEIGHT: Final = 200.0
"""Weight of the pooled tail at the first level: there it is known best."""
WEIGHT: Final = 20.0
"""Weight of the pooled tail at each other level."""
SMALLEST: Final = 1e-12

_LEVELS: Final = np.array(TAIL_LEVELS)
_DISTANCES: Final = np.diff(_LEVELS)
_WEIGHTS: Final = np.array([FIRST_WEIGHT] + [WEIGHT] * (len(TAIL_LEVELS) - 2))
_PRIOR: Final = _WEIGHTS * np.exp(-_DISTANCES)


class StreamTails:
    """The tails of K statistics, of each stream.

    Args:
        spec: a model whose `detection` has `tail_memory_events`.
        memory_events: these.
    """

    def __init__(self, spec: ModelSpec, memory_events: int):
        self._decay = float(np.exp(-BLOCK / memory_events))
        self._parts = detection_columns(spec)

    def follow(
        self, nats: Floats, present: Bools, lengths: NDArray[Any], state: FloatRows
    ) -> tuple[Floats, FloatRows]:
        """The nats of the next events of each stream by its own tails, and the state after them.

        Args:
            nats: [K, B, T], by the pooled tails.
            present: bool [K, B, T], whether the event has the statistic; false beyond a length.
            lengths: int [B], 1..T.
            state: [B, S].
        """
        own = np.empty_like(nats)
        for at in range(0, nats.shape[-1], MAX_STEPS):
            part = slice(at, at + MAX_STEPS)
            kept = np.clip(lengths - at, 0, nats[..., part].shape[-1])
            own[..., part], state = self._follow(nats[..., part], present[..., part], kept, state)
        return own, state

    def _follow(
        self, nats: Floats, present: Bools, lengths: NDArray[Any], state: FloatRows
    ) -> tuple[Floats, FloatRows]:
        size, batch, steps = nats.shape
        parts = StateParts(state, lengths, steps, self._parts)
        counts, pending = (
            np.maximum(parts.before(name), 0.0).reshape(size, -1, batch).transpose(0, 2, 1)
            for name in ("tail_counts", "tail_pending")
        )
        filled = np.minimum(np.maximum(parts.before("tail_filled")[0], 0), BLOCK - 1)
        above = _above(nats)
        own = _own_nats(counts, nats, above)
        is_ended = filled + lengths >= BLOCK
        if not is_ended.any():
            pending = pending + _count(present, above)
        else:
            is_next = filled[:, np.newaxis] + np.arange(steps) >= BLOCK
            pending = pending + _count(present & ~is_next, above)
            # as it is stored, wherever a chunk ends
            ended = (counts * self._decay + pending).astype(np.float32).astype(np.float64)
            own = np.where(is_next, _own_nats(ended, nats, above), own)
            change = is_ended[:, np.newaxis]
            counts = np.where(change, ended, counts)
            pending = np.where(change, _count(present & is_next, above), pending)
        parts.replace("tail_counts", counts.transpose(0, 2, 1).reshape(-1, batch))
        parts.replace("tail_pending", pending.transpose(0, 2, 1).reshape(-1, batch))
        parts.replace("tail_filled", ((filled + lengths) % BLOCK)[np.newaxis])
        return np.minimum(own, MAX_NATS, out=own), parts.after


class _Above(NamedTuple):
    """The events above the first level, among nats [K, B, T]: their places in the flat array, their
    rows of K x B, the last level below each, and how far each is on the way to the next one."""

    place: NDArray[np.int64]
    row: NDArray[np.int64]
    level: NDArray[np.int64]
    share: Floats


def _above(nats: Floats) -> _Above:
    flat = nats.ravel()
    place = np.flatnonzero(flat > _LEVELS[1])
    values = flat[place]
    level = np.searchsorted(_LEVELS, values, side="left") - 1
    lower = np.minimum(level, len(_LEVELS) - 2)
    share = (values - _LEVELS[lower]) / _DISTANCES[lower]
    return _Above(place, place // nats.shape[-1], level, share)


def _count(counted: Bools, above: _Above) -> Floats:
    """How many events [K, B, levels] of the counted ones [K, B, T] are above each level."""
    last = len(_LEVELS)
    counts = np.zeros((*counted.shape[:2], last))
    kept = counted.ravel()[above.place]
    if kept.any():
        index = above.row[kept] * last + above.level[kept]
        found = np.bincount(index, minlength=counts.size).reshape(counts.shape)
        np.cumsum(found[..., ::-1], axis=-1, out=counts[..., ::-1])
    counts[..., 0] = counted.sum(axis=-1)
    return counts


def _own_nats(counts: Floats, nats: Floats, above: _Above) -> Floats:
    """A stream's own nats [K, B, T] of pooled ones, given its counts [K, B, levels]."""
    # a restored state may have any counts
    shares = np.maximum((counts[..., 1:] + _PRIOR) / (counts[..., :-1] + _WEIGHTS), SMALLEST)
    steps = -np.log(np.minimum(shares, 1.0, out=shares))
    own = nats * (steps[..., :1] / _LEVELS[1])
    if len(above.place):
        below = np.zeros((steps.shape[0] * steps.shape[1], len(_LEVELS)))
        np.cumsum(steps.reshape(len(below), -1), axis=-1, out=below[:, 1:])
        lower = np.minimum(above.level, len(_LEVELS) - 2)
        start = below[above.row, lower]
        further = above.share * (below[above.row, lower + 1] - start)
        own.ravel()[above.place] = start + further
    return np.asarray(own)
