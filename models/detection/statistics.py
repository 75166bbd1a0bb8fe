"""Deviations of an event in each channel from its stream's past, and statistics of them.

Equations, for one target with encoded value x, the forecast's mean mu and log deviation s, and the
decay r = exp(-1 / memory_events); "before" means from the events before this one only:

    values   v = (x - mu) exp(-s),  x,  x - x_before,  x - s_(a season before), by channel
    mean     m_t = sum_t / W_t,     sum_t = r sum_(t-1) + v_t,   W_t = r W_(t-1) + 1
    errors   e = v - m_before
    spread   (q / c)^2,  c = E sqrt|N(0, 1)|,  where q is the mean of sqrt|e| with the weights of
             the events before, and of the usual spread with weight P
    prior    P_t = exp(-1 / (2 P_0)) P_(t-1),  P_0 = prior_events
    trust    a = W_before / (W_before + P_before)
    z        a e / max(spread, minimum), within -30 to 30
    energy   E_t = g E_(t-1) + (1 - g) a (min(z_t^2 / a^2, 25) - q u),  g = exp(-1 / scale), where
             q is the usual mean square of the fitted streams, and u = min((own / s)^2, 25) of the
             stream's own spread, without prior and minimum, and the spread s in z
    square   q + a E_t
    season   s_t = x_t if |z_t| and the squares of the channel `season` are usual, else s_(t-L), for
             a season of L events; its value is v_t = x_t - s_(t-L)

In a new stream `trust` shrinks deviations towards 0 and squares towards the usual one, and a
target's first event has no statistics. The mean of square roots is a robust spread: one outlier
hardly moves it, and many zeros do not make it zero. The statistics of a channel, larger for what is
more unusual, are |z|, for each scale the square, and its inverse: of the channels `change`, or of
all if there are none. (In other channels a square is also small after a change of the level, whose
large errors are in the spread.) An event without the target changes only the decays. The season
remembers the last usual value at each phase, so that an anomaly is not unusual again one season
later. A stream that is nearly constant is not too quiet, since `u` compares it with its own spread.

Every recurrence y_t = r y_(t-1) + x_t is a product with the matrix of the powers of r, so that a
chunk needs no loop over its steps. Arrays have the channels first and the steps last, so that
NumPy's inner loops are long. Pure NumPy in float64; states are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.detection.forecasts import Forecasts, steps_last
from models.events.schema import NumericField
from models.spec.detection import ROOT_OF_NORMAL
from models.spec.heads import DEVIATION_LIMIT as LARGEST
from models.spec.layout import detection_of
from models.spec.model import ModelSpec

Floats = NDArray[np.float64]
FloatRows = NDArray[np.float32]


@lru_cache(maxsize=256)
def decay_matrix(events: int, steps: int) -> Floats:
    """The matrix [T + 1, T + 1] of y_t = r y_(t-1) + x_t with r = exp(-1 / events): the product of
    (y_0, x_1 .. x_T) with it is (y_0 .. y_T)."""
    rate = float(np.exp(-1.0 / events))
    distance = np.subtract.outer(np.arange(steps + 1), np.arange(steps + 1)).T
    return np.where(distance >= 0, rate ** np.maximum(distance, 0), 0.0)


@lru_cache(maxsize=64)
def averages(scales: tuple[int, ...], steps: int) -> Floats:
    """The matrices [scales, T + 1, T + 1] of y_t = g y_(t-1) + (1 - g) x_t, g = exp(-1 / scale)."""
    if not scales:
        return np.empty((0, steps + 1, steps + 1))
    matrices = np.stack([decay_matrix(scale, steps) for scale in scales])
    matrices[:, 1:] *= 1.0 - np.exp(-1.0 / np.array(scales))[:, np.newaxis, np.newaxis]
    return matrices


def sums(matrix: Floats, initial: Floats, values: NDArray[Any]) -> Floats:
    """y of a recurrence, beginning with the initial y.

    Args:
        matrix: [T + 1, T + 1], or one for each scale.
        initial: [K, B]; with scales [scales K, B].
        values: x, [K, B, T].

    Returns:
        [K, B, T + 1]; with scales [scales K, B, T + 1].
    """
    size, batch, steps = values.shape
    lead = matrix.shape[:-2]
    sequence = np.empty((*lead, size, batch, steps + 1))
    sequence[..., 0], sequence[..., 1:] = initial.reshape(*lead, size, batch), values
    product = np.matmul(sequence.reshape(*lead, size * batch, steps + 1), matrix)
    return np.asarray(product.reshape(-1, batch, steps + 1))


def sums_of(matrix: Floats, sequence: Floats) -> Floats:
    """y of a recurrence, of the initial y and x [..., T + 1]."""
    product = sequence.reshape(-1, len(matrix)) @ matrix
    return np.asarray(product.reshape(sequence.shape))


def latest_values(x: Floats, is_present: NDArray[np.bool_] | None, last: Floats) -> Floats:
    """The latest value at or before each step, [N, B, T + 1], beginning with `last`.

    Args:
        x: [N, B, T].
        is_present: bool [N, B, T], whether there is a value; None if everywhere.
        last: [N, B].
    """
    values = np.concatenate([last[..., np.newaxis], x], axis=-1)
    if is_present is None:
        return values
    has_value = np.concatenate([np.ones_like(is_present[..., :1]), is_present], axis=-1)
    index = np.maximum.accumulate(np.where(has_value, np.arange(values.shape[-1]), 0), axis=-1)
    return np.asarray(np.take_along_axis(values, index, axis=-1))


class StateParts:
    """The parts of the states of B streams, before T events and after each row's last one.

    Args:
        state: [B, S].
        lengths: int [B], 0..T.
        columns: of each part, by name.

    Attributes:
        lengths: as given.
        is_full: whether they are all T.
        after: float32 [B, S]; parts that are not stored keep their values.
    """

    def __init__(
        self,
        state: FloatRows,
        lengths: NDArray[Any],
        steps: int,
        columns: Mapping[str, slice],
    ):
        # parts are rows, so that each is contiguous
        self._before = state.T.astype(np.float64, order="C")
        self._after = state.T.astype(np.float32, order="C")
        self._columns, self.lengths = columns, lengths
        self.is_full = int(lengths.min()) == steps
        self._rows = np.arange(len(state))
        self.after: FloatRows = self._after.T

    def before(self, name: str) -> Floats:
        """A part before the events, [size, B]."""
        return np.asarray(self._before[self._columns[name]])

    def last(self, sequence: Floats) -> Floats:
        """The values [size, B] after each row's last event, of [size, B, T + 1] before the events
        and after each."""
        return sequence[..., -1] if self.is_full else sequence[:, self._rows, self.lengths]

    def store(self, name: str, sequence: Floats) -> None:
        """Store a part, of its values [size, B, T + 1] before the events and after each."""
        self.replace(name, self.last(sequence))

    def replace(self, name: str, values: Floats) -> None:
        """Store a part, of its values [size, B] after each row's last event."""
        self._after[self._columns[name]] = values

    def add(self, name: str, values: NDArray[Any]) -> None:
        """Add integers [B] to a part of one number."""
        self._after[self._columns[name].start] += values

    def store_window(self, name: str, history: Floats) -> None:
        """Store a part of N x L numbers, of its history [N, B, L + T]: the last L up to the
        length."""
        size = self._columns[name].stop - self._columns[name].start
        length = size // max(len(history), 1)
        if self.is_full:
            window = history[..., history.shape[-1] - length :]
        else:
            within = self.lengths[:, np.newaxis] + np.arange(length)
            window = history[:, self._rows[:, np.newaxis], within]
        self.after[:, self._columns[name]] = window.transpose(1, 0, 2).reshape(-1, size)


