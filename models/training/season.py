"""Finds the season of recorded series: after how many events their values repeat.

Candidates are peaks of the mean autocorrelation. A candidate of L events counts if values are
closer to the usual one at their phase, h_(t-L) of h_t = h_(t-L) + (x_t - h_(t-L)) / 2, than to the
mean of all values before them and to that of the last L. Random walks, trends and noise are not.
Events are counted, not time: series whose events are irregular have a season only if nearly as many
come in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.spec.detection import MAX_SEASON_EVENTS

Floats = NDArray[np.float64]

MIN_SEASONS: Final = 4
"""Whole seasons in a series of median length."""
MAX_RATIO: Final = 0.75
"""Largest distance from the usual value at the phase, over that from the closer mean."""
LONGER_GAIN, LEAST_GAIN = 1.15, 0.01
"""A longer season has to have a ratio smaller by this factor and by this difference."""
NEIGHBOURS: Final = 32
"""Lengths within 1/32 of a season, and 1 more, are taken for the same one."""
MULTIPLES: Final = 8
"""Multiples of a length whose autocorrelations decide between neighbours."""
SEASONS_BACK: Final = 6
"""Seasons in the usual value at a phase: earlier ones weigh less than 1/64."""
MAX_SERIES, MAX_EVENTS = 128, 32_768
"""Series that are looked at, evenly chosen, and the last events of each."""


def find_season(
    series: Sequence[Floats], longest: int = MAX_SEASON_EVENTS, likely: Sequence[int] = ()
) -> int | None:
    """The season of most series, in events; None without a clear one.

    Args:
        series: values float64 [n] of one target of one stream each, in order; nan is missing.
        longest: most events of a season.
        likely: lengths that are preferred to their neighbours, such as a day.
    """
    at = np.linspace(0, len(series) - 1, min(len(series), MAX_SERIES)).round().astype(int)
    scaled = [each for i in at if (each := _scaled(series[i][-MAX_EVENTS:])) is not None]
    if not scaled:
        return None
    longest = min(longest, int(np.median([len(each) for each in scaled])) // MIN_SEASONS)
    lags = _candidates(scaled, longest)
    if not lags:
        return None
    ratios = np.array([_ratios(scaled, lag) for lag in lags])
    medians = np.nanmedian(ratios, axis=1)
    best = ratios[np.argmin(medians)]
    near = ratios <= LONGER_GAIN * best + LEAST_GAIN
    eligible = (near[:, ~np.isnan(best)].mean(axis=1) >= 0.5) & (medians <= MAX_RATIO)
    if not eligible.any():
        return None
    chosen = int(np.argmax(eligible))
    lag, limit = lags[chosen], LONGER_GAIN * medians[chosen] + LEAST_GAIN
    around = [each for each in likely if abs(each - lag) <= _reach(lag) and each <= longest]
    return next((each for each in around if np.nanmedian(_ratios(scaled, each)) <= limit), lag)


def _scaled(values: Floats) -> Floats | None:
    """Values of mean 0 and deviation 1, outliers clipped; None if they are constant."""
    if np.isnan(values).all():
        return None
    low, high = np.nanquantile(values, [0.01, 0.99])
    clipped = np.clip(values, 2 * low - high, 2 * high - low)
    std = np.nanstd(clipped)
    return (clipped - np.nanmean(clipped)) / std if std > 1e-9 * max(abs(low), abs(high)) else None


def _reach(lag: int) -> int:
    return 1 + lag // NEIGHBOURS


def _candidates(series: Sequence[Floats], longest: int) -> list[int]:
    """Lengths of 2 to `longest` events at which the mean autocorrelation peaks, ascending."""
    total = np.zeros(max(len(values) for values in series))
    for values in series:
        # pairs of events that are further apart are few
        lags = 5 * len(values) // 6
        total[:lags] += _autocorrelation(values)[:lags]
    peaks: set[int] = set()
    for lag in range(2, longest + 1):
        width = max(1, lag // 3)
        if total[lag] == np.max(total[lag - width : lag + width + 1]) and total[lag] > 0:
            near = np.arange(max(2, lag - _reach(lag)), min(lag + _reach(lag), longest) + 1)
            count = min(MULTIPLES, 5 * len(total) // (6 * int(near[-1])))
            comb = total[near[:, None] * np.arange(1, count + 1)].sum(axis=1)
            peaks.add(int(near[np.argmax(comb)]))
    return sorted(peaks)


def _autocorrelation(values: Floats) -> Floats:
    """Mean product of two values of mean 0, by how many events they are apart; float64 [n]."""
    size = 1 << (2 * len(values) - 1).bit_length()
    spectrum = np.fft.rfft(np.nan_to_num(values), size)
    sums = np.fft.irfft(np.abs(spectrum) ** 2, size)[: len(values)]
    return np.asarray(sums / np.arange(len(values), 0, -1), np.float64)


def _ratios(series: Sequence[Floats], lag: int) -> Floats:
    return np.array([_ratio(each, lag) for each in series])


def _ratio(values: Floats, lag: int) -> float:
    """How far values are from the usual one at their phase, over how far from the closer mean.

    Of the half that speaks against the season, if one does. nan if there are too few seasons.
    """
    events = len(values)
    if events < MIN_SEASONS * lag:
        return np.nan
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    usual, weights = np.zeros((2, events))
    for back in range(1, min(SEASONS_BACK, (events - 1) // lag) + 1):
        usual[back * lag :] += filled[: -back * lag] * 0.5**back
        weights[back * lag :] += known[: -back * lag] * 0.5**back
    sums, counts = np.zeros((2, events + 1))
    np.cumsum(filled, out=sums[1:])
    np.cumsum(known, out=counts[1:])
    at = np.arange(events // MIN_SEASONS, events)
    with np.errstate(invalid="ignore", divide="ignore"):
        usual /= weights
        long_mean = sums[at] / counts[at]
        recent_mean = (sums[at] - sums[at - lag]) / (counts[at] - counts[at - lag])
    predictions = np.array([usual[at], long_mean, recent_mean])
    distances = np.abs(values[at] - predictions)
    distances = distances[:, np.isfinite(distances).all(axis=0)]
    halves = np.array([half.sum(axis=1) for half in np.array_split(distances, 2, axis=1)])
    own, *others = halves.sum(axis=0)
    if min(others) <= 0:
        return 1.0
    by_half = max(float(half[0] / max(half[1:].min(), 1e-12)) for half in halves)
    return by_half if by_half > 1 else float(own / min(others))
