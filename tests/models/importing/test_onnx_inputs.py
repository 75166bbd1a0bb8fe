"""Inputs of graphs that need an option or have no batch axis: constants, columns, one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from models.errors import ImportedModelError
from models.importing.packaging import onnx_options
from models.onnx.library import open_session
from models.onnx.stateful_graph import StatefulGraph
from tests.support.onnx_graphs import graphs, import_here
from tests.support.onnx_variants import F, H, scanned, step_nodes


def of_two_rates(path: Path) -> None:
    """A step that doubles its input at one sampling rate; its export declares no columns."""
    branches = []
    for factor in (1.0, 2.0):
        branch = graphs.Builder(f"times_{factor:g}", 1)
        branch.add("Mul", "x", branch.constant(np.float32(factor)), outputs=["scaled"])
        branches.append(branch.graph({}, {"scaled": [None, None]}))
    g = graphs.Builder("rates", 1)
    is_fast = g.add("Equal", "sr", g.constant(np.int64(16000)))
    g.add("If", is_fast, outputs=["row"], then_branch=branches[1], else_branch=branches[0])
    state = step_nodes(g, g.add("Reshape", "row", g.constant([-1, F])), "state")
    g.add("Identity", state, outputs=["stateN"])
    g.add("ReduceMean", state, g.constant([1]), outputs=["output"], keepdims=1)
    g.save(
        path,
        {"x": [None, None], "state": [None, H], "sr": (TensorProto.INT64, [])},
        {"output": [None, 1], "stateN": [None, H]},
    )


def served(path: Path, out: Path, **options: Any) -> StatefulGraph:
    artifact = import_here(path, out, **options).artifact
    network, graph = artifact.spec.onnx, artifact.network
    assert network is not None
    assert graph is not None
    return StatefulGraph(network, artifact.network_state, open_session(graph, 1, "graph"))


def random_rows(*shape: int) -> Any:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_a_constant_replaces_an_input(tmp_path: Path, rate: int) -> None:
    of_two_rates(tmp_path / "m.onnx")
    options = {"constants": [f"sr={rate}"], "features": F}
    graph = served(tmp_path / "m.onnx", tmp_path / "out", **options)
    assert graph.network.features == F
    rows, states = random_rows(3, 2, F), random_rows(3, H)
    outputs, after = graph.step(rows, np.full(3, 2, np.int32), states)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for step in range(2):
        feeds = {"x": rows[:, step], "state": states, "sr": np.array(rate)}
        expected, states = session.run(None, feeds)
        np.testing.assert_allclose(outputs[:, step], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after, states, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"got \['x', 'sr'\] besides the states .*`--constant sr=VALUE`"),
        ({"constants": ["sr=16000"]}, r"given by `--features F`"),
        ({"constants": ["sr=16000"], "features": F + 1}, r"ONNX Runtime fails on a batch"),
        ({"constants": ["sr=0.5"], "features": F}, r"--constant sr=0.5: expected a value of int64"),
        ({"constants": ["rate=1"]}, r"--constant rate: expected one of the inputs .*'sr'"),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    of_two_rates(tmp_path / "m.onnx")
    with pytest.raises(ImportedModelError, match=message):
        import_here(tmp_path / "m.onnx", tmp_path / "out", **options)


def test_a_constant_is_a_number() -> None:
    with pytest.raises(ImportedModelError, match=r"--constant sr=fast: expected NAME=NUMBER"):
        onnx_options(constants=["sr=fast"])


@pytest.mark.parametrize("shape", [[H], [1, H], [1, 1, H]])
def test_a_graph_of_one_row_serves_a_batch(tmp_path: Path, shape: list[int]) -> None:
    def write(path: Path, *, is_batched: bool) -> None:
        g = graphs.Builder("row", 1)
        x, state = "x", "h_in"
        if not is_batched:
            x = g.add("Unsqueeze", x, g.constant([0]))
            state = g.add("Reshape", state, g.constant([1, H]))
        rows, last = scanned(g, x, state)
        if not is_batched:
            rows = g.add("Squeeze", rows, g.constant([0]))
            last = g.add("Reshape", last, g.constant(shape))
        g.add("Identity", rows, outputs=["y"])
        g.add("Identity", last, outputs=["h_out"])
        own, lead = (["batch", H], ["batch"]) if is_batched else (shape, [])
        g.save(
            path,
            {"x": [*lead, "time", F], "h_in": own},
            {"y": [*lead, "time", H], "h_out": own},
        )

    graph_of: dict[bool, StatefulGraph] = {}
    for is_batched in (True, False):
        path = tmp_path / f"m{is_batched}.onnx"
        write(path, is_batched=is_batched)
        graph_of[is_batched] = served(path, tmp_path / f"out{is_batched}")
    assert graph_of[False].network.axes == "unbatched"
    rows, states = random_rows(3, 7, F), random_rows(3, H)
    lengths = np.array([7, 2, 5], np.int32)
    expected, states_expected = graph_of[True].step(rows, lengths, states)
    outputs, after = graph_of[False].step(rows, lengths, states)
    np.testing.assert_allclose(after, states_expected, rtol=1e-5, atol=1e-6)
    for at, length in enumerate(lengths):
        np.testing.assert_allclose(
            outputs[at, :length], expected[at, :length], rtol=1e-5, atol=1e-6
        )
