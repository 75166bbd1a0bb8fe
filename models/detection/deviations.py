"""How far the events of a stream are from its own past, in each channel.

Equations, for one target with encoded value x, of which the forecast has mean mu and log deviation
s, and a numeric one's value v as it comes, with r = exp(-1 / memory_events); "before" means from
the events before this one only:

    weight    W_t = r W_(t-1) + 1
    mean      m_t = sum_t / W_t,   sum_t = r sum_(t-1) + v_t
    errors    e = (x - mu) exp(-s), v - m_before, v - v_(the event before), v - s_(a season before),
              of the channels `forecast`, `level`, `change`, `season`
    distance  d = the mean of |e|, with this event
    peak      p = the fourth root of the mean of e^4 of the errors with the sign of this one, and of
              those with the other sign with weight 1 - a; of all errors of a forecast
    spread    q = the square root of the mean of min(|e|, LIMIT d)^2
    trust     a = W_before / (W_before + prior_events)
    season    s_t = v_t if a e / q_before of the channel is usual, else s_(t-L), for a season of L

Means have the weights of the stream, those of the channel `season` start one season later. Where a
stream is often far from its mean, the peak is large: so a |e| / p_before has a light tail, which
separates events beyond all of the past from others. Each direction has its own, since a value may
often fall far and never rise; a new stream has one for both. One outlier makes the peak large for
several times the memory, but not the spread, so that a |e| / q_before orders what follows it.
|e| / p and |e| / q are at most `LARGEST`.

The quantities, larger for what is more unusual, are over all targets together, so that they are not
diluted by many. Of levels, of changes and of seasons:

    single    the root of the mean over the targets of (a e / p_before)^2
    averages  for each of `SCALES`, g = exp(-1 / scale), the root of
              E_t = g E_(t-1) + (1 - g) mean over the targets of (a e / q_before)^2

then the single one of forecasts, and that of runs of equal values (a stuck sensor): a run n is 0
where the value changes, else one more than before; M_t = max(r M_(t-1), n_(t-1) if a run ends at
t) is the longest one before, and k the number of the stream's events before the run. It is the
largest over the targets of

    run       k / (k + prior_events) n / max(M, SHORT_RUN), at most `LARGEST`

A target that an event does not have counts as 0. The mean is stored as two float32, and followed
relative to that before the chunk, so that a large offset of a stream costs no digits. The season
remembers the last usual value at each phase, so that an anomaly is not unusual again one season
later.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.detection.forecasts import Forecasts, steps_last
from models.detection.recurrences import (
    MAX_COUNT,
    MAX_STEPS,
    Bools,
    FloatRows,
    Floats,
    StateParts,
    average_matrices,
    columns_of,
    decay_matrix,
    latest_values,
    solve_recurrence,
    solve_sequence,
)
from models.events.schema import NumericField
from models.spec.detection import SCALES
from models.spec.heads import DEVIATION_LIMIT
from models.spec.layout import detection_of
from models.spec.model import ModelSpec

LIMIT: Final = 5.0
"""Largest error that the spread counts, as a multiple of the distance."""
LARGEST: Final = 20.0
"""Largest deviation."""
RESOLUTION: Final = 1e-7
"""Smallest peak and spread, as a share of the value: float32 resolves no less."""
LEAST_SPREAD: Final = 1e-12
"""Added to it, for values of 0."""
LEAST_FORECAST: Final = 1e-6
"""Smallest peak of forecasts, in predicted deviations."""
USUAL_SQUARE: Final = 16.0
"""The season does not remember a value with a larger (a e / q)^2."""
SHORT_RUN: Final = 8.0
"""A run of equal values up to this length is not longer than usual in any stream."""
LEAST_WEIGHT: Final = 1e-9
"""A past with no more than this weight has no event."""


class Events(NamedTuple):
    """The targets of T events of B streams, and their forecasts; 0 beyond a stream's length.

    Attributes:
        values: [D, B, T], encoded.
        present: bool [D, B, T], whether the event has the target.
        parameters: [P, B, T], the forecasts.
        is_complete: whether every target is present in every event.
        raw: [N, B, T], the values of the numeric targets as they come.
        has_numeric: bool [B, T], whether each event has a numeric target.
    """

    values: Floats
    present: Bools
    parameters: Floats
    is_complete: bool
    raw: Floats
    has_numeric: Bools


class Deviations(NamedTuple):
    """The deviations of T events of B streams.

    Rows are the forecasts of the D targets, the levels of the N numeric ones, their changes, with a
    season their seasons, and their runs.

    Attributes:
        quantities: [Q, B, T].
        errors: [R, B, T], e, 0 where there is none; of runs the events.
        squares: [R, B, T], (a e / p_before)^2; of runs the square of what their quantity is the
            largest of.
        events: the events as they were read.
    """

    quantities: Floats
    errors: Floats
    squares: Floats
    events: Events

    def signed(self) -> Floats:
        """a e / p_before, and what the quantity of runs is the largest of, [R, B, T]."""
        return np.copysign(np.sqrt(self.squares), self.errors)


class Channels:
    """Follows the channels of one model; see the module for the equations.

    Args:
        spec: a model with `detection`.

    Attributes:
        forecasts: of the model's head.
        max_steps: the most events that can be followed at once.
        order: int [C], the row of each channel.
    """

    def __init__(self, spec: ModelSpec):
        detection, head, events = detection_of(spec)
        self.forecasts = Forecasts(spec)
        self._memory_events, self._prior = detection.memory_events, detection.prior_events
        self._season_events = detection.season_events
        # the season's past is known for a season only
        self.max_steps = min(self._season_events or MAX_STEPS, MAX_STEPS)
        columns, targets = events.column_index, head.targets
        self._columns = columns_of([columns[name] for name in targets])
        missing = [(d, columns.get(f"{name}.missing")) for d, name in enumerate(targets)]
        self._missing = [(d, column) for d, column in missing if column is not None]
        numeric = [
            d for d, name in enumerate(targets) if isinstance(events.field(name), NumericField)
        ]
        names = [targets[d] for d in numeric]
        self._raw = columns_of([columns.get(f"{name}.value", columns[name]) for name in names])
        self._targets, self._count, self._numeric = len(targets), len(numeric), columns_of(numeric)
        # with averages
        self._kinds = len(detection.kinds) - 2 if numeric else 0
        # of the forecasts, levels and changes
        self._target_of = np.array([*range(self._targets), *numeric, *numeric])
        rows = [("forecast", name) for name in targets]
        rows += [(kind, name) for kind in detection.kinds[1:] for name in names]
        channels = detection.channels_of(targets, events)
        self.order = np.array([rows.index((each.kind, each.target)) for each in channels])

    def follow(self, rows: FloatRows, parameters: FloatRows, parts: StateParts) -> Deviations:
        """The deviations of the next events of each stream, at most `max_steps`.

        Args:
            rows: [B, T, F], encoded; anything beyond a length.
            parameters: [B, T, P], the forecast of each event, made before it.
            parts: the states, of `models.spec.layout.detection_columns`; updated.
        """
        events = self._events(rows, parameters, parts)
        decay = decay_matrix(self._memory_events, rows.shape[1])
        parts.replace("events", parts.before("events") + parts.lengths)
        errors, weights, latest = self._errors(decay, events, parts)
        season: _Season | None = None
        if self._season_events is not None and self._count:
            season = self._season(self._season_events, decay, events, latest, parts)
            errors = np.concatenate([errors, season.errors])
            weights = np.concatenate([weights, season.weights])
        own = weights[..., :-1]
        trust = own / (own + self._prior)
        ratios = self._ratios(decay, events, errors, weights, trust, parts)
        if season is not None:
            self._remember(season, events, ratios[-self._count :], parts)
        if not self._count:
            forecasts = np.sqrt(ratios.sum(axis=0, keepdims=True) / self._targets)
            return Deviations(forecasts, errors, ratios, events)
        is_same = (events.raw == latest[..., :-1]) & (
            own[self._targets : self._targets + self._count] > LEAST_WEIGHT
        )
        runs, by_run = self._runs(decay[0], is_same, events, parts)
        quantities = self._quantities(events, ratios, by_run, parts)
        # in place of the ratios to the spreads, which are no longer used
        squares = ratios[: len(errors) + self._count]
        np.square(by_run, out=squares[len(errors) :])
        return Deviations(quantities, np.concatenate([errors, runs]), squares, events)

    def _events(self, rows: FloatRows, parameters: FloatRows, parts: StateParts) -> Events:
        values, raw = steps_last(rows[..., self._columns]), steps_last(rows[..., self._raw])
        exact, present = steps_last(parameters), np.ones(values.shape, np.bool_)
        if not parts.is_full:
            present &= np.arange(rows.shape[1]) < parts.lengths[:, np.newaxis]
            values, raw, exact = (np.where(present[0], x, 0.0) for x in (values, raw, exact))
        for index, column in self._missing:
            present[index] &= rows[..., column] == 0
        is_complete = parts.is_full and (not self._missing or bool(present.all()))
        np.minimum(np.maximum(raw, -DEVIATION_LIMIT, out=raw), DEVIATION_LIMIT, out=raw)
        has_numeric = present[0] if is_complete else present[self._numeric].any(axis=0)
        return Events(values, present, exact, is_complete, raw, has_numeric)

    def _errors(
        self, decay: Floats, events: Events, parts: StateParts
    ) -> tuple[Floats, Floats, Floats]:
        """The errors [R, B, T] of forecasts, levels and changes; their weights [R, B, T + 1],
        before each event and after the last one, at least `LEAST_WEIGHT`; and the latest values
        likewise."""
        targets, x = self._targets, events.raw
        start = (parts.before("mean") + parts.before("rest"))[..., np.newaxis]
        followed = np.empty((targets + self._count, *x.shape[1:-1], x.shape[-1] + 1))
        followed[:targets, :, 0], followed[targets:, :, 0] = parts.before_positive("weight"), 0.0
        followed[:targets, :, 1:] = events.present
        np.subtract(x, start, out=followed[targets:, :, 1:])
        if not events.is_complete:
            followed[targets:, :, 1:] *= self._present(events)
        followed = solve_sequence(decay, followed)
        weights, means = followed[:targets], followed[targets:]
        parts.store("weight", weights)
        weights = np.maximum(weights, LEAST_WEIGHT)
        means /= weights[self._numeric]
        means += start
        mean = parts.last(means)
        parts.replace("mean", mean)
        parts.replace("rest", mean - mean.astype(np.float32))
        present = None if events.is_complete else self._present(events)
        latest = latest_values(x, present, parts.before("last"))
        parts.store("last", latest)

        errors = np.empty((targets + 2 * self._count, *x.shape[1:]))
        forecasts = self.forecasts.deviations(events.values, events.parameters)
        np.maximum(forecasts, -DEVIATION_LIMIT, out=forecasts)
        np.minimum(forecasts, DEVIATION_LIMIT, out=errors[:targets])
        np.subtract(x, means[..., :-1], out=errors[targets : targets + self._count])
        np.subtract(x, latest[..., :-1], out=errors[targets + self._count :])
        own = weights[..., :-1]
        if not events.is_complete or bool((own[..., 0] <= LEAST_WEIGHT).any()):
            errors *= self._by_row(events.present & (own > LEAST_WEIGHT))
        return errors, self._by_row(weights), latest

    def _by_row(self, by_target: NDArray[Any]) -> NDArray[Any]:
        """Repeat values of targets [D, ...] for forecasts, levels and changes."""
        return by_target.take(self._target_of, axis=0)

    def _ratios(
        self,
        decay: Floats,
        events: Events,
        errors: Floats,
        weights: Floats,
        trust: Floats,
        parts: StateParts,
    ) -> Floats:
        """(a e / p_before)^2 of all rows, and (a e / q_before)^2 of those of numeric targets."""
        targets, numeric = self._targets, len(errors) - self._targets
        peaks = targets + 2 * numeric
        deviating = errors[targets:]
        distance = np.abs(deviating)
        distances = solve_recurrence(decay, parts.before_positive("distance"), distance)
        parts.store("distance", distances)
        # stored as roots, since float32 has no fourth power of small values
        followed = np.empty((peaks + numeric, *weights.shape[1:]))
        followed[:peaks, :, 0] = parts.before("peak")
        followed[peaks:, :, 0] = parts.before("spread")
        signed, limited = followed[:peaks, :, 1:], followed[peaks:, :, 1:]
        signed[:targets] = errors[:targets]
        np.maximum(deviating, 0.0, out=signed[targets : len(errors)])
        np.minimum(deviating, 0.0, out=signed[len(errors) :])
        np.multiply(distances[..., 1:], LIMIT / weights[targets:, :, 1:], out=limited)
        np.minimum(limited, distance, out=limited)
        np.square(followed, out=followed)
        np.square(followed[:peaks], out=followed[:peaks])
        followed = solve_sequence(decay, followed)
        last = np.sqrt(parts.last(followed))
        parts.replace("peak", np.sqrt(last[:peaks]))
        parts.replace("spread", last[peaks:])
        # p^2 and q^2
        past, own = followed[..., :-1], weights[..., :-1]
        scales = np.empty((len(errors) + numeric, *errors.shape[1:]))
        by_peak, by_spread = scales[: len(errors)], scales[len(errors) :]
        above, below = past[targets : len(errors)], past[len(errors) : peaks]
        by_peak[:targets], signed = past[:targets], by_peak[targets:]
        is_above = deviating > 0.0
        np.multiply(np.where(is_above, below, above), 1.0 - trust[targets:], out=signed)
        signed += np.where(is_above, above, below)
        np.sqrt(np.divide(by_peak, own, out=by_peak), out=by_peak)
        np.divide(past[peaks:], own[targets:], out=by_spread)
        least = np.abs(events.raw)
        least *= RESOLUTION
        least += LEAST_SPREAD
        np.square(least, out=least)
        by_target = scales[targets:].reshape(2 * self._kinds, *least.shape)
        np.maximum(by_target, least, out=by_target)
        np.maximum(scales[:targets], LEAST_FORECAST**2, out=scales[:targets])
        squared = np.square(errors)
        np.divide(squared, by_peak, out=by_peak)
        np.divide(squared[targets:], by_spread, out=by_spread)
        np.minimum(scales, LARGEST**2, out=scales)
        np.square(trust, out=trust)
        by_peak *= trust
        by_spread *= trust[targets:]
        return scales

    def _runs(
        self, fade: Floats, is_same: Bools, events: Events, parts: StateParts
    ) -> tuple[Floats, Floats]:
        """The run of each numeric target [N, B, T], and what its quantity is the largest of.

        Args:
            fade: [T + 1], r^0 .. r^T.
            is_same: bool [N, B, T], whether the value is the one before.
        """
        before, before_longest = parts.before_positive("run"), parts.before("longest")
        if events.is_complete and not is_same.any():
            # no run but those before the chunk, which end with its first event
            longest = np.maximum(before_longest * fade[-1], before * fade[-2])
            parts.replace("longest", longest)
            parts.replace("run", 0.0)
            none = np.zeros(is_same.shape)
            return none, none
        at: NDArray[Any] = np.arange(1.0, len(fade))
        passed = parts.before("events").T + at - 1.0
        is_end = ~is_same
        if not events.is_complete:
            present = self._present(events)
            at, is_end = np.cumsum(present, axis=-1), is_end & present
        runs, longest = np.empty((2, *before.shape, len(fade)))
        # where the latest run up to each event starts
        starts = np.where(is_end, at, -before[..., np.newaxis])
        np.maximum.accumulate(starts, axis=-1, out=starts)
        runs[..., 0], longest[..., 0] = before, before_longest
        np.subtract(at, starts, out=runs[..., 1:])
        np.multiply(runs[..., :-1], is_end, out=longest[..., 1:])
        longest /= fade
        np.maximum.accumulate(longest, axis=-1, out=longest)
        longest *= fade
        parts.replace("run", np.minimum(parts.last(runs), MAX_COUNT))
        parts.store("longest", longest)
        runs = runs[..., 1:]
        past = np.maximum(passed - runs, 0.0)
        ratios = runs / np.maximum(longest[..., 1:], SHORT_RUN)
        ratios *= past / (past + self._prior)
        if not events.is_complete:
            ratios *= present
        return runs, np.minimum(ratios, LARGEST, out=ratios)

    def _present(self, events: Events) -> Bools:
        return np.asarray(events.present[self._numeric])

    def _quantities(
        self,
        events: Events,
        ratios: Floats,
        by_run: Floats,
        parts: StateParts,
    ) -> Floats:
        """The quantities [Q, B, T], of what `_ratios` and `_runs` give."""
        targets, kinds, shape = self._targets, self._kinds, ratios.shape[1:]
        by_kind = ratios[targets:].reshape(2 * kinds, -1, *shape).sum(axis=1)
        by_kind /= self._count
        averaged = solve_recurrence(
            average_matrices(SCALES, shape[1]), parts.before("average"), by_kind[kinds:]
        )
        parts.store("average", averaged)
        quantities = np.empty((kinds * (1 + len(SCALES)) + 2, *shape))
        roots, own = quantities[:-1], quantities[:-2].reshape(kinds, -1, *shape)
        own[:, 0] = by_kind[:kinds]
        own[:, 1:] = averaged[..., 1:].reshape(-1, kinds, *shape).swapaxes(0, 1)
        np.divide(ratios[:targets].sum(axis=0), targets, out=quantities[-2])
        by_run.max(axis=0, out=quantities[-1])
        np.sqrt(np.maximum(roots, 0.0, out=roots), out=roots)
        if not events.is_complete:
            quantities[:-2] *= events.has_numeric
        return quantities

    def _season(
        self,
        length: int,
        decay: Floats,
        events: Events,
        latest: Floats,
        parts: StateParts,
    ) -> _Season:
        """The values of the last season at the phases of the next events; in the first season, the
        latest value, from which no error is counted."""
        batch, steps = events.raw.shape[1:]
        passed = parts.before("events").T + np.arange(steps)
        memory = parts.before("season").reshape(-1, length, batch).transpose(0, 2, 1)
        is_known = passed >= length
        past = memory[..., :steps]
        if not is_known.all():
            past = np.where(is_known, past, latest[..., :-1])
        has = self._present(events) & is_known
        weights = solve_recurrence(decay, parts.before("season_weight"), has)
        parts.store("season_weight", weights)
        errors = (events.raw - past) * has
        return _Season(memory, past, errors, np.maximum(weights, LEAST_WEIGHT, out=weights))

    def _remember(
        self, season: _Season, events: Events, limited: Floats, parts: StateParts
    ) -> None:
        """Store the values for the next season: an unusual or missing one does not replace the
        last usual one at its phase."""
        usual = limited <= USUAL_SQUARE
        if not events.is_complete:
            usual &= self._present(events)
        new = np.where(usual, events.raw, season.past)
        parts.store_window("season", np.concatenate([season.memory, new], axis=-1))


class _Season(NamedTuple):
    """The season's memory [N, B, L], its values [N, B, T] at the phases of the next events, the
    errors [N, B, T] from them, and their weights [N, B, T + 1]."""

    memory: Floats
    past: Floats
    errors: Floats
    weights: Floats
