"""The step that scores a network: one contract on ONNX Runtime and on TensorFlow."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tensorflow")

from models.offline import steps as step_module
from models.offline.steps import open_step
from models.spec.layout import network_outputs, network_state
from models.spec.model import ModelSpec, parse_spec
from tests.support.oracle import contracting_weights, oracle_step
from tests.support.training import both_ways_spec


def spec_of(activation: str) -> ModelSpec:
    layers = [
        {"kind": "lstm", "units": 3, "activation": activation},
        {"kind": "attention", "over": "chunk", "units": 2, "inputs": ["features"]},
        {"kind": "concatenate", "inputs": ["lstm_1", "attention_1"]},
    ]
    heads = [{"kind": "dense", "name": "y", "units": 2}]
    return parse_spec({"name": "m", "features": 2, "layers": layers, "heads": heads})


@pytest.mark.parametrize(
    ("activation", "installed"),
    [("tanh", True), ("gelu", True), ("tanh", False)],
    ids=["graph", "no graph", "no ONNX Runtime"],
)
def test_the_step_equals_the_oracle_beside_padding_and_rows_without_steps(
    monkeypatch: pytest.MonkeyPatch, activation: str, installed: bool
) -> None:
    if not installed:
        monkeypatch.setattr(step_module, "find_spec", lambda name: None)
    spec = spec_of(activation)
    weights = contracting_weights(spec, 3)
    random = np.random.default_rng(3)
    rows = random.normal(size=(4, 5, 2)).astype(np.float32)
    lengths = np.array([3, 0, 5, 1], np.int32)
    rows[np.arange(5) >= lengths[:, np.newaxis]] = np.nan
    state = random.uniform(-1, 1, (4, network_state(spec).float_size)).astype(np.float32)
    before = state.copy()

    outputs, after = open_step(spec, weights)(rows, lengths, state)

    np.testing.assert_array_equal(state, before)
    np.testing.assert_array_equal(after[1], state[1])
    for row in (0, 2, 3):
        expected = oracle_step(spec, weights, rows[row, : lengths[row]], state[row])
        np.testing.assert_allclose(outputs[row, : lengths[row]], expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(after[row], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "output_steps"),
    [
        (spec_of("tanh"), 4),
        (both_ways_spec(blocks={"size": 3, "lookahead": 1}, layers=1), 3),
    ],
    ids=["steps", "blocks"],
)
def test_outputs_have_one_shape_with_and_without_steps(spec: ModelSpec, output_steps: int) -> None:
    step = open_step(spec, contracting_weights(spec, 1))
    states = np.ones((2, network_state(spec).float_size), np.float32)
    rows = np.zeros((2, 4, spec.input_features), np.float32)
    for batch, length in ((2, 2), (2, 0), (0, 0)):
        outputs, after = step(rows[:batch], np.full(batch, length, np.int32), states[:batch])
        assert outputs.shape == (batch, output_steps, network_outputs(spec).size)
        if length == 0:
            np.testing.assert_array_equal(after, states[:batch])


def test_a_network_with_a_graph_is_scored_without_tensorflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(step_module, "open_keras_step")
    spec = spec_of("tanh")
    assert open_step(spec, contracting_weights(spec, 1))
