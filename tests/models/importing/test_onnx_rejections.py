"""ONNX graphs that the import rejects: each error names the place, and a way on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from models.errors import ArtifactError, ImportedModelError
from models.importing.onnx_signature import read_signature
from models.onnx.library import onnxruntime, open_session
from tests.support.onnx_graphs import EXAMPLE_GRAPHS, EXAMPLES, graphs, import_here
from tests.support.onnx_variants import (
    F,
    H,
    Write,
    excess,
    outside,
    plain,
    repeated,
    scanned,
    step_nodes,
)


def two_states(path: Path) -> None:
    """h' = g(x, h), c' = h' - c, as a loop, with names that say nothing."""
    body = graphs.Builder("cell", 1)
    h = step_nodes(body, "row", "state")
    body.add("Identity", h, outputs=["state_next"])
    body.add("Sub", h, "other", outputs=["other_next"])
    body.add("Add", "state_next", "other_next", outputs=["y_step"])
    both = {"state": [None, H], "other": [None, H]}
    step = body.graph(
        {**both, "row": [None, F]},
        {"state_next": [None, H], "other_next": [None, H], "y_step": [None, H]},
    )
    g = graphs.Builder("two", 1)
    names = ["a_last", "b_last", "y"]
    axes = {"scan_input_axes": [1], "scan_output_axes": [1]}
    g.add("Scan", "first", "second", "x", outputs=names, body=step, num_scan_inputs=1, **axes)
    state = ["batch", H]
    g.save(
        path,
        {"x": ["batch", "time", F], "first": state, "second": state},
        {"y": ["batch", "time", H], "a_last": state, "b_last": state},
    )


def changed(change: Callable[[onnx.ModelProto], Any]) -> Write:
    def write(path: Path) -> None:
        plain(path)
        model = onnx.load(path)
        change(model)
        path.write_bytes(model.SerializeToString())

    return write


def custom_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Magic", ["x"], ["z"], domain="mine"))
    model.opset_import.append(helper.make_opsetid("mine", 1))


def unknown_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def random_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("RandomNormalLike", ["x"], ["z"]))


def hidden_state(path: Path) -> None:
    g = graphs.Builder("hidden", 1)
    g.add("Identity", g.dense("x", F, H), outputs=["y"])
    g.save(path, {"x": ["batch", "time", F]}, {"y": ["batch", "time", H]})


def bidirectional(path: Path) -> None:
    g = graphs.Builder("both", 1)
    shapes = ((2, 3 * H, F), (2, 3 * H, H))
    weights = [g.constant(np.ones(shape, np.float32)) for shape in shapes]
    options = {"direction": "bidirectional", "hidden_size": H}
    g.add("GRU", "x", *weights, outputs=["y"], **options)
    g.save(path, {"x": ["time", "batch", F]}, {"y": ["time", 2, "batch", H]})


def fixed_steps(path: Path) -> None:
    g = graphs.Builder("fixed", 1)
    rows, last = scanned(g, "x", "h_in")
    g.add("Identity", rows, outputs=["y"])
    g.add("Identity", last, outputs=["h_out"])
    g.save(path, {"x": [1, 7, F], "h_in": [1, H]}, {"y": [1, 7, H], "h_out": [1, H]})


def either_axes(path: Path) -> None:
    """A state that does not depend on the rows, so that nothing tells steps from batch."""
    g = graphs.Builder("either", 1)
    g.add("Identity", g.dense("x", F, H), outputs=["y"])
    g.add("Mul", "h_in", g.constant(np.float32(0.5)), outputs=["h_out"])
    state = [None, H]
    g.save(path, {"x": [None, None, F], "h_in": state}, {"y": [None, None, H], "h_out": state})


def mixes_rows(path: Path) -> None:
    def centred(g: Any, rows: str) -> str:
        return str(g.add("Sub", rows, g.add("ReduceMean", rows, g.constant([0]), keepdims=1)))

    plain(path, after=centred)


def not_finite(path: Path) -> None:
    plain(path, after=lambda g, rows: g.add("Log", g.add("Neg", g.add("Abs", rows))))


def flattened(path: Path) -> None:
    plain(path, after=lambda g, rows: g.add("Reshape", rows, g.constant([-1, H])), y=["rows", H])


def string_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["y"], ["t"], to=TensorProto.STRING))
    model.graph.output.append(helper.make_tensor_value_info("t", TensorProto.STRING, None))


def loops_by_value(path: Path) -> None:
    """A request with a huge feature would never end."""
    plain(path, after=lambda g, rows: repeated(g, rows, excess(g)))


def allocates_by_value(path: Path) -> None:
    """A request with a huge feature would take all memory."""

    def after(g: Any, rows: str) -> str:
        zeros = g.add("ConstantOfShape", excess(g))
        return str(g.add("Add", rows, g.add("ReduceSum", zeros, keepdims=0)))

    plain(path, after=after)


