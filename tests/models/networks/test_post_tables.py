"""The post's printed tables come out of the step, whole, in chunks and one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from models.networks.build import StepNetwork
from tests.support.oracle import oracle_step
from tests.support.post_tables import INPUT, OUTPUTS, PRINTED, STATES, post_model

CUTS = [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1]]


def post_network(kind: str) -> StepNetwork:
    spec, weights = post_model(kind)
    network = StepNetwork(spec)
    network.set_weights(weights)
    return network


@pytest.fixture(scope="module", params=OUTPUTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def network(kind: str) -> StepNetwork:
    return post_network(kind)


@pytest.fixture(scope="module", params=["eager", "compiled"])
def step(request: pytest.FixtureRequest, network: StepNetwork) -> Callable[..., Any]:
    """The step; the compiled one takes all chunks padded to five rows, as a service pads them."""
    if request.param == "eager":
        return network.step
    compiled = tf.function(network.step, jit_compile=True)

    def padded_step(rows: Any, lengths: Any, state: Any) -> tuple[Any, Any]:
        missing = len(INPUT) - rows.shape[1]
        padded = tf.pad(rows, [[0, 0], [0, missing], [0, 0]], constant_values=7.5)
        values, after = compiled(padded, lengths, state)
        return values[:, : rows.shape[1]], after

    return padded_step


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_printed_outputs_and_states_are_reproduced(
    kind: str, network: StepNetwork, step: Callable[..., Any], cuts: list[int]
) -> None:
    state = tf.zeros((1, network.state_size))
    outputs: list[float] = []
    for length in cuts:
        rows = np.array(INPUT[len(outputs) : len(outputs) + length], np.float32)
        values, state = step(
            tf.constant(rows.reshape(1, length, 1)), tf.constant([length], tf.int32), state
        )
        outputs.extend(values[0, :, 0].numpy())
    expected, expected_state = OUTPUTS[kind], list(STATES[kind].values())
    np.testing.assert_allclose(np.float64(outputs), expected, rtol=0, atol=PRINTED)
    np.testing.assert_allclose(np.float64(state[0]), expected_state, rtol=0, atol=PRINTED)


def test_the_oracle_reproduces_the_printed_numbers(kind: str) -> None:
    spec, weights = post_model(kind)
    expected, expected_state = OUTPUTS[kind], list(STATES[kind].values())
    rows = np.array(INPUT).reshape(5, 1)
    outputs, state = oracle_step(spec, weights, rows, np.zeros(len(expected_state)))
    np.testing.assert_allclose(outputs[:, 0], expected, rtol=0, atol=PRINTED)
    np.testing.assert_allclose(state, expected_state, rtol=0, atol=PRINTED)