def columns_of(indexes: Sequence[int]) -> slice | NDArray[np.int64]:
    """Indexes as a slice, which makes views, where they have equal distances."""
    if len(indexes) == 1:
        return slice(indexes[0], indexes[0] + 1)
    distances = {b - a for a, b in pairwise(indexes)}
    if len(distances) == 1 and (step := distances.pop()) > 0:
        return slice(indexes[0], indexes[-1] + 1, step)
    return np.array(indexes, np.int64)


Bools = NDArray[np.bool_]

Z_LIMIT: Final = 30.0
ENERGY_LIMIT: Final = 25.0
UNUSUAL_Z: Final = 4.0
UNUSUAL_SQUARE: Final = 4.0
"""The season does not remember a value with a larger deviation from the season before, or a larger
mean square of them, as a multiple of the usual one."""
STUCK: Final = 0.05
"""Added to a mean square before it is inverted, which bounds the inverse."""
SMALLEST: Final = 1e-9
MAX_STEPS: Final = 32
"""Events that are computed at once: products of larger matrices are slower than several ones, and
BLAS would compute them in threads."""


class Events(NamedTuple):
    """The targets of T events of B streams, and their forecasts; 0 beyond a stream's length.

    Attributes:
        values: [D, B, T], encoded.
        present: bool [D, B, T], whether the event has the target.
        parameters: [P, B, T], the forecasts.
        is_complete: whether every target is present in every event.
        raw: [N, B, T], the values of the numeric targets as they come.
    """

    values: Floats
    present: Bools
    parameters: Floats
    is_complete: bool
    raw: Floats