REJECTIONS: dict[str, tuple[Write, dict[str, Any]]] = {
    r"expected an ONNX file \(a protobuf message ModelProto\), got other bytes": (
        lambda path: path.write_bytes(b"PK\x03\x04 not a graph"),
        {},
    ),
    r"it contains no graph": (lambda path: path.write_bytes(b""), {}),
    r"got \['mine.Magic'\]; export the model with standard operators": (
        changed(custom_operator),
        {},
    ),
    r"without random numbers, got the operators \['RandomNormalLike'\].*model\.eval\(\)": (
        changed(random_operator),
        {},
    ),
    (
        r"the operator Loop \(node 'plain_\d'\) takes its trip count \('plain_\d'\) from the "
        r"values of inputs or states.*endless.*from shapes or constants, and mask the excess"
    ): (loops_by_value, {}),
    r"the operator ConstantOfShape \(node 'plain_\d'\) takes its input 0 .*memory": (
        allocates_by_value,
        {},
    ),
    r"Opset 99.*older opset, in PyTorch `opset_version=18`": (changed(unknown_opset), {}),
    r"in a file beside it, got the file '\.\./secret'.*external_data=False": (
        outside("../secret"),
        {},
    ),
    r"got the file '/etc/hostname'": (outside("/etc/hostname"), {}),
    r"place of its weights in 'm.onnx': -5 bytes": (outside("m.onnx", "-5"), {}),
    r"place of its weights .*0 bytes": (outside("m.onnx", "1" + 20 * "0"), {}),
    r"'gone.data', which cannot be read.*beside": (outside("gone.data"), {}),
    r"found no pair.*`forward\(x, h0, c0\) -> y, hn, cn`": (hidden_state, {}),
    r"the bidirectional GRU .* reads the sequence backwards.*forward layers": (bidirectional, {}),
    r"--state first=a_last --state second=b_last[\s\S]*inputs: x .*[\s\S]*outputs: y ": (
        two_states,
        {},
    ),
    r"not right.*not with `--state first=a_last --state second=b_last`": (
        two_states,
        {"states": ("first=b_last", "second=a_last")},
    ),
    r"--state h=h_out: .*no such input": (plain, {"states": ("h=h_out",)}),
    r"--state h_in=h: .*no such output": (plain, {"states": ("h_in=h",)}),
    r"--state x=h_out: expected input and output of one element type and shape": (
        plain,
        {"states": ("x=h_out",)},
    ),
    r"--state h_in: expected NAME_OF_INPUT=": (plain, {"states": ("h_in",)}),
    r"got \['x', 'elapsed_s'\].*--input x --input elapsed_s": (
        lambda path: path.write_bytes(EXAMPLE_GRAPHS["cfc"].path.read_bytes()),
        {},
    ),
    r"x takes exactly 7 steps; export it for any number": (fixed_steps, {}),
    r"runs as batch_major and as time_major; say which with `--axes batch_major`": (
        either_axes,
        {},
    ),
    r"values that it has alone.*statistic over the batch": (mixes_rows, {}),
    r"expected finite outputs on random rows": (not_finite, {}),
    r"y is \[6, 5\] and \[15, 5\].*--output NAME": (flattened, {}),
    r"tensors of numbers, got t .*--output NAME": (changed(string_output), {}),
    r"--output z: expected an output": (plain, {"outputs": ("z",)}),
    r"--input z: expected an input": (plain, {"inputs": ("z",)}),
    r"--lengths n: expected an input": (plain, {"lengths": "n"}),
    r"--lengths x: expected an input \[B\], got x": (plain, {"lengths": "x"}),
    r"--initial x: expected a state input, one of \['h_in'\]": (plain, {"initial": ("x=1",)}),
    r"--initial h_in: expected finite values of float32, got float64 \[nan\]": (
        plain,
        {"initial": ("h_in=nan",)},
    ),
    r"gone\.npy: cannot be read": (plain, {"initial": ("h_in=gone.npy",)}),
    r"time_major: ONNX Runtime fails on a batch": (plain, {"axes": "time_major"}),
}
"""A pattern of the error; how the graph is written, and the options of the import."""


@pytest.mark.parametrize("message", REJECTIONS)
def test_unsupported_graphs_are_rejected_with_reason_and_alternative(
    tmp_path: Path, message: str
) -> None:
    write, options = REJECTIONS[message]
    path = tmp_path / "m.onnx"
    write(path)
    with pytest.raises(ImportedModelError, match=message):
        import_here(path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_graph_in_the_format_of_onnx_runtime_is_never_run(tmp_path: Path) -> None:
    """A file can be of both formats, and the checks read protobuf."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "m.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(EXAMPLES / "min_gru.onnx", options)
    with pytest.raises(ArtifactError, match="protobuf parsing failed"):
        open_session((tmp_path / "m.ort").read_bytes(), 1, "m")


def test_a_graph_that_is_too_large_is_rejected(tmp_path: Path) -> None:
    message = r"at most 1000 bytes with its weights.*store the weights as float16"
    with pytest.raises(ImportedModelError, match=message):
        read_signature(EXAMPLES / "min_gru.onnx", EXAMPLES, most_bytes=1000)
    outside("m.data")(tmp_path / "m.onnx")
    (tmp_path / "m.data").write_bytes(bytes(5000))
    with pytest.raises(ImportedModelError, match=r"weights of at most 4000 bytes"):
        read_signature(tmp_path / "m.onnx", tmp_path, most_bytes=4000)
