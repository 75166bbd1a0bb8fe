from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import polars as pl
import pytest

from examples.customers import data
from examples.customers.baselines import BgNbd
from examples.customers.data import END, TEST_FROM, VALIDATE_FROM, purchase_events

BORDERS = (VALIDATE_FROM, TEST_FROM, END)


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    return purchase_events()


def test_streams_are_customers_in_the_order_of_their_purchases(events):
    path = data.package_folder("lifetimes") / "datasets" / "CDNOW_master.txt"
    lines = [line.split() for line in path.read_text().splitlines()[1:]]
    assert events.equals(events.sort("customer", "bought"))
    assert not events.select("customer", "bought").is_duplicated().any()
    assert events["discs"].sum() == sum(int(line[2]) for line in lines)
    assert events["dollars"].sum() == pytest.approx(sum(float(line[3]) for line in lines))


def test_a_label_says_whether_a_purchase_followed_within_thirty_days(events):
    days: dict[str, list[date]] = {}
    for customer, bought in events.select("customer", "bought").iter_rows():
        days.setdefault(customer, []).append(bought)
    for customer, bought, _, _, wait, label in events.sample(4000, seed=1).iter_rows():
        before = [day for day in days[customer] if day < bought]
        assert wait == ((bought - before[-1]).days if before else None)
        border = next(border for border in BORDERS if bought < border)
        if bought + timedelta(days=30) >= border:
            assert label is None
        else:
            within = [day for day in days[customer] if 0 < (day - bought).days <= 30]
            assert label is bool(within)


@pytest.mark.parametrize("border", BORDERS[:2])
def test_labels_do_not_leak_across_the_splits(events, border, monkeypatch):
    """Labels before a split do not change if later purchases are removed."""
    labels = data._read()
    monkeypatch.setattr(data, "_read", lambda: labels.filter(pl.col("bought") < border))
    assert purchase_events().equals(events.filter(pl.col("bought") < border))


def test_bg_nbd_recovers_the_parameters_of_simulated_customers():
    """Fitted on simulated customers, it finds their parameters and probabilities."""
    random = np.random.default_rng(4)
    truth = BgNbd(r=0.7, alpha=20.0, a=0.8, b=2.5)
    count, observed_days = 20_000, 300.0
    rate = random.gamma(truth.r, 1 / truth.alpha, count)
    stops = random.beta(truth.a, truth.b, count)
    x, last, now = np.zeros(count), np.zeros(count), np.zeros(count)
    going = np.ones(count, bool)
    histories = []
    while going.any():
        # No customer stops at the first purchase of all.
        stopped = (x > 0) & (random.random(count) < stops)
        wait = random.exponential(1 / rate)
        histories.append(np.stack([x, now, ~stopped & (wait <= 30)])[:, going])
        now = now + wait
        going &= ~stopped & (now <= observed_days)
        x[going] += 1
        last[going] = now[going]
    estimate = BgNbd.fit(x, last, np.full(count, observed_days))
    assert estimate.r == pytest.approx(truth.r, rel=0.1)
    assert estimate.alpha == pytest.approx(truth.alpha, rel=0.1)
    assert estimate.a / (estimate.a + estimate.b) == pytest.approx(0.8 / 3.3, rel=0.1)
    purchases, age, bought = np.concatenate(histories, axis=1)
    probability = truth.probability(purchases, age)
    for group in (
        purchases == 0,
        (purchases == 1) & (age < 50),
        (purchases == 1) & (age > 100),
        (purchases > 1) & (age < 100),
        purchases > 4,
    ):
        assert group.sum() > 1000
        error = 3 * np.sqrt(0.25 / group.sum())
        assert probability[group].mean() == pytest.approx(bought[group].mean(), abs=error)