class Deviations(NamedTuple):
    """The deviations of T events of B streams.

    Attributes:
        z: [C, B, T], by channel; 0 where the event has none.
        errors: [C, B, T], encoded, how far each value is from the stream's mean; 0 likewise.
        statistics: [K, B, T]: |z| of every channel, then for each scale the square of every
            channel, then for each scale its inverse of the channels that may be too quiet; 0 where
            the event has none.
        events: the events as they were read.
    """

    z: Floats
    errors: Floats
    statistics: Floats
    events: Events


class Channels:
    """Follows the channels of one model; see the module for the equations.

    Args:
        spec: a fitted model with `detection`.
        spreads: by channel, the usual spread.
        squares: by channel, the usual mean square of its deviations.

    Attributes:
        forecasts: of the model's head.
        max_steps: the most events that can be followed at once.
    """

    def __init__(self, spec: ModelSpec, spreads: Floats, squares: Floats):
        detection, head, events = detection_of(spec)
        channels = detection.channels_of(head.targets, events)
        self.forecasts = Forecasts(spec)
        self._scales = detection.scales
        self._memory_events, self._season_events = detection.memory_events, detection.season_events
        # the matrices grow with the steps, and the season's past is known for a season only
        self.max_steps = min(self._season_events or MAX_STEPS, MAX_STEPS)
        self._targets, self._count = len(head.targets), len(channels)
        columns = events.column_index
        self._columns = columns_of([columns[name] for name in head.targets])
        missing = [(d, columns.get(f"{name}.missing")) for d, name in enumerate(head.targets)]
        self._missing = [(d, column) for d, column in missing if column is not None]
        fields = [events.field(name) for name in head.targets]
        numeric = [d for d, field in enumerate(fields) if isinstance(field, NumericField)]
        self._numeric = columns_of(numeric)
        names = [head.targets[d] for d in numeric]
        self._raw = columns_of([columns.get(f"{name}.value", columns[name]) for name in names])
        self._target = np.array([head.targets.index(each.target) for each in channels])
        self._of_kind = {
            kind: columns_of([c for c, each in enumerate(channels) if each.kind == kind])
            for kind in {each.kind for each in channels}
        }
        self._quiet = self._of_kind.get("change", slice(None))
        self._quiet_count = len(self._target[self._quiet])
        scales = len(detection.scales)
        self._statistics = self._count * (1 + scales) + self._quiet_count * scales
        self._prior = detection.prior_events
        self._roots = (np.sqrt(spreads) * ROOT_OF_NORMAL)[:, np.newaxis, np.newaxis]
        self._minimum = (spreads * detection.minimum_spread)[:, np.newaxis, np.newaxis]
        self._squares = squares[:, np.newaxis, np.newaxis]

    def _events(self, rows: FloatRows, parameters: FloatRows, parts: StateParts) -> Events:
        values, raw = steps_last(rows[..., self._columns]), steps_last(rows[..., self._raw])
        exact, present = steps_last(parameters), np.ones(values.shape, np.bool_)
        if not parts.is_full:
            present &= np.arange(rows.shape[1]) < parts.lengths[:, np.newaxis]
            values, raw, exact = (np.where(present[0], x, 0.0) for x in (values, raw, exact))
        for index, column in self._missing:
            present[index] &= rows[..., column] == 0
        is_complete = parts.is_full and (not self._missing or bool(present.all()))
        return Events(values, present, exact, is_complete, raw)

    def follow(self, rows: FloatRows, parameters: FloatRows, parts: StateParts) -> Deviations:
        """The deviations of the next events of each stream, at most `max_steps`.

        Args:
            rows: [B, T, F], encoded; anything beyond a length.
            parameters: [B, T, P], the forecast of each event, made before it.
            parts: the states, of `models.spec.layout.detection_columns`; updated.
        """
        events, steps = self._events(rows, parameters, parts), rows.shape[1]
        decay = decay_matrix(self._memory_events, steps)
        weights = sums(decay, parts.before("weight"), events.present)
        parts.store("weight", weights)
        count = parts.before("events").T + np.arange(steps)
        parts.add("events", parts.lengths)
        own = np.maximum(weights[..., :-1], SMALLEST)
        prior = self._prior * np.exp(count * (-0.5 / self._prior))
        known = own + prior

        values, has, season = self._values(events, own > SMALLEST, count, parts)
        means = sums(decay, parts.before("mean"), values)
        parts.store("mean", means)
        errors = means[..., :-1] / self._by_channel(own)
        np.subtract(values, errors, out=errors)
        if has is not None:
            errors *= has
        roots = np.sqrt(np.abs(errors))
        if has is not None:
            # a channel without a value, of a target that is present, counts as the usual spread
            roots += (self._by_channel(events.present) & ~has) * self._roots
        roots = sums(decay, parts.before("spread"), roots)
        parts.store("spread", roots)
        spread = roots[..., :-1] + prior * self._roots
        spread /= self._by_channel(known * ROOT_OF_NORMAL)
        np.square(spread, out=spread)
        np.maximum(spread, self._minimum, out=spread)
        z = errors / spread
        usual = roots[..., :-1] / self._by_channel(own * ROOT_OF_NORMAL)
        np.square(np.divide(np.square(usual, out=usual), spread, out=usual), out=usual)
        np.minimum(usual, ENERGY_LIMIT, out=usual)
        usual *= self._squares

        trust = self._by_channel(own / known)
        excess = np.minimum(np.square(z, out=spread), ENERGY_LIMIT, out=spread)
        excess -= usual
        excess *= trust
        if has is not None:
            excess *= has
        z *= trust
        np.maximum(np.minimum(z, Z_LIMIT, out=z), -Z_LIMIT, out=z)
        statistics = np.empty((self._statistics, *z.shape[1:]))
        single, square, inverse = self._parts_of(statistics)
        np.abs(z, out=single)
        energy = sums(averages(self._scales, steps), parts.before("energy"), excess)
        parts.store("energy", energy)
        np.multiply(energy[..., 1:].reshape(square.shape), trust, out=square)
        square += self._squares
        np.maximum(square, 0.0, out=square)
        np.add(square[:, self._quiet], STUCK, out=inverse)
        np.reciprocal(inverse, out=inverse)
        if season is not None:
            self._remember(season, events, z, square, parts)
        if has is not None:
            single *= has
            square *= has
            inverse *= has[self._quiet]
        return Deviations(z, errors, statistics, events)

    def by_channel(self, weights: Floats) -> Floats:
        """The sum [C, B, T] over each channel of weights [K, B, T] of the statistics."""
        single, square, inverse = self._parts_of(weights)
        total = single + square.sum(axis=0)
        total[self._quiet] += inverse.sum(axis=0)
        return np.asarray(total)

    def _parts_of(
        self, statistics: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Views of statistics [K, B, T]: of |z| [C, B, T], the squares [scales, C, B, T] and the
        inverses [scales, Q, B, T]."""
        channels, scales, rest = self._count, len(self._scales), statistics.shape[1:]
        squares = statistics[channels : channels * (1 + scales)]
        inverses = statistics[channels * (1 + scales) :]
        return (
            statistics[:channels],
            squares.reshape(scales, channels, *rest),
            inverses.reshape(scales, self._quiet_count, *rest),
        )

    def _by_channel(self, by_target: NDArray[Any]) -> NDArray[Any]:
        """Repeat values of targets [D, ...] by channel [C, ...]; of a single target [1, ...]."""
        return by_target if self._targets == 1 else by_target.take(self._target, axis=0)

    def _values(
        self, events: Events, seen: Bools, count: Floats, parts: StateParts
    ) -> tuple[Floats, Bools | None, _Season | None]:
        """The values [C, B, T] of the channels, 0 where there is none; where there is one that can
        be compared with others, [C, B, T], None for everywhere; and the season's past.

        Args:
            seen: bool [D, B, T], whether an earlier event had the target.
            count: [B, T], events of the stream before each.
        """
        x, season = events.values[self._numeric], None
        is_present = None if events.is_complete else events.present[self._numeric]
        latest = latest_values(x, is_present, parts.before("last"))
        parts.store("last", latest)
        if self._season_events is not None:
            season = self._past(self._season_events, latest, count, parts)
        values = np.empty((self._count, *x.shape[1:]))
        for kind, at in self._of_kind.items():
            match kind:
                case "forecast":
                    values[at] = self.forecasts.deviations(events.values, events.parameters)
                case "level":
                    values[at] = x
                case "change":
                    np.subtract(x, latest[..., :-1], out=values[at])
                case "season" if season is not None:
                    np.subtract(x, season.past, out=values[at])
        np.maximum(np.minimum(values, LARGEST, out=values), -LARGEST, out=values)
        has_all = events.is_complete and bool(seen.all())
        if has_all and (season is None or season.is_known.all()):
            return values, None, season
        values *= self._by_channel(events.present)
        has = np.empty(values.shape, np.bool_)
        has[...] = self._by_channel(events.present & seen)
        if season is not None:
            has[self._of_kind["season"]] &= season.is_known
        for kind in ("change", "season"):
            if kind in self._of_kind:
                values[self._of_kind[kind]] *= has[self._of_kind[kind]]
        return values, has, season

    def _past(self, length: int, latest: Floats, count: Floats, parts: StateParts) -> _Season:
        """Values of the last season at the phases of the next events; in the first season, the
        latest value."""
        steps, batch = count.shape[1], len(count)
        memory = parts.before("season").reshape(-1, length, batch).transpose(0, 2, 1)
        known = count >= length
        past = memory[..., :steps]
        if not known.all():
            past = np.where(known, past, latest[..., :-1])
        return _Season(memory, past, known)

    def _remember(
        self, season: _Season, events: Events, z: Floats, square: Floats, parts: StateParts
    ) -> None:
        """Store the values for the next season: an unusual or missing one does not replace the
        last usual one at its phase."""
        at = self._of_kind["season"]
        usual = np.abs(z[at]) <= UNUSUAL_Z
        usual &= (square[:, at] <= UNUSUAL_SQUARE * self._squares[at]).all(axis=0)
        if not events.is_complete:
            usual &= events.present[self._numeric]
        new = np.where(usual, events.values[self._numeric], season.past)
        parts.store_window("season", np.concatenate([season.memory, new], axis=-1))


class _Season(NamedTuple):
    """The season's memory [N, B, L], its values [N, B, T] at the phases of the next events, and
    whether [B, T] they are a season old."""

    memory: Floats
    past: Floats
    is_known: Bools
