"""The written graph: valid ONNX, the oracle's numbers for any network, clear rejections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.artifact.fingerprint import compute_fingerprint
from models.errors import GraphUnsupportedError
from models.networks.build import StepNetwork
from models.onnx import graph as graph_module
from models.onnx.graph import write_graph
from models.onnx.library import onnxruntime
from models.onnx.messages import MARK_FINGERPRINT, MARK_FORMAT
from models.spec.layout import state_spec
from models.spec.model import ModelSpec, parse_spec
from tests.models.networks.specs import (
    COMBINATIONS,
    coded_batch,
    convolved_codes,
    sequences,
    stacks,
)
from tests.support.events import FULL_SCHEMA
from tests.support.models import random_weights, small_spec
from tests.support.oracle import contracting_weights, joined, oracle_step, random_states
from tests.support.oracle_layers import ACTIVATIONS

Floats = NDArray[np.float32]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CELLS = ["elu", "hard_sigmoid", "leaky_relu", "linear", "relu", "sigmoid", "softplus", "softsign"]
CELLS += ["tanh"]


def session_of(spec: ModelSpec, weights: Mapping[str, Floats]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = write_graph(spec, weights)
    assert onnx.load_from_string(graph).SerializeToString(deterministic=True) == graph
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def run(
    session: onnxruntime.InferenceSession, rows: Floats, lengths: list[int], states: Floats
) -> tuple[Floats, Floats]:
    inputs = {"rows": rows, "lengths": np.array(lengths, np.int32), "states": states}
    outputs, after = session.run(["outputs", "states_after"], inputs)
    return outputs, after


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    stacks() | stacks(per_chunk=True),
    st.lists(st.integers(1, 11), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_any_network_equals_the_oracle(spec: ModelSpec, lengths: list[int], seed: int) -> None:
    check_batch(spec, lengths, seed)


@pytest.mark.parametrize("options", COMBINATIONS, ids="-".join)
def test_every_combination_of_lstm_options_equals_the_oracle(options: dict[str, Any]) -> None:
    layer = {"kind": "lstm", "units": 5, **options}
    heads = [{"kind": "sequence", "name": "h"}]
    spec = parse_spec({"name": "m", "features": 2, "layers": [layer], "heads": heads})
    check_batch(spec, [6, 2, 1, 9], 12)


def test_coded_rows_under_a_convolution_equal_the_oracle() -> None:
    spec = convolved_codes()
    weights = contracting_weights(spec, 4)
    rows, lengths, states = coded_batch(np.random.default_rng(4))
    outputs, after = run(session_of(spec, weights), rows, list(lengths), states)
    for b, length in enumerate(lengths):
        expected, expected_state = oracle_step(spec, weights, rows[b, :length], states[b])
        np.testing.assert_allclose(outputs[b, :length], expected, **CLOSE)
        np.testing.assert_allclose(after[b], expected_state, **CLOSE)


def check_batch(spec: ModelSpec, lengths: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = contracting_weights(spec, seed)
    streams = sequences(random, lengths, spec.input_features)
    states = random_states(spec, random, len(lengths))
    rows = np.zeros((len(lengths), max(lengths) + 2, spec.input_features), np.float32)
    for b, stream in enumerate(streams):
        rows[b, : len(stream)] = stream
    outputs, after = run(session_of(spec, weights), rows, lengths, states)
    for b, stream in enumerate(streams):
        expected, expected_state = oracle_step(spec, weights, stream, states[b])
        np.testing.assert_allclose(outputs[b, : len(stream)], expected, **CLOSE)
        np.testing.assert_allclose(joined(spec, after[b]), joined(spec, expected_state), **CLOSE)


def cells(name: str) -> list[dict[str, Any]]:
    recurrent = {"units": 3, "activation": name, "recurrent_activation": name}
    return [
        {"kind": "lstm", **recurrent},
        {"kind": "gru", **recurrent},
        {"kind": "gru", "reset_after": False, **recurrent},
        {"kind": "simple_rnn", "units": 3, "activation": name},
    ]


def check_one_step(layers: list[dict[str, Any]], head: str) -> None:
    heads = [{"kind": "dense", "name": "y", "units": 4, "activation": head}]
    spec = parse_spec({"name": "m", "features": 3, "layers": layers, "heads": heads})
    weights = contracting_weights(spec, 8)
    rows = np.random.default_rng(8).normal(size=(1, 1, 3)).astype(np.float32)
    size = state_spec(spec).float_size
    states = np.linspace(-0.4, 0.3, size, dtype=np.float32)[np.newaxis]
    outputs, after = run(session_of(spec, weights), rows, [1], states)
    expected, expected_state = oracle_step(spec, weights, rows[0], states[0])
    np.testing.assert_allclose(outputs[0], expected, **CLOSE)
    np.testing.assert_allclose(after[0], expected_state, **CLOSE)


@pytest.mark.parametrize("name", CELLS)
def test_activations_inside_a_cell_equal_the_oracle(name: str) -> None:
    check_one_step(cells(name), "linear")


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_of_layers_and_heads_equal_the_oracle(name: str) -> None:
    layers = [
        {"kind": "gru", "units": 3},
        {"kind": "dense", "units": 3, "activation": name},
        {"kind": "activation", "activation": name},
        {"kind": "activation", "activation": "tanh"},
        {"kind": "lstm", "units": 3, "projection": 2, "activation": name},
        {"kind": "activation", "activation": "tanh"},
    ]
    check_one_step(layers, name)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS.keys() - set(CELLS)))
@pytest.mark.parametrize("kind", [0, 1], ids=["lstm", "gru"])
def test_activations_unsupported_in_onnx_cells_are_rejected(name: str, kind: int) -> None:
    heads = [{"kind": "sequence", "name": "h"}]
    spec = parse_spec({"name": "m", "features": 1, "layers": [cells(name)[kind]], "heads": heads})
    with pytest.raises(GraphUnsupportedError, match=rf"'(lstm|gru)_1'.*'{name}'.*'softsign'"):
        write_graph(spec, random_weights(spec))


@pytest.mark.parametrize("over", ["lstm", "chunk"])
def test_attention_over_the_stream_with_long_chunks_is_rejected(over: str) -> None:
    """Its memory grows with the square of a call's steps, and such a call is never sliced."""
    second_lstm = {"kind": "lstm", "units": 2, "starts_from": "lstm_1"}
    attention = {"kind": "attention", "over": "chunk", "units": 2}
    data = {
        "name": "m",
        "features": 2,
        "layers": [
            {"kind": "lstm", "units": 2},
            {"kind": "attention", "over": "stream", "units": 2, "name": "past"},
            second_lstm if over == "lstm" else attention,
        ],
        "heads": [{"kind": "sequence", "name": "h"}],
        "max_chunk_steps": 2048,
    }
    spec = parse_spec(data)
    write_graph(spec, random_weights(spec))
    longer = parse_spec({**data, "max_chunk_steps": 2049})
    with pytest.raises(GraphUnsupportedError, match=r"'past'.* at most 2048 steps, .* 2049"):
        write_graph(longer, random_weights(longer))


