"""The oracle of the tails of each stream in float64: one event after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models.events.schema import NumericField
from models.spec.detection import DetectionFit, DetectionSpec

SCALES = (12, 36)
KINDS = ("level", "change")
BLOCK = 32


class StreamTailsOracle:
    """The tails of one stream.

    Args:
        tail: the pooled tail probability of a value.
    """

    def __init__(
        self,
        detection: DetectionSpec,
        fit: DetectionFit,
        fields: Sequence[Any],
        tail: Callable[[Any, float], float],
    ):
        assert detection.tail_memory_events is not None
        assert fit.streams is not None
        self.normalised = {field.name for field in fields if getattr(field, "normalisation", None)}
        self.memory, self.prior = detection.tail_memory_events, detection.prior_events
        self.fit, self.combined, self.tail = fit.streams, fit.combined, tail
        self.numeric = [field.name for field in fields if isinstance(field, NumericField)]
        self.long = {name: _Long() for name in self.numeric}
        self.energy = {(kind, scale): 0.0 for kind in KINDS for scale in SCALES}
        self.levels = detection.tail_levels
        self.counts = [[0.0] * len(self.levels) for _ in self.fit.tails]
        self.pending = [[0] * len(self.levels) for _ in self.fit.tails]
        self.events = 0
        self.errors: dict[str, float] = {}

    def step(
        self, values: Mapping[str, float | None], channels: float, is_any_present: bool
    ) -> tuple[float, dict[str, float]]:
        """The nats of the next event, and the weight of the level and change of each target, and
        of the channels.

        Args:
            values: of each numeric target as it comes; None where it is missing.
            channels: -log of the harmonic mean of the tail probabilities of all statistics.
        """
        zs = {name: self._long(self.long[name], name, values[name]) for name in self.numeric}
        squares = {(kind, n): zs[n][at][0] ** 2 for at, kind in enumerate(KINDS) for n in zs}
        statistics: list[float | None] = []
        is_known = any(value is not None for value in values.values())
        for at, kind in enumerate(KINDS if self.numeric else ()):
            single = sum(each[at][0] ** 2 for each in zs.values()) / len(zs)
            limited = sum(each[at][1] ** 2 for each in zs.values()) / len(zs)
            found = [math.sqrt(single)]
            for scale in SCALES:
                slow = math.exp(-1 / scale)
                self.energy[kind, scale] = slow * self.energy[kind, scale] + (1 - slow) * limited
                found.append(math.sqrt(self.energy[kind, scale]))
            statistics += [value if is_known else None for value in found]
        statistics.append(channels if is_any_present else None)
        own = [self._own(at, value) for at, value in enumerate(statistics)]
        self._end_block()
        weights = {"": own[-1] ** 3}
        for at, kind in enumerate(KINDS if self.numeric else ()):
            total = sum(squares[kind, name] + 1e-9 for name in self.numeric)
            part = sum(each**3 for each in own[3 * at : 3 * at + 3]) / total
            for name in self.numeric:
                weights[f"{name}.{kind}"] = part * (squares[kind, name] + 1e-9)
        norm = sum(each**3 for each in own) ** (1 / 3)
        return -math.log(self.tail(self.combined, norm)), weights

    def _long(self, long: _Long, name: str, value: float | None) -> list[tuple[float, float]]:
        """The z by peak and by spread of the level and of the change."""
        own, decay = long.weight, math.exp(-1 / self.memory)
        errors = [0.0, 0.0]
        if value is not None and own > 0:
            errors = [value - long.total / own, value - long.last]
        trust = own / (own + self.prior)
        long.weight = decay * own + (value is not None)
        long.total = decay * long.total + (value or 0.0)
        long.last = long.last if value is None else value
        least, zs = 1e-7 * abs(value or 0.0) + 1e-12, []
        for at, error in enumerate(errors):
            peak = (long.fourths[at] / own) ** 0.25 if own else 0.0
            spread = (long.squares[at] / own) ** 0.5 if own else 0.0
            zs.append(tuple(min(trust * abs(error) / max(x, least), 30.0) for x in (peak, spread)))
            long.distances[at] = decay * long.distances[at] + abs(error)
            limit = 5 * long.distances[at] / long.weight if long.weight else 0.0
            long.squares[at] = decay * long.squares[at] + min(abs(error), limit) ** 2
            long.fourths[at] = decay * long.fourths[at] + error**4
        in_peaks = math.copysign(zs[0][0], errors[0])
        self.errors[name] = in_peaks if name in self.normalised else errors[0]
        return zs

    def _own(self, at: int, value: float | None) -> float:
        if value is None:
            return 0.0
        pooled = -math.log(self.tail(self.fit.tails[at], value))
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
            for counts, pending in zip(self.counts, self.pending, strict=True):
                for i, new in enumerate(pending):
                    counts[i], pending[i] = decay * counts[i] + new, 0


class _Long:
    def __init__(self) -> None:
        self.weight = self.total = self.last = 0.0
        self.distances, self.squares, self.fourths = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
