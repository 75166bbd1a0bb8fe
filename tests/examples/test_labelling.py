from __future__ import annotations

import polars as pl
import pytest

from examples.labelling.__main__ import SPEC
from examples.labelling.baselines import SPEC as ONE_WAY
from examples.labelling.data import labelled_days
from examples.weather.data import weather_events
from models.spec.spec_file import read_spec
from models.training.data import moment_ms


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    return labelled_days()


def test_labels_are_not_fields_of_their_events(events):
    weather = weather_events()
    joined = events.join(weather, on=["airport", "observed"], how="inner", validate="1:1")
    assert joined.height == events.height == weather.height
    assert (joined["rain"] == (joined["precipitation"] > 0)).all()
    assert (joined["gusts"] == joined["gusts_right"]).all()
    fields = {field.name for field in read_spec(SPEC).events.fields}
    assert not fields & {"rain", "gusts", "precipitation"}
    assert fields < set(events.columns)


@pytest.mark.parametrize("spec", [SPEC, ONE_WAY], ids=["both ways", "one way"])
def test_a_day_is_one_window_in_one_split(events, spec):
    parsed = read_spec(spec)
    assert events.group_by("day").len()["len"].max() == parsed.training.window_steps
    for name in ("validate_from", "test_from"):
        border = moment_ms(parsed.events, getattr(parsed.training, name), name)
        after = events.with_columns(after=pl.col("observed").dt.timestamp("ms") >= border)
        assert (after.group_by("day").agg(pl.col("after").n_unique())["after"] == 1).all()
        assert 0.1 < after["after"].mean() < 0.5


def test_baseline_differs_in_its_layers_only():
    both, one = (read_spec(path) for path in (SPEC, ONE_WAY))
    assert one.events == both.events
    assert one.training == both.training
    assert [head.source for head in one.heads] == [head.source for head in both.heads]
    assert one.chunking == "invisible"
    assert both.chunking == "whole"
