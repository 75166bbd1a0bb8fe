"""The Keras step against the oracle, and invariance to chunking, batching and padding."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import ArtifactError, SpecError
from models.networks.build import StepNetwork
from models.spec.model import ModelSpec, parse_spec
from tests.models.networks.running import CLOSE, assert_oracle, network_of, run_in_chunks, step
from tests.models.networks.specs import coded_batch, convolved_codes, sequences, stacks
from tests.support.events import FULL_SCHEMA
from tests.support.oracle import (
    joined,
    oracle_in_cuts,
    oracle_step,
    random_states,
)
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


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    stacks() | stacks(per_chunk=True),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_step_equals_the_oracle_with_any_chunking_batch_and_padding(
    spec: ModelSpec, lengths: list[int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    network = network_of(spec, seed)
    streams = sequences(random, lengths, spec.input_features)
    states = random_states(spec, random, len(lengths))
    outputs, after, cuts = run_in_chunks(network, streams, states, random)
    for b, rows in enumerate(streams):
        chunk_lengths = [len(rows)] if spec.chunking == "invisible" else cuts[b]
        expected, expected_state = oracle_in_cuts(
            spec, network.get_weights(), rows, states[b], chunk_lengths
        )
        np.testing.assert_allclose(outputs[b], expected, **CLOSE)
        np.testing.assert_allclose(joined(spec, after[b]), joined(spec, expected_state), **CLOSE)


def test_compiled_step_of_coded_rows_equals_the_oracle() -> None:
    network = network_of(convolved_codes(), 8)
    rows, lengths, states = coded_batch(np.random.default_rng(8))
    compiled = tf.function(network.step, jit_compile=True)
    outputs, after = compiled(tf.constant(rows), tf.constant(lengths), tf.constant(states))
    streams, unpadded = (
        [values[b, :length] for b, length in enumerate(lengths)] for values in (rows, outputs)
    )
    assert_oracle(network, streams, states, unpadded, after)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_equals_the_oracle_in_cell_layer_and_head(name: str) -> None:
    spec = two_layers(
        layers=[
            {"kind": "lstm", "units": 3, "activation": name, "recurrent_activation": name},
            {"kind": "activation", "activation": "tanh"},
            {"kind": "gru", "units": 3, "activation": name},
            {"kind": "activation", "activation": "tanh"},
            {"kind": "dense", "units": 3, "activation": name},
            {"kind": "activation", "activation": name},
        ],
        heads=[{"kind": "dense", "name": "y", "units": 4, "activation": name}],
    )
    network = network_of(spec, 8)
    # One step from a state that is not zero: a cell of exponentials leaves float32 soon after.
    rows = np.random.default_rng(8).normal(size=(1, 1, 3)).astype(np.float32)
    state = np.linspace(-0.4, 0.3, network.state_size, dtype=np.float32)[np.newaxis]
    outputs, after = step(network, rows, [1], state)
    expected, expected_state = oracle_step(spec, network.get_weights(), rows[0], state[0])
    np.testing.assert_allclose(outputs[0], expected, **CLOSE)
    np.testing.assert_allclose(after[0], expected_state, **CLOSE)


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
