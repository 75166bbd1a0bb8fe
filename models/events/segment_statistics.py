"""Statistics of many segments of streams at once: the bits of `FieldStatistics.encode` of each.

A value depends on the one before it in its segment, so each step takes the next value of every
segment and of every field with `normalisation` in one NumPy operation after another, in the order
of `models.events.statistics.normalise`. The few longest segments are left to that function, which
is faster for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.events.schema import NumericField
from models.events.statistics import (
    MOMENT_WORDS,
    Bools,
    FieldStatistics,
    Floats,
    Words,
    follow_season,
    normalise,
)

WIDE: Final = 64
"""Values at a time from which a step of NumPy is faster than Python."""
MAX_FIELDS: Final = 8
"""Fields that are normalised together, which bounds the memory."""


class SegmentStatistics(NamedTuple):
    """The statistics of G segments, of which those of some are kept.

    Attributes:
        starts, stops: int64 [G], the events of each segment.
        before: by segment, the words of its stream's statistics before it, int64 [W]; 0 for others.
        wanted: int64 [S], the segments whose statistics are kept.
        after: int64 [S, W], the statistics after these; written.
    """

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    before: Mapping[int, Words]
    wanted: NDArray[np.int64]
    after: Words


def encode_statistics(
    fields: Sequence[FieldStatistics],
    segments: SegmentStatistics,
    absent: Bools | None,
    numbers: Floats,
    rows: NDArray[np.float32],
) -> None:
    """Standardise the fields in `numbers`, and write their other columns to `rows`.

    Args:
        absent: bool [M, T], as of `Block.absent`; None if nothing is absent.
        numbers: float64 [K, T], transformed.
        rows: float32 [T, F].
    """
    for at, words in enumerate(map(segments.before.get, segments.wanted.tolist())):
        if words is not None:
            segments.after[at] = words
    normalised = [each for each in fields if each.field.normalisation is not None]
    for first in range(0, len(normalised), MAX_FIELDS):
        group = normalised[first : first + MAX_FIELDS]
        values = numbers[[each.row for each in group]]
        missing = [_absence(each, absent) for each in group]
        scored, means, deviations = _normalise(group, values, missing, segments)
        for at, each in enumerate(group):
            rows[:, each.value] = each.share(values[at], missing[at])
            rows[:, each.mean], rows[:, each.std] = means[at], deviations[at]
            if each.field.season_events is not None:
                moments = means[at], deviations[at]
                rows[:, each.season] = _seasons(each, values[at], missing[at], moments, segments)
            numbers[each.row] = scored[at]
    for each in fields:
        if each.field.normalisation is None:
            rows[:, each.season] = _seasons(
                each, numbers[each.row], _absence(each, absent), None, segments
            )


def _absence(field: FieldStatistics, absent: Bools | None) -> Bools | None:
    """Where the values of a field are absent, bool [T]; None if none is."""
    return None if absent is None or field.absent is None else absent[field.absent]


def _seasons(
    each: FieldStatistics,
    values: Floats,
    absent: Bools | None,
    moments: tuple[Floats, Floats] | None,
    segments: SegmentStatistics,
) -> Floats:
    """The seasons of a field, float64 [T], by `follow_season` of each segment.

    Args:
        moments: mean and deviation as of each event, [T]; None for those of the field.
    """
    field, seasons = each.field, np.empty_like(values)
    own = slice(each.start if moments is None else each.start + MOMENT_WORDS, each.stop)
    kept = dict(zip(segments.wanted.tolist(), segments.after[:, own], strict=True))
    mean, std = each.constants if moments is None else moments
    cuts = zip(segments.starts.tolist(), segments.stops.tolist(), strict=True)
    for segment, (start, stop) in enumerate(cuts):
        words = kept.get(segment)
        if words is None:
            before = segments.before.get(segment)
            words = (
                np.zeros(own.stop - own.start, np.int64) if before is None else before[own].copy()
            )
        part = slice(start, stop)
        seasons[part] = follow_season(
            field,
            values[part],
            None if absent is None else absent[part],
            mean[part] if isinstance(mean, np.ndarray) else mean,
            std[part] if isinstance(std, np.ndarray) else std,
            words,
        )
    return seasons


def _normalise(
    fields: Sequence[FieldStatistics],
    values: Floats,
    absent: Sequence[Bools | None],
    segments: SegmentStatistics,
) -> Floats:
    """Standardised values, means and deviations of N fields, float64 [3, N, T].

    Args:
        values: float64 [N, T].
        absent: of each field, bool [T]; None if no value is absent.
    """
    results = np.empty((3, *values.shape))
    moments = np.zeros((len(fields), len(segments.starts), MOMENT_WORDS), np.int64)
    for segment, words in segments.before.items():
        for at, each in enumerate(fields):
            moments[at, segment] = words[each.start : each.start + MOMENT_WORDS]
    steps = _normalise_side_by_side(fields, values, absent, segments, moments, results)
    for segment in np.flatnonzero(segments.stops - segments.starts > steps).tolist():
        part = slice(int(segments.starts[segment]) + steps, int(segments.stops[segment]))
        for at, each in enumerate(fields):
            own, words = absent[at], moments[at, segment]
            own = None if own is None else own[part]
            results[:, at, part] = normalise(each.field, values[at, part], own, words)
    for at, each in enumerate(fields):
        own_words = slice(each.start, each.start + MOMENT_WORDS)
        segments.after[:, own_words] = moments[at, segments.wanted]
    return results


def _normalise_side_by_side(
    fields: Sequence[FieldStatistics],
    values: Floats,
    absent: Sequence[Bools | None],
    segments: SegmentStatistics,
    moments: Words,
    results: Floats,
) -> int:
    """Normalise the first values of each segment, while there are segments enough.

    Args:
        moments: int64 [N, G, 3], updated.
        results: float64 [3, N, T], written.

    Returns:
        How many values of each.
    """
    lengths = segments.stops - segments.starts
    order = np.argsort(-lengths, kind="stable")
    enough = -(-WIDE // len(fields))
    if len(order) < enough:
        return 0
    steps = int(lengths[order[enough - 1]])
    missing = None
    if any(each is not None for each in absent):
        nowhere = np.zeros(values.shape[1], np.bool_)
        missing = np.stack([nowhere if each is None else each for each in absent])
    follower = _Follower([each.field for each in fields], moments[:, order])
    starts = segments.starts[order]
    for step, active in enumerate(np.searchsorted(-lengths[order], -np.arange(steps)).tolist()):
        places = starts[:active] + step
        there = None if missing is None else ~missing[:, places]
        results[:, :, places] = follower.follow(values[:, places], there)
    moments[:, order] = follower.moments()
    return steps


class _Follower:
    """Follows the moments of N fields of G segments, as `models.events.statistics.normalise`.

    Args:
        fields: fitted fields with `normalisation`.
        moments: int64 [N, G, 3].
    """

    def __init__(self, fields: Sequence[NumericField], moments: Words):
        options = [each.normalisation for each in fields if each.normalisation is not None]
        std = _column([each.std for each in options])
        self._memory = _column([each.memory_events for each in options])
        self._prior_events = _column([each.prior_events for each in options])
        self._clip = _column([each.clip for each in options])
        self._prior = std * std
        self._minimum = _column([each.minimum_std for each in options]) * std
        self._count = moments[..., 0].copy()
        values = np.ascontiguousarray(moments[..., 1:]).view(np.float64)
        self._variance = values[..., 1].copy()
        is_new = self._count == 0
        self._mean = np.where(is_new, _column([each.mean for each in fields]), values[..., 0])
        self._std = self._deviation(self._count, self._variance)
        self._std = np.where(is_new, _column([each.std for each in fields]), self._std)

    def follow(self, x: Floats, there: Bools | None) -> tuple[Floats, Floats, Floats]:
        """Follow the next value of the first A segments.

        Args:
            x: float64 [N, A].
            there: bool [N, A], whether there is a value; None if everywhere.

        Returns:
            The standardised values, and means and deviations after them, float64 [N, A].
        """
        now = np.s_[:, : x.shape[1]]
        mean, variance, std = self._mean[now], self._variance[now], self._std[now]
        deviation = x - mean
        z = deviation / std
        clipped = np.minimum(np.maximum(z, -self._clip), self._clip)
        deviation = np.where(clipped != z, clipped * std, deviation)
        count = self._count[now] + 1
        share = 1.0 / np.minimum(count, self._memory)
        next_mean = np.where(count == 1, x, mean + share * deviation)
        square = (1.0 - share) * deviation * deviation
        next_variance = variance + share * (square - variance)
        next_std = self._deviation(count, next_variance)
        if there is not None:
            clipped = np.where(there, clipped, 0.0)
            count = np.where(there, count, count - 1)
            next_mean = np.where(there, next_mean, mean)
            next_variance = np.where(there, next_variance, variance)
            next_std = np.where(there, next_std, std)
        self._count[now], self._mean[now] = count, next_mean
        self._variance[now], self._std[now] = next_variance, next_std
        return clipped, next_mean, next_std

    def moments(self) -> Words:
        """The moments of all segments, int64 [N, G, 3]; 0 without a value."""
        known = self._count > 0
        mean, variance = (
            np.where(known, column, 0.0).view(np.int64) for column in (self._mean, self._variance)
        )
        return np.stack([self._count, mean, variance], axis=-1)

    def _deviation(self, count: Words, variance: Floats) -> Floats:
        rest = np.maximum(0.0, 1.0 - count / self._prior_events)
        deviation = np.sqrt(rest * self._prior + (1.0 - rest) * variance)
        return np.asarray(np.maximum(deviation, self._minimum))


def _column(values: Sequence[float | None]) -> NDArray[Any]:
    """Numbers of N fields, [N, 1]."""
    return np.array(values)[:, np.newaxis]
