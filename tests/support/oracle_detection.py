"""The oracle of detection in float64: one event after another, as the equations say."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from models.spec.layout import detection_of
from models.spec.model import ModelSpec
from tests.support.oracle_layers import Floats, softmax, softplus

ROOT = 2**0.25 * math.gamma(0.75) / math.sqrt(math.pi)


class DetectionOracle:
    """One stream of a model with a fitted detection."""

    def __init__(self, spec: ModelSpec):
        self.detection, self.head, self.events = detection_of(spec)
        self.fit = self.detection.fit
        self.channels = self.detection.channels_of(self.head.targets, self.events)
        prior, spreads = self.detection.prior_events, self.fit.spreads
        self.weight = dict.fromkeys(self.head.targets, 0.0)
        self.prior = prior
        self.means = [0.0] * len(spreads)
        self.last: dict[str, float | None] = dict.fromkeys(self.head.targets)
        self.roots = [0.0] * len(spreads)
        self.energy = {(s, c): 1.0 for s in self.detection.scales for c in range(len(spreads))}
        self.past = {
            name: deque(maxlen=self.detection.season_events or 1) for name in self.head.targets
        }
        self.is_open, self.unusual, self.usual = False, 0, 0

    def step(self, row: Floats, parameters: Floats) -> dict[str, Any]:
        decay = math.exp(-1 / self.detection.memory_events)
        values, present = self._values(row, parameters)
        zs, inverses = [], np.ones((1 + 2 * len(self.detection.scales), len(self.channels)))
        for c, channel in enumerate(self.channels):
            own = self.weight[channel.target]
            usual = ROOT * math.sqrt(self.fit.spreads[c])
            root = (self.roots[c] + self.prior * usual) / (own + self.prior)
            spread = (root / ROOT) ** 2
            least = self.fit.spreads[c] * self.detection.minimum_spread
            there = values[c] is not None and own > 0
            error = values[c] - self.means[c] / own if there else 0.0
            trust = own / (own + self.prior)
            whole = error / max(spread, least)
            z = float(np.clip(trust * whole, -30, 30))
            zs.append(z)
            found = [abs(z)]
            for scale in self.detection.scales:
                slow = math.exp(-1 / scale)
                before = self.energy[scale, c] - 1
                now = slow * before + (
                    (1 - slow) * trust * (min(whole**2, 25.0) - 1) if there else 0.0
                )
                self.energy[scale, c] = 1 + now
                found += [1 + now, 1 / (1 + now + 0.05)] if there else [0.0, 0.0]
            if there:
                for k, value in enumerate(found):
                    tail = self.fit.tails[k * len(self.channels) + c]
                    inverses[k, c] = 1 / self._tail(tail, value)
            added = math.sqrt(abs(error)) if there else usual * present[channel.target]
            self.roots[c] = decay * self.roots[c] + added
            self.means[c] = decay * self.means[c] + (values[c] or 0.0)
        where = {column.name: i for i, column in enumerate(self._columns())}
        self.prior *= math.exp(-1 / (2 * self.detection.prior_events))
        for name in self.head.targets:
            self.weight[name] = decay * self.weight[name] + present[name]
            if present[name]:
                self.last[name] = row[where[name]]
            self.past[name].append(self.last[name] if self.last[name] is not None else 0.0)
        probability = self._tail(self.fit.combined, math.log(inverses.mean()))
        return {
            "probability": probability,
            "alarm": self._alarm(probability),
            "deviation": np.array(zs),
            "share": inverses.sum(axis=0) / inverses.sum(),
        }

    def _columns(self) -> Any:
        return self.events.columns

    def _values(
        self, row: Floats, parameters: Floats
    ) -> tuple[list[float | None], dict[str, bool]]:
        where = {column.name: i for i, column in enumerate(self._columns())}
        forecast, present, start = {}, {}, 0
        for name in self.head.targets:
            field, value = self.events.field(name), row[where[name]]
            present[name] = not (f"{name}.missing" in where and row[where[f"{name}.missing"]])
            if field.kind == "numeric":
                mean, s = parameters[start], np.clip(parameters[start + 1], -7, 7)
                forecast[name] = (value - mean) / math.exp(s)
                start += 2
            elif field.kind == "categorical":
                logits = parameters[start : start + field.codes]
                forecast[name] = math.sqrt(-2 * math.log(softmax(logits)[int(value)]))
                start += field.codes
            else:
                logit = parameters[start]
                forecast[name] = math.sqrt(2 * (softplus(logit) - value * logit))
                start += 1
        values: list[float | None] = []
        for channel in self.channels:
            name, value = channel.target, row[where[channel.target]]
            found: float | None = None
            if present[name]:
                if channel.kind == "forecast":
                    found = forecast[name]
                elif channel.kind == "level":
                    found = value
                elif channel.kind == "change" and self.last[name] is not None:
                    found = value - self.last[name]
                elif channel.kind == "season" and len(self.past[name]) == self.past[name].maxlen:
                    found = value - self.past[name][0]
            values.append(found)
        return values, present

    def _tail(self, tail: Any, value: float) -> float:
        if value <= tail.threshold:
            return tail.exceeded ** (value / tail.threshold)
        excess = (value - tail.threshold) / tail.scale
        if tail.shape == 0:
            return max(tail.exceeded * math.exp(-excess), math.exp(-60))
        return max(tail.exceeded * (1 + tail.shape * excess) ** (-1 / tail.shape), math.exp(-60))

    def _alarm(self, probability: float) -> int:
        alarm, threshold = self.detection.alarm, self.fit.threshold
        if self.is_open:
            self.usual = self.usual + 1 if probability > threshold * alarm.hysteresis else 0
            if self.usual == alarm.hold_events:
                self.is_open, self.usual = False, 0
                return 3
            return 2
        self.unusual = self.unusual + 1 if probability <= threshold else 0
        if self.unusual == alarm.min_events:
            self.is_open, self.unusual = True, 0
            return 1
        return 0
