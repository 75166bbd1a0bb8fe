"""Customary predictors of repeat purchases, as baselines of the head `again`.

    own mean gap       m, the mean of the customer's gaps so far; 1 - exp(-30 / m), calibrated by
                       isotonic regression. At a first purchase the rate of first purchases.
    recency-frequency  the share that bought again among training purchases with as many before
                       (1, 2, 3, 4 to 5, 6 to 9, more) and as long a gap before (in weeks)
    BG/NBD             Fader, Hardie and Lee, "Counting your customers" the easy way, 2005: each
                       customer buys at a rate drawn from a gamma distribution and stops after a
                       purchase with a probability drawn from a beta distribution

BG/NBD is fitted by maximum likelihood on every customer's number of repeat purchases x, moment
of the last t and age T at the end of the training months, in days:

    L = B(a, b+x) G(r+x) A^r / (B(a, b) G(r) (A+T)^(r+x))
      + [x > 0] B(a+1, b+x-1) G(r+x) A^r / (B(a, b) G(r) (A+t)^(r+x))

At the moment of a purchase t = T, and the probability of another within d days is that of going on
times that of a purchase in time, whose rate is gamma distributed given what was seen:

    (b+x-1) / (a+b+x-1) [1 where x = 0] * (1 - ((A+T) / (A+T+d))^(r+x))
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import betaln, gammaln
from sklearn.isotonic import IsotonicRegression

from examples.customers.data import WITHIN_DAYS
from models.decoding.losses import Floats, score_binary
from models.events.calendar import DAY_MS
from models.spec.heads import Head
from models.training.data import split_of
from models.training.table import Baseline, Table

FREQUENCIES = (1, 2, 3, 5, 9)
"""Upper ends of the classes of earlier purchases; 0 has a class of its own."""
GAPS_DAYS = (7, 14, 28, 56, 112, 224)


def customer_baselines(table: Table, head: Head) -> list[Baseline]:
    """The three baselines of the head `again`; empty for any other head."""
    if head.name != "again":
        return []
    history = _history(table)
    truth = table.labels[head.name].astype(np.float64)
    probabilities = {
        "own mean gap": _own_gap(history, truth, table.train, table.test),
        "recency-frequency": _cells(history, truth, table.train, table.test),
    }
    settings: dict[str, dict[str, float]] = {name: {} for name in probabilities}
    probabilities["BG/NBD"], settings["BG/NBD"] = _bg_nbd(table, history)
    return [
        Baseline(name, score_binary(probability, truth[table.test]), settings[name])
        for name, probability in probabilities.items()
    ]


def _history(table: Table) -> pl.DataFrame:
    """Of every row: `x` earlier purchases, `age` in days, `gap` in days before it (or null)."""
    frame = pl.DataFrame({"s": table.stream_of, "day": table.streams.moments_ms / DAY_MS})
    return frame.select(
        x=pl.int_range(pl.len()).over("s").cast(pl.Float64),
        age=(pl.col("day") - pl.col("day").first()).over("s"),
        gap=(pl.col("day") - pl.col("day").shift(1)).over("s"),
    )


def _own_gap(
    history: pl.DataFrame, truth: Floats, train: NDArray[np.int64], test: NDArray[np.int64]
) -> Floats:
    first = history["x"].to_numpy() == 0
    mean = (history["age"] / history["x"]).fill_nan(1.0).to_numpy()
    raw = 1 - np.exp(-WITHIN_DAYS / np.maximum(mean, 1.0))
    with_gap = train[~first[train]]
    curve = IsotonicRegression(out_of_bounds="clip").fit(raw[with_gap], truth[with_gap])
    # Isotonic regression may say 0 or 1; a little of the base rate keeps the loss finite.
    size = float(np.sqrt(len(with_gap)))
    probability = (curve.predict(raw[test]) * size + truth[with_gap].mean()) / (size + 1)
    rate = truth[train[first[train]]].mean()
    return np.asarray(np.where(first[test], rate, probability), np.float64)


def _cells(
    history: pl.DataFrame, truth: Floats, train: NDArray[np.int64], test: NDArray[np.int64]
) -> Floats:
    often = np.digitize(history["x"].to_numpy(), FREQUENCIES, right=True)
    often = np.where(history["x"].to_numpy() == 0, 0, often + 1)
    gap = np.digitize(history["gap"].fill_null(0.0).to_numpy(), GAPS_DAYS)
    cell = often * (len(GAPS_DAYS) + 1) + gap
    cells = (len(FREQUENCIES) + 2) * (len(GAPS_DAYS) + 1)
    rate = truth[train].mean()
    bought = np.bincount(cell[train], truth[train], cells) + rate
    return np.asarray((bought / (np.bincount(cell[train], minlength=cells) + 1))[cell[test]])


@dataclass(frozen=True, slots=True)
class BgNbd:
    """The model's four parameters; rates are per day."""

    r: float
    alpha: float
    a: float
    b: float

    @classmethod
    def fit(cls, x: Floats, last: Floats, age: Floats) -> BgNbd:
        """Fit the four parameters by maximum likelihood.

        Args:
            x: repeat purchases of every customer, [n].
            last: days from the first purchase to the last, [n].
            age: days from the first purchase to the end of what was seen, [n].
        """

        def loss(logs: Floats) -> float:
            r, alpha, a, b = np.exp(logs)
            shared = gammaln(r + x) - gammaln(r) + r * np.log(alpha) - betaln(a, b)
            going = betaln(a, b + x) - (r + x) * np.log(alpha + age)
            stopped = betaln(a + 1, b + np.maximum(x, 1) - 1) - (r + x) * np.log(alpha + last)
            stopped = np.where(x > 0, stopped, -np.inf)
            return -float((shared + np.logaddexp(going, stopped)).mean())

        best = minimize(loss, np.log([0.5, 10.0, 0.5, 2.0]), method="Nelder-Mead")
        return cls(*(float(value) for value in np.exp(best.x)))

    def probability(self, x: Floats, age: Floats) -> Floats:
        """Chance of another purchase within 30 days, at the moment of one.

        Args:
            x: repeat purchases so far, this one included, [n].
            age: days since the first purchase, [n].
        """
        stays_active = np.where(x > 0, (self.b + x - 1) / (self.a + self.b + x - 1), 1.0)
        waits = ((self.alpha + age) / (self.alpha + age + WITHIN_DAYS)) ** (self.r + x)
        return np.asarray(stays_active * (1 - waits), np.float64)


def _bg_nbd(table: Table, history: pl.DataFrame) -> tuple[Floats, dict[str, float]]:
    end = split_of(table.spec).validate / DAY_MS
    customers = (
        history.with_columns(s=table.stream_of, day=table.streams.moments_ms / DAY_MS)
        .filter(pl.col("day") < end)
        .group_by("s")
        .agg(pl.col("x").max(), last=pl.col("age").max(), age=end - pl.col("day").min())
    )
    model = BgNbd.fit(*(customers[name].to_numpy() for name in ("x", "last", "age")))
    x, age = (history[name].to_numpy()[table.test] for name in ("x", "age"))
    return model.probability(x, age), asdict(model)
