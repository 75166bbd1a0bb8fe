"""What a graph reads of earlier rows, as a state; rows in several axes, and names of columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.errors import ImportedModelError
from models.onnx.library import open_session
from models.onnx.stateful_graph import StatefulGraph
from models.spec.layout import output_spec
from tests.support.onnx_graphs import graphs, import_here
from tests.support.onnx_variants import F, H, scanned, step_nodes

Floats = NDArray[np.float32]
C = 1
"""Values of the row before that a row of the graph begins with; F - C are new."""
LENGTHS = np.array([6, 2, 5], np.int32)


def write_loop(path: Path, lead: Sequence[str | int], state: Sequence[str | int]) -> None:
    """A loop over rows of F values, behind the given axes."""
    g = graphs.Builder("loop", 1)
    x, h = "x", "h_in"
    if len(lead) == 1:
        x, h = g.add("Unsqueeze", x, g.constant([0])), g.add("Reshape", h, g.constant([1, H]))
    elif lead[0] == "time":
        x = g.add("Transpose", x, perm=[1, 0, 2])
    rows, last = scanned(g, x, h)
    if len(lead) == 1:
        rows, last = (g.add("Squeeze", rows, g.constant([0])), g.add("Squeeze", last))
    elif lead[0] == "time":
        rows = g.add("Transpose", rows, perm=[1, 0, 2])
    g.add("Identity", rows, outputs=["y"])
    g.add("Identity", last, outputs=["h_out"])
    g.save(path, {"x": [*lead, F], "h_in": state}, {"y": [*lead, H], "h_out": state})


def write_step(path: Path, batch: str | int = "batch") -> None:
    """One step, which reads its values again in a branch of an `If`."""
    g = graphs.Builder("step", 1)
    branches = []
    for name in ("then", "else"):
        branch = graphs.Builder(name, 1)
        branch.add("Identity", "x", outputs=[f"{name}_x"])
        branches.append(branch.graph({}, {f"{name}_x": [None, None]}))
    is_given = g.constant(np.array(True))
    row = g.add("If", is_given, outputs=["row"], then_branch=branches[0], else_branch=branches[1])
    state = step_nodes(g, g.add("Reshape", row, g.constant([-1, F])), "h_in")
    g.add("Identity", state, outputs=["h_out"])
    g.add("ReduceSum", state, g.constant([1]), outputs=["y"], keepdims=1)
    g.save(path, {"x": [batch, F], "h_in": [batch, H]}, {"y": [batch, 1], "h_out": [batch, H]})


def write_window(path: Path, *shape: int) -> None:
    """A graph without states, of a window of values in several axes."""
    g = graphs.Builder("window", 1)
    flat = g.add("Reshape", "x", g.constant([0, -1]))
    g.add("Tanh", g.dense(flat, int(np.prod(shape)), 3), outputs=["y"])
    g.save(path, {"x": [None, *shape]}, {"y": [None, 3]})


def serve(artifact: Artifact) -> StatefulGraph:
    assert artifact.spec.onnx is not None
    assert artifact.network is not None
    session = open_session(artifact.network, 1, "graph")
    return StatefulGraph(artifact.spec.onnx, artifact.network_state, session)


def run_in_chunks(artifact: Artifact, rows: Floats) -> list[Floats]:
    """The outputs of each row of a batch, sent as two chunks of different lengths."""
    graph, layout = serve(artifact), artifact.network_state
    states = np.tile(layout.pack(layout.initial()), (len(rows), 1))
    first = np.array([2, 1, 2], np.int32)
    begin, states = graph.step(rows[:, :2], first, states)
    rest = np.zeros((len(rows), int(max(LENGTHS - first)), rows.shape[2]), np.float32)
    for at, row in enumerate(rows):
        rest[at, : LENGTHS[at] - first[at]] = row[first[at] : LENGTHS[at]]
    end, _ = graph.step(rest, LENGTHS - first, states)
    return [
        np.concatenate([begin[at, : first[at]], end[at, : LENGTHS[at] - first[at]]])
        for at in range(len(rows))
    ]


def windows_of(row: Floats, context: int) -> Floats:
    """Each row of a stream behind the values before it, as the caller of the graph keeps them."""
    values = np.concatenate([np.zeros(context, np.float32), row.ravel()])
    size = context + row.shape[1]
    every: Floats = np.lib.stride_tricks.sliding_window_view(values, size)[:: row.shape[1]]
    return np.ascontiguousarray(every)


def random_rows(columns: int) -> Floats:
    return np.random.default_rng(5).standard_normal((3, 6, columns)).astype(np.float32)


def call_row_by_row(path: Path, windows: Floats, shape: Sequence[int] = (F,)) -> Floats:
    """The outputs of a graph of one step, with its state if it has one."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    has_state = len(session.get_inputs()) > 1
    state, outputs = {"h_in": np.zeros((1, H), np.float32)} if has_state else {}, []
    for window in windows:
        y, *after = session.run(None, {"x": window.reshape(1, *shape), **state})
        state = dict(zip(state, after, strict=True))
        outputs.append(y[0])
    return np.array(outputs)


