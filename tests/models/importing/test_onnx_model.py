"""Importing ONNX graphs: what is found and proven, and the mathematics of the examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from typer.testing import CliRunner

from carry.cli import app
from models.artifact.artifact import Artifact, load_artifact
from models.artifact.writing import write_artifact
from models.errors import ArtifactError, ImportedModelError
from models.importing.onnx_proof import Prover
from models.importing.packaging import default_name, import_onnx_model, onnx_options
from models.onnx.library import open_session
from models.onnx.stateful_graph import StatefulGraph
from models.spec.onnx_network import OnnxNetwork
from tests.support.onnx_graphs import EXAMPLE_GRAPHS, EXAMPLES, graphs, import_here
from tests.support.onnx_variants import F, H, W, outside, plain, scanned

F64 = NDArray[np.float64]


def sigmoid(x: F64) -> F64:
    return 1 / (1 + np.exp(-x))


def weights_of(graph: onnx.GraphProto, operator: str) -> list[list[F64]]:
    """The weights of each node of a type, float64, without the axis of directions."""
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    return [
        [values[name][0].astype(np.float64) for name in node.input[1:4]]
        for node in graph.node
        if node.op_type == operator
    ]


def graph_of(artifact: Artifact) -> OnnxNetwork:
    assert artifact.spec.onnx is not None
    return artifact.spec.onnx


def session_of(artifact: Artifact) -> Any:
    assert artifact.network is not None
    return open_session(artifact.network, 1, "m")


def head_of(graph: onnx.GraphProto) -> tuple[F64, F64]:
    """Kernel and bias of the linear layer at the end."""
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    kernel = next(node.input[1] for node in graph.node if node.op_type == "MatMul")
    return values[kernel].astype(np.float64), values["head.bias"].astype(np.float64)


def lstm(rows: F64, kernel: F64, recurrent: F64, bias: F64) -> F64:
    """An LSTM from zero by the equations of the ONNX operator, gates i, o, f, c."""
    h, c = np.zeros((2, recurrent.shape[1]))
    outputs = []
    for row in rows:
        gates = kernel @ row + recurrent @ h + bias[: len(bias) // 2] + bias[len(bias) // 2 :]
        i, o, f, new = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.array(outputs)


def gru(rows: F64, kernel: F64, recurrent: F64, bias: F64) -> F64:
    """A GRU from zero with `linear_before_reset`, gates z, r, h."""
    h = np.zeros(recurrent.shape[1])
    own, other = np.split(bias, 2)
    outputs = []
    for row in rows:
        (z, r, new), (rz, rr, rn) = (
            np.split(kernel @ row + own, 3),
            np.split(recurrent @ h + other, 3),
        )
        z, r = sigmoid(z + rz), sigmoid(r + rr)
        h = (1 - z) * np.tanh(new + r * rn) + z * h
        outputs.append(h)
    return np.array(outputs)


def test_name_is_the_file_s_or_the_folder_s_of_a_triton_model() -> None:
    folder = EXAMPLES / "triton/counting_gru"
    file = folder / "1/model.onnx"
    options = onnx_options(triton=folder / "config.pbtxt")
    assert default_name(file, onnx_options()) == "model"
    assert default_name(file, options) == "counting-gru"


@pytest.mark.parametrize(("name", "cell"), [("torch-lstm", lstm), ("torch-gru", gru)])
def test_exports_of_pytorch_equal_the_oracle(tmp_path: Path, name: str, cell: Any) -> None:
    example = EXAMPLE_GRAPHS[name]
    artifact = import_here(example.path, tmp_path / name, name).artifact
    rows = np.random.default_rng(5).standard_normal((12, 4)).astype(np.float32)
    graph = onnx.load(example.path).graph
    value = rows.astype(np.float64)
    for weights in weights_of(graph, cell.__name__.upper()):
        value = cell(value, *weights)
    kernel, bias = head_of(graph)
    runner = StatefulGraph(graph_of(artifact), artifact.network_state, session_of(artifact))
    # beside a longer row, so that the batch is cut
    batch = np.stack([np.concatenate([rows, np.zeros((5, 4))]), np.ones((17, 4))])
    states = np.tile(artifact.state.initial().floats, (2, 1))
    lengths = np.array([12, 17], np.int32)
    outputs, _ = runner.step(batch.astype(np.float32), lengths, states)
    np.testing.assert_allclose(outputs[0, :12], value @ kernel + bias, rtol=1e-5, atol=1e-5)


def test_the_recipe_writes_the_files_of_the_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "FOLDER", tmp_path)
    for write in ("residual_lstm", "min_gru", "slstm", "cfc", "triton"):
        getattr(graphs, write)()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 7
    for path in written:
        assert path.read_bytes() == (EXAMPLES / path.relative_to(tmp_path)).read_bytes(), path


def test_the_command_reports_what_it_found_and_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["import", str(EXAMPLES / "residual_lstm.onnx"), str(out), "--name", "residual"]
    command += ["--reset-every", "32"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "model residual, version " in result.output
    assert load_artifact(out).spec.reset_every == 32
    assert "features: x, 4 columns, batch_major" in result.output
    assert "h_in -> h_out float32 [2, 8], batch axis 1" in result.output
    assert "chunking: invisible; measured: batch equals alone" in result.output
    assert "batching: padded" in result.output
    result = CliRunner().invoke(app, ["import", "model.keras", str(out), "--input", "a"])
    assert result.exit_code == 1
    assert "model.keras: expected a .onnx file" in result.output
    result = CliRunner().invoke(app, ["import", "model.pt", str(out)])
    assert "export the model with torch.onnx.export" in result.output


def looks_ahead(g: Any, rows: str) -> str:
    """Adds the mean over the chunk."""
    return str(g.add("Add", rows, g.add("ReduceMean", rows, g.constant([1]), keepdims=1)))


def test_a_graph_that_sees_the_chunk_as_a_whole_is_per_chunk(tmp_path: Path) -> None:
    plain(tmp_path / "m.onnx", after=looks_ahead)
    report = import_here(tmp_path / "m.onnx", tmp_path / "out")
    network = graph_of(report.artifact)
    assert (network.chunking, network.batching) == ("per_chunk", "equal")
    assert report.artifact.spec.chunk_limit == 1024
    assert "outputs depend on where a stream is cut" in report.notes[0]


def test_lengths_that_do_not_hide_padding_share_no_calls(tmp_path: Path) -> None:
    lengths = {"lengths": (TensorProto.INT32, ["batch"])}

    def unmasked(g: Any, rows: str) -> str:
        return str(g.add("Add", rows, g.add("Mul", rows, g.constant(np.float32(0)))))

    plain(tmp_path / "m.onnx", after=unmasked, inputs=lengths)
    report = import_here(tmp_path / "m.onnx", tmp_path / "out")
    assert graph_of(report.artifact).batching == "cut"
    assert "padding changes results in spite of the input 'lengths'" in report.notes[0]


def test_the_batch_of_a_state_is_behind_its_layers(tmp_path: Path) -> None:
    """In a state [layers, batch, units] that is exported for one layer and a batch of one."""
    g = graphs.Builder("layers", 1)
    rows, last = scanned(g, "x", g.add("Squeeze", "h_in", g.constant([0])))
    g.add("Identity", rows, outputs=["y"])
    g.add("Unsqueeze", last, g.constant([0]), outputs=["h_out"])
    state = [1, 1, H]
    g.save(
        tmp_path / "m.onnx",
        {"x": [1, "time", F], "h_in": state},
        {"y": [1, "time", H], "h_out": state},
    )
    network = graph_of(import_here(tmp_path / "m.onnx", tmp_path / "out").artifact)
    assert (network.batch_size, network.states[0].batch_axis) == (1, 1)


def test_weights_in_a_file_beside_the_model_are_embedded(tmp_path: Path) -> None:
    plain(tmp_path / "whole.onnx")
    model = onnx.load(tmp_path / "whole.onnx")
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    artifact = import_here(tmp_path / "m.onnx", tmp_path / "out").artifact
    (tmp_path / "m.data").unlink()
    embedded = onnx.load_from_string(artifact.network or b"")
    assert not any(each.external_data for each in embedded.graph.initializer)
    onnx.checker.check_model(embedded)
    session_of(artifact)


def test_initial_values_are_read_from_a_file(tmp_path: Path) -> None:
    plain(tmp_path / "m.onnx")
    values = np.arange(H, dtype=np.float64) / 3
    np.save(tmp_path / "h.npy", values)
    options = {"initial": (f"h_in={tmp_path / 'h.npy'}",)}
    artifact = import_here(tmp_path / "m.onnx", tmp_path / "out", **options).artifact
    np.testing.assert_array_equal(artifact.state.initial().floats, values.astype(np.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, H)), r"expected one value or shape \[5\].*got \[2, 5\]"),
        (np.array([{}], object), r"expected a number or a \.npy file"),
        (b"not NumPy's", r"expected a number or a \.npy file"),
    ],
)
def test_files_of_initial_values_are_checked(tmp_path: Path, values: Any, message: str) -> None:
    plain(tmp_path / "m.onnx")
    file = tmp_path / "h.npy"
    if isinstance(values, bytes):
        file.write_bytes(values)
    else:
        np.save(file, values)
    with pytest.raises(ImportedModelError, match=rf"--initial h_in: {message}"):
        import_here(tmp_path / "m.onnx", tmp_path / "out", initial=(f"h_in={file}",))


def test_the_isolated_import_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x00nothing")
    with pytest.raises(ImportedModelError, match=rf"^{path}: expected an ONNX file"):
        import_onnx_model(path, tmp_path / "out")


def test_a_report_has_no_control_characters(tmp_path: Path) -> None:
    plain(tmp_path / "m.onnx")
    report = import_here(tmp_path / "m.onnx", tmp_path / "out")
    report = replace(report, notes=("\x1b[31mfirst\nsecond",))
    assert report.lines()[-1] == "note: ?[31mfirst?second"
    assert all(map(str.isprintable, report.lines()))


def test_a_file_whose_name_is_not_utf_8_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "m\udcff.onnx"
    plain(path)
    artifact = import_here(path, tmp_path / "out").artifact
    assert artifact.manifest["training"]["imported"]["file"] == "m?.onnx"


def test_the_isolated_import_takes_long_options(tmp_path: Path) -> None:
    plain(tmp_path / "m.onnx")
    options = onnx_options(labels=[f"y={','.join(map(str, range(50_000)))}"])
    with pytest.raises(ImportedModelError, match=r"labels|names|values"):
        import_onnx_model(tmp_path / "m.onnx", tmp_path / "out", options=options)


def runner(path: Path, out: Path, **changes: Any) -> tuple[StatefulGraph, Artifact]:
    """A graph, imported and run with changes of its signature."""
    artifact = import_here(path, out).artifact
    network = graph_of(artifact).model_copy(update=changes)
    return StatefulGraph(network, artifact.network_state, session_of(artifact)), artifact


@pytest.mark.parametrize("batching", ["padded", "cut", "equal", "step"])
def test_every_batching_mode_equals_rows_computed_alone(tmp_path: Path, batching: str) -> None:
    path = EXAMPLES / "residual_lstm.onnx"
    graph, artifact = runner(path, tmp_path / "out", batching=batching)
    random = np.random.default_rng(3)
    lengths = np.array([3, 7, 1, 7, 4], np.int32)
    rows = random.standard_normal((5, 7, 4)).astype(np.float32)
    states = random.standard_normal((5, artifact.state.float_size)).astype(np.float32)
    outputs, after = graph.step(rows, lengths, states)
    for at, length in enumerate(lengths.tolist()):
        alone = graph.call(rows[at : at + 1, :length], None, states[at : at + 1])
        np.testing.assert_allclose(outputs[at, :length], alone[0][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(after[at], alone[1][0], rtol=1e-5, atol=1e-5)


def test_a_fixed_batch_is_filled_and_isolates_failures(tmp_path: Path) -> None:
    g = graphs.Builder("pair", 1)
    rows, last = scanned(g, g.add("Gather", g.constant(np.eye(F, dtype=np.float32)), "x"), "h_in")
    g.add("Identity", rows, outputs=["y"])
    g.add("Identity", last, outputs=["h_out"])
    codes = {"x": (TensorProto.INT64, [2, "time"]), "h_in": [2, H]}
    g.save(tmp_path / "m.onnx", codes, {"y": [2, "time", H], "h_out": [2, H]})
    graph, artifact = runner(tmp_path / "m.onnx", tmp_path / "out")
    assert graph.network.batch_size == 2
    values = np.array([0, 1, 9, 2, 1], np.float32).reshape(5, 1, 1)
    states = np.tile(artifact.state.initial().floats, (5, 1))
    outputs, after = graph.step(values, np.ones(5, np.int32), states)
    failed = [not np.isfinite(row).all() for row in outputs]
    assert failed == [False, False, True, False, False]
    assert [not np.isfinite(row).all() for row in after] == failed
    np.testing.assert_array_equal(outputs[1], outputs[4])
    np.testing.assert_allclose(outputs[0, 0], 0.25 * W[0], rtol=1e-6)


class Faulty:
    """A session that a fault changes; the measurements have to notice it."""

    def __init__(self, session: Any, fault: str):
        self._session, self._fault = session, fault
        self._random = np.random.default_rng(1)

    def run(self, names: list[str], feeds: dict[str, Any], options: Any) -> list[Any]:
        states = [name for name in feeds if name in ("h_in", "c_in")]
        if self._fault == "swapped states":
            values = [feeds[name] for name in states[::-1]]
            feeds = {**feeds, **dict(zip(states, values, strict=True))}
        if self._fault == "mixed rows":
            feeds = {**feeds, **{name: feeds[name][:, ::-1].copy() for name in states}}
        if self._fault == "padding not masked" and "lengths" in feeds:
            feeds["lengths"] = np.full_like(feeds["lengths"], feeds["x"].shape[1])
        values = self._session.run(names, feeds, options)
        if self._fault == "noise":
            values = [value + np.float32(1e-7 * self._random.random()) for value in values]
        return list(values)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("swapped states", "the state pairs are not right"),
        ("mixed rows", "each row of a batch"),
        ("noise", r"same outputs from the same call.*dropout"),
        ("padding not masked", None),
    ],
)
def test_measurements_detect_faults(tmp_path: Path, fault: str, message: str | None) -> None:
    artifact = import_here(EXAMPLES / "residual_lstm.onnx", tmp_path / "out").artifact
    unproven = graph_of(artifact).model_copy(update={"batching": "equal"})
    prover = Prover(unproven, artifact.state, Faulty(session_of(artifact), fault))
    if message is not None:
        with pytest.raises(ImportedModelError, match=message):
            prover.prove()
        return
    assert prover.prove().batching == "cut"
    assert "padding_invisible" not in prover.verified


def test_an_artifact_whose_graph_refers_to_files_is_rejected(tmp_path: Path) -> None:
    artifact = import_here(EXAMPLES / "min_gru.onnx", tmp_path / "out").artifact
    outside("graph.data")(tmp_path / "m.onnx")
    graph = (tmp_path / "m.onnx").read_bytes()
    with pytest.raises(ArtifactError, match=r"graph\.onnx: .*refers to the file 'graph\.data'"):
        write_artifact(tmp_path / "other", artifact.spec, artifact.weights, network=graph)
