"""Decoding without a runtime: start state, covariates, feedback and sample paths."""

from __future__ import annotations

import numpy as np
import pytest

from models.decoding.forecasts import Decoding, Distribution, encode_covariates, start
from models.errors import DataError
from models.events.columns import EventColumns
from models.events.encode import Clock, encode
from models.spec.decoder import known_schema
from models.spec.layout import state_spec
from models.spec.model import ModelSpec
from tests.support.decoders import (
    HOUR_MS,
    START_MS,
    clock,
    decoder_spec,
    future_of,
    hourly_events,
    random_state,
)
from tests.support.strict_events import columns_from_events


def covariates(spec: ModelSpec, events: list[dict[str, object]]) -> EventColumns:
    assert spec.events is not None
    assert spec.decoder is not None
    schema = known_schema(spec.events, spec.decoder, timed=False)
    assert schema is not None
    return columns_from_events(schema, events)


def test_decoder_layers_start_from_the_named_layers_or_from_zero() -> None:
    spec = decoder_spec(
        layers=[
            {"kind": "gru", "units": 2},
            {"kind": "lstm", "units": 4, "starts_from": "lstm_1"},
        ]
    )
    floats = np.arange(1, state_spec(spec).float_size + 1, dtype=np.float32)
    state, previous = start(spec, floats)
    assert state.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert previous.tolist() == [12, 13]


def test_covariates_are_encoded_as_in_the_events_themselves() -> None:
    spec = decoder_spec()
    assert spec.events is not None
    events = hourly_events(5 + 6)
    rows, _ = encode(spec.events, columns_from_events(spec.events, events), Clock())
    future = [{k: e[k] for k in ("holiday", "tariff", "wind") if k in e} for e in events[5:]]
    encoded = encode_covariates(spec, clock(5), 6, covariates(spec, future))
    columns = ["at.hour_sin", "at.hour_cos", "at.weekday_sin", "at.weekday_cos"]
    columns += ["holiday", "tariff", "wind", "wind.missing"]
    index = spec.events.column_index
    np.testing.assert_array_equal(encoded.rows, rows[5:, [index[name] for name in columns]])
    assert encoded.times_ms == tuple(START_MS + HOUR_MS * k for k in range(5, 11))


def test_a_timestamp_of_the_future_must_agree_with_the_step() -> None:
    spec = decoder_spec()
    future = future_of(2)
    future[0]["at"] = START_MS + 5 * HOUR_MS
    assert encode_covariates(spec, clock(5), 2, covariates(spec, future)).times_ms is not None
    future[1]["at"] = START_MS + 7 * HOUR_MS
    with pytest.raises(DataError, match=r"3600\.0 s after the one before") as caught:
        encode_covariates(spec, clock(5), 2, covariates(spec, future))
    assert (caught.value.index, caught.value.field) == (1, "at")


@pytest.mark.parametrize("regular", [True, False])
def test_timestamps_that_cannot_be_derived_are_required(regular: bool) -> None:
    spec = decoder_spec(step_s=3600 if regular else None)
    before = Clock() if regular else clock(5)
    future = future_of(3)
    for number in (0, 2):
        future[number]["at"] = START_MS + number * HOUR_MS
    with pytest.raises(DataError, match="the timestamp of the step") as caught:
        encode_covariates(spec, before, 3, covariates(spec, future))
    assert (caught.value.index, caught.value.field) == (1, "at")
    future[1]["at"] = START_MS + HOUR_MS
    assert encode_covariates(spec, before, 3, covariates(spec, future)).rows.shape == (3, 8)


def test_a_missing_covariate_is_named() -> None:
    with pytest.raises(DataError) as caught:
        encode_covariates(decoder_spec(), clock(), 3, None)
    assert (caught.value.index, caught.value.field) == (0, "holiday")
    assert encode_covariates(decoder_spec(known=None), clock(), 3, None).rows.shape == (3, 4)


@pytest.mark.parametrize("head", ["quantiles", "gaussian"])
def test_sampled_values_have_the_predicted_quantiles(head: str) -> None:
    spec = decoder_spec(head={"kind": head, "quantiles": [0.1, 0.5, 0.8, 0.95]})
    distribution = Distribution(spec)
    size = 8 if head == "quantiles" else 4
    one = np.random.default_rng(5).normal(size=size).astype(np.float32)
    if head == "quantiles":
        one = np.sort(one.reshape(2, 4), axis=1).ravel()
    quantiles = distribution.quantiles(one)
    noise = distribution.noise(1, 1, 40_000)[0]
    samples = distribution.sample(np.tile(one, (40_000, 1)), noise)
    for level, value in zip(distribution.levels, quantiles.T, strict=True):
        share = (samples <= value).mean(axis=0)
        np.testing.assert_allclose(share, level, atol=0.01)
    assert (samples < quantiles[:, 0]).any()
    assert (samples > quantiles[:, -1]).any()


def test_a_shorter_horizon_is_a_prefix_of_a_longer_one() -> None:
    distribution = Distribution(decoder_spec())
    np.testing.assert_array_equal(distribution.noise(9, 3, 5), distribution.noise(9, 7, 5)[:3])
    assert not np.array_equal(distribution.noise(9, 3, 5), distribution.noise(10, 3, 5))


def test_forecasts_are_in_the_units_of_their_fields() -> None:
    spec = decoder_spec()
    distribution = Distribution(spec)
    values = distribution.in_units(np.array([[0.5, (np.log1p(2.5) - 0.4) / 0.7]]))
    np.testing.assert_allclose(values, [[16.0, 2.5]], rtol=1e-6)
    assert np.isfinite(distribution.in_units(np.array([[0.0, 1e9]]))).all()


def test_decoding_ends_after_its_horizon() -> None:
    spec = decoder_spec()
    known_rows = encode_covariates(spec, clock(), 2, covariates(spec, future_of(2))).rows
    decoding = Decoding(spec, random_state(spec), known_rows, samples=0, seed=0)
    assert decoding.rows.shape == (1, 10)
    for _ in range(2):
        assert not decoding.is_done
        decoding.advance(np.zeros((1, 8), np.float32), decoding.states)
    assert decoding.is_done
    forecast = decoding.forecast()
    assert (forecast.point.shape, forecast.quantiles.shape) == ((2, 2), (2, 2, 4))
    assert forecast.paths.shape == (0, 2, 2)
