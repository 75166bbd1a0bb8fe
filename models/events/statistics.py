"""Encoding of a number by the stream's own earlier values: running mean and deviation, season.

The statistics are parts of the stream's state, in float64 and int64. Every event is processed in
the same order of operations wherever a stream is cut, so that the results are the same bits.

With x_n the n-th value of a stream after the field's transform, m_n and s_n mean and deviation
after it, N `memory_events`, p `prior_events`, s_p the prior deviation (`normalisation.std`):

    m_0 = field.mean,  s_0 = field.std
    z_n = clip((x_n - m_(n-1)) / s_(n-1), -clip, clip)          the encoded value
    m_1 = x_1,  v_1 = 0
    a_n = 1 / min(n, N),  d_n = z_n s_(n-1)
    m_n = m_(n-1) + a_n d_n
    v_n = v_(n-1) + a_n ((1 - a_n) d_n^2 - v_(n-1))
    q_n = max(0, 1 - n / p)
    s_n = max(sqrt(q_n s_p^2 + (1 - q_n) v_n), minimum_std s_p)

Until n = N these are the mean and the variance of all values (Welford, 1962), from then on
exponentially weighted ones (Finch, "Incremental calculation of weighted mean and variance", 2009).
An outlier counts as `clip` deviations; a level shift beyond that is reached in steps that grow with
the deviation. An absent value changes nothing.

z_(n+1) is standardised by what is known after the n-th event: so it is the target of a forecast
that is made then, and s_n y + m_n is a forecast y in the stream's units.

The season of the t-th event is the value S - 1 events before it: one season before the next event,
standardised by m and s after the t-th event; 0 in the first season. In the place of an absent value
the season before it is kept, or in the first season the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.events.schema import EventSchema, NumericField
from models.spec.state import STATISTICS_PREFIX, StatePart

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Words = NDArray[np.int64]

MOMENT_WORDS = 3


class Encoded(NamedTuple):
    """A field of T events.

    Attributes:
        values: float64 [T], standardised; any number where a value is absent. None without
            `normalisation`.
        shared: float64 [T], standardised by the field's own mean and std; 0 where it is absent.
        mean, std: as of each event, [T], or the field's own constants without `normalisation`.
        season: float64 [T], standardised; None without `season_events`.
    """

    values: Floats | None
    shared: Floats
    mean: Floats | float
    std: Floats | float
    season: Floats | None


class FieldStatistics:
    """The statistics of one field.

    Args:
        schema: the event schema.
        field: one of its fields, with `normalisation` or `season_events`.
        row: the field's row of `Block.numbers`.
        absent: its row of `Block.absent`, or None if it is required.
        start: its first word of a stream's statistics, 8 bytes each.

    Attributes:
        stop: one past its last word.
        mean, std, value, season: its encoded columns, or None.
    """

    __slots__ = ("absent", "field", "mean", "row", "season", "start", "std", "stop", "value")

    def __init__(
        self, schema: EventSchema, field: NumericField, row: int, absent: int | None, start: int
    ):
        columns, name = schema.column_index, field.name
        self.field, self.row, self.absent, self.start = field, row, absent, start
        self.stop = start + sum(part.size for part in statistic_parts(field))
        self.mean, self.std = columns.get(f"{name}.mean"), columns.get(f"{name}.std")
        self.value = columns.get(f"{name}.value")
        self.season = columns.get(f"{name}.season")

    @property
    def constants(self) -> tuple[Floats | float, Floats | float]:
        """Mean and std of the field itself."""
        field = self.field
        if field.mean is None or field.std is None:
            raise ValueError(f"field {field.name!r}: expected a fitted field")
        return field.mean, field.std

    def share(self, values: Floats, absent: Bools | None) -> Floats:
        """Values [T] standardised by the field's own mean and std, 0 where they are absent."""
        mean, std = self.constants
        shared = (values - mean) / std
        if absent is not None:
            shared[absent] = 0.0
        return shared

    def encode(self, values: Floats, absent: Bools | None, statistics: Words) -> Encoded:
        """Encode T events of one stream.

        Args:
            values: float64 [T], transformed.
            absent: bool [T]; None if no value is absent.
            statistics: int64, those of the stream before the events; updated.
        """
        field, own = self.field, statistics[self.start : self.stop]
        shared = self.share(values, absent)
        scored: Floats | None = None
        mean, std = self.constants
        if field.normalisation is not None:
            scored, mean, std = normalise(field, values, absent, own)
            own = own[MOMENT_WORDS:]
        season = None
        if field.season_events is not None:
            season = follow_season(field, values, absent, mean, std, own)
        return Encoded(scored, shared, mean, std, season)


