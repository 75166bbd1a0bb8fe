"""Deviations of an event in each channel from its stream's past, and statistics of them.

Equations, for one target with encoded value x, the forecast's mean mu and log deviation s, and the
decay r = exp(-1 / memory_events); "before" means from the events before this one only:

    values   v = (x - mu) exp(-s),  x,  x - x_before,  x - x_(a season before), by channel
    mean     m_t = sum_t / W_t,     sum_t = r sum_(t-1) + v_t,   W_t = r W_(t-1) + 1
    errors   e = v - m_before
    spread   (q / c)^2,  c = E sqrt|N(0, 1)|,  where q is the mean of sqrt|e| with the weights of
             the events before, and of the usual spread with weight P
    prior    P_t = exp(-1 / (2 P_0)) P_(t-1),  P_0 = prior_events
    trust    a = W_before / (W_before + P_before)
    z        a e / max(spread, minimum), within -30 to 30
    energy   E_t = g E_(t-1) + (1 - g) a (min(z_t^2 / a^2, 25) - 1),  g = exp(-1 / scale)

In a new stream `trust` shrinks the deviations towards 0, and a target's first event has no
statistics. The mean of square roots is a robust spread: one outlier hardly moves it, and many zeros
do not make it zero. The statistics of a channel, larger for what is more unusual, are |z|, and for
each scale the mean square 1 + E and its inverse. An event without the target changes only the
decays.

Every recurrence y_t = r y_(t-1) + x_t is computed for all steps at once, as a product with the
matrix of the powers of r. Pure NumPy in float64; states are float32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import SpecError
from models.events.schema import BooleanField, CategoricalField, NumericField
from models.spec.detection import ROOT_OF_NORMAL
from models.spec.heads import LOG_DEVIATION_LIMIT
from models.spec.layout import anomaly_width, detection_of, detection_state
from models.spec.model import ModelSpec

Floats = NDArray[np.float64]
FloatRows = NDArray[np.float32]

Z_LIMIT: Final = 30.0
ENERGY_LIMIT: Final = 25.0
STUCK: Final = 0.05
"""Added to a mean square before it is inverted, which bounds the inverse."""
SMALLEST: Final = 1e-9


class Deviations(NamedTuple):
    """The deviations of T events of B streams.

    Attributes:
        z: [B, T, C], by channel; 0 where the event has none.
        statistics: [B, T, C (1 + 2 scales)]: |z| of every channel, then for each scale the mean
            square of every channel, then its inverse; 0 where the event has none.
        state: float32 [B, S], after each stream's last event.
    """

    z: Floats
    statistics: Floats
    state: FloatRows


class Channels:
    """Follows the channels of one model; see the module for the equations.

    Args:
        spec: a fitted model with `detection`.
        spreads: by channel, the usual spread.
    """

    def __init__(self, spec: ModelSpec, spreads: Floats):
        detection, head, events = detection_of(spec)
        channels = detection.channels_of(head.targets, events)
        self._spec = detection
        self._fields = [events.field(name) for name in head.targets]
        columns = events.column_index
        self._columns = np.array([columns[name] for name in head.targets])
        self._missing = [columns.get(f"{name}.missing") for name in head.targets]
        widths = np.array([anomaly_width(field) for field in self._fields])
        self._starts = np.cumsum(widths) - widths
        numeric = [isinstance(field, NumericField) for field in self._fields]
        self._numeric = np.flatnonzero(numeric)
        self._target = np.array([head.targets.index(each.target) for each in channels])
        self._of_kind = {
            kind: np.array([c for c, each in enumerate(channels) if each.kind == kind], int)
            for kind in ("forecast", "level", "change", "season")
        }
        self._prior = detection.prior_events
        self._fading = float(np.exp(-1 / (2 * detection.prior_events)))
        self._roots = np.sqrt(spreads) * ROOT_OF_NORMAL
        self._minimum = spreads * detection.minimum_spread
        self._parts = {
            name.rpartition(".")[2]: part for name, part in detection_state(spec).slices.items()
        }

    def follow(
        self, rows: FloatRows, lengths: NDArray[Any], parameters: FloatRows, state: FloatRows
    ) -> Deviations:
        """The deviations of the next events of each stream.

        Args:
            rows: [B, T, F], encoded; anything beyond a length.
            lengths: int [B], 1..T.
            parameters: [B, T, P], the forecast of each event, made before it.
            state: [B, S].
        """
        chunk = self._chunk(rows, lengths, parameters, state)
        steps = rows.shape[1]
        decay = _Decay.of(self._spec.memory_events, steps)
        weight = decay.sums(chunk.present, chunk.before["weight"])
        chunk.keep("weight", weight)
        prior = self._prior * self._fading ** (chunk.before["events"] + np.arange(steps))
        chunk.after["events"] = chunk.before["events"] + chunk.lengths[:, np.newaxis]
        own = weight[:, :-1, self._target]
        values, has = self._values(chunk, own > SMALLEST)
        sums = decay.sums(np.where(has, values, 0.0), chunk.before["mean"])
        chunk.keep("mean", sums)
        has &= own > SMALLEST
        errors = np.where(has, values - sums[:, :-1] / np.maximum(own, SMALLEST), 0.0)
        # a channel without a value, of a target that is present, counts as the usual spread
        usual = np.where(chunk.present[..., self._target], self._roots, 0.0)
        roots = np.where(has, np.sqrt(np.abs(errors)), usual)
        sums = decay.sums(roots, chunk.before["spread"])
        chunk.keep("spread", sums)
        prior = prior[..., np.newaxis]
        known = np.maximum(own + prior, SMALLEST)
        spread = np.square((sums[:, :-1] + prior * self._roots) / known / ROOT_OF_NORMAL)
        trust = own / known
        z = errors / np.maximum(spread, self._minimum)
        excess = np.where(has, trust * (np.minimum(np.square(z), ENERGY_LIMIT) - 1.0), 0.0)
        z = np.where(has, np.clip(trust * z, -Z_LIMIT, Z_LIMIT), 0.0)
        statistics, energies = [np.abs(z)], []
        before = np.split(chunk.before["energy"], len(self._spec.scales), axis=1)
        for scale, energy_before in zip(self._spec.scales, before, strict=True):
            slow = _Decay.of(scale, steps)
            energy = slow.sums((1.0 - slow.rate) * excess, energy_before)
            energies.append(energy)
            square = np.maximum(1.0 + energy[:, 1:], 0.0)
            statistics += [np.where(has, square, 0.0), np.where(has, 1.0 / (square + STUCK), 0.0)]
        chunk.keep("energy", np.concatenate(energies, axis=-1))
        packed = [chunk.after[name] for name in self._parts]
        return Deviations(
            z, np.concatenate(statistics, axis=-1), np.concatenate(packed, -1).astype(np.float32)
        )

    def _chunk(
        self, rows: FloatRows, lengths: NDArray[Any], parameters: FloatRows, state: FloatRows
    ) -> _Chunk:
        """The arguments as float64, zero beyond a length."""
        valid = (np.arange(rows.shape[1]) < lengths[:, np.newaxis])[..., np.newaxis]
        present = np.repeat(valid, len(self._fields), axis=-1)
        for index, column in enumerate(self._missing):
            if column is not None:
                present[..., index] &= rows[..., column] == 0
        before = {name: state[:, part].astype(np.float64) for name, part in self._parts.items()}
        return _Chunk(
            np.where(valid, rows[..., self._columns], 0).astype(np.float64),
            present,
            np.where(valid, parameters, 0).astype(np.float64),
            lengths.astype(np.int64),
            before,
            dict(before),
        )

    def _values(self, chunk: _Chunk, seen: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
        """The values [B, T, C] of the channels, and where there are any.

        Args:
            seen: bool [B, T, C], whether an earlier event had the channel's target.
        """
        values = np.zeros((*chunk.values.shape[:2], len(self._target)))
        has = chunk.present[..., self._target]
        for channel in self._of_kind["forecast"]:
            values[..., channel] = self._forecast_error(chunk, int(self._target[channel]))
        x, there = chunk.values[..., self._numeric], chunk.present[..., self._numeric]
        latest = _latest(x, there, chunk.before["last"])
        chunk.keep("last", latest)
        if len(level := self._of_kind["level"]):
            values[..., level] = x
        if len(change := self._of_kind["change"]):
            values[..., change] = x - latest[:, :-1]
            has[..., change] &= seen[..., change]
        if len(season := self._of_kind["season"]):
            before, known = self._season(chunk, latest[:, 1:])
            values[..., season] = x - before
            has[..., season] &= known
        return values, has

    def _season(self, chunk: _Chunk, latest: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """The values [B, T, N] one season before, and whether there are any, [B, T, 1]."""
        length, count = self._spec.season_events or 0, len(self._numeric)
        past = chunk.before["season"].reshape(-1, length, count)
        history = np.concatenate([past, latest], axis=1)
        window = (chunk.lengths[:, np.newaxis] + np.arange(length))[..., np.newaxis]
        after = np.take_along_axis(history, window, axis=1)
        chunk.after["season"] = after.reshape(len(after), -1)
        steps = latest.shape[1]
        events = chunk.before["events"] + np.arange(steps)
        known = (events >= length)[..., np.newaxis]
        return history[:, :steps], known

    def _forecast_error(self, chunk: _Chunk, target: int) -> Floats:
        start, value = self._starts[target], chunk.values[..., target]
        match self._fields[target]:
            case NumericField():
                mean, log_deviation = chunk.parameters[..., start], chunk.parameters[..., start + 1]
                limited = np.clip(log_deviation, -LOG_DEVIATION_LIMIT, LOG_DEVIATION_LIMIT)
                return np.asarray((value - mean) * np.exp(-limited))
            case CategoricalField() as field:
                logits = chunk.parameters[..., start : start + field.codes]
                code = np.rint(value).astype(np.int64)[..., np.newaxis]
                chosen = np.take_along_axis(logits, code, axis=-1)
                nats = np.log(np.exp(logits - chosen).sum(axis=-1))
            case BooleanField():
                logit = chunk.parameters[..., start]
                nats = np.logaddexp(0.0, logit) - value * logit
            case field:
                raise SpecError(f"field {field.name!r}: {field.kind} cannot be a target")
        return np.asarray(np.sqrt(2.0 * np.maximum(nats, 0.0)))


class _Chunk(NamedTuple):
    """The next events of B streams.

    Attributes:
        values: [B, T, D], encoded targets.
        present: bool [B, T, D], whether the event has them.
        parameters: [B, T, P], the forecasts.
        lengths: int64 [B].
        before: by part, the state before the events, [B, size].
        after: the state after them.
    """

    values: Floats
    present: NDArray[np.bool_]
    parameters: Floats
    lengths: NDArray[np.int64]
    before: dict[str, Floats]
    after: dict[str, Floats]

    def keep(self, name: str, sequence: Floats) -> None:
        """Store a part after each row's last event, of its sequence [B, T + 1, size]."""
        self.after[name] = sequence[np.arange(len(sequence)), self.lengths]


