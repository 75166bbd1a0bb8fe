"""The tails of each stream: how often its own past had a quantity as large as this one.

The pooled tails (`models.detection.tails`) say how unusual a quantity is among all fitted streams,
as u = -log P. A stream's own tail maps u to its own nats n. It counts the stream's events
above fixed levels l_0 = 0 < l_1 < ... of u. With the counts c_0 >= c_1 >= ..., which decay over
`memory_events`, the share of the events above l_(i-1) that are also above l_i is

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

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.detection.recurrences import Bools, Floats, StateParts
from models.detection.tails import MAX_NATS
from models.spec.detection import LEVEL_STEP
from models.spec.layout import detection_of
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
    """The tails of Q quantities, of each stream.

    Args:
        spec: a model with `detection`.
    """

    def __init__(self, spec: ModelSpec):
        detection, _, _ = detection_of(spec)
        levels = np.array(detection.tail_levels)
        # the last level below each multiple of LEVEL_STEP
        multiples = np.arange(0.0, MAX_NATS + 2 * LEVEL_STEP, LEVEL_STEP)
        self._level_of = np.searchsorted(levels, multiples, side="right") - 1
        self._decay = float(np.exp(-BLOCK / detection.memory_events))
        # by level, [levels, 1], as tables are [levels, K B]
        levels, distances = levels[:, np.newaxis], np.diff(levels)[:, np.newaxis]
        self._weights = np.where(levels[1:] <= KNOWN_NATS, KNOWN_WEIGHT, WEIGHT)
        self._prior = self._weights * np.exp(-distances)
        self._from_level = np.triu(np.ones((len(levels), len(levels))))
        # from each level on n = start + slope u; both are linear in the log q_i
        own = -np.eye(len(distances))
        slope = np.concatenate([own / distances, own[-1:] / distances[-1]])
        start = np.concatenate([np.zeros_like(own[:1]), own.cumsum(axis=0)]) - slope * levels
        self._lines = np.concatenate([slope, start])

    def follow(self, nats: Floats, present: Bools | None, parts: StateParts) -> Floats:
        """The nats of the next events of each stream, at most `MAX_STEPS`, by its own tails.

        Args:
            nats: [K, B, T], by the pooled tails.
            present: bool [K, B, T], whether the event has the quantity; false beyond a length.
                None if every event has every one.
            parts: the states, of `models.spec.layout.detection_columns`; updated.
        """
        size, batch, steps = nats.shape
        width = size * batch
        counts, pending = (
            parts.before_positive(name).reshape(-1, width)
            for name in ("tail_counts", "tail_pending")
        )
        filled = parts.before("tail_filled")[0] % BLOCK
        after = filled + parts.lengths
        is_ended = after >= BLOCK
        has_ended = bool(is_ended.any())
        # the place of each event in a table [levels, K B]
        multiple = (nats * (1.0 / LEVEL_STEP)).astype(np.intp)
        place = (self._level_of * ((1 + has_ended) * width)).take(multiple, mode="clip")
        place += _columns(size, batch)
        if has_ended:
            # events of the next block have columns of their own, of the counts after this one
            is_next = np.arange(steps) >= (BLOCK - filled)[:, np.newaxis]
            np.add(place, width, out=place, where=is_next)
        new = self._count(place if present is None else place[present], (1 + has_ended) * width)
        pending, tables = pending + new[:, :width], counts
        if has_ended:
            # as it is stored, wherever a chunk ends
            ended = (counts * self._decay + pending).astype(np.float32).astype(np.float64)
            tables = np.concatenate([counts, ended], axis=1)
            has_next = np.concatenate([is_ended] * size)
            pending = np.where(has_next, new[:, width:], pending)
            parts.replace("tail_counts", np.where(has_next, ended, counts).reshape(-1, batch))
            after -= BLOCK * is_ended
        parts.replace("tail_pending", pending.reshape(-1, batch))
        parts.replace("tail_filled", after)
        own = self._own_nats(tables, nats, place)
        return np.minimum(own, MAX_NATS, out=own)

    def _count(self, places: NDArray[np.intp], width: int) -> Floats:
        """How many events [levels, width] are above each level, by their places."""
        found = np.bincount(places.ravel(), minlength=len(self._from_level) * width)
        return np.asarray(self._from_level @ found.reshape(-1, width))

    def _own_nats(self, counts: Floats, nats: Floats, place: NDArray[np.intp]) -> Floats:
        """A stream's own nats [K, B, T] of pooled ones, by their places in tables of counts."""
        # a restored state may have any counts
        shares = (counts[1:] + self._prior) / (counts[:-1] + self._weights)
        np.minimum(np.maximum(shares, SMALLEST, out=shares), 1.0, out=shares)
        slope, start = (self._lines @ np.log(shares, out=shares)).reshape(2, -1)
        own: Floats = slope.take(place)
        own *= nats
        own += start.take(place)
        return own


@lru_cache(maxsize=256)
def _columns(size: int, batch: int) -> NDArray[np.intp]:
    """The column [K, B, 1] of each stream in a table [levels, K B]."""
    return np.arange(size * batch).reshape(size, batch, 1)
