"""The example of meters of different scales: its generator, its encodings, its baseline."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from examples.scales import __main__ as example
from examples.scales.comparison import _by_stream, _encodings, _naive, _table
from examples.scales.data import meters
from models.spec.model import ModelSpec
from models.spec.spec_file import read_spec
from models.training.data import fitted_spec, split_of, streams_of
from models.training.defaults import resolve_training


@pytest.fixture(scope="module")
def fitted() -> ModelSpec:
    frame = meters(3, count=6, days=20)
    streams = streams_of(read_spec(example.SPEC), frame)
    spec, _ = resolve_training(read_spec(example.SPEC), streams)
    return fitted_spec(spec, streams, split_of(spec).validate)


def test_meters_differ_in_scale_and_equal_arguments_give_equal_tables() -> None:
    frame = meters(3, count=6, days=20)

    assert frame.equals(meters(3, count=6, days=20))
    assert not frame.equals(meters(4, count=6, days=20))
    spreads = frame.group_by("meter").agg(pl.col("load").std())["load"]
    assert spreads.max() / spreads.min() > 100  # type: ignore[operator]


def test_each_encoding_is_fitted_to_the_training_data(fitted: ModelSpec) -> None:
    fields = {name: spec.events.field("load") for name, spec in _encodings(fitted).items()}  # type: ignore[union-attr]

    assert [field.normalisation is None for field in fields.values()] == [False, True, True]  # type: ignore[union-attr]
    assert [field.fitted for field in fields.values()] == [True, False, False]


def test_the_losses_of_a_meter_do_not_depend_on_its_scale(fitted: ModelSpec) -> None:
    frame = meters(5, count=4, days=20)
    scaled = frame.with_columns(load=1000 * pl.col("load") - 7)

    found, expected = (_naive(fitted, _table(fitted, each)) for each in (scaled, frame))

    np.testing.assert_allclose(found, expected, rtol=0.05)
    assert (expected > 0.02).all()


def test_losses_are_averaged_over_the_events_of_each_stream(fitted: ModelSpec) -> None:
    table = _table(fitted, meters(5, count=2, days=20))
    per_stream = np.repeat([1.0, 4.0], len(table.at) // 2)

    assert _by_stream(table, per_stream * table.scale).tolist() == pytest.approx([1.0, 4.0])
