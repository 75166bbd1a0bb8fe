"""Keras networks and ONNX graphs against the oracle, with any chunking, batch and padding."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import ArtifactError, SpecError
from models.networks.build import StepNetwork
from models.spec.layout import state_spec
from models.spec.model import ModelSpec, parse_spec
from tests.models.networks.running import CLOSE, check_batch, check_in_chunks, network_of, step
from tests.models.networks.specs import (
    COMBINATIONS,
    ONNX_CELLS,
    OPTIONS,
    bidirectional_stacks,
    coded_batch,
    convolved_codes,
    sequences,
    stacks,
)
from tests.support.events import FULL_SCHEMA
from tests.support.oracle import joined, oracle_step, random_states
from tests.support.oracle_layers import ACTIVATIONS

EVERY_STATE: list[dict[str, object]] = [
    {"kind": "lstm", "units": 4, "peepholes": True},
    {"kind": "lstm", "units": 4, "projection": 3, "layer_normalization": True},
    {"kind": "attention", "name": "so_far", "over": "stream", "units": 3},
    {"kind": "gru", "units": 3},
    {"kind": "gru", "units": 3, "reset_after": False},
    {"kind": "conv1d", "units": 3, "kernel_size": 3, "dilation": 2},
    {"kind": "simple_rnn", "units": 3},
]


def two_layers(**changes: object) -> ModelSpec:
    layers = [{"kind": "lstm", "units": 4}, {"kind": "gru", "units": 3}]
    heads = [{"kind": "dense", "name": "y", "units": 2}]
    return parse_spec({"name": "m", "features": 3, "layers": layers, "heads": heads, **changes})


EXAMPLES = given(
    stacks() | stacks(per_chunk=True) | bidirectional_stacks(),
    st.lists(st.integers(1, 11), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)


def check_stack(kind: str, spec: ModelSpec, lengths: list[int], seed: int) -> None:
    streams = sequences(np.random.default_rng(seed), lengths, spec.input_features)
    check_in_chunks(kind, spec, seed, streams)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@EXAMPLES
def test_step_equals_the_oracle_with_any_chunking_batch_and_padding(
    spec: ModelSpec, lengths: list[int], seed: int
) -> None:
    check_stack("keras", spec, lengths, seed)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@EXAMPLES
def test_graph_equals_the_oracle_with_any_chunking_batch_and_padding(
    spec: ModelSpec, lengths: list[int], seed: int
) -> None:
    check_stack("onnx", spec, lengths, seed)


@pytest.mark.parametrize("kind", ["keras", "onnx"])
@pytest.mark.parametrize("options", COMBINATIONS, ids="-".join)
def test_every_combination_of_lstm_options_equals_the_oracle(
    options: dict[str, Any], kind: str
) -> None:
    layer = {"kind": "lstm", "units": 5, **options}
    heads = [{"kind": "sequence", "name": "h"}]
    spec = parse_spec({"name": "m", "features": 2, "layers": [layer], "heads": heads})
    check_stack(kind, spec, [6, 11, 1, 9], 12)


@pytest.mark.parametrize("kind", ["compiled", "onnx"])
def test_coded_rows_under_a_convolution_equal_the_oracle(kind: str) -> None:
    check_batch(kind, convolved_codes(), 8, *coded_batch(np.random.default_rng(8)))


@pytest.mark.parametrize("kind", ["keras", "onnx"])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_equals_the_oracle_in_cell_layer_and_head(name: str, kind: str) -> None:
    own = name if kind == "keras" or name in ONNX_CELLS else "tanh"
    cell = {"units": 3, "activation": own, "recurrent_activation": own}
    bounded = {"kind": "activation", "activation": "tanh"}
    layers = [
        *({"kind": "lstm", **cell}, bounded, {"kind": "gru", **cell}, bounded),
        *({"kind": "gru", "reset_after": False, **cell}, bounded),
        *({"kind": "simple_rnn", "units": 3, "activation": own}, bounded),
        {"kind": "dense", "units": 3, "activation": name, "use_bias": False},
        *({"kind": "activation", "activation": name}, bounded),
        {"kind": "lstm", "units": 3, "projection": 2, "use_bias": False, "activation": name},
        bounded,
    ]
    heads = [{"kind": "dense", "name": "y", "units": 4, "activation": name}]
    spec = two_layers(layers=layers, heads=heads)
    # One step from a state that is not zero: a cell of exponentials leaves float32 soon after.
    rows = np.random.default_rng(8).normal(size=(1, 1, 3)).astype(np.float32)
    state = np.linspace(-0.4, 0.3, state_spec(spec).float_size, dtype=np.float32)[np.newaxis]
    check_batch(kind, spec, 8, rows, [1], state)


def test_global_dtype_policy_does_not_reach_the_network() -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        network = network_of(two_layers(), 9)
        rows = np.ones((1, 4, 3), np.float32)
        outputs, _ = step(network, rows, [4], np.zeros((1, network.state_size), np.float32))
    finally:
        keras.config.set_dtype_policy(before)
    zero = np.zeros(network.state_size)
    expected, _ = oracle_step(network.spec, network.get_weights(), rows[0], zero)
    np.testing.assert_allclose(outputs[0], expected, **CLOSE)


@pytest.mark.parametrize(
    "layers",
    [
        [{"kind": "lstm", "units": 8, "dropout": 0.5}, {"kind": "dropout", "rate": 0.5}],
        [{"kind": "lstm", "units": 8, "recurrent_dropout": 0.5}],
        [{"kind": "lstm", "units": 8, "dropout": 0.5, "peepholes": True}],
        [{"kind": "lstm", "units": 8, "recurrent_dropout": 0.5, "layer_normalization": True}],
        [{"kind": "lstm", "units": 8, "recurrent_dropout": 0.5, "projection": 5}],
    ],
    ids=str,
)
def test_dropout_is_active_in_training_only_and_follows_its_seed(
    layers: list[dict[str, object]],
) -> None:
    spec = two_layers(layers=layers)
    network = network_of(spec, 10)
    rows = np.ones((2, 5, 3), np.float32)
    lengths = np.array([5, 5], np.int32)
    state = np.zeros((2, network.state_size), np.float32)

    def training_outputs(seed: int) -> np.ndarray:
        network.reseed(seed)
        return np.asarray(network.step(rows, lengths, state, training=True)[0])

    first, repeated, other = training_outputs(1), training_outputs(1), training_outputs(2)
    np.testing.assert_array_equal(first, repeated)
    assert np.abs(first - other).max() > 1e-3
    inference = step(network, rows, [5, 5], state)[0]
    np.testing.assert_array_equal(inference, step(network, rows, [5, 5], state)[0])
    assert np.abs(first - inference).max() > 1e-3


def test_gradients_reach_every_weight() -> None:
    cell = {"kind": "lstm", "units": 5, **OPTIONS, "dropout": 0.2, "recurrent_dropout": 0.2}
    network = network_of(two_layers(layers=[cell], heads=[{"kind": "sequence", "name": "h"}]))
    rows = np.random.default_rng(7).normal(size=(2, 5, 3)).astype(np.float32)
    state = np.full((2, 8), 0.3, np.float32)
    with tf.GradientTape() as tape:
        outputs, _ = network.step(rows, np.array([5, 3], np.int32), state, training=True)
        loss = tf.reduce_sum(tf.square(outputs))
    gradients = tape.gradient(loss, [variable.value for variable in network.trainable_variables])
    assert len(gradients) == 9
    for gradient in gradients:
        assert np.abs(np.asarray(gradient)).max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lstm_1.kernel": None}, "missing \\['lstm_1.kernel'\\]"),
        ({"lstm_9.kernel": np.zeros((3, 16), np.float32)}, "unknown \\['lstm_9.kernel'\\]"),
        ({"lstm_1.bias": np.zeros((4, 4), np.float32)}, "lstm_1.bias.*\\[16\\].*\\[4, 4\\]"),
        ({"lstm_1.bias": np.zeros(16, np.int32)}, "lstm_1.bias.*got int32"),
        ({"lstm_1.bias": np.full(16, np.nan, np.float32)}, "lstm_1.bias.*finite"),
    ],
)
def test_invalid_weights_are_rejected_and_none_is_set(
    change: dict[str, np.ndarray | None], message: str
) -> None:
    network = network_of(two_layers(), 12)
    before = network.get_weights()
    invalid = {name: value + 1 for name, value in before.items()} | change
    invalid = {name: value for name, value in invalid.items() if value is not None}
    with pytest.raises(ArtifactError, match=message):
        network.set_weights(invalid)
    for name, value in network.get_weights().items():
        np.testing.assert_array_equal(value, before[name])


def test_unfitted_schema_is_rejected() -> None:
    fields = [{"kind": "numeric", "name": "delay"}, {"kind": "boolean", "name": "late"}]
    spec = two_layers(features=None, events={"fields": fields})
    with pytest.raises(SpecError, match=r"\['delay'\]"):
        StepNetwork(spec)


def test_a_row_of_length_0_keeps_its_state() -> None:
    events = FULL_SCHEMA.model_dump(mode="json")
    head = {"kind": "anomaly", "name": "odd", "targets": ["load", "carrier"]}
    spec = parse_spec({"name": "m", "events": events, "layers": EVERY_STATE, "heads": [head]})
    network, random = network_of(spec, 4), np.random.default_rng(4)
    states = random_states(spec, random, 2)
    rows = np.zeros((2, 6, spec.input_features), np.float32)
    rows[:, :, 0] = random.normal(size=(2, 6))
    _, after = step(network, rows, [0, 6], states)
    np.testing.assert_array_equal(after[0], states[0])
    _, expected = oracle_step(spec, network.get_weights(), rows[1], states[1])
    np.testing.assert_allclose(joined(spec, after[1]), joined(spec, expected), **CLOSE)