def test_weights_over_the_size_limit_of_a_file_are_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = small_spec()
    monkeypatch.setattr(graph_module, "MAX_CONSTANT_BYTES", 1000)
    with pytest.raises(GraphUnsupportedError, match="at most 1000 bytes of weights"):
        write_graph(spec, random_weights(spec))


def test_the_graph_is_valid_and_has_the_fingerprint_of_its_model() -> None:
    spec, weights = small_spec(), random_weights(small_spec())
    data = write_graph(spec, weights)
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    size = state_spec(spec).float_size
    assert shapes == {
        "rows": ["B", "T", 13],
        "lengths": ["B"],
        "states": ["B", size],
        "outputs": ["B", "T", shapes["outputs"][2]],
        "states_after": ["B", size],
    }
    marks = {entry.key: entry.value for entry in model.metadata_props}
    assert marks == {MARK_FORMAT: "1", MARK_FINGERPRINT: compute_fingerprint(spec, weights).hex()}
    assert {node.op_type for node in model.graph.node} >= {"LSTM", "GRU"}
    assert data == write_graph(spec, dict(reversed(weights.items())))


@pytest.mark.parametrize(
    ("log_deviation", "value"),
    [(30, 2), (-30, 2), (7.5, 2), (-7.5, 2), (6.5, 2), (0, 1e30), (0, -1e30), (-30, 3e38)],
)
def test_an_anomaly_heads_deviations_are_bounded(log_deviation: float, value: float) -> None:
    """In both networks: without bounds they overflow, or fit any deviation."""
    head = {"kind": "anomaly", "name": "odd", "targets": ["load"]}
    data = {"events": FULL_SCHEMA.model_dump(mode="json"), "layers": [{"kind": "gru", "units": 2}]}
    spec = parse_spec({"name": "m", **data, "heads": [head]})
    weights = contracting_weights(spec, 5)
    rows = np.zeros((1, 1, spec.input_features), np.float32)
    rows[0, 0, spec.events.column_index["load"]] = value
    state = np.zeros((1, state_spec(spec).float_size), np.float32)
    state[0, state_spec(spec).slices["odd.forecast"]] = 0.5, log_deviation
    network = StepNetwork(spec)
    network.set_weights(weights)
    outputs, _ = run(session_of(spec, weights), rows, [1], state)
    others, _ = network.step(rows, np.ones(1, np.int32), state)
    expected, _ = oracle_step(spec, weights, rows[0], state[0])
    assert np.isfinite(outputs).all()
    np.testing.assert_allclose(outputs[0], expected, **CLOSE)
    np.testing.assert_allclose(others[0], expected, **CLOSE)
