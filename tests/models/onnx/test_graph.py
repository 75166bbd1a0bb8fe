"""The written graph: valid ONNX, clear rejections; `test_step.py` compares its numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from models.artifact.fingerprint import compute_fingerprint
from models.errors import GraphUnsupportedError
from models.onnx import graph as graph_module
from models.onnx.graph import write_graph
from models.onnx.messages import MARK_FINGERPRINT, MARK_FORMAT
from models.spec.layout import state_spec
from models.spec.model import parse_spec
from tests.models.networks.running import CLOSE, RUNS
from tests.models.networks.specs import ONNX_CELLS
from tests.support.events import FULL_SCHEMA
from tests.support.models import random_weights, small_spec
from tests.support.oracle import contracting_weights, oracle_step
from tests.support.oracle_layers import ACTIVATIONS


@pytest.mark.parametrize("name", sorted(ACTIVATIONS.keys() - set(ONNX_CELLS)))
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_activations_unsupported_in_onnx_cells_are_rejected(name: str, kind: str) -> None:
    layer = {"kind": kind, "units": 3, "activation": name, "recurrent_activation": name}
    heads = [{"kind": "sequence", "name": "h"}]
    spec = parse_spec({"name": "m", "features": 1, "layers": [layer], "heads": heads})
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
    expected, _ = oracle_step(spec, weights, rows[0], state[0])
    for kind in ("onnx", "keras"):
        outputs, _ = RUNS[kind](spec, weights)(rows, [1], state)
        assert np.isfinite(outputs).all()
        np.testing.assert_allclose(outputs[0], expected, **CLOSE)
