"""The oracle of the tails of each stream in float64: one event after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from models.spec.detection import DetectionFit, DetectionSpec

BLOCK = 32


class StreamTailsOracle:
    """The tails of one stream.

    Args:
        tail: the pooled tail probability of a value.
        numeric: numeric targets; the last quantity is that of their runs, if there are any.
    """

    def __init__(
        self,
        detection: DetectionSpec,
        fit: DetectionFit,
        tail: Callable[[Any, float], float],
        numeric: int,
    ):
        self.memory, self.fit, self.tail = detection.memory_events, fit, tail
        self.levels, self.numeric = detection.tail_levels, numeric
        self.counts = [[0.0] * len(self.levels) for _ in self.fit.tails]
        self.pending = [[0] * len(self.levels) for _ in self.fit.tails]
        self.events = 0

    def step(self, quantities: Sequence[float | None]) -> tuple[float, list[float]]:
        """The norm of the nats of the next event, and the nats by quantity.

        Args:
            quantities: None where the event has none.
        """
        own = [self._own(at, value) for at, value in enumerate(quantities)]
        self._end_block()
        return sum(each**3 for each in own) ** (1 / 3), own

    def _own(self, at: int, value: float | None) -> float:
        if value is None:
            return 0.0
        pooled = -math.log(self.tail(self.fit.tails[at], value))
        if self.numeric and at == len(self.counts) - 1:
            pooled = max(pooled - math.log(self.numeric), 0.0)
        own = 0.0
        for i in range(1, len(self.levels)):
            low, high = self.levels[i - 1], self.levels[i]
            weight = 200.0 if high <= 3.0 else 20.0
            above, below = self.counts[at][i], self.counts[at][i - 1]
            share = (above + weight * math.exp(low - high)) / (below + weight)
            is_last = i == len(self.levels) - 1
            part = (pooled - low) / (high - low)
            own -= math.log(share) * (max(part, 0.0) if is_last else min(max(part, 0.0), 1.0))
        for i, level in enumerate(self.levels):
            self.pending[at][i] += pooled > level or i == 0
        return min(own, 60.0)

    def _end_block(self) -> None:
        self.events += 1
        if self.events % BLOCK == 0:
            decay = math.exp(-BLOCK / self.memory)
            for at, (counts, pending) in enumerate(zip(self.counts, self.pending, strict=True)):
                is_average = at < len(self.counts) - 2 and at % 2 == 1
                for i, new in enumerate(pending):
                    most = BLOCK if self.levels[i] < 4.5 else 4 if is_average else 2
                    counts[i], pending[i] = decay * counts[i] + min(new, most), 0
