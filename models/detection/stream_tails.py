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
from math import prod
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
        self._decay = float(np.exp(-BLOCK / detection.memory_events))
        # by level, [levels, 1], as tables are [K, levels, B]
        self._levels, self._distances = levels[:, np.newaxis], np.diff(levels)[:, np.newaxis]
        self._weights = np.where(self._levels[1:] <= KNOWN_NATS, KNOWN_WEIGHT, WEIGHT)
        self._prior = self._weights * np.exp(-self._distances)
        self._from_level = np.triu(np.ones((len(levels), len(levels))))
        # the last level below each multiple of LEVEL_STEP
        multiples = np.arange(0.0, MAX_NATS + 2 * LEVEL_STEP, LEVEL_STEP)
        self._level_of = np.searchsorted(levels, multiples, side="right") - 1

    def follow(self, nats: Floats, present: Bools | None, parts: StateParts) -> Floats:
        """The nats of the next events of each stream, at most `MAX_STEPS`, by its own tails.

        Args:
            nats: [K, B, T], by the pooled tails.
            present: bool [K, B, T], whether the event has the quantity; false beyond a length.
                None if every event has every one.
            parts: the states, of `models.spec.layout.detection_columns`; updated.
        """
        size, batch, steps = nats.shape
        counts, pending = (
            np.maximum(parts.before(name), 0.0).reshape(size, -1, batch)
            for name in ("tail_counts", "tail_pending")
        )
        filled = parts.before("tail_filled")[0] % BLOCK
        # the place of each event in a table [K, levels, B]
        multiple = (nats * (1.0 / LEVEL_STEP)).astype(np.intp)
        place = self._level_of.take(multiple, mode="clip")
        place *= batch
        place += _first_places(size, len(self._levels), batch)
        after = filled + parts.lengths
        is_ended = after >= BLOCK
        if has_ended := bool(is_ended.any()):
            # events of the next block have a second table, of the counts after this one
            place += counts.size * (filled[:, np.newaxis] + np.arange(steps) >= BLOCK)
        new = self._count(place, present, ((1 + has_ended) * size, *counts.shape[1:]))
        pending, tables = pending + new[:size], counts
        if has_ended:
            # as it is stored, wherever a chunk ends
            ended = (counts * self._decay + pending).astype(np.float32).astype(np.float64)
            tables = np.concatenate([counts, ended])
            pending = np.where(is_ended, new[size:], pending)
            parts.replace("tail_counts", np.where(is_ended, ended, counts).reshape(-1, batch))
        parts.replace("tail_pending", pending.reshape(-1, batch))
        parts.replace("tail_filled", after % BLOCK)
        own = self._own_nats(tables, nats, place)
        return np.minimum(own, MAX_NATS, out=own)

    def _count(
        self, place: NDArray[np.intp], counted: Bools | None, shape: tuple[int, ...]
    ) -> Floats:
        """How many events [K, levels, B] of the counted ones are above each level."""
        places = place.ravel() if counted is None else place[counted]
        found = np.bincount(places, minlength=prod(shape)).reshape(shape)
        return np.asarray(np.matmul(self._from_level, found))

    def _own_nats(self, counts: Floats, nats: Floats, place: NDArray[np.intp]) -> Floats:
        """A stream's own nats [K, B, T] of pooled ones, by their places in tables of counts."""
        # a restored state may have any counts
        shares = (counts[:, 1:] + self._prior) / (counts[:, :-1] + self._weights)
        np.minimum(np.maximum(shares, SMALLEST, out=shares), 1.0, out=shares)
        steps = np.negative(np.log(shares, out=shares), out=shares)
        slope, start = np.empty(counts.shape), np.zeros(counts.shape)
        np.divide(steps, self._distances, out=slope[:, :-1])
        slope[:, -1] = slope[:, -2]
        np.add.accumulate(steps, axis=1, out=start[:, 1:])
        start -= slope * self._levels
        own = slope.take(place)
        own *= nats
        own += start.take(place)
        return own


@lru_cache(maxsize=256)
def _first_places(size: int, levels: int, batch: int) -> NDArray[np.intp]:
    """The place [K, B, 1] of the first level of each stream in a table [K, levels, B]."""
    return np.arange(size * levels * batch).reshape(size, levels, batch)[:, 0, :, np.newaxis]
