from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import polars as pl
import pytest

from examples.customers import data
from examples.customers.__main__ import SPEC
from examples.customers.baselines import BgNbd
from examples.customers.data import END, TEST_FROM, VALIDATE_FROM, purchase_events
from models.spec.spec_file import read_spec
from models.training.data import fitted_spec, moment_ms, streams_of

BORDERS = (VALIDATE_FROM, TEST_FROM, END)


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    return purchase_events()


def test_streams_are_customers_in_the_order_of_their_purchases(events):
    assert events.height == 67_591
    assert events["customer"].n_unique() == 23_570
    assert events.equals(events.sort("customer", "bought"))
    assert not events.select("customer", "bought").is_duplicated().any()
    assert events["discs"].sum() == sum(int(line.split()[2]) for line in _lines())
    assert events["dollars"].sum() == pytest.approx(sum(float(x.split()[3]) for x in _lines()))


def _lines() -> list[str]:
    path = data.package_folder("lifetimes") / "datasets" / "CDNOW_master.txt"
    return path.read_text().splitlines()[1:]


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


def test_spec_names_the_splits_and_fits_the_events(events):
    spec = read_spec(SPEC)
    assert spec.training is not None
    assert spec.events is not None
    assert spec.training.validate_from == str(VALIDATE_FROM)
    assert spec.training.test_from == str(TEST_FROM)
    streams = streams_of(spec, events.head(2000))
    fitted = fitted_spec(spec, streams, moment_ms(spec.events, "1997-10-01", "validate_from"))
    assert fitted.events is not None
    assert streams.encoded(fitted.events).shape == (2000, fitted.input_features)


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
