"""The check that the work of a graph depends on the shapes of its inputs, never on values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from models.onnx import bounded_work
from models.onnx.bounded_work import find_unbounded_work
from models.onnx.library import open_session
from models.onnx.messages import DecodingError, parse_model
from tests.support.onnx_graphs import EXAMPLE_GRAPHS, graphs
from tests.support.onnx_variants import F, H, excess, plain, repeated

FED = ("x", "h_in")
NUMBERS = np.arange(64)


def steps(g: Any) -> str:
    """The number of steps, int64 [1], from a shape."""
    return str(g.add("Slice", g.add("Shape", "x"), g.constant([1]), g.constant([2])))


def scalar(g: Any, n: str) -> str:
    return str(g.add("Squeeze", n))


def below(g: Any, n: str) -> str:
    """Which of the numbers 0 to 63 are less than n."""
    return str(g.add("Less", g.constant(NUMBERS), n))


def image(g: Any, *shape: int) -> str:
    return str(g.constant(np.zeros(shape, np.float32)))


def zero(g: Any, n: str) -> str:
    return str(g.add("Sub", n, n))


def one_more(g: Any, rows: str, n: str) -> str:
    """A loop of at most three iterations, each of which asks whether there is another one."""
    body = graphs.Builder("asking", 1)
    body.add("Greater", scalar(body, n), body.constant(0), outputs=["go_on"])
    body.add("Identity", "value", outputs=["value_next"])
    flag: Any = (TensorProto.BOOL, [])
    shape = [None, None, H]
    step = body.graph(
        {"iteration": (TensorProto.INT64, []), "go": flag, "value": shape},
        {"go_on": flag, "value_next": shape},
    )
    return str(g.add("Loop", g.constant(3), g.constant(np.array(True)), rows, body=step))


def choice(g: Any, n: str) -> str:
    """One of two numbers."""
    branches = {}
    for name in ("then", "else"):
        inner = graphs.Builder(name, 1)
        inner.add("Identity", inner.constant(np.float32(1)), outputs=[f"{name}_value"])
        branches[f"{name}_branch"] = inner.graph({}, {f"{name}_value": []})
    return str(g.add("If", g.add("Greater", scalar(g, n), g.constant(0)), **branches))


Use = Callable[[Any, str, str], str]
"""Adds a node to a graph; from the rows [B, T, H] and a size of int64 [1], which is T at most."""

OPERATORS: dict[str, Use] = {
    "CenterCropPad": lambda g, rows, n: g.add("CenterCropPad", image(g, 8), n),
    "Compress": lambda g, rows, n: g.add("Compress", g.constant(NUMBERS), below(g, n)),
    "ConstantOfShape": lambda g, rows, n: g.add("ConstantOfShape", n),
    "DFT": lambda g, rows, n: g.add("DFT", image(g, 1, 8, 1), scalar(g, n)),
    "Expand": lambda g, rows, n: g.add("Expand", image(g, 1), n),
    "HannWindow": lambda g, rows, n: g.add("HannWindow", scalar(g, n)),
    "If": lambda g, rows, n: choice(g, n),
    "Loop": lambda g, rows, n: repeated(g, rows, n),
    "MelWeightMatrix": lambda g, rows, n: g.add(
        *("MelWeightMatrix", scalar(g, n), g.constant(16), g.constant(8192)),
        *(g.constant(np.float32(0)), g.constant(np.float32(4096))),
    ),
    "NonMaxSuppression": lambda g, rows, n: g.add(
        "NonMaxSuppression", image(g, 1, 4, 4), image(g, 1, 1, 4), n
    ),
    "NonZero": lambda g, rows, n: g.add("NonZero", below(g, n)),
    "OneHot": lambda g, rows, n: g.add("OneHot", g.constant([0]), n, g.constant([0, 1])),
    "Pad": lambda g, rows, n: g.add("Pad", image(g, 1), g.add("Concat", n, n, axis=0)),
    "Range": lambda g, rows, n: g.add("Range", g.constant(0), scalar(g, n), g.constant(1)),
    "ReduceSum": lambda g, rows, n: g.add("ReduceSum", rows, zero(g, n)),
    "Reshape": lambda g, rows, n: g.add(
        "Reshape", rows, g.add("Concat", g.constant([0]), n, g.constant([H]), axis=0)
    ),
    "Resize": lambda g, rows, n: g.add(
        "Resize", image(g, 1, 1, 2), "", "", g.add("Concat", g.constant([1, 1]), n, axis=0)
    ),
    "SequenceAt": lambda g, rows, n: g.add(
        "SequenceAt", g.add("SequenceConstruct", rows), scalar(g, zero(g, n))
    ),
    "Slice": lambda g, rows, n: g.add("Slice", rows, g.constant([0]), n, g.constant([1])),
    "Split": lambda g, rows, n: g.add(
        "Split",
        g.constant(NUMBERS),
        g.add("Concat", n, g.add("Sub", g.constant([64]), n), axis=0),
        outputs=["split_first", "split_second"],
    ),
    "SplitToSequence": lambda g, rows, n: g.add(
        "ConcatFromSequence", g.add("SplitToSequence", rows, scalar(g, n), axis=1), axis=1
    ),
    "Squeeze": lambda g, rows, n: g.add("Squeeze", image(g, 1, 3), zero(g, n)),
    "STFT": lambda g, rows, n: g.add("STFT", image(g, 1, 64, 1), scalar(g, n), image(g, 8)),
    "Tile": lambda g, rows, n: g.add("Tile", image(g, 1), n),
    "TopK": lambda g, rows, n: g.add(
        "TopK", image(g, 64), n, outputs=["top_values", "top_indices"]
    ),
    "Unique": lambda g, rows, n: g.add("Unique", g.add("Min", g.constant(NUMBERS), n)),
    "Unsqueeze": lambda g, rows, n: g.add("Unsqueeze", rows, zero(g, n)),
    "condition of Loop": lambda g, rows, n: repeated(
        g, rows, "", g.add("Less", scalar(g, n), g.constant(0))
    ),
    "next condition of Loop": lambda g, rows, n: one_more(g, rows, n),
}


def write(path: Path, use: Use, size: Callable[[Any], str]) -> bytes:
    """A graph with that operator, whose size is made by `size`."""

    def after(g: Any, rows: str) -> str:
        used = g.add("Cast", use(g, rows, size(g)), to=TensorProto.FLOAT)
        return str(g.add("Add", rows, g.add("ReduceSum", g.add("Abs", used), keepdims=0)))

    plain(path, after=after)
    return path.read_bytes()


@pytest.mark.parametrize("name", OPERATORS)
def test_sizes_come_from_shapes_not_from_values(tmp_path: Path, name: str) -> None:
    operator = name.split()[-1]
    bad = check(write(tmp_path / "bad.onnx", OPERATORS[name], excess), FED, None)
    assert bad is not None
    assert bad.startswith(f"the operator {operator} (node ")
    assert "from the values of inputs or states" in bad
    good = write(tmp_path / "good.onnx", OPERATORS[name], steps)
    assert check(good, FED, None) is None
    feeds = {"x": np.ones((2, 3, F), np.float32), "h_in": np.zeros((2, H), np.float32)}
    y, _ = open_session(good, 1, name).run(["y", "h_out"], feeds)
    assert y.shape == (2, 3, H)


def model(
    *nodes: onnx.NodeProto,
    constants: Sequence[str] = (),
    inputs: Sequence[str] = ("x", "lengths"),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model of these nodes, with inputs of no type, since only names matter."""
    values = [onnx.ValueInfoProto(name=name) for name in inputs]
    tensors = [numpy_helper.from_array(np.array([1]), name) for name in constants]
    graph = helper.make_graph(nodes, "graph", values, [onnx.ValueInfoProto(name="y")], tensors)
    return helper.make_model(graph, functions=functions)


