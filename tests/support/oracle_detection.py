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

AVERAGED_EVENTS = 12


class DetectionOracle:
    """One stream of a model with a fitted detection."""

    def __init__(self, spec: ModelSpec):
        self.detection, self.head, self.events = detection_of(spec)
        assert self.detection.fit is not None
        self.fit = self.detection.fit
        self.channels = self.detection.channels_of(self.head.targets, self.events)
        self.fields = {name: self.events.field(name) for name in self.head.targets}
        self.numeric = [name for name, field in self.fields.items() if field.kind == "numeric"]
        self.kinds = ["level", "change"]
        self.count = 0
        self.weight = dict.fromkeys(self.fields, 0.0)
        self.level_weight = dict.fromkeys(self.numeric, 0.0)
        self.total = dict.fromkeys(self.numeric, 0.0)
        self.last = dict.fromkeys(self.numeric, 0.0)
        self.past = {
            name: deque[float](maxlen=self.detection.season_events or 1) for name in self.numeric
        }
        self.errors = {channel.label: _Errors() for channel in self.channels}
        self.gain = dict.fromkeys(self.numeric, 0.0)
        self.averages = dict.fromkeys(self.kinds, 0.0)
        self.run = dict.fromkeys(self.numeric, 0)
        self.longest = dict.fromkeys(self.numeric, 0.0)
        self.tails = StreamTailsOracle(self.detection, self.fit, self._tail, len(self.numeric))
        self.is_open, self.unusual, self.usual, self.excess = False, 0, 0, 0.0
        self.since, self.peak, self.latest, self.cause = 0, 0.0, 0.0, (0.0, 0.0)

    def step(self, row: Floats, parameters: Floats, rate: float | None = None) -> dict[str, Any]:
        """The outputs of the next event, with an alarm at a rate of its own."""
        where = {column.name: i for i, column in enumerate(self.events.columns)}
        present = {
            name: not (f"{name}.missing" in where and row[where[f"{name}.missing"]])
            for name in self.fields
        }
        encoded = {name: float(row[where[name]]) for name in self.fields}
        raw = {name: float(row[where.get(f"{name}.value", where[name])]) for name in self.numeric}
        forecasts = self._forecasts(encoded, parameters)
        zs, squares, errors = {}, {}, {}
        limited = dict.fromkeys(self.kinds, 0.0)
        for channel in self.channels:
            name, kind = channel.target, channel.kind
            if kind == "run":
                ratio = self._run(name, raw[name] if present[name] else None)
                zs[channel.label], squares[channel.label] = ratio, ratio**2
                errors[channel.label] = float(self.run[name])
                continue
            own = self.errors[channel.label]
            of_season = kind == "level" and self.detection.season_events is not None
            if of_season and self.count == self.detection.season_events:
                own = self.errors[channel.label] = _Errors()
                self.level_weight[name] = 0.0
            weight = self.level_weight[name] if of_season else self.weight[name]
            spread = (own.squares / weight) ** 0.5 if weight else 0.0
            error = self._error(name, kind, raw, forecasts[name]) if present[name] else None
            trust = weight / (weight + self.detection.prior_events)
            by_peak, by_spread = own.follow(
                error,
                weight,
                trust,
                self.detection.memory_events,
                1e-6 if kind == "forecast" else 1e-7 * abs(raw[name]) + 1e-12,
                is_limited=kind == "forecast",
                is_seen=present[name],
            )
            if kind == "level" and len(self.numeric) > 1:
                by_peak = by_spread
            errors[channel.label] = error or 0.0
            zs[channel.label] = math.copysign(trust * by_peak, error or 0.0)
            squares[channel.label] = (trust * by_peak) ** 2
            if kind != "forecast":
                limited[kind] += (trust * by_spread) ** 2 / len(self.numeric)
            if of_season:
                bound = max(spread, 1e-7 * abs(raw[name]) + 1e-12)
                self._follow_season(name, raw[name] if present[name] else None, weight, bound)
        quantities = self._quantities(squares, limited, present)
        decay = math.exp(-1 / self.detection.memory_events)
        for name in self.fields:
            self.weight[name] = decay * self.weight[name] + present[name]
        for name in self.numeric:
            self.total[name] = decay * self.total[name] + (raw[name] if present[name] else 0.0)
            self.last[name] = raw[name] if present[name] else self.last[name]
        self.count += 1
        norm, own = self.tails.step(quantities)
        probability = self._tail(self.fit.combined, norm)
        shares = self._shares(squares, own)
        alarm = self._alarm(probability, rate)
        record = {}
        if self.detection.alarm.close_above is not None:
            if alarm:
                self._record(alarm, probability, shares, zs, errors, raw, parameters)
            nats = -math.log(self._threshold(rate or self.detection.alarm.false_alarms_per_day))
            record["severity"] = self.peak / nats if alarm else 0.0
            record["since"] = self.since if alarm else 0
        return {
            "probability": probability,
            "alarm": alarm,
            **record,
            "deviation": np.array(list(zs.values())),
            "share": shares / shares.sum(),
            **self._described(row, parameters, present),
        }

    def _error(self, name: str, kind: str, raw: dict[str, float], forecast: float) -> float | None:
        if self.weight[name] == 0:
            return None
        if kind == "forecast":
            return forecast
        if kind == "change":
            return raw[name] - self.last[name]
        has_season = len(self.past[name]) == self.detection.season_events
        is_closer = has_season and self.gain[name] >= 0
        return raw[name] - (self.past[name][0] if is_closer else self._mean(name))

    def _mean(self, name: str) -> float:
        return self.total[name] / self.weight[name] if self.weight[name] else 0.0

    def _follow_season(self, name: str, value: float | None, weight: float, bound: float) -> None:
        """The usual value at the phase of an event, and whether it is closer than the mean."""
        known, decay = self.past[name], math.exp(-1 / self.detection.memory_events)
        has_season = len(known) == known.maxlen
        usual = known[0] if has_season else self._mean(name)
        if self.gain[name] < 0:
            bound = max(bound, abs(usual - self._mean(name)))
        following = usual
        if value is not None:
            error = value - usual
            is_followed = weight and has_season
            following = usual + min(max(error, -bound), bound) / 2 if is_followed else value
            if has_season:
                closer = abs(value - self._mean(name)) - abs(error)
                self.gain[name] = decay * self.gain[name] + closer
            if not self.weight[name]:
                known = self.past[name] = deque([value] * len(known), known.maxlen)
        known.append(following)
        self.level_weight[name] = decay * weight + (value is not None)

    def _run(self, name: str, value: float | None) -> float:
        """How long the value has been the same, beside the longest run before."""
        self.longest[name] *= math.exp(-1 / self.detection.memory_events)
        if value is None:
            return 0.0
        if self.weight[name] > 0 and value == self.last[name]:
            self.run[name] += 1
        else:
            self.longest[name] = max(self.longest[name], self.run[name])
            self.run[name] = 0
        past = max(self.count - self.run[name], 0)
        trust = past / (past + self.detection.prior_events)
        ratio = min(trust * self.run[name] / max(self.longest[name], 8.0), 20.0)
        return 1 + 2 * math.log(ratio) if ratio > 1 else ratio

    def _quantities(
        self,
        squares: dict[str, float],
        limited: dict[str, float],
        present: dict[str, bool],
    ) -> list[float | None]:
        has_numeric = any(present[name] for name in self.numeric)
        found: list[float | None] = []
        for kind in self.kinds if self.numeric else []:
            own = [squares[f"{name}.{kind}"] for name in self.numeric]
            found.append(math.sqrt(sum(own) / len(own)))
            slow = math.exp(-1 / AVERAGED_EVENTS)
            self.averages[kind] = slow * self.averages[kind] + (1 - slow) * limited[kind]
            found.append(math.sqrt(self.averages[kind]))
        found = [each if has_numeric else None for each in found]
        forecasts = [squares[f"{name}.forecast"] for name in self.fields]
        is_any = any(present.values())
        found.append(math.sqrt(sum(forecasts) / len(forecasts)) if is_any else None)
        if self.numeric:
            found.append(max(squares[f"{name}.run"] for name in self.numeric) ** 0.5)
            found[-1] = found[-1] if has_numeric else None
        return found

    def _shares(self, squares: dict[str, float], own: list[float]) -> Floats:
        """The cubes of each kind's quantities, by how far each target is off."""
        cubes = [each**3 for each in own]
        parts, at = {}, 0
        for kind in self.kinds if self.numeric else []:
            parts[kind] = sum(cubes[at : at + 2])
            at += 2
        parts |= {"forecast": cubes[at], "run": cubes[-1]}
        shares = []
        for channel in self.channels:
            same = [squares[c.label] + 1e-9 for c in self.channels if c.kind == channel.kind]
            part = (parts[channel.kind] + 1e-9) / sum(same)
            share = part * (squares[channel.label] + 1e-9)
            shares.append(share)
        return np.array(shares)

    def _record(
        self,
        alarm: int,
        probability: float,
        shares: Floats,
        zs: dict[str, float],
        errors: dict[str, float],
        raw: dict[str, float],
        parameters: Floats,
    ) -> None:
        """The events since the alarm opened, its peak, and the cause at its first event."""
        self.latest = -math.log(probability)
        self.since, self.peak = (0, -1.0) if alarm == 1 else (self.since + 1, self.peak)
        self.peak = max(self.peak, self.latest)
        if alarm != 1:
            return
        c = int(np.argmax(shares))
        channel, start = self.channels[c], 0
        for name, field in self.fields.items():
            if name == channel.target:
                break
            start += {"numeric": 2, "boolean": 1}.get(field.kind) or field.codes
        field, excess = self.fields[channel.target], 0.0
        if channel.kind == "run":
            self.cause = (float(c), errors[channel.label])
            return
        is_far = abs(zs[channel.label]) >= 2.0 or channel.kind == "level"
        if field.kind == "numeric" and is_far:
            value = raw[channel.target]
            usual = value - errors[channel.label]
            if channel.kind == "forecast":
                usual = float(parameters[start])
            excess = self._unit(field, value) - self._unit(field, usual)
        self.cause = (float(c), excess)

    def _forecasts(self, encoded: dict[str, float], parameters: Floats) -> dict[str, float]:
        found, start = {}, 0
        for name, field in self.fields.items():
            value = encoded[name]
            if field.kind == "numeric":
                mean, s = parameters[start], np.clip(parameters[start + 1], -7, 7)
                found[name] = (value - mean) / math.exp(s)
                start += 2
            elif field.kind == "categorical":
                logits = parameters[start : start + field.codes]
                found[name] = math.sqrt(-2 * math.log(softmax(logits)[int(value)]))
                start += field.codes
            else:
                logit = parameters[start]
                found[name] = math.sqrt(2 * (softplus(logit) - value * logit))
                start += 1
        return found

    def _described(
        self, row: Floats, parameters: Floats, present: dict[str, bool]
    ) -> dict[str, list[float]]:
        where = {column.name: i for i, column in enumerate(self.events.columns)}
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


