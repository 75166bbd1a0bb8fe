"""Small ONNX graphs with one property each, and what they compute, in float64 NumPy.

All are variations of h' = a h + (1 - a) W x, y = h', which is known without a library. Variants are
written in ONNX's own syntax; tests write further graphs by `Builder`, from `plain`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from tests.support.onnx_graphs import graphs

F, H = 3, 5
DECAY = 0.75
RANDOM = np.random.default_rng(11)
W = RANDOM.uniform(-1, 1, (F, H)).astype(np.float32)
START = RANDOM.uniform(-1, 1, H).astype(np.float32)
CODES = np.eye(F, dtype=np.float32)[[0, 1, 2, 0]]

Rows = NDArray[np.float64]
Write = Callable[[Path], Any]
Reference = Callable[[Rows], tuple[Rows, dict[str, NDArray[Any]]]]


@dataclass(frozen=True)
class Variant:
    """One graph.

    Attributes:
        text: its inputs, outputs and nodes; names of `WEIGHTS` are weights.
        reference: outputs [T, O] and last states of rows [T, F], from the initial state.
        options: options of the import.
        integers: whether its rows are codes 0 to 3.
        config: text of Triton's configuration.
        more: further weights, such as the default of an input.
    """

    text: str
    reference: Reference
    options: Mapping[str, Any] = field(default_factory=dict)
    features: int = F
    integers: bool = False
    config: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the graph's file."""
        header = '<ir_version: 10, opset_import: ["": 18]> variant '
        model = onnx.parser.parse_model(header + self.text)
        _add_weights(model.graph, {**WEIGHTS, **self.more})
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)

    def arguments(self, path: Path) -> dict[str, Any]:
        """Write the file, and its configuration of Triton; returns the options of the import."""
        self.write(path)
        if self.config is None:
            return dict(self.options)
        path.with_suffix(".pbtxt").write_text(self.config)
        return {**self.options, "triton": path.with_suffix(".pbtxt")}


WEIGHTS = {
    **{f"w{kind}": (W * (1 - DECAY)).astype(f"float{kind}") for kind in (16, 32, 64)},
    **{f"a{kind}": np.asarray(DECAY, f"float{kind}") for kind in (16, 32, 64)},
    "zero": np.float32(0),
    "one": np.float32(1),
    "two": np.float32(2),
    "last": np.int64(-1),
    "axis0": np.array([0]),
    "axis1": np.array([1]),
    "axis2": np.array([2]),
    "codes": CODES,
    "start": START,
}


