"""Small ONNX graphs with one property each, and what they compute, in float64 NumPy.

All are variations of h' = a h + (1 - a) W x, y = h', which is known without a library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from tests.support.onnx_graphs import graphs

F, H = 3, 5
DECAY = 0.75
RANDOM = np.random.default_rng(11)
W = RANDOM.uniform(-1, 1, (F, H)).astype(np.float32)
START = RANDOM.uniform(-1, 1, H).astype(np.float32)

Rows = NDArray[np.float64]
Write = Callable[[Path], Any]
Reference = Callable[[Rows], tuple[Rows, dict[str, NDArray[Any]]]]


@dataclass(frozen=True)
class Variant:
    """One graph.

    Attributes:
        write: writes its file.
        reference: outputs [T, O] and last states of rows [T, F], from the initial state.
        options: options of the import.
        integers: whether its rows are codes 0 to 3.
        config: text of Triton's configuration.
    """

    write: Callable[[Path], None]
    reference: Reference
    options: Mapping[str, Any] = field(default_factory=dict)
    features: int = F
    integers: bool = False
    config: str | None = None

    def arguments(self, path: Path) -> dict[str, Any]:
        """Write the file, and its configuration of Triton; returns the options of the import."""
        self.write(path)
        if self.config is None:
            return dict(self.options)
        path.with_suffix(".pbtxt").write_text(self.config)
        return {**self.options, "triton": path.with_suffix(".pbtxt")}


def leaky(rows: Rows, start: float | Rows = 0.0) -> Rows:
    """h after each step, [T, H]."""
    states, h = [], np.zeros(H) + start
    for row in rows:
        h = DECAY * h + (1 - DECAY) * (row @ W.astype(np.float64))
        states.append(h)
    return np.array(states)


def step_nodes(g: Any, x: str, h: str, dtype: Any = np.float32) -> str:
    """The nodes of one step; returns h'."""
    new = g.add("MatMul", x, g.constant((W * (1 - DECAY)).astype(dtype)))
    return str(g.add("Add", g.add("Mul", h, g.constant(np.asarray(DECAY, dtype))), new))


def scanned(g: Any, x: str, h: str, *, mask: str | None = None, axis: int = 1) -> tuple[str, str]:
    """A loop over time; returns all h and the last one."""
    body = graphs.Builder("cell", 1)
    after = step_nodes(body, "row", "state")
    inputs = {"state": [None, H], "row": [None, F]}
    if mask is not None:
        inputs["valid"] = [None]
        valid = body.add("Unsqueeze", "valid", body.constant([1]))
        rest = body.add("Sub", body.constant(np.float32(1)), valid)
        kept = body.add("Mul", "state", rest)
        after = body.add("Add", body.add("Mul", after, valid), kept)
    body.add("Identity", after, outputs=["state_next"])
    body.add("Identity", after, outputs=["y_step"])
    step = body.graph(inputs, {"state_next": [None, H], "y_step": [None, H]})
    sequences = [x] if mask is None else [x, mask]
    g.add(
        "Scan",
        h,
        *sequences,
        outputs=["scan_state", "scan_rows"],
        body=step,
        num_scan_inputs=len(sequences),
        scan_input_axes=[axis] * len(sequences),
        scan_output_axes=[axis],
    )
    return "scan_rows", "scan_state"


def _rename(g: Any, **names: str) -> None:
    for name, value in names.items():
        g.add("Identity", value, outputs=[name])


def write_double(path: Path) -> None:
    """A float64 state, which float32 would round."""
    g = graphs.Builder("double", 1)
    x = g.add("Cast", "x", to=TensorProto.DOUBLE)
    h = step_nodes(g, x, "h_in", np.float64)
    _rename(g, h_out=h, y=g.add("Cast", h, to=TensorProto.FLOAT))
    state = (TensorProto.DOUBLE, ["batch", H])
    g.save(path, {"x": ["batch", F], "h_in": state}, {"y": ["batch", H], "h_out": state})


def write_half(path: Path) -> None:
    """A float16 state and a float16 input."""
    g = graphs.Builder("half", 1)
    h = step_nodes(g, "x", "h_in", np.float16)
    _rename(g, h_out=h, y=h)
    half = (TensorProto.FLOAT16, ["batch", H])
    g.save(
        path,
        {"x": (TensorProto.FLOAT16, ["batch", F]), "h_in": half},
        {"y": half, "h_out": half},
    )


def write_counters(path: Path) -> None:
    """Integer and boolean states: the number of positive values, and whether one was above 1."""
    g = graphs.Builder("counters", 1)
    first = g.add("Slice", "x", g.constant([0]), g.constant([1]), g.constant([1]))
    above = g.add("Greater", first, g.constant(np.float32(1)))
    flag = g.add("Or", "seen_in", above)
    positive = g.add("Greater", first, g.constant(np.float32(0)))
    count = g.add("Add", "count_in", g.add("Cast", positive, to=TensorProto.INT32))
    y = g.add(
        "Concat",
        g.add("Cast", count, to=TensorProto.FLOAT),
        g.add("Cast", flag, to=TensorProto.FLOAT),
        axis=1,
    )
    _rename(g, seen_out=flag, count_out=count, y=y)
    count_type, flag_type = (TensorProto.INT32, ["n", 1]), (TensorProto.BOOL, ["n", 1])
    g.save(
        path,
        {"x": ["n", F], "count_in": count_type, "seen_in": flag_type},
        {"y": ["n", 2], "count_out": count_type, "seen_out": flag_type},
    )