class _Decay(NamedTuple):
    """Powers of a decay for T steps, which compute its recurrences.

    Attributes:
        rate: r.
        matrix: [T, T], r^(t-s) for s <= t, else 0.
        powers: [T, 1], r^1 .. r^T.
    """

    rate: float
    matrix: Floats
    powers: Floats

    @staticmethod
    @lru_cache(maxsize=256)
    def of(events: int, steps: int) -> _Decay:
        rate = float(np.exp(-1.0 / events))
        distance = np.subtract.outer(np.arange(steps), np.arange(steps))
        matrix = np.where(distance >= 0, rate ** np.maximum(distance, 0), 0.0)
        powers = np.power(rate, np.arange(1.0, steps + 1))[:, np.newaxis]
        return _Decay(rate, matrix, powers)

    def sums(self, values: NDArray[Any], initial: Floats) -> Floats:
        """y [B, T + 1, K] of y_t = r y_(t-1) + x_t, beginning with the initial y [B, K]."""
        first = initial[:, np.newaxis]
        after = np.matmul(self.matrix, values.astype(np.float64)) + self.powers * first
        return np.concatenate([first, after], axis=1)


def _latest(x: Floats, there: NDArray[np.bool_], last: Floats) -> Floats:
    """The latest value at or before each step, [B, T + 1, N], beginning with `last`."""
    values = np.concatenate([last[:, np.newaxis], x], axis=1)
    steps = np.arange(values.shape[1])[:, np.newaxis]
    taken = np.concatenate([np.ones_like(there[:, :1]), there], axis=1)
    index = np.maximum.accumulate(np.where(taken, steps, 0), axis=1)
    return np.asarray(np.take_along_axis(values, index, axis=1))