class _Errors:
    """The errors of one channel: sums with the weights of the memory."""

    def __init__(self) -> None:
        self.distance = self.squares = 0.0
        self.fourths = [0.0, 0.0]

    def follow(
        self,
        error: float | None,
        weight: float,
        trust: float,
        memory: int,
        least: float,
        *,
        is_limited: bool,
        is_seen: bool,
    ) -> tuple[float, float]:
        """|e| / p and |e| / q, each at most 20, by the errors before.

        Args:
            weight: of the events before.
            is_seen: whether the event counts in it.
        """
        decay, size = math.exp(-1 / memory), abs(error or 0.0)
        side = int((error or 0.0) > 0)
        fourths = self.fourths[side] + (1 - trust) * self.fourths[1 - side]
        peak = (fourths / weight) ** 0.25 if weight else 0.0
        spread = (self.squares / weight) ** 0.5 if weight else 0.0
        found = tuple(min(size / max(scale, least), 20.0) for scale in (peak, spread))
        after = decay * weight + is_seen
        self.distance = decay * self.distance + size
        limit = 5 * self.distance / after if after else 0.0
        self.squares = decay * self.squares + min(size, limit) ** 2
        self.fourths = [decay * each for each in self.fourths]
        self.fourths[side] += (min(size, limit) if is_limited else size) ** 4
        return found[0], found[1]
