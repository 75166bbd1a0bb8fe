"""Mountain rivers: a generator, since no package carries recordings of many catchments.

The discharge is that of HBV, a published rainfall-runoff model (Bergström 1976; in the form of
HBV-light, Seibert and Vis 2012): snow in five bands of elevation, soil, a fast and a slow store of
groundwater. Its parameters are within the usual ranges and the same everywhere; catchments differ
in climate, relief and latitude. The weather is a stochastic generator's (after Richardson 1981): a
Markov chain of wet days with gamma amounts, temperature as an autoregression around a season.
Potential evaporation is that of Oudin et al. (2005).

An event is a day at the catchment's weather station. The discharge is no part of it: the label
`flow` says whether it was `low`, `normal` or `high` that day. What fell as snow in November is
high water in May.

The catchments to train on, to choose by and the held-out ones have the same distribution and
different seeds. Equal arguments give equal tables.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Part = Literal["train", "select", "held_out"]

SEEDS: dict[Part, int] = {"train": 1, "select": 2, "held_out": 3}
COUNTS: dict[Part, int] = {"train": 120, "select": 30, "held_out": 60}
YEARS = 5
SPIN_UP_DAYS = 365
"""Events that show a model the catchment's stores; they are not scored."""
WARM_UP_DAYS = 3 * 365
"""Simulated before the first event, so that the stores are full."""
YEAR_DAYS = 365.25
START_MS = 1_262_304_000_000
"""2010-01-01T00:00:00Z."""
DAY_MS = 86_400_000
LOW_MM, HIGH_MM = 0.5, 5.0
"""Discharges in mm a day, below and above which the label is `low` and `high`."""


class Catchments(NamedTuple):
    """What differs between catchments, [catchments] each.

    Attributes:
        relief_m: between the lowest and the highest tenth.
        latitude: degrees north.
        mean, season, spread: of the temperature in degrees Celsius.
        wet_after_dry, wet_after_wet: chances of a wet day.
        rain_mm: mean of a wet day.
        rain_season: relative amplitude of the amounts over the year.
    """

    relief_m: Floats
    latitude: Floats
    mean: Floats
    season: Floats
    spread: Floats
    wet_after_dry: Floats
    wet_after_wet: Floats
    rain_mm: Floats
    rain_season: Floats


RANGES = {
    "relief_m": (200, 2000),
    "latitude": (42, 64),
    "mean": (-2, 9),
    "season": (7, 13),
    "spread": (3, 5),
    "wet_after_dry": (0.2, 0.4),
    "wet_after_wet": (0.5, 0.75),
    "rain_mm": (4, 11),
    "rain_season": (-0.4, 0.4),
}
"""Catchments are drawn evenly from these."""
PERSISTENCE = 0.7
"""Of the temperature's deviation, from day to day."""
GAMMA_SHAPE = 0.75
"""Of the amounts of wet days."""
GAUGE_SPREAD, THERMOMETER_SPREAD = 0.1, 0.5
"""Errors of the station: relative, and in degrees Celsius."""

BANDS = 5
LAPSE = 0.0065
"""Kelvin per metre."""
DEGREE_DAY, REFREEZING, HOLDING = 3.5, 0.05, 0.1
"""CFMAX in mm per degree and day, CFR, CWH; snow falls and melts around 0 degrees Celsius (TT)."""
FIELD_CAPACITY_MM, EVAPORATION_LIMIT, BETA = 200.0, 0.7, 2.0
"""FC, LP, BETA."""
PERCOLATION_MM, UPPER_MM = 1.5, 30.0
"""PERC a day, UZL."""
K0, K1, K2 = 0.3, 0.1, 0.02
"""Shares of the stores that drain in a day."""
ROUTING = (0.32, 0.54, 0.14)
"""Shares of a day's runoff at the gauge on that day and the next two (MAXBAS of 2.5 days)."""


def rivers(part: Part, years: int = YEARS) -> pl.DataFrame:
    """All events of some years, catchment by catchment.

    Returns:
        `catchment`, `day`, `precipitation` (mm), `temperature` (degrees Celsius), `relief_m`,
        `latitude`, and the label `flow`.
    """
    random = np.random.default_rng(SEEDS[part])
    count, days = COUNTS[part], int(years * YEAR_DAYS)
    drawn = Catchments(**{name: random.uniform(*ends, count) for name, ends in RANGES.items()})
    dates = np.arange(-WARM_UP_DAYS, days)
    precipitation, temperature = weather(random, drawn, dates)
    flow = discharge(drawn, dates, precipitation, temperature)[WARM_UP_DAYS:]
    errors = random.lognormal(0, GAUGE_SPREAD, precipitation.shape)
    rain = (precipitation * errors)[WARM_UP_DAYS:].round(1)
    heat = temperature + random.normal(0, THERMOMETER_SPREAD, temperature.shape)
    heat = heat[WARM_UP_DAYS:].round(1)
    label = np.where(flow > HIGH_MM, "high", np.where(flow < LOW_MM, "low", "normal"))
    times = START_MS + DAY_MS * np.arange(days)
    return pl.DataFrame(
        {
            "catchment": np.repeat([f"{part}-{at:03d}" for at in range(count)], days),
            "day": pl.Series(np.tile(times, count)).cast(pl.Datetime("ms", "UTC")),
            "precipitation": rain.ravel(order="F"),
            "temperature": heat.ravel(order="F"),
            "relief_m": np.repeat(drawn.relief_m.round(), days),
            "latitude": np.repeat(drawn.latitude.round(1), days),
            "flow": label.ravel(order="F"),
        }
    )


