"""The oracle of the tails of each stream in float64: one event after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models.events.schema import NumericField
from models.spec.detection import DetectionFit, DetectionSpec

ROOT = 2**0.25 * math.gamma(0.75) / math.sqrt(math.pi)
SCALES = (12, 36)
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
        self.is_raw = detection.raw_levels
        self.normalised = {field.name for field in fields if getattr(field, "normalisation", None)}
        self.memory, self.prior = detection.tail_memory_events, detection.prior_events
        self.least, self.fit, self.tail = detection.minimum_spread, fit.streams, tail
        self.numeric = [field.name for field in fields if isinstance(field, NumericField)]
        self.targets = [field.name for field in fields]
        self.long = [_Long() for _ in (*self.numeric, "joint")]
        self.means = [0.0 for _ in SCALES]
        self.levels = detection.tail_levels
        self.counts = [[0.0] * len(self.levels) for _ in self.fit.tails]
        self.pending = [[0] * len(self.levels) for _ in self.fit.tails]
        self.events = 0
        self.errors: dict[str, float] = {}

    def step(
        self,
        values: Mapping[str, float | None],
        nats: Mapping[str, float | None],
        by_target: Mapping[str, float],
    ) -> tuple[float, dict[str, float]]:
        """The nats of the next event, and the weight of each level, target and of the joint nats.

        Args:
            values: of each numeric target, encoded, or as they come with `raw_levels`; None where
                it is missing.
            nats: by the forecast of each target; None where it is missing.
            by_target: -log of the harmonic mean of the tail probabilities of its statistics.
        """
        known = [value for value in nats.values() if value is not None]
        joint = sum(min(value, 50.0) for value in known) if known else None
        rows = [*(values[name] for name in self.numeric), joint]
        zs = [self._z(at, value, at == len(self.numeric)) for at, value in enumerate(rows)]
        statistics: list[float | None] = [
            None if rows[at] is None else min(abs(z), 30.0) for at, z in enumerate(zs[:-1])
        ]
        limited = min(max(zs[-1], -10.0), 30.0)
        for at, scale in enumerate(SCALES):
            slow = math.exp(-1 / scale)
            self.means[at] = slow * self.means[at] + (1 - slow) * limited
        joints = [max(value + 3.0, 0.0) for value in (limited, *self.means)]
        statistics += [None if joint is None else value for value in joints]
        statistics += [None if nats[name] is None else by_target[name] for name in self.targets]
        own = [self._own(at, value) for at, value in enumerate(statistics)]
        self._end_block()
        levels, targets = len(self.numeric), len(self.targets)
        groups = [own[:levels]] if levels else []
        groups += [[each] for each in own[levels : levels + 3]] + [own[levels + 3 :]]
        largest = max(max(group) - math.log(len(group)) for group in groups)
        weights = {f"{name}.level": math.exp(own[at]) for at, name in enumerate(self.numeric)}
        weights["joint"] = sum(math.exp(each) for each in own[levels : levels + 3])
        for at, name in enumerate(self.targets):
            weights[name] = math.exp(own[len(own) - targets + at])
        return max(largest - math.log(len(groups)), 0.0), weights

    def _z(self, at: int, value: float | None, is_joint: bool) -> float:
        long = self.long[at]
        if self.is_raw and not is_joint:
            return self._raw_z(long, self.numeric[at], value)
        usual = self.fit.spreads[-1 if is_joint else at]
        known = long.weight + (self.prior if is_joint else 0.0)
        z, root, error = 0.0, 0.0, 0.0
        if value is not None:
            root = ROOT * math.sqrt(usual)
            if known > 0:
                start = self.prior * self.fit.joint_mean if is_joint else 0.0
                error = value - (long.total + start) / known
                spread = (long.roots + self.prior * root) / ((long.weight + self.prior) * ROOT)
                z = error / max(spread**2, usual * self.least)
                if not is_joint:
                    z *= long.weight / (long.weight + self.prior)
                root = math.sqrt(abs(error))
        decay = math.exp(-1 / self.memory)
        long.weight = decay * long.weight + (value is not None)
        long.total = decay * long.total + (value or 0.0)
        long.roots = decay * long.roots + root
        if not is_joint:
            self.errors[self.numeric[at]] = error
        return z

    def _raw_z(self, long: _Long, name: str, value: float | None) -> float:
        error, z = 0.0, 0.0
        if value is not None and long.weight > 0:
            mean = long.total / long.weight
            error = value - mean
            spread = max((long.fourths / long.weight) ** 0.25, 1e-7 * abs(value) + 1e-12)
            z = error / spread
        self.errors[name] = z if name in self.normalised else error
        z *= long.weight / (long.weight + self.prior)
        decay = math.exp(-1 / self.memory)
        long.weight = decay * long.weight + (value is not None)
        long.total = decay * long.total + (value or 0.0)
        long.fourths = decay * long.fourths + error**4
        return z

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
        self.weight = self.total = self.roots = self.fourths = 0.0