def check(
    made: onnx.ModelProto | bytes, fed: Sequence[str] = ("x",), lengths: str | None = "lengths"
) -> str | None:
    data = made if isinstance(made, bytes) else made.SerializeToString()
    try:
        return find_unbounded_work(parse_model(data), fed, lengths)
    except DecodingError as error:
        return f"not ONNX: {error}"


node = helper.make_node
FILL = node("ConstantOfShape", ["n"], ["y"])


def subgraph(
    *nodes: onnx.NodeProto, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
) -> onnx.GraphProto:
    first, last = (
        [onnx.ValueInfoProto(name=name) for name in names] for names in (inputs, outputs)
    )
    return helper.make_graph(nodes, "inner", first, last)


def scanning(*nodes: onnx.NodeProto) -> onnx.NodeProto:
    """A loop over the steps of x."""
    body = subgraph(*nodes, inputs=["row"], outputs=["y"])
    return node("Scan", ["x"], ["y"], num_scan_inputs=1, body=body)


def delayed(scanned: str, ahead: Sequence[str] = ()) -> onnx.NodeProto:
    """A loop whose first state has a value of the scanned input after three steps."""
    pairs = pairwise(["a", "b", "c", "row"])
    body = subgraph(
        *(node("Identity", [later], [f"{state}_next"]) for state, later in pairs),
        inputs=["a", "b", "c", "row"],
        outputs=["a_next", "b_next", "c_next"],
    )
    inputs = [*ahead, "c", "c", "c", scanned]
    return node("Scan", inputs, ["n", "o", "p"], num_scan_inputs=1, body=body)