@pytest.mark.parametrize("batch", ["batch", 1])
def test_the_end_of_each_row_is_kept_for_the_next(tmp_path: Path, batch: str | int) -> None:
    write_step(tmp_path / "m.onnx", batch)
    artifact = import_here(tmp_path / "m.onnx", tmp_path / "out", context=C).artifact
    assert artifact.spec.features == F - C
    rows = random_rows(F - C)
    for got, row, length in zip(run_in_chunks(artifact, rows), rows, LENGTHS, strict=True):
        expected = call_row_by_row(tmp_path / "m.onnx", windows_of(row[:length], C))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("lead", "state"),
    [
        (["batch", "time"], ["batch", H]),
        (["time", "batch"], ["batch", H]),
        (["time"], [H]),
    ],
)
def test_a_loop_over_rows_reads_the_end_of_the_row_before(
    tmp_path: Path, lead: list[str | int], state: list[str | int]
) -> None:
    write_loop(tmp_path / "m.onnx", lead, state)
    artifact = import_here(tmp_path / "m.onnx", tmp_path / "out", context=C).artifact
    write_step(tmp_path / "step.onnx")
    rows = random_rows(F - C)
    for got, row, length in zip(run_in_chunks(artifact, rows), rows, LENGTHS, strict=True):
        expected = call_row_by_row(tmp_path / "step.onnx", windows_of(row[:length], C))
        np.testing.assert_allclose(got.sum(1, keepdims=True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [F, 2 * F, 3])
def test_a_window_without_states_becomes_a_stream(tmp_path: Path, columns: int) -> None:
    shape = (6, F, 1)
    write_window(tmp_path / "m.onnx", *shape)
    context = 6 * F - columns
    options = {"features": columns, "context": context}
    artifact = import_here(tmp_path / "m.onnx", tmp_path / "out", **options).artifact
    rows = random_rows(columns)
    for got, row, length in zip(run_in_chunks(artifact, rows), rows, LENGTHS, strict=True):
        windows = windows_of(row[:length], context)
        expected = call_row_by_row(tmp_path / "m.onnx", windows, shape)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_row_may_be_all_values_of_an_input_with_several_axes(tmp_path: Path) -> None:
    g = graphs.Builder("plane", 1)
    flat = g.add("Reshape", "x", g.constant([-1, F]))
    g.add("Identity", step_nodes(g, flat, "h_in"), outputs=["h_out"])
    g.add("Reshape", "h_out", g.constant([-1, H, 1, 1]), outputs=["y"])
    y = {"y": [1, H, 1, 1], "h_out": [1, H]}
    g.save(tmp_path / "m.onnx", {"x": [1, F, 1, 1], "h_in": [1, H]}, y)
    with pytest.raises(ImportedModelError, match=f"if a row is all of it, `--features {F}`"):
        import_here(tmp_path / "m.onnx", tmp_path / "out")
    artifact = import_here(tmp_path / "m.onnx", tmp_path / "out", features=F).artifact
    assert [output.shape for output in output_spec(artifact.spec).outputs] == [(H, 1, 1)]
    write_step(tmp_path / "step.onnx")
    rows = random_rows(F)
    for got, row, length in zip(run_in_chunks(artifact, rows), rows, LENGTHS, strict=True):
        expected = call_row_by_row(tmp_path / "step.onnx", row[:length])
        np.testing.assert_allclose(got.sum(1, keepdims=True), expected, rtol=1e-5, atol=1e-5)


def test_the_way_to_serve_a_window_is_suggested_and_works(tmp_path: Path) -> None:
    write_window(tmp_path / "m.onnx", 6, F)
    with pytest.raises(ImportedModelError, match=rf"`--features {F} --context {5 * F}`"):
        import_here(tmp_path / "m.onnx", tmp_path / "out")
    import_here(tmp_path / "m.onnx", tmp_path / "out", features=F, context=5 * F)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": F}, rf"--context {F}: expected at most {F - 1} of the {F} values"),
        ({"context": 1, "features": F}, rf"--features {F} --context 1: the input x has {F}"),
    ],
)
def test_a_context_leaves_a_row(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_step(tmp_path / "m.onnx")
    with pytest.raises(ImportedModelError, match=message):
        import_here(tmp_path / "m.onnx", tmp_path / "out", **options)


def test_a_loop_takes_a_context_of_one_row_at_most(tmp_path: Path) -> None:
    write_loop(tmp_path / "m.onnx", ["batch", "time"], ["batch", H])
    message = rf"--context 2: expected at most 1 of the {F} values"
    with pytest.raises(ImportedModelError, match=message):
        import_here(tmp_path / "m.onnx", tmp_path / "out", context=2)


def test_a_graph_whose_nodes_fix_the_batch_is_called_for_each_row(tmp_path: Path) -> None:
    """Its inputs declare any batch, and a reshape in it takes one row alone."""
    write_step(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    for constant in model.graph.initializer:
        if constant.raw_data == np.array([-1, F]).tobytes():
            constant.raw_data = np.array([1, F]).tobytes()
    onnx.save(model, tmp_path / "one.onnx")
    artifact = import_here(tmp_path / "one.onnx", tmp_path / "out").artifact
    assert artifact.spec.onnx is not None
    assert artifact.spec.onnx.batch_size == 1
    rows = random_rows(F)
    for got, row, length in zip(run_in_chunks(artifact, rows), rows, LENGTHS, strict=True):
        expected = call_row_by_row(tmp_path / "m.onnx", row[:length])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_columns_are_named_after_their_inputs(tmp_path: Path) -> None:
    g = graphs.Builder("two", 1)
    both = g.add("Concat", "x", "elapsed", axis=1)
    g.add("Identity", step_nodes(g, both, "h_in"), outputs=["h_out"])
    inputs = {"x": [None, F - 1], "elapsed": [None, 1], "h_in": [None, H]}
    g.save(tmp_path / "m.onnx", inputs, {"h_out": [None, H]})
    options = {"inputs": ["elapsed", "x"]}
    artifact = import_here(tmp_path / "m.onnx", tmp_path / "out", **options).artifact
    names = [column.name for column in artifact.spec.columns]
    assert names == ["elapsed", *(f"x[{at}]" for at in range(F - 1))]


def test_places_of_an_output_are_named_by_labels(tmp_path: Path) -> None:
    write_window(tmp_path / "m.onnx", 2, F)
    (tmp_path / "classes.txt").write_text("walk\nrun\n\nrest\n")
    window = {"features": F, "context": F}
    unnamed = import_here(tmp_path / "m.onnx", tmp_path / "unnamed", **window).artifact
    for at, labels in enumerate((["y=walk,run,rest"], [f"y={tmp_path / 'classes.txt'}"])):
        own = {**window, "labels": labels}
        artifact = import_here(tmp_path / "m.onnx", tmp_path / f"out{at}", **own).artifact
        (output,) = output_spec(artifact.spec).outputs
        assert output.column_names() == ["y[walk]", "y[run]", "y[rest]"]
        assert artifact.fingerprint == unnamed.fingerprint
    for labels, message in (
        ("y=walk,run", r"labels of 'y': expected a distinct one for each .* \[3\], got 2"),
        ("y=walk,run,run", r"labels of 'y': expected a distinct one"),
        ("z=walk", r"--labels z: expected one of the outputs \['y'\]"),
    ):
        with pytest.raises(ImportedModelError, match=message):
            import_here(tmp_path / "m.onnx", tmp_path / "out", **window, labels=[labels])


def test_rows_that_a_loud_row_raises_need_a_batch_of_one(tmp_path: Path) -> None:
    """The floor of a spectrum is often relative to the loudest value of the whole call."""

    def write(path: Path, batch: str | int) -> None:
        g = graphs.Builder("floor", 1)
        size = g.add("Abs", "x")
        floor = g.add("Mul", g.add("ReduceMax", size, keepdims=0), g.constant(np.float32(1e-5)))
        g.add("Log", g.add("Max", size, floor), outputs=["y"])
        g.save(path, {"x": [batch, F]}, {"y": [batch, F]})

    write(tmp_path / "any.onnx", "rows")
    with pytest.raises(ImportedModelError, match=r"mixes rows .*make_dynamic_shape_fixed"):
        import_here(tmp_path / "any.onnx", tmp_path / "out", context=C)
    write(tmp_path / "one.onnx", 1)
    import_here(tmp_path / "one.onnx", tmp_path / "out", context=C)
