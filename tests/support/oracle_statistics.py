"""The oracle of per-stream statistics: float64 NumPy, every step from all values so far.

Unlike the code it is compared with, it has no recurrences of moments: mean and variance are those
of all values up to an event, each with the weight that it still has.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.events.schema import NumericField

Floats = NDArray[np.float64]


class Row(NamedTuple):
    """One event: its encoded value, mean and deviation after it, and the encoded season."""

    value: float
    mean: float
    std: float
    season: float


def statistics_of(field: NumericField, values: list[float | None]) -> list[Row]:
    """The events of a stream from its beginning."""
    rows: list[Row] = []
    counted: list[float] = []
    filled: list[float] = []
    mean, std = field.mean or 0.0, field.std or 1.0
    options = field.normalisation
    for value in values:
        z = 0.0
        x = value
        if x is not None and field.transform == "signed_log1p":
            x = float(np.sign(x) * np.log1p(abs(x)))
        if x is not None:
            z = (x - mean) / std
            if options is not None:
                z = float(np.clip(z, -options.clip, options.clip))
                counted.append(mean + z * std if counted else x)
                mean, std = _moments(field, np.array(counted))
        length = field.season_events or 1
        if x is None:
            x = filled[-length] if len(filled) >= length else mean
        filled.append(x)
        season = 0.0
        if field.season_events is not None and len(filled) >= length:
            season = (filled[-length] - mean) / std
            if options is not None:
                season = float(np.clip(season, -options.clip, options.clip))
        rows.append(Row(z, mean, std, season))
    return rows


def _moments(field: NumericField, values: Floats) -> tuple[float, float]:
    """Weighted mean and deviation of all values so far."""
    options = field.normalisation
    assert options is not None
    assert options.std is not None
    shares = 1 / np.minimum(np.arange(1, len(values) + 1), options.memory_events)
    kept = np.append(np.cumprod((1 - shares)[:0:-1])[::-1], 1.0)
    weights = shares * kept
    mean = float(weights @ values)
    variance = float(weights @ np.square(values - mean))
    rest = max(0.0, 1 - len(values) / options.prior_events)
    blended = rest * options.std**2 + (1 - rest) * variance
    return mean, max(float(np.sqrt(blended)), options.minimum_std * options.std)