def carrying(*outputs: str) -> onnx.NodeProto:
    """A loop that carries a value of x to its first output, and numbers its iterations."""
    body = subgraph(
        node("Identity", ["go"], ["go_on"]),
        node("Identity", ["b"], ["a_next"]),
        node("Identity", ["x"], ["b_next"]),
        inputs=["i", "go", "a", "b"],
        outputs=["go_on", "a_next", "b_next", "i"],
    )
    return node("Loop", ["c", "", "c", "c"], outputs, body=body)


def choosing(*branches: str) -> onnx.NodeProto:
    then, other = (
        subgraph(node("Identity", [name], ["chosen"]), outputs=["chosen"]) for name in branches
    )
    return node("If", ["c"], ["n"], then_branch=then, else_branch=other)


def function(name: str, *nodes: onnx.NodeProto, domain: str = "own") -> onnx.FunctionProto:
    return helper.make_function(domain, name, ["n"], ["y"], nodes, [])


def call(name: str, read: str, written: str, domain: str = "own") -> onnx.NodeProto:
    return node(name, [read], [written], domain=domain)


SHAPE = node("Shape", ["x"], ["n"])
VALUES = node("Neg", ["x"], ["n"])
SAME = function("same", node("Identity", ["n"], ["y"]))
ASKED = [call("same", "n", "shape"), call("same", "x", "values")]
FILLED = function("fill", FILL)
TOP = node("Pad", ["x", "c", "x"], ["y"])
BOUNDED: dict[str, onnx.ModelProto] = {
    "shapes": model(SHAPE, FILL),
    "sizes of values": model(node("Neg", ["x"], ["z"]), node("Size", ["z"], ["n"]), FILL),
    "lengths of chunks": model(node("Neg", ["lengths"], ["n"]), FILL),
    "a constant that is an input too": model(FILL, inputs=("x", "n"), constants=("n",)),
    "values that are padding": model(TOP, constants="c"),
    "values that are inserted": model(
        node("SequenceConstruct", ["x"], ["s"]),
        node("SequenceInsert", ["s", "x", "c"], ["y"]),
        constants="c",
    ),
    "a shape from outside": model(SHAPE, scanning(FILL)),
    "states of shapes": model(node("Shape", ["x"], ["s"]), delayed("s"), FILL, constants="c"),
    "states of shapes, with lengths": model(
        node("Shape", ["x"], ["s"]), delayed("s", [""]), FILL, constants="c"
    ),
    "numbers of iterations": model(carrying("a", "b", "n"), FILL, constants="c"),
    "a choice of constants": model(choosing("c", "c"), FILL, constants="c"),
    "a function of shapes": model(SHAPE, call("fill", "n", "y"), functions=[FILLED]),
    "what a function returns of shapes": model(
        SHAPE, *ASKED, node("ConstantOfShape", ["shape"], ["y"]), functions=[SAME]
    ),
}
UNBOUNDED: dict[str, onnx.ModelProto] = {
    "values": model(VALUES, FILL),
    "chosen values": model(node("Where", ["x", "a", "b"], ["n"]), FILL, constants="ab"),
    "an input without a value": model(FILL, inputs=("x", "n")),
    "values that are read before their node": model(FILL, VALUES),
    "values that a loop reads before their node": model(scanning(FILL), VALUES),
    "a shape that is hidden in a loop": model(SHAPE, scanning(FILL, node("Neg", ["row"], ["n"]))),
    "values from outside": model(VALUES, scanning(FILL)),
    "states of values": model(delayed("x"), FILL, constants="c"),
    "states of values, with lengths": model(delayed("x", [""]), FILL, constants="c"),
    "carried values": model(carrying("n", "b", "counts"), FILL, constants="c"),
    "a choice of values": model(choosing("c", "x"), FILL, constants="c"),
    "another choice of values": model(choosing("x", "c"), FILL, constants="c"),
    "a function of values": model(
        SHAPE, call("fill", "n", "y"), call("fill", "x", "z"), functions=[FILLED]
    ),
    "what a function returns of values": model(
        SHAPE, *ASKED, node("ConstantOfShape", ["values"], ["y"]), functions=[SAME]
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_work_that_depends_on_shapes_is_accepted(name: str) -> None:
    assert check(BOUNDED[name]) is None


@pytest.mark.parametrize("name", UNBOUNDED)
def test_work_that_depends_on_values_is_rejected(name: str) -> None:
    assert str(check(UNBOUNDED[name])).startswith("the operator ConstantOfShape")


def test_a_constant_that_is_fed_is_none() -> None:
    assert check(BOUNDED["a constant that is an input too"], fed=("x", "n")) is not None


@pytest.mark.parametrize(
    ("operator", "domain"), [("Magic", "mine"), ("RandomNormal", ""), ("TfIdfVectorizer", "")]
)
def test_unknown_operators_are_rejected_by_name(operator: str, domain: str) -> None:
    found = check(model(node(operator, ["x"], ["y"], domain=domain, name="it")))
    shown = f"{domain}.{operator}" if domain else operator
    assert str(found).startswith(f"the operator {shown} (node 'it') is not one whose work is known")


@pytest.mark.parametrize("domain", ["", "ai.onnx", "com.microsoft", "ai.onnx.ml"])
def test_a_function_that_hides_an_operator_is_rejected(domain: str) -> None:
    hidden = function("Range", node("Identity", ["n"], ["y"]), domain=domain)
    assert "local function" in str(
        check(model(call("Range", "x", "y", domain), functions=[hidden]))
    )


def test_two_functions_of_one_name_are_rejected() -> None:
    twice = [function("f", node("Identity", ["n"], ["y"])), function("f", FILL)]
    assert "local function 'own.f'" in str(check(model(call("f", "x", "y"), functions=twice)))


def test_nested_functions_do_not_take_exponential_time(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = [
        function(f"f{at}", call(f"f{at + 1}", "n", "a"), call(f"f{at + 1}", "n", "y"))
        for at in range(50)
    ]
    chain.append(function("f50", node("Identity", ["n"], ["y"])))
    monkeypatch.setattr(bounded_work, "MAX_NAMES", 600)
    assert check(model(call("f0", "x", "y"), functions=chain)) is None
    endless = function("f", call("f", "n", "y"))
    assert "in at most 64 levels" in str(check(model(call("f", "x", "y"), functions=[endless])))


def test_nested_loops_do_not_take_exponential_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_work, "MAX_NAMES", 5000)
    inner = subgraph(node("Identity", ["r"], ["y"]), inputs=["r"], outputs=["y"])
    names = [f"s{at}" for at in range(9)]
    for _ in range(9):
        scan = node("Scan", ["r"], ["y"], num_scan_inputs=1, body=inner)
        shift = [node("Identity", [b], [f"{a}n"]) for a, b in pairwise([*names, "r"])]
        outputs = [*(f"{name}n" for name in names), "y"]
        inner = subgraph(*shift, scan, inputs=[*names, "r"], outputs=outputs)
        scan = node("Scan", [*["0"] * 9, "r"], [*names, "y"], num_scan_inputs=1, body=inner)
        inner = subgraph(scan, inputs=["r"], outputs=["y"])
    made = model(node("Scan", ["x"], ["y"], num_scan_inputs=1, body=inner), constants="0")
    assert "at most 5000 names" in str(check(made))


@pytest.mark.parametrize("what", ["inputs", "constants"])
def test_nested_loops_of_many_names_do_not_take_exponential_time(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(bounded_work, "MAX_NAMES", 10_000)
    many = [f"c{at}" for at in range(1000)]
    body = subgraph(node("Sum", ["x", *many], ["y"]), inputs=["s"], outputs=["y"])
    if what == "constants":
        body = subgraph(node("Identity", ["x"], ["y"]), inputs=["s"], outputs=["y"])
        body.initializer.extend(numpy_helper.from_array(np.array([1]), name) for name in many)
    for _ in range(8):
        body.input.insert(0, onnx.ValueInfoProto(name="go"))
        body.input.insert(0, onnx.ValueInfoProto(name="i"))
        body.output.insert(0, onnx.ValueInfoProto(name="go"))
        loop = node("Loop", ["3", "", "0"], ["y"], body=body)
        body = subgraph(loop, inputs=["s"], outputs=["y"])
    assert "at most 10000 names" in str(check(model(loop, constants="03")))


def field(number: int, wire_type: int, value: bytes, high_bits: int = 0) -> bytes:
    """A protobuf field; `high_bits` of its tag are those that protobuf drops."""
    tag, out = (high_bits << 32) | (number << 3) | wire_type, bytearray()
    while tag > 0x7F:
        out.append(tag & 0x7F | 0x80)
        tag >>= 7
    out.append(tag)
    return bytes(out) + (bytes([len(value)]) if wire_type == 2 else b"") + value


def test_a_field_of_another_wire_type_hides_no_operator() -> None:
    """Protobuf skips it."""
    hidden = node("Range", ["c", "x", "c"], ["y"]).SerializeToString() + field(4, 5, b"Tanh")
    graph = field(1, 2, hidden) + field(11, 2, field(1, 2, b"x")) + field(12, 2, field(1, 2, b"y"))
    assert "the operator Range" in str(check(field(7, 2, graph)))


def test_upper_bits_of_a_tag_hide_no_node() -> None:
    hidden = node("Range", ["c", "x", "c"], ["y"]).SerializeToString()
    assert "the operator Range" in str(check(field(7, 2, field(1, 2, hidden))))
    found = check(field(7, 2, field(1, 2, hidden, high_bits=1)))
    assert "not ONNX" in str(found)


def test_a_graph_in_two_fields_is_one_graph() -> None:
    """Protobuf merges them."""
    first = field(1, 2, node("Neg", ["x"], ["n"]).SerializeToString())
    second = field(1, 2, FILL.SerializeToString())
    for parts in ((first, second), (second, first)):
        found = check(b"".join(field(7, 2, part) for part in parts))
        assert "the operator ConstantOfShape" in str(found)


def test_names_that_differ_in_invalid_bytes_are_not_one_name() -> None:
    broken = field(1, 2, field(1, 2, b"x\xff") + field(4, 2, b"Shape"))
    assert "not ONNX: " in str(check(field(7, 2, broken)))


def test_two_attributes_of_one_name_are_rejected() -> None:
    scan = scanning(FILL)
    scan.attribute.append(helper.make_attribute("num_scan_inputs", 2))
    assert "different names of the attributes of the operator Scan" in str(check(model(scan)))


BODY = subgraph(inputs=["row"], outputs=["y"])
MALFORMED = {
    "no inputs": node("If", [], ["y"], then_branch=subgraph(), else_branch=subgraph()),
    "no trip count": node("Loop", [], ["y"], body=subgraph()),
    "no body": node("Loop", ["c", ""], ["y"]),
    "nothing to scan": node("Scan", ["x"], ["y"], body=BODY),
    "more to scan than there is": node("Scan", ["x"], ["y"], num_scan_inputs=-1, body=BODY),
    "no outputs": node("Range", ["x", "x", "x"], []),
    "other outputs of a branch": node(
        "If", ["c"], ["y"], then_branch=subgraph(outputs=["c"]), else_branch=subgraph()
    ),
    "no condition from the body": node(
        "Loop", ["c", "", "x"], ["y"], body=subgraph(inputs=["i", "go", "v"])
    ),
}


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_nodes_are_rejected(malformed: onnx.NodeProto) -> None:
    assert check(model(malformed, constants="c")) is not None


@settings(deadline=None)
@given(data=st.data())
def test_mutated_files_are_accepted_or_rejected(data: st.DataObject) -> None:
    original = EXAMPLE_GRAPHS["slstm"].path.read_bytes()
    start = data.draw(st.integers(0, len(original)))
    end = data.draw(st.integers(start, min(len(original), start + 8)))
    changed = original[:start] + data.draw(st.binary(max_size=8)) + original[end:]
    assert check(changed) is None or isinstance(check(changed), str)
