"""The rivers example: its labels, and what the trees of the comparison see."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from examples.rivers import data
from examples.rivers.comparison import Months, shares
from examples.rivers.data import CATCHMENT, DAY, LABEL, SPEC, TEST, VALIDATE, codes, river_days
from examples.rivers.trees import AGGREGATED_DAYS, tree_features
from models.spec.spec_file import read_spec


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return river_days()


def test_every_catchment_has_every_day_of_twenty_years(frame) -> None:
    assert frame[CATCHMENT].n_unique() == 19
    for part in frame.partition_by(CATCHMENT):
        assert set(part[DAY].diff().drop_nulls().dt.total_days()) == {1}
        assert [part[DAY][0].isoformat()[:10], part[DAY][-1].isoformat()[:10]] == [
            "1999-01-01",
            "2018-12-31",
        ]


def test_a_label_is_the_class_of_the_next_seven_days(frame) -> None:
    part = frame.filter(pl.col(CATCHMENT) == "X031001001")
    flow, label, day = (part[name].to_list() for name in ("discharge", LABEL, DAY))
    before = [each for each, at in zip(flow, day, strict=True) if each and at < VALIDATE]
    low, high = np.quantile(before, [0.2, 0.8])
    for at in np.random.default_rng(1).integers(len(flow) - 8, size=500).tolist():
        week = flow[at + 1 : at + 8]
        crosses = any(day[at] < border <= day[at + 7] for border in (VALIDATE, TEST))
        if None in week or crosses:
            assert label[at] is None
        else:
            mean = np.mean(week)
            assert label[at] == ("low" if mean < low else "high" if mean > high else "normal")
    assert label[-7:] == [None] * 7


@pytest.mark.parametrize("border", [VALIDATE, TEST])
def test_labels_do_not_leak_across_the_splits(frame, border, monkeypatch) -> None:
    """What is before a split does not change if later days are removed."""
    table = pl.read_parquet(data.TABLE).filter(pl.col(DAY) < border)
    monkeypatch.setattr(data.pl, "read_parquet", lambda path: table)
    assert river_days().equals(frame.filter(pl.col(DAY) < border))


def test_the_splits_are_those_of_the_specification() -> None:
    training = read_spec(SPEC).training
    assert training is not None
    borders = (training.validate_from, training.test_from)
    assert borders == tuple(f"{border:%Y-%m-%d}" for border in (VALIDATE, TEST))


def test_trees_see_no_later_day_and_no_other_catchment(frame) -> None:
    frame = frame.filter(pl.col(DAY) < pl.datetime(2002, 1, 1, time_zone="UTC"))
    before = tree_features(frame, 20)
    at = frame.height // 2
    changed = pl.when(pl.int_range(pl.len()) == at).then(99.0).otherwise("temperature")
    after = tree_features(frame.with_columns(changed.alias("temperature")), 20)
    equal = (after == before) | (np.isnan(after) & np.isnan(before))
    differ = np.flatnonzero(~equal.all(axis=1))
    assert min(differ) == at
    assert frame[CATCHMENT][int(max(differ))] == frame[CATCHMENT][at]
    assert max(differ) >= at + max(AGGREGATED_DAYS) - 1


def test_shares_and_losses_are_of_their_own_split(frame) -> None:
    by = pl.col(CATCHMENT)
    later = pl.when(pl.col(DAY) < VALIDATE).then(LABEL).otherwise(pl.lit("low")).alias(LABEL)
    own = shares(frame, by)
    assert np.array_equal(own, shares(frame.with_columns(later), by))
    np.testing.assert_allclose(own.sum(axis=1), 1)
    months = Months(frame)
    at = months.rows
    assert (frame[DAY][at.tolist()] >= TEST).all()
    losses = -np.log(own[at, codes(frame)[at]])
    np.testing.assert_allclose(months.losses(own), losses)
    assert months.text(losses).startswith(f"{losses.mean():.4f} (")