def _add_weights(graph: Any, weights: Mapping[str, Any]) -> None:
    """Give a graph, and the graphs within, the weights that its nodes or inputs name."""
    names = {name for node in graph.node for name in node.input} | {
        each.name for each in graph.input
    }
    for name in sorted(names & weights.keys()):
        graph.initializer.append(numpy_helper.from_array(np.asarray(weights[name]), name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _add_weights(attribute.g, weights)


def leaky(rows: Rows, start: float | Rows = 0.0) -> Rows:
    """h after each step, [T, H]."""
    states, h = [], np.zeros(H) + start
    for row in rows:
        h = DECAY * h + (1 - DECAY) * (row @ W.astype(np.float64))
        states.append(h)
    return np.array(states)


def _plain(start: float | Rows = 0.0) -> Reference:
    def reference(rows: Rows) -> tuple[Rows, dict[str, NDArray[Any]]]:
        states = leaky(rows, start)
        return states, {"h_in": states[-1]}

    return reference


def counters(rows: Rows) -> tuple[Rows, dict[str, NDArray[Any]]]:
    """The number of positive values, and whether one was above 1."""
    count = np.cumsum(rows[:, 0] > 0)
    flag = np.logical_or.accumulate(rows[:, 0] > 1)
    last = {"count_in": count[-1:], "seen_in": flag[-1:]}
    return np.stack([count, flag], axis=1).astype(np.float64), last


def codes(rows: Rows) -> tuple[Rows, dict[str, NDArray[Any]]]:
    """The outputs of embedded codes, and their sum."""
    states = leaky(CODES.astype(np.float64)[rows[:, 0].astype(int)])
    outputs = np.concatenate([states, states.sum(axis=1, keepdims=True)], axis=1)
    return outputs, {"h_in": states[-1]}


def started(rows: Rows) -> tuple[Rows, dict[str, NDArray[Any]]]:
    """A model that sets its own first state."""
    states = leaky(rows, START)
    return states, {"h_in": states[-1], "sequence.started": np.array(True)}


def _step(kind: str = "32", x: str = "x", h: str = "h_in", after: str = "h_out") -> str:
    """The nodes of one step."""
    return f"new = MatMul({x}, w{kind}) kept = Mul({h}, a{kind}) {after} = Add(kept, new)"


def _scan(x: str = "x", h: str = "h_in", last: str = "h_out", axis: int = 1) -> str:
    """A loop over time: all h are `y`."""
    return f"""
    {last}, y = Scan <num_scan_inputs = 1, scan_input_axes = [{axis}], scan_output_axes = [{axis}],
        body = cell (float[N, 5] state, float[N, 3] row) => (float[N, 5] next, float[N, 5] out)
        {{ {_step(x="row", h="state", after="next")} out = Identity(next) }}>({h}, {x})"""


def _masked(lead: str, axis: int) -> str:
    """A mask of float32, by which padding is ignored."""
    return f"""
    (float[{lead}, 3] x, float[batch, 5] h_in, float[{lead}] mask)
        => (float[{lead}, 5] y, float[batch, 5] h_out) {{
        h_out, y = Scan <num_scan_inputs = 2, scan_input_axes = [{axis}, {axis}],
            scan_output_axes = [{axis}],
            body = cell (float[N, 5] state, float[N, 3] row, float[N] valid)
                => (float[N, 5] next, float[N, 5] out) {{
                {_step(x="row", h="state", after="moved")}
                is_valid = Unsqueeze(valid, axis1)
                taken = Mul(moved, is_valid)
                rest = Sub(one, is_valid)
                left = Mul(state, rest)
                next = Add(taken, left)
                out = Identity(next)
            }}>(h_in, x, mask)
    }}"""


STARTED_CONFIG = """\
sequence_batching {
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 1, 3 ] } ] },
    { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] } ] }
  ]
  state [ { input_name: "h_in" output_name: "h_out" data_type: TYPE_FP32 dims: [ 5 ] } ]
}
"""
IN_TIME = "float[batch, time, 3] x, float[batch, 5] h_in"
OUT_IN_TIME = "float[batch, time, 5] y, float[batch, 5] h_out"
VARIANTS = {
    # a float64 state, which float32 would round
    "double": Variant(
        f"""(float[batch, 3] x, double[batch, 5] h_in)
        => (float[batch, 5] y, double[batch, 5] h_out) {{
        x64 = Cast <to = 11> (x)
        {_step("64", "x64")}
        y = Cast <to = 1> (h_out)
        }}""",
        _plain(),
    ),
    # a float16 state and a float16 input
    "half": Variant(
        f"""(float16[batch, 3] x, float16[batch, 5] h_in)
        => (float16[batch, 5] y, float16[batch, 5] h_out)
        {{ {_step("16")} y = Identity(h_out) }}""",
        _plain(),
    ),
    # integer and boolean states
    "counters": Variant(
        """(float[n, 3] x, int32[n, 1] count_in, bool[n, 1] seen_in)
        => (float[n, 2] y, int32[n, 1] count_out, bool[n, 1] seen_out) {
        first = Slice(x, axis0, axis1, axis1)
        above = Greater(first, one)
        seen_out = Or(seen_in, above)
        positive = Greater(first, zero)
        more = Cast <to = 6> (positive)
        count_out = Add(count_in, more)
        count = Cast <to = 1> (count_out)
        seen = Cast <to = 1> (seen_out)
        y = Concat <axis = 1> (count, seen)
        }""",
        counters,
    ),
    "masked": Variant(_masked("batch, time", 1), _plain()),
    "masked-time-major": Variant(_masked("time, batch", 0), _plain()),
    # exported for a batch of one
    "fixed-batch": Variant(
        f"""(float[1, time, 3] x, float[1, 5] h_in) => (float[1, time, 5] y, float[1, 5] h_out)
        {{ {_scan()} }}""",
        _plain(0.5),
        {"initial": ("h_in=0.5",)},
    ),
    # an output of the last step only, and a state [H, B]: the batch axis is the last one
    "last-step": Variant(
        f"""(float[batch, time, 3] x, float[5, batch] h_in)
        => (float[batch, 5] z, float[5, batch] h_out) {{
        h = Transpose <perm = [1, 0]> (h_in)
        {_scan(h="h", last="after")}
        z = Gather <axis = 1> (y, last)
        h_out = Transpose <perm = [1, 0]> (after)
        }}""",
        _plain(),
    ),
    # codes [T, B] without an axis of features, embedded; two outputs of different shapes
    "codes": Variant(
        f"""(int64[time, batch] tokens, float[batch, 5] h_in)
        => (float[time, batch, 5] y, float[time, batch] total, float[batch, 5] h_out) {{
        embedded = Gather(codes, tokens)
        {_scan("embedded", axis=0)}
        total = ReduceSum <keepdims = 0> (y, axis2)
        }}""",
        codes,
        features=1,
        integers=True,
    ),
    # as for Triton: the model sets its own first state when `START` says so
    "started": Variant(
        f"""(float[batch, 3] x, float[batch, 5] h_in, float[batch, 1] START, bool[batch] READY)
        => (float[batch, 5] y, float[batch, 5] h_out) {{
        begins = Greater(START, two)
        h = Where(begins, start, h_in)
        {_step(h="h", after="y")}
        ready = Cast <to = 1> (READY)
        each = Unsqueeze(ready, axis1)
        h_out = Mul(y, each)
        }}""",
        started,
        config=STARTED_CONFIG,
    ),
    # a learned initial state: the default value of the state input
    "learned": Variant(
        f"({IN_TIME}) => ({OUT_IN_TIME}) {{ {_scan()} }}",
        _plain(START),
        more={"h_in": START[np.newaxis]},
    ),
}


def step_nodes(g: Any, x: str, h: str) -> str:
    """The nodes of one step; returns h'."""
    new = g.add("MatMul", x, g.constant(WEIGHTS["w32"]))
    return str(g.add("Add", g.add("Mul", h, g.constant(WEIGHTS["a32"])), new))


def scanned(g: Any, x: str, h: str) -> tuple[str, str]:
    """A loop over time; returns all h and the last one."""
    body = graphs.Builder("cell", 1)
    after = step_nodes(body, "row", "state")
    for name in ("state_next", "y_step"):
        body.add("Identity", after, outputs=[name])
    shape = [None, H]
    inputs, outputs = {"state": shape, "row": [None, F]}, {"state_next": shape, "y_step": shape}
    axes = {"scan_input_axes": [1], "scan_output_axes": [1], "num_scan_inputs": 1}
    step = body.graph(inputs, outputs)
    g.add("Scan", h, x, outputs=["scan_state", "scan_rows"], body=step, **axes)
    return "scan_rows", "scan_state"


def plain(path: Path, **changes: Any) -> None:
    """A loop over [B, T, F] with names that are certain; `changes` adds to the graph."""
    g = graphs.Builder("plain", 1)
    x = changes["before"](g) if "before" in changes else "x"
    rows, last = scanned(g, x, "h_in")
    y = changes["after"](g, rows) if "after" in changes else rows
    g.add("Identity", y, outputs=["y"])
    g.add("Identity", last, outputs=["h_out"])
    state = ["batch", H]
    g.save(
        path,
        {"x": ["batch", "time", F], "h_in": state, **changes.get("inputs", {})},
        {"y": changes.get("y", ["batch", "time", H]), "h_out": state},
    )


def excess(g: Any) -> str:
    """A number that a feature above a million makes huge, int64 [1]."""
    above = g.add("Relu", g.add("Sub", g.add("ReduceMax", "x", keepdims=0), g.constant(MILLION)))
    number = g.add("Cast", g.add("Mul", above, g.constant(MILLION)), to=TensorProto.INT64)
    return str(g.add("Unsqueeze", number, g.constant([0])))


def repeated(g: Any, value: str, count: str, condition: str = "") -> str:
    """A loop that returns [B, T, H] as it is."""
    body = graphs.Builder("repeated", 1)
    body.add("Identity", "go", outputs=["go_on"])
    body.add("Identity", "value", outputs=["value_next"])
    shape, flag = [None, None, H], (TensorProto.BOOL, [])
    step = body.graph(
        {"iteration": (TensorProto.INT64, []), "go": flag, "value": shape},
        {"go_on": flag, "value_next": shape},
    )
    return str(g.add("Loop", count, condition, value, body=step))


MILLION = np.float32(1e6)
ENDLESS_STEPS = 40
"""The longest call of `write_endless` that ends."""


def write_endless(path: Path) -> None:
    """A graph whose longer calls never end; its work depends on shapes alone."""

    def after(g: Any, rows: str) -> str:
        steps = g.add("Gather", g.add("Shape", "x"), g.constant(1))
        beyond = g.add("Sub", steps, g.constant(ENDLESS_STEPS))
        none = g.add("Max", beyond, g.constant(0))
        return repeated(g, rows, g.add("Mul", none, g.constant(2**50)))

    plain(path, after=after)


def outside(location: str, offset: str = "0") -> Write:
    """A graph whose weights are in another file."""

    def write(path: Path) -> None:
        plain(path)
        model = onnx.load(path)
        for node in model.graph.node:
            for attribute in node.attribute:
                for tensor in attribute.g.initializer:
                    tensor.ClearField("raw_data")
                    tensor.data_location = TensorProto.EXTERNAL
                    tensor.external_data.add(key="location", value=location)
                    tensor.external_data.add(key="offset", value=offset)
        path.write_bytes(model.SerializeToString())

    return write
