"""Heads over event schemas: outputs, the state of the anomaly head, and training losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.events.encode import Clock, encode
from models.events.values import standardise
from models.networks.heads import head_loss
from models.spec.layout import output_spec, state_spec
from models.spec.model import ModelSpec, parse_spec
from tests.models.networks.running import check_in_chunks, network_of, step
from tests.support.oracle_heads import nats
from tests.support.oracle_layers import sigmoid, softmax, softplus
from tests.support.strict_events import columns_from_events

EVENTS = {
    "fields": [
        {"kind": "categorical", "name": "kind", "vocabulary": ["a", "b", "c"], "embedding": 3},
        {"kind": "numeric", "name": "size", "mean": 2.5, "std": 1.5},
        {"kind": "timestamp", "name": "at", "gap_mean": 1.0, "gap_std": 2.0},
        {
            "kind": "numeric",
            "name": "price",
            "optional": True,
            "transform": "signed_log1p",
            "mean": -0.4,
            "std": 0.7,
        },
        {"kind": "boolean", "name": "late"},
        {
            "kind": "categorical",
            "name": "place",
            "vocabulary": ["x", "y"],
            "optional": True,
            "embedding": 2,
        },
        {"kind": "boolean", "name": "sold", "optional": True},
    ]
}
HEADS: list[dict[str, Any]] = [
    {"kind": "forecast", "name": "spread", "targets": ["price", "size"]},
    {"kind": "forecast", "name": "median", "targets": ["price"], "quantiles": [0.5]},
    {"kind": "forecast", "name": "point", "targets": ["size", "price"], "quantiles": []},
    {"kind": "classification", "name": "place_next", "target": "place"},
    {"kind": "anomaly", "name": "odd", "targets": ["place", "price", "sold", "size", "late"]},
    {"kind": "classification", "name": "late_next", "target": "late"},
    {"kind": "classification", "name": "dear", "target": "price", "above": 0.8},
    {"kind": "dense", "name": "both", "units": 2, "targets": ["size", "price"]},
    {"kind": "anomaly", "name": "odd_kind", "targets": ["kind"], "input": "first"},
    {"kind": "classification", "name": "likely", "target": "place", "top": 2},
    {"kind": "classification", "name": "any", "target": "kind", "top": 9, "input": "first"},
    {"kind": "sequence", "name": "hidden", "input": "first"},
    {"kind": "label", "name": "faulty"},
    {"kind": "label", "name": "phase", "classes": ["start", "run", "stop"]},
]


def model() -> ModelSpec:
    # Heads see the row itself too: behind a recurrent layer alone, padding repeats the last
    # valid step and would hide a head that reads the wrong one.
    layers = [
        {"kind": "lstm", "units": 4, "name": "first"},
        {"kind": "gru", "units": 5},
        {"kind": "concatenate", "inputs": ["gru_1", "features"]},
    ]
    return parse_spec({"name": "m", "events": EVENTS, "layers": layers, "heads": HEADS})


def encoded(random: np.random.Generator, spec: ModelSpec, steps: int) -> NDArray[np.float32]:
    """Rows that an encoder could have written, float32 [steps, F]."""
    rows = random.normal(size=(steps, spec.input_features))
    where = {column.name: index for index, column in enumerate(spec.columns)}
    for index, column in enumerate(spec.columns):
        if column.codes is not None:
            rows[:, index] = random.integers(0, column.codes, steps)
    for name in ("late", "sold", "price.missing", "sold.missing"):
        rows[:, where[name]] = random.integers(0, 2, steps)
    for name in ("price", "sold"):
        rows[:, where[name]] *= 1 - rows[:, where[f"{name}.missing"]]
    return rows.astype(np.float32)


def no_labels(shape: tuple[int, int]) -> dict[str, NDArray[np.float32]]:
    return {name: np.full(shape, np.nan, np.float32) for name in ("faulty", "phase")}


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_every_head_equals_the_oracle_across_chunks(lengths: list[int], seed: int) -> None:
    random, spec = np.random.default_rng(seed), model()
    check_in_chunks("keras", spec, seed, [encoded(random, spec, steps) for steps in lengths])


def test_first_event_of_a_stream_is_scored_by_the_zero_forecast() -> None:
    spec = model()
    network = network_of(spec, 4)
    rows = encoded(np.random.default_rng(4), spec, 1)
    where = {column.name: index for index, column in enumerate(spec.columns)}
    rows[0, where["price.missing"]] = rows[0, where["sold.missing"]] = 1
    rows[0, where["price"]] = rows[0, where["sold"]] = 0
    outputs, _ = step(network, rows[np.newaxis], [1], np.zeros((1, network.state_size), "f4"))
    score = output_spec(spec).by_name(outputs)["odd"][0, 0]
    normal = np.log(2 * np.pi) / 2 + rows[0, where["size"]] ** 2 / 2
    assert score == pytest.approx(np.log(4) + normal + np.log(2), abs=1e-5)


def test_scores_stay_finite_for_any_finite_row_and_forecast() -> None:
    spec = model()
    network = network_of(spec, 5)
    rows = encoded(np.random.default_rng(5), spec, 3)[np.newaxis]
    where = {column.name: index for index, column in enumerate(spec.columns)}
    rows[0, :, where["size"]] = [3e38, -3e38, 0]
    rows[0, :, where["price"]] = [-3e38, 3e38, 0]
    state = np.zeros((1, network.state_size), np.float32)
    forecast = state_spec(spec).slices["odd.forecast"]
    state[0, forecast] = -1e30
    outputs, after = step(network, rows, [3], state)
    scores = output_spec(spec).by_name(outputs)["odd"]
    assert np.isfinite(scores).all()
    assert np.isfinite(after).all()


def test_quantiles_increase_for_any_weights() -> None:
    spec = model()
    network = network_of(spec, 6)
    weights = {name: 5 * value for name, value in network.get_weights().items()}
    network.set_weights(weights)
    rows = encoded(np.random.default_rng(6), spec, 12)[np.newaxis]
    outputs, _ = step(network, rows, [12], np.zeros((1, network.state_size), np.float32))
    spread = output_spec(spec).by_name(outputs)["spread"]
    assert spread.shape == (1, 12, 2, 3)
    assert (np.diff(spread, axis=-1) > 0).all()


def test_losses_equal_numpy() -> None:
    spec = model()
    network = network_of(spec, 7)
    random = np.random.default_rng(7)
    lengths = [9, 3, 1]
    rows = np.stack([encoded(random, spec, 10) for _ in lengths])
    state = random.uniform(-1, 1, (3, network.state_size)).astype(np.float32)
    result = network.forward(rows[:, :-1], np.array(lengths, np.int32), state)
    next_rows = rows[:, 1:]
    mask = np.arange(9) < np.array(lengths)[:, np.newaxis]
    labels = {
        name: np.where(random.random((3, 9)) < 0.3, np.nan, random.integers(0, count, (3, 9)))
        for name, count in (("faulty", 2), ("phase", 3))
    }
    labels = {name: value.astype(np.float32) for name, value in labels.items()}
    losses = network.losses(result.raw, next_rows, mask, labels)
    raw = {name: np.float64(value) for name, value in result.raw.items()}
    expected = {**_numpy_losses(spec, raw, next_rows, mask), **_numpy_label_losses(raw, labels)}
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-5), name


def _numpy_losses(
    spec: ModelSpec,
    raw: dict[str, NDArray[np.float64]],
    next_rows: NDArray[np.float32],
    mask: NDArray[np.bool_],
) -> dict[str, float]:
    where = {column.name: index for index, column in enumerate(spec.columns)}
    losses: dict[str, list[tuple[float, float]]] = {}

    def add(name: str, loss: float, counted: float = 1.0) -> None:
        losses.setdefault(name, []).append((loss, counted))

    def huber(error: float) -> float:
        return error**2 / 2 if abs(error) <= 1 else abs(error) - 0.5

    def entropy(logit: float, label: float) -> float:
        p = sigmoid(np.float64(logit))
        return -float(np.log(p if label else 1 - p))

    odd, odd_kind = spec.heads[4], spec.heads[8]
    threshold = (np.log1p(0.8) - -0.4) / 0.7
    for b, t in zip(*np.nonzero(mask), strict=True):
        row = next_rows[b, t].astype(np.float64)
        at = {name: row[index] for name, index in where.items()}
        y = {name: value[b, t] for name, value in raw.items()}
        prices = not at["price.missing"]
        levels = np.array([0.1, 0.5, 0.9])
        for first, name in ((0, "price"), (3, "size")):
            q = np.cumsum(
                np.concatenate(
                    [y["spread"][first : first + 1], softplus(y["spread"][first + 1 : first + 3])]
                )
            )
            error = at[name] - q
            loss = np.mean(np.where(error > 0, levels * error, (levels - 1) * error))
            if name == "size" or prices:
                add("spread", float(loss))
        add("point", huber(at["size"] - y["point"][0]))
        add("both", huber(at["size"] - y["both"][0]))
        if prices:
            add("point", huber(at["price"] - y["point"][1]))
            add("both", huber(at["price"] - y["both"][1]))
            add("median", abs(at["price"] - y["median"][0]) / 2)
            add("dear", entropy(y["dear"][0], at["price"] > threshold))
        for name, field in (("place_next", "place"), ("likely", "place"), ("any", "kind")):
            add(name, -float(np.log(softmax(y[name])[int(at[field])])))
        add("late_next", entropy(y["late_next"][0], at["late"]))
        add("odd", nats(spec, odd, y["odd"], row), 3 + prices + (not at["sold.missing"]))
        add("odd_kind", nats(spec, odd_kind, y["odd_kind"], row))
    return {
        name: sum(loss for loss, _ in parts) / sum(counted for _, counted in parts)
        for name, parts in losses.items()
    }


def _numpy_label_losses(
    raw: dict[str, NDArray[np.float64]], labels: dict[str, NDArray[np.float32]]
) -> dict[str, float]:
    losses_by_head: dict[str, list[float]] = {name: [] for name in labels}
    for name, steps in labels.items():
        for b, t in zip(*np.nonzero(~np.isnan(steps)), strict=True):
            y, label = raw[name][b, t], int(steps[b, t])
            p = softmax(y) if len(y) > 1 else np.array([1 - sigmoid(y[0]), sigmoid(y[0])])
            losses_by_head[name].append(-float(np.log(p[label])))
    return {name: sum(losses) / len(losses) for name, losses in losses_by_head.items()}


def test_a_value_equal_to_the_threshold_is_not_above_it() -> None:
    spec = model()
    network = network_of(spec, 8)
    price = spec.events.field("price")
    next_rows = np.zeros((1, 2, spec.input_features), np.float32)
    at = spec.events.column_index["price"]
    next_rows[0, :, at] = standardise(price, np.array([0.8, 0.8001]))
    raw = {head.name: tf.zeros((1, 2, 64)) for head in spec.heads}
    raw["dear"] = tf.constant([[[-30.0], [30.0]]])
    raw["spread"] = raw["spread"][..., :6]
    raw["median"] = raw["median"][..., :1]
    raw["point"] = raw["both"] = raw["point"][..., :2]
    raw["place_next"] = raw["place_next"][..., :4]
    raw["odd"] = raw["odd"][..., :10]
    raw["odd_kind"] = raw["odd_kind"][..., :4]
    raw["phase"] = raw["phase"][..., :3]
    losses = network.losses(raw, next_rows, np.ones((1, 2), bool), no_labels((1, 2)))
    assert float(losses["dear"]) == pytest.approx(0, abs=1e-6)


def test_a_threshold_of_a_normalised_field_is_compared_in_units() -> None:
    """However the stream's own mean and deviation encode a value."""
    head = {"kind": "classification", "name": "dear", "target": "price", "above": 7.5}
    field = {"kind": "numeric", "name": "price", "mean": 3.0, "std": 2.0}
    spec = parse_spec(
        {
            "name": "shop",
            "events": {"fields": [{**field, "normalisation": {"std": 0.1}}]},
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [head],
        }
    )
    prices = [7.5, 7.51, 7.49, 7.6, 1e4, 8.0, 7.4]
    assert spec.events is not None
    columns = columns_from_events(spec.events, [{"price": price} for price in prices])
    rows, _ = encode(spec.events, columns, Clock())
    raw = tf.fill([1, len(prices), 1], 2.0)

    found = head_loss(spec, spec.heads[0], raw, tf.constant(rows[np.newaxis]))

    assert found is not None
    above = np.array(prices) > 7.5
    expected = np.where(above, np.log1p(np.exp(-2.0)), np.log1p(np.exp(2.0)))
    np.testing.assert_allclose(found[0][0], expected, rtol=1e-5)


def test_losses_of_a_window_without_targets_are_zero_and_have_gradients() -> None:
    spec = model()
    network = network_of(spec, 9)
    rows = np.zeros((2, 4, spec.input_features), np.float32)
    state = np.zeros((2, network.state_size), np.float32)
    with tf.GradientTape() as tape:
        result = network.forward(rows, np.array([4, 2], np.int32), state, training=True)
        losses = network.losses(result.raw, rows, np.zeros((2, 4), bool), no_labels((2, 4)))
        total = tf.add_n(list(losses.values()))
    assert float(total) == 0
    gradients = tape.gradient(total, [v.value for v in network.trainable_variables])
    assert all(np.isfinite(tf.convert_to_tensor(g)).all() for g in gradients if g is not None)
