"""The LSTM's options, alone and together: against the oracle, and beside Keras' own LSTM."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from models.errors import SpecError
from models.networks.initial_weights import draw_weights
from models.spec.layout import output_spec, state_spec, weight_shapes
from models.spec.model import ModelSpec, parse_spec
from tests.models.networks.running import assert_oracle, network_of, run_in_chunks, step
from tests.models.networks.specs import COMBINATIONS, OPTIONS, sequences
from tests.support.oracle import contracting_weights


def one_layer(*, units: int = 5, **options: Any) -> ModelSpec:
    return parse_spec(
        {
            "name": "m",
            "features": 2,
            "layers": [{"kind": "lstm", "name": "cell", "units": units, **options}],
            "heads": [{"kind": "sequence", "name": "output"}],
        }
    )


@pytest.mark.parametrize("options", COMBINATIONS, ids="-".join)
def test_every_combination_equals_the_oracle_with_any_chunking(options: dict[str, Any]) -> None:
    spec = one_layer(**options)
    network = network_of(spec)
    random = np.random.default_rng(4)
    streams = sequences(random, [11, 1, 6], 2)
    states = random.uniform(-1, 1, (3, network.state_size)).astype(np.float32)
    outputs, after, _ = run_in_chunks(network, streams, states, random)
    assert_oracle(network, streams, states, outputs, after)


@pytest.mark.parametrize("options", [OPTIONS, {"peepholes": True}], ids=["all", "peepholes"])
def test_state_does_not_change_beyond_a_rows_length(options: dict[str, Any]) -> None:
    network = network_of(one_layer(**options))
    random = np.random.default_rng(5)
    rows = random.normal(size=(3, 6, 2)).astype(np.float32)
    state = random.normal(size=(3, network.state_size)).astype(np.float32)
    compiled = tf.function(network.step, jit_compile=True)
    _, after = compiled(tf.constant(rows), tf.constant([0, 2, 6]), tf.constant(state))
    _, short = step(network, rows[1:2, :2], [2], state[1:2])
    np.testing.assert_array_equal(after[0], state[0])
    np.testing.assert_allclose(after[1], short[0], rtol=0, atol=1e-6)
    assert np.abs(after[2] - state[2]).max() > 1e-3


def test_layout_of_state_outputs_and_weights() -> None:
    spec = one_layer(**OPTIONS)
    assert {part.name: part.shape for part in state_spec(spec).parts} == {
        "cell.hidden": (3,),
        "cell.carry": (5,),
    }
    assert output_spec(spec).outputs[0].shape == (3,)
    assert weight_shapes(spec) == {
        "cell.kernel": (2, 20),
        "cell.recurrent_kernel": (3, 20),
        "cell.bias": (20,),
        "cell.peepholes": (15,),
        "cell.kernel_gamma": (20,),
        "cell.recurrent_gamma": (20,),
        "cell.carry_gamma": (5,),
        "cell.carry_beta": (5,),
        "cell.projection": (5, 3),
    }


def test_a_wider_projection_is_rejected() -> None:
    with pytest.raises(
        SpecError, match=r"layers\.0\.lstm: .*projection: expected at most `units` \(5\), got 6"
    ):
        one_layer(projection=6)


def test_initial_peepholes_are_zero_and_gains_are_one() -> None:
    spec = one_layer(**OPTIONS)
    weights = draw_weights(spec, 1)
    np.testing.assert_array_equal(weights["cell.peepholes"], np.zeros(15))
    np.testing.assert_array_equal(weights["cell.carry_beta"], np.zeros(5))
    for name in ("kernel_gamma", "recurrent_gamma", "carry_gamma"):
        assert (weights[f"cell.{name}"] == 1).all()
    np.testing.assert_array_equal(weights["cell.bias"], [0] * 5 + [1] * 5 + [0] * 10)
    recurrent = weights["cell.recurrent_kernel"].astype(np.float64)
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(3), atol=1e-6)
    assert np.abs(weights["cell.projection"]).max() > 0.1


def test_zero_peepholes_equal_the_lstm_of_keras() -> None:
    """Dropout included: the same seed draws the same masks in both."""
    layer = {"units": 4, "dropout": 0.4, "recurrent_dropout": 0.3}
    plain, peeping = one_layer(**layer), one_layer(**layer, peepholes=True)
    ours, keras_own = network_of(peeping), network_of(plain)
    weights = {**contracting_weights(plain, 6), "cell.peepholes": np.zeros(12, np.float32)}
    ours.set_weights(weights)
    keras_own.set_weights({name: weights[name] for name in weight_shapes(plain)})
    rows = np.random.default_rng(6).normal(size=(3, 7, 2)).astype(np.float32)
    lengths, state = np.array([7, 2, 5], np.int32), np.full((3, 8), 0.3, np.float32)
    for training in (False, True):
        results = []
        for network in (ours, keras_own):
            network.reseed(9)
            results.append(network.step(rows, lengths, state, training=training))
        for one, other in zip(*results, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_gradients_reach_every_weight() -> None:
    network = network_of(one_layer(**OPTIONS, dropout=0.2, recurrent_dropout=0.2))
    rows = np.random.default_rng(7).normal(size=(2, 5, 2)).astype(np.float32)
    state = np.full((2, 8), 0.3, np.float32)
    with tf.GradientTape() as tape:
        outputs, _ = network.step(rows, np.array([5, 3], np.int32), state, training=True)
        loss = tf.reduce_sum(tf.square(outputs))
    gradients = tape.gradient(loss, [variable.value for variable in network.trainable_variables])
    assert len(gradients) == 9
    for gradient in gradients:
        assert np.abs(np.asarray(gradient)).max() > 0


def test_layers_differ_in_cell_and_width_with_a_residual() -> None:
    spec = parse_spec(
        {
            "name": "mixed",
            "features": 3,
            "layers": [
                {"kind": "gru", "name": "first", "units": 4},
                {"kind": "lstm", "name": "second", "units": 7, "projection": 4},
                {"kind": "add", "name": "over_second", "inputs": ["first", "second"]},
                {"kind": "gru", "name": "third", "units": 4, "reset_after": False},
                {"kind": "add", "name": "over_third", "inputs": ["over_second", "third"]},
                {"kind": "lstm", "name": "last", "units": 2, "peepholes": True},
            ],
            "heads": [{"kind": "sequence", "name": "output"}],
        }
    )
    network = network_of(spec)
    random = np.random.default_rng(8)
    streams = sequences(random, [9, 5], 3)
    states = random.uniform(-1, 1, (2, network.state_size)).astype(np.float32)
    outputs, after, _ = run_in_chunks(network, streams, states, random)
    slices = state_spec(spec).slices
    assert_oracle(network, streams, states, outputs, after)
    assert {name: part.stop - part.start for name, part in slices.items()} == {
        "first.hidden": 4,
        "second.hidden": 4,
        "second.carry": 7,
        "third.hidden": 4,
        "last.hidden": 2,
        "last.carry": 2,
    }


@pytest.mark.parametrize("options", COMBINATIONS, ids="-".join)
def test_cell_runs_in_keras_rnn(options: dict[str, Any]) -> None:
    """Through `keras.layers.RNN`, with its mask, `initial_state` and `return_state`."""
    network = network_of(one_layer(**options))
    layer = network._layers["cell"]
    assert isinstance(layer, keras.layers.RNN)
    rows = np.random.default_rng(9).normal(size=(1, 4, 2)).astype(np.float32)
    sequence, hidden, carry = layer(rows)
    assert sequence.shape[1:] == (4, *hidden.shape[1:])
    np.testing.assert_array_equal(sequence[:, -1], hidden)
    _, halfway, halfway_carry = layer(rows[:, :2])
    _, *after = layer(rows[:, 2:], initial_state=[halfway, halfway_carry])
    np.testing.assert_allclose(after[0], hidden, rtol=0, atol=1e-6)
    np.testing.assert_allclose(after[1], carry, rtol=0, atol=1e-6)