def counters(rows: Rows) -> tuple[Rows, dict[str, NDArray[Any]]]:
    """What `write_counters` computes."""
    count = np.cumsum(rows[:, 0] > 0)
    flag = np.logical_or.accumulate(rows[:, 0] > 1)
    last = {"count_in": count[-1:], "seen_in": flag[-1:]}
    return np.stack([count, flag], axis=1).astype(np.float64), last


def write_masked(path: Path) -> None:
    """A mask of float32, by which padding is ignored."""
    _write_masked(path, ["batch", "time"], axis=1)


def write_masked_time_major(path: Path) -> None:
    """The same with the time first."""
    _write_masked(path, ["time", "batch"], axis=0)


def _write_masked(path: Path, lead: list[str], axis: int) -> None:
    g = graphs.Builder("masked", 1)
    rows, last = scanned(g, "x", "h_in", mask="mask", axis=axis)
    _rename(g, y=rows, h_out=last)
    state = ["batch", H]
    g.save(
        path,
        {"x": [*lead, F], "h_in": state, "mask": lead},
        {"y": [*lead, H], "h_out": state},
    )


def write_fixed_batch(path: Path) -> None:
    """Exported for a batch of one."""
    g = graphs.Builder("fixed", 1)
    rows, last = scanned(g, "x", "h_in")
    _rename(g, y=rows, h_out=last)
    g.save(
        path,
        {"x": [1, "time", F], "h_in": [1, H]},
        {"y": [1, "time", H], "h_out": [1, H]},
    )


def write_last_step(path: Path) -> None:
    """An output of the last step only, and a state [H, B]: the batch axis is the last one."""
    g = graphs.Builder("last", 1)
    rows, last = scanned(g, "x", g.add("Transpose", "h_in", perm=[1, 0]))
    g.add("Gather", rows, g.constant(-1), axis=1, outputs=["y"])
    _rename(g, h_out=g.add("Transpose", last, perm=[1, 0]))
    state = [H, "batch"]
    g.save(
        path,
        {"x": ["batch", "time", F], "h_in": state},
        {"y": ["batch", H], "h_out": state},
    )


CODES = np.eye(F, dtype=np.float32)[[0, 1, 2, 0]]


def write_codes(path: Path) -> None:
    """Codes [T, B] without an axis of features, embedded; two outputs of different shapes."""
    g = graphs.Builder("codes", 1)
    rows, last = scanned(g, g.add("Gather", g.constant(CODES), "tokens"), "h_in", axis=0)
    g.add("ReduceSum", rows, g.constant([2]), keepdims=0, outputs=["total"])
    _rename(g, y=rows, h_out=last)
    state = ["batch", H]
    g.save(
        path,
        {"tokens": (TensorProto.INT64, ["time", "batch"]), "h_in": state},
        {"y": ["time", "batch", H], "total": ["time", "batch"], "h_out": state},
    )


def codes(rows: Rows) -> tuple[Rows, dict[str, NDArray[Any]]]:
    """What `write_codes` computes."""
    states = leaky(CODES.astype(np.float64)[rows[:, 0].astype(int)])
    outputs = np.concatenate([states, states.sum(axis=1, keepdims=True)], axis=1)
    return outputs, {"h_in": states[-1]}


def write_learned(path: Path) -> None:
    """A learned initial state: the default value of the state input."""
    g = graphs.Builder("learned", 1)
    rows, last = scanned(g, "x", "h_in")
    _rename(g, y=rows, h_out=last)
    g.default("h_in", START[np.newaxis])
    state = ["batch", H]
    g.save(
        path,
        {"x": ["batch", "time", F], "h_in": state},
        {"y": ["batch", "time", H], "h_out": state},
    )


def write_started(path: Path) -> None:
    """As for Triton: the model sets its own first state when `START` says so."""
    g = graphs.Builder("started", 1)
    begins = g.add("Greater", "START", g.constant(np.float32(2)))
    h = g.add("Where", begins, g.constant(START), "h_in")
    h = step_nodes(g, "x", h)
    ready = g.add("Cast", "READY", to=TensorProto.FLOAT)
    _rename(g, h_out=g.add("Mul", h, g.add("Unsqueeze", ready, g.constant([1]))), y=h)
    state = ["batch", H]
    g.save(
        path,
        {"x": ["batch", F], "h_in": state, "START": ["batch", 1]}
        | {"READY": (TensorProto.BOOL, ["batch"])},
        {"y": ["batch", H], "h_out": state},
    )


STARTED_CONFIG = """\
sequence_batching {
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 1, 3 ] } ] },
    { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] } ] }
  ]
  state [ { input_name: "h_in" output_name: "h_out" data_type: TYPE_FP32 dims: [ 5 ] } ]
}
"""


def started(rows: Rows) -> tuple[Rows, dict[str, NDArray[Any]]]:
    """What `write_started` computes."""
    states = leaky(rows, START)
    return states, {"h_in": states[-1], "sequence.started": np.array(True)}


def _plain(start: float | Rows = 0.0) -> Reference:
    def reference(rows: Rows) -> tuple[Rows, dict[str, NDArray[Any]]]:
        states = leaky(rows, start)
        return states, {"h_in": states[-1]}

    return reference


VARIANTS = {
    "double": Variant(write_double, _plain()),
    "half": Variant(write_half, _plain()),
    "counters": Variant(write_counters, counters),
    "masked": Variant(write_masked, _plain()),
    "masked-time-major": Variant(write_masked_time_major, _plain()),
    "fixed-batch": Variant(write_fixed_batch, _plain(0.5), {"initial": ("h_in=0.5",)}),
    "last-step": Variant(write_last_step, _plain()),
    "codes": Variant(write_codes, codes, features=1, integers=True),
    "started": Variant(write_started, started, config=STARTED_CONFIG),
    "learned": Variant(write_learned, _plain(START)),
}


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