def weather(
    random: np.random.Generator, drawn: Catchments, dates: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Precipitation in mm and the catchment's mean temperature, [days, catchments]."""
    shape = (len(dates), len(drawn.mean))
    season = np.cos(2 * np.pi * (dates[:, None] - 15) / YEAR_DAYS)
    uniform = random.uniform(size=shape)
    amounts = random.gamma(GAMMA_SHAPE, 1 / GAMMA_SHAPE, shape)
    noise = random.normal(size=shape) * drawn.spread * np.sqrt(1 - PERSISTENCE**2)
    # dry and wet years
    years = 1 + 0.15 * random.normal(size=(len(dates) // 365 + 1, shape[1]))
    wet, deviation = np.zeros(shape[1], np.bool_), np.zeros(shape[1])
    precipitation, temperature = np.zeros(shape), np.zeros(shape)
    for at in range(len(dates)):
        chance = np.where(wet, drawn.wet_after_wet, drawn.wet_after_dry)
        wet = uniform[at] < chance * years[at // 365]
        precipitation[at] = wet * amounts[at] * drawn.rain_mm * (1 - drawn.rain_season * season[at])
        deviation = PERSISTENCE * deviation + noise[at]
        temperature[at] = drawn.mean - drawn.season * season[at] + deviation
    return precipitation, temperature


def discharge(
    drawn: Catchments, dates: NDArray[np.int64], precipitation: Floats, temperature: Floats
) -> Floats:
    """Discharge in mm a day, [days, catchments]."""
    count = len(drawn.mean)
    # any state will do: the first years are dropped
    snow, water = np.zeros((BANDS, count)), np.zeros((BANDS, count))
    soil, fast, slow = np.full(count, 100.0), np.zeros(count), np.full(count, 30.0)
    elevation = np.outer(np.linspace(-0.4, 0.4, BANDS), drawn.relief_m)
    radiation = extraterrestrial_radiation(drawn.latitude, dates)
    potential = radiation / 2.45 * np.maximum(temperature + 5, 0) / 100
    runoff = np.zeros(temperature.shape)
    for at in range(len(dates)):
        degrees = temperature[at] - LAPSE * elevation
        snowfall = np.where(degrees < 0, precipitation[at], 0)
        melt = np.minimum(snow, DEGREE_DAY * np.maximum(degrees, 0))
        frozen = np.minimum(water, REFREEZING * DEGREE_DAY * np.maximum(-degrees, 0))
        snow += snowfall - melt + frozen
        water += precipitation[at] - snowfall + melt - frozen
        released = np.maximum(water - HOLDING * snow, 0)
        water -= released
        reaching = released.mean(axis=0)
        recharge = reaching * np.minimum(soil / FIELD_CAPACITY_MM, 1) ** BETA
        soil += reaching - recharge
        recharge += np.maximum(soil - FIELD_CAPACITY_MM, 0)
        soil = np.minimum(soil, FIELD_CAPACITY_MM)
        moisture = np.minimum(soil / (EVAPORATION_LIMIT * FIELD_CAPACITY_MM), 1)
        soil -= np.minimum(soil, potential[at] * moisture)
        fast += recharge
        percolating = np.minimum(fast, PERCOLATION_MM)
        fast -= percolating
        slow += percolating
        quick = K0 * np.maximum(fast - UPPER_MM, 0) + K1 * fast
        base = K2 * slow
        fast -= quick
        slow -= base
        runoff[at] = quick + base
    routed = np.zeros(runoff.shape)
    for lag, share in enumerate(ROUTING):
        routed[lag:] += share * runoff[: len(runoff) - lag]
    return routed


def extraterrestrial_radiation(latitude: Floats, dates: NDArray[np.int64]) -> Floats:
    """In MJ per square metre and day, [days, catchments] (Allen et al. 1998, equation 21)."""
    angle = 2 * np.pi * dates[:, None] / YEAR_DAYS
    north = np.radians(latitude)
    declination = 0.409 * np.sin(angle - 1.39)
    sunset = np.arccos(np.clip(-np.tan(north) * np.tan(declination), -1, 1))
    height = sunset * np.sin(north) * np.sin(declination)
    height = height + np.cos(north) * np.cos(declination) * np.sin(sunset)
    return np.asarray(37.6 * (1 + 0.033 * np.cos(angle)) * height)