def encode_parts(
    fields: Sequence[FieldStatistics],
    parts: Sequence[tuple[slice, Words]],
    absent: Bools | None,
    numbers: Floats,
    rows: NDArray[np.float32],
) -> None:
    """Standardise fields in `numbers`, and write their other columns to `rows`.

    Args:
        parts: the events of each stream, and the statistics before them, which are updated.
        absent: bool [M, T], as of `Block.absent`; None if nothing is absent.
        numbers: float64 [K, T], transformed.
        rows: float32 [T, F].
    """
    for part, words in parts:
        for field in fields:
            missing = None
            if field.absent is not None and absent is not None:
                missing = absent[field.absent, part]
            encoded = field.encode(numbers[field.row, part], missing, words)
            if encoded.values is not None:
                numbers[field.row, part] = encoded.values
                rows[part, field.mean], rows[part, field.std] = encoded.mean, encoded.std
                rows[part, field.value] = encoded.shared
            if encoded.season is not None:
                rows[part, field.season] = encoded.season


def statistic_parts(field: NumericField) -> list[StatePart]:
    """The state parts of a field's statistics, all 0 for a new stream.

    `count`, `mean` and `variance` of the values so far, of `normalisation`; the number of `events`
    and the values of the last `season`, oldest first, of `season_events`.
    """
    prefix = f"{STATISTICS_PREFIX}{field.name}"
    parts = []
    if field.normalisation is not None:
        parts.append(StatePart(f"{prefix}.count", (), "int64"))
        parts.append(StatePart(f"{prefix}.mean", (), "float64"))
        parts.append(StatePart(f"{prefix}.variance", (), "float64"))
    if field.season_events is not None:
        parts.append(StatePart(f"{prefix}.events", (), "int64"))
        parts.append(StatePart(f"{prefix}.season", (field.season_events,), "float64"))
    return parts


def normalise(
    field: NumericField, values: Floats, absent: Bools | None, own: Words
) -> tuple[Floats, Floats, Floats]:
    """Standardised values, means and deviations, [T] each; updates the words of the moments.

    One value after the other: any other order of operations would round differently.
    """
    options = field.normalisation
    if options is None or options.std is None or field.mean is None or field.std is None:
        raise ValueError(f"field {field.name!r}: expected a fitted field")
    memory, prior_events, clip = options.memory_events, options.prior_events, options.clip
    prior, min_std = options.std * options.std, options.minimum_std * options.std
    count, moments = int(own[0]), own[1:MOMENT_WORDS].view(np.float64)
    mean, variance = moments.tolist()
    if count == 0:
        mean, std = field.mean, field.std
    else:
        std = _deviation(count, variance, prior_events, prior, min_std)
    skipped = repeat(False) if absent is None else absent.tolist()
    scored, means, deviations = [], [], []
    for x, skip in zip(values.tolist(), skipped, strict=False):
        z = 0.0
        if not skip:
            deviation = x - mean
            z = deviation / std
            if not -clip <= z <= clip:
                z = clip if z > clip else -clip
                deviation = z * std
            count += 1
            if count == 1:
                mean, variance = x, 0.0
            else:
                share = 1.0 / (count if count < memory else memory)
                mean += share * deviation
                variance += share * ((1.0 - share) * deviation * deviation - variance)
            if count < prior_events:
                std = _deviation(count, variance, prior_events, prior, min_std)
            elif (std := sqrt(variance)) < min_std:
                std = min_std
        scored.append(z)
        means.append(mean)
        deviations.append(std)
    if count:
        own[0], moments[:] = count, (mean, variance)
    return np.array(scored), np.array(means), np.array(deviations)


def _deviation(
    count: int, variance: float, prior_events: int, prior: float, min_std: float
) -> float:
    """s_n of the module's equations."""
    rest = max(0.0, 1.0 - count / prior_events)
    return max(sqrt(rest * prior + (1.0 - rest) * variance), min_std)


def follow_season(
    field: NumericField,
    values: Floats,
    absent: Bools | None,
    mean: Floats | float,
    std: Floats | float,
    own: Words,
) -> Floats:
    """The standardised season of each event; updates the words of the season."""
    steps, before, last = len(values), int(own[0]), own[1:].view(np.float64)
    length = len(last)
    history = np.concatenate([last, values])
    if absent is not None:
        means = np.broadcast_to(mean, values.shape)
        for at in np.flatnonzero(absent).tolist():
            history[length + at] = history[at] if before + at >= length else means[at]
    with np.errstate(over="ignore"):
        season = (history[1 : steps + 1] - mean) / std
    if field.normalisation is not None:
        np.clip(season, -field.normalisation.clip, field.normalisation.clip, out=season)
    season[: max(0, length - 1 - before)] = 0.0
    own[0], last[:] = before + steps, history[steps:]
    return season
