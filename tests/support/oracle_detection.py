"""The oracle of detection in float64: one event after another, as the equations say."""

from __future__ import annotations

import math
from collections import deque
from statistics import NormalDist
from typing import Any

import numpy as np

from models.spec.layout import detection_of
from models.spec.model import ModelSpec
from tests.support.oracle_layers import Floats, softmax, softplus
from tests.support.oracle_stream_tails import StreamTailsOracle

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
        self.energy = {
            (s, c): square
            for s in self.detection.scales
            for c, square in enumerate(self.fit.squares)
        }
        self.past: dict[str, deque[float]] = {
            name: deque(maxlen=self.detection.season_events or 1) for name in self.head.targets
        }
        self.is_open, self.unusual, self.usual, self.excess = False, 0, 0, 0.0
        self.since, self.peak, self.latest, self.cause = 0, 0.0, 0.0, (0.0, 0.0)
        self.tails: StreamTailsOracle | None = None
        if self.detection.tail_memory_events is not None:
            fields = [self.events.field(name) for name in self.head.targets]
            self.tails = StreamTailsOracle(self.detection, self.fit, fields, self._tail)

    def step(self, row: Floats, parameters: Floats, rate: float | None = None) -> dict[str, Any]:
        """The outputs of the next event, with an alarm at a rate of its own."""
        decay = math.exp(-1 / self.detection.memory_events)
        values, present = self._values(row, parameters)
        odd: set[str] = set()
        scales, every = len(self.detection.scales), range(len(self.channels))
        quiet = [c for c in every if self.channels[c].kind == "change"] or list(every)
        zs, errors, inverses = [], [], np.ones((1 + 2 * scales, len(self.channels)))
        for c, channel in enumerate(self.channels):
            own, square = self.weight[channel.target], self.fit.squares[c]
            usual = ROOT * math.sqrt(self.fit.spreads[c])
            root = (self.roots[c] + self.prior * usual) / (own + self.prior)
            spread = (root / ROOT) ** 2
            least = self.fit.spreads[c] * self.detection.minimum_spread
            there = values[c] is not None and own > 0
            error = values[c] - self.means[c] / own if there else 0.0
            trust = own / (own + self.prior)
            whole = error / max(spread, least)
            z = float(np.clip(trust * whole, -30, 30))
            alone = (self.roots[c] / own / ROOT) ** 2 if own else 0.0
            expected = square * min((alone / max(spread, least)) ** 2, 25.0)
            zs.append(z)
            errors.append(error)
            found = [abs(z)]
            for scale in self.detection.scales:
                slow = math.exp(-1 / scale)
                before = self.energy[scale, c] - square
                now = slow * before + (
                    (1 - slow) * trust * (min(whole**2, 25.0) - expected) if there else 0.0
                )
                self.energy[scale, c] = square + now
                mean = square + trust * now
                found += [mean, 1 / (mean + 0.05)] if there else [0.0, 0.0]
            if channel.kind == "season" and (
                abs(z) > 4 or max(found[1::2], default=0) > 4 * square
            ):
                odd.add(channel.target)
            if there:
                for k, value in enumerate([found[0], *found[1::2]]):
                    tail = self.fit.tails[k * len(self.channels) + c]
                    inverses[k, c] = 1 / self._tail(tail, value)
                for k, value in enumerate(found[2::2] if c in quiet else []):
                    tail = self.fit.tails[
                        (1 + scales) * len(self.channels) + k * len(quiet) + quiet.index(c)
                    ]
                    inverses[1 + scales + k, c] = 1 / self._tail(tail, value)
            added = math.sqrt(abs(error)) if there else usual * present[channel.target]
            self.roots[c] = decay * self.roots[c] + added
            self.means[c] = decay * self.means[c] + (values[c] or 0.0)
        where = {column.name: i for i, column in enumerate(self._columns())}
        self.prior *= math.exp(-1 / (2 * self.detection.prior_events))
        for name in self.head.targets:
            self.weight[name] = decay * self.weight[name] + present[name]
            past, last = self.past[name], self.last[name]
            if present[name]:
                self.last[name] = row[where[name]]
            known = past[0] if len(past) == past.maxlen else (last or 0.0)
            past.append(row[where[name]] if present[name] and name not in odd else known)
        used = [*range(1 + scales)], [*range(1 + scales, 1 + 2 * scales)]
        inverses[np.ix_(used[1], [c for c in range(len(self.channels)) if c not in quiet])] = 0.0
        described = self._described(row, parameters, present)
        if self.tails is None:
            mean = inverses.sum() / len(self.fit.tails)
            probability = self._tail(self.fit.combined, math.log(mean))
            shares = inverses.sum(axis=0)
        else:
            probability, shares = self._by_stream(row, present, inverses)
        alarm = self._alarm(probability, rate)
        record = {}
        if self.detection.alarm.close_above is not None:
            if alarm:
                self._record(alarm, probability, shares, row, parameters, zs, errors)
            nats = -math.log(self._threshold(rate or self.detection.alarm.false_alarms_per_day))
            record["severity"] = self.peak / nats if alarm else 0.0
            record["since"] = self.since if alarm else 0
        return {
            "probability": probability,
            "alarm": alarm,
            **record,
            "deviation": np.array(zs),
            "share": shares / shares.sum(),
            **described,
        }

    def _record(
        self,
        alarm: int,
        probability: float,
        shares: Floats,
        row: Floats,
        parameters: Floats,
        zs: list[float],
        errors: list[float],
    ) -> None:
        """The events since the alarm opened, its peak, and the cause there."""
        self.latest = -math.log(probability)
        self.since, self.peak = (0, -1.0) if alarm == 1 else (self.since + 1, self.peak)
        if self.latest <= self.peak:
            return
        self.peak, c = self.latest, int(np.argmax(shares))
        channel, excess, start = self.channels[c], 0.0, 0
        for name in self.head.targets:
            field = self.events.field(name)
            if name == channel.target:
                break
            start += {"numeric": 2, "boolean": 1}.get(field.kind) or field.codes
        if field.kind == "numeric":
            where = {column.name: i for i, column in enumerate(self._columns())}
            value, reference = float(row[where[name]]), None
            if channel.kind == "level" and self.tails is not None:
                reference = value - self.tails.errors[name]
            elif abs(zs[c]) >= 2.0:
                is_forecast = channel.kind == "forecast"
                reference = float(parameters[start]) if is_forecast else value - errors[c]
            if reference is not None:
                excess = self._unit(field, value) - self._unit(field, reference)
        self.cause = (float(c), excess)

    def _by_stream(
        self, row: Floats, present: dict[str, bool], inverses: Floats
    ) -> tuple[float, Floats]:
        """The probability and the weights of channels by the tails of the stream."""
        assert self.tails is not None
        where = {column.name: i for i, column in enumerate(self._columns())}
        raw = {name: where.get(f"{name}.value", where[name]) for name in self.tails.numeric}
        own, weights = self.tails.step(
            {name: float(row[at]) if present[name] else None for name, at in raw.items()},
            math.log(inverses.sum() / len(self.fit.tails)),
            any(present.values()),
        )
        shares = inverses.sum(axis=0)
        shares *= weights.pop("") / shares.sum()
        labels = [channel.label for channel in self.channels]
        targets = [channel.target for channel in self.channels]
        for label, weight in weights.items():
            target = label.rpartition(".")[0]
            shares[labels.index(label) if label in labels else targets.index(target)] += weight
        return math.exp(-own), shares + 1e-9

    def _described(
        self, row: Floats, parameters: Floats, present: dict[str, bool]
    ) -> dict[str, list[float]]:
        where = {column.name: i for i, column in enumerate(self._columns())}
        found: dict[str, list[float]] = {
            name: [] for name in ("mean", "spread", "residual", "z", "pit", "nats")
        }
        start = 0
        for name in self.head.targets:
            field, x, there = self.events.field(name), float(row[where[name]]), present[name]
            own = [float(each) for each in parameters[start:]]
            if field.kind == "categorical":
                nats = -math.log(softmax(parameters[start : start + field.codes])[int(x)])
                start += field.codes
            else:
                if field.kind == "numeric":
                    normal = NormalDist(own[0], math.exp(min(max(own[1], -7), 7)))
                    mean, value = self._unit(field, normal.mean), self._unit(field, x)
                    high = self._unit(field, normal.mean + normal.stdev)
                    spread = (high - self._unit(field, normal.mean - normal.stdev)) / 2
                    pit, z = normal.cdf(x), (x - normal.mean) / normal.stdev
                    nats = 0.5 * z * z + math.log(normal.stdev * math.sqrt(2 * math.pi))
                    start += 2
                else:
                    mean, value = 1 / (1 + math.exp(-own[0])), x
                    spread = math.sqrt(mean * (1 - mean))
                    z, pit = (x - mean) / spread, 1 - mean / 2 if x else (1 - mean) / 2
                    nats = -math.log(mean if x else 1 - mean)
                    start += 1
                found["mean"].append(mean)
                found["spread"].append(spread)
                found["residual"].append(value - mean if there else 0.0)
                found["z"].append(z if there else 0.0)
                found["pit"].append(pit if there else 0.5)
            found["nats"].append(nats if there else 0.0)
        return found

    @staticmethod
    def _unit(field: Any, value: float) -> float:
        value = value * field.std + field.mean
        return math.copysign(math.expm1(abs(value)), value) if field.transform != "none" else value

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

    def _threshold(self, rate: float) -> float:
        rates = np.log([self.fit.rates[0] * 1e-9, *self.fit.rates])
        thresholds = np.log([self.fit.thresholds[0] * 1e-9, *self.fit.thresholds])
        return float(np.exp(np.interp(np.log(rate), rates, thresholds)))

    def _alarm(self, probability: float, rate: float | None) -> int:
        alarm = self.detection.alarm
        rate = rate or alarm.false_alarms_per_day
        threshold = opens = self._threshold(rate)
        if alarm.backoff_nats is not None:
            self.excess = max(0.0, self.excess - rate / self.fit.events_per_day)
            opens *= math.exp(-alarm.backoff_nats * max(0.0, self.excess - 1))
        if self.is_open:
            limit = threshold * alarm.hysteresis
            if alarm.close_above is not None:
                limit = max(threshold, alarm.close_above)
            self.usual = self.usual + 1 if probability > limit else 0
            if self.usual == alarm.hold_events:
                self.is_open, self.usual = False, 0
                return 3
            return 2
        self.unusual = self.unusual + 1 if probability <= opens else 0
        if self.unusual == alarm.min_events:
            self.is_open, self.unusual = True, 0
            self.excess += alarm.backoff_nats is not None
            return 1
        return 0
