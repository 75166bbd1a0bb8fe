"""The rivers example: its generator, and what each method of the comparison sees."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from examples.rivers import data
from examples.rivers.data import K2, Catchments, discharge, rivers
from examples.rivers.networks import WINDOWS, spec_of
from examples.rivers.windows import AGGREGATED_DAYS, tree_features
from models.spec.layers import Conv1dLayer


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    """A few catchments over two years."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "COUNTS", dict.fromkeys(data.COUNTS, 4))
        patch.setattr(data, "YEARS", 2)
        table = rivers("train")
        assert table.equals(rivers("train"))
        assert not table["precipitation"].equals(rivers("select")["precipitation"])
    return table


def test_every_catchment_has_a_day_after_the_other_and_every_class_occurs(frame) -> None:
    for part in frame.partition_by("catchment"):
        assert set(np.diff(part["day"].dt.epoch("ms"))) == {data.DAY_MS}
        assert part["relief_m"].n_unique() == part["latitude"].n_unique() == 1
    assert set(frame["flow"]) == {"low", "normal", "high"}


def test_snow_of_last_year_melts_into_the_flow_of_this_spring() -> None:
    days, snowy = 400, slice(50, 80)
    catchments = Catchments(**{name: np.full(2, ends[0]) for name, ends in data.RANGES.items()})
    temperature = np.full((days, 2), -10.0)
    temperature[300:] = 8.0
    precipitation = np.zeros((days, 2))
    precipitation[snowy, 1] = 10.0
    flow = discharge(catchments, np.arange(days), precipitation, temperature)
    assert (flow[:300, 0] == flow[:300, 1]).all()
    assert flow[301:, 1].max() > 10 * flow[301:, 0].max()
    # snow falls, nothing melts or evaporates: the slow store drains alone
    np.testing.assert_allclose(flow[200:300] / flow[199:299], 1 - K2)
    assert 0.5 * 300 < flow[:, 1].sum() - flow[:, 0].sum() < 300


def test_without_evaporation_all_rain_becomes_flow(monkeypatch) -> None:
    monkeypatch.setattr(data, "extraterrestrial_radiation", lambda *_: np.zeros((2000, 2)))
    catchments = Catchments(**{name: np.full(2, ends[0]) for name, ends in data.RANGES.items()})
    rain = np.tile([1.0, 9.0], (2000, 1))
    flow = discharge(catchments, np.arange(2000), rain, np.full((2000, 2), 10.0))
    np.testing.assert_allclose(flow[-1], rain[-1], rtol=1e-6)


def test_trees_see_no_later_event_and_no_other_stream(frame) -> None:
    before = tree_features(frame, 100)
    at = frame.height // 2 + 200
    changed = frame.with_columns(
        pl.when(pl.int_range(pl.len()) == at)
        .then(pl.lit(99.0))
        .otherwise("temperature")
        .alias("temperature")
    )
    after = tree_features(changed, 100)
    equal = (after == before) | (np.isnan(after) & np.isnan(before))
    differ = np.flatnonzero(~equal.all(axis=1))
    assert min(differ) == at
    assert frame["catchment"][int(max(differ))] == frame["catchment"][at]
    assert max(differ) >= at + max(AGGREGATED_DAYS)


@pytest.mark.parametrize("method", WINDOWS)
def test_convolutions_see_their_window(method) -> None:
    layers = [one for one in spec_of(method).layers if isinstance(one, Conv1dLayer)]
    assert 1 + sum(layer.past_steps for layer in layers) == WINDOWS[method]
