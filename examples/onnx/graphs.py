"""Writes recurrent networks that no layer library has as ONNX graphs, ready for `carry import`.

    pip install onnx
    python graphs.py

Each graph is built node by node, so that it shows what an exporter has to produce: features and
states in, outputs and the next states out. The weights are random.

    residual_lstm  two LSTM layers with a residual connection, with the lengths of the rows
    min_gru        minGRU: gates that depend on the input alone
    slstm          xLSTM's sLSTM: exponential gates, with a normaliser and a stabiliser as states
    cfc            closed-form continuous-time network, which takes the time since the last event
    triton         a GRU cell as an entry of a Triton model repository
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FOLDER = Path(__file__).parent
F, H = 4, 8
"""Features and units."""


class Builder:
    """Nodes and weights of one graph."""

    def __init__(self, name: str, seed: int):
        self.name = name
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, outputs: list[str] | None = None, **attributes):
        """Add a node; returns the name of its first output."""
        names = outputs or [f"{self.name}_{len(self._nodes)}"]
        self._nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names[0]

    def constant(self, value) -> str:
        """A constant: weights, or the axes of an operator."""
        name = f"{self.name}_weight_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def default(self, name: str, value) -> None:
        """The value of an input that is not given: a learned initial state."""
        self._constants.append(numpy_helper.from_array(value, name))

    def weight(self, *shape: int) -> str:
        """Random weights."""
        return self.constant(self._random.uniform(-0.5, 0.5, shape).astype(np.float32))

    def dense(self, x: str, read: int, units: int) -> str:
        """A linear layer."""
        product = self.add("MatMul", x, self.weight(read, units))
        return self.add("Add", product, self.weight(units))

    def graph(self, inputs: dict, outputs: dict) -> onnx.GraphProto:
        """The graph; inputs and outputs are shapes, of float32 unless a type comes first."""

        def values(tensors: dict) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(
                    name, *shape if isinstance(shape, tuple) else (TensorProto.FLOAT, shape)
                )
                for name, shape in tensors.items()
            ]

        return helper.make_graph(
            self._nodes, self.name, values(inputs), values(outputs), self._constants
        )

    def save(self, path: Path, inputs: dict, outputs: dict) -> None:
        """Write the file."""
        opset = [helper.make_opsetid("", 18)]
        model = helper.make_model(
            self.graph(inputs, outputs), opset_imports=opset, ir_version=10, producer_name="graphs"
        )
        onnx.checker.check_model(model, full_check=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)


def scan(outer: Builder, body: Builder, states: list[str], x: str, axis: int = 1) -> None:
    """Run a body of one step over the axis of time; it ends with the states, then the output.

    The body reads `row` and each state by its name, and writes `y` and `STATE_next`.
    """
    step = body.graph(
        {**{name: [None, H] for name in states}, "row": [None, F]},
        {**{f"{name}_next": [None, H] for name in states}, "y": [None, H]},
    )
    outer.add(
        "Scan",
        *(f"{name}_in" for name in states),
        x,
        outputs=[*(f"{name}_out" for name in states), "hidden"],
        body=step,
        num_scan_inputs=1,
        scan_input_axes=[axis],
        scan_output_axes=[axis],
    )


def residual_lstm() -> None:
    """x + LSTM(LSTM(x)), states [layers, B, H]; padding is known by `lengths`."""
    g = Builder("residual_lstm", 1)
    rows = g.add("Transpose", g.dense("x", F, H), perm=[1, 0, 2])
    value, after = rows, {"h": [], "c": []}
    for layer in range(2):
        before = []
        for state in ("h", "c"):
            one = g.add("Gather", f"{state}_in", g.constant([layer]), axis=0)
            before.append(one)
        outputs = [f"y{layer}", f"h{layer}", f"c{layer}"]
        g.add(
            "LSTM", value, g.weight(1, 4 * H, H), g.weight(1, 4 * H, H), g.weight(1, 8 * H),
            "lengths", *before, outputs=outputs, hidden_size=H,
        )  # fmt: skip
        after["h"].append(outputs[1])
        after["c"].append(outputs[2])
        value = g.add("Add", g.add("Squeeze", outputs[0], g.constant([1])), value)
    for state, parts in after.items():
        g.add("Concat", *parts, axis=0, outputs=[f"{state}_out"])
    y = g.dense(g.add("Transpose", value, perm=[1, 0, 2]), H, 3)
    g.add("Identity", y, outputs=["y"])
    state = [2, "batch", H]
    g.save(
        FOLDER / "residual_lstm.onnx",
        {"x": ["batch", "time", F], "lengths": (TensorProto.INT32, ["batch"])}
        | {"h_in": state, "c_in": state},
        {"y": ["batch", "time", 3], "h_out": state, "c_out": state},
    )


def min_gru() -> None:
    """h' = (1 - z) * h + z * g, z = sigmoid(Wx), g = Vx (Feng et al., 2024)."""
    body = Builder("cell", 2)
    z = body.add("Sigmoid", body.dense("row", F, H))
    kept = body.add("Mul", body.add("Sub", body.constant(np.float32(1)), z), "h")
    new = body.add("Add", kept, body.add("Mul", z, body.dense("row", F, H)))
    body.add("Identity", new, outputs=["h_next"])
    body.add("Identity", new, outputs=["y"])
    g = Builder("min_gru", 3)
    scan(g, body, ["h"], "x")
    g.add("Identity", g.dense("hidden", H, 2), outputs=["y"])
    g.save(
        FOLDER / "min_gru.onnx",
        {"x": ["batch", "time", F], "h_in": ["batch", H]},
        {"y": ["batch", "time", 2], "h_out": ["batch", H]},
    )


def slstm() -> None:
    """sLSTM (Beck et al., 2024, equations 8 to 18), with exponential gates.

    m' = max(f + m, i), the stabiliser; i' = exp(i - m'), f' = exp(f + m - m');
    c' = f' c + i' tanh(z), n' = f' n + i', h' = sigmoid(o) c' / n', with f = log sigmoid(Wx + Rh).
    """
    body = Builder("cell", 4)
    gates = [body.add("Add", body.dense("row", F, H), body.dense("h", H, H)) for _ in range(4)]
    i, z, o = gates[0], body.add("Tanh", gates[2]), body.add("Sigmoid", gates[3])
    f = body.add("Neg", body.add("Softplus", body.add("Neg", gates[1])))
    shifted = body.add("Add", f, "m")
    m = body.add("Max", shifted, i)
    write = body.add("Exp", body.add("Sub", i, m))
    keep = body.add("Exp", body.add("Sub", shifted, m))
    c = body.add("Add", body.add("Mul", keep, "c"), body.add("Mul", write, z))
    n = body.add("Add", body.add("Mul", keep, "n"), write)
    h = body.add("Mul", o, body.add("Div", c, n))
    for name, value in (("h", h), ("c", c), ("n", n), ("m", m)):
        body.add("Identity", value, outputs=[f"{name}_next"])
    body.add("Identity", h, outputs=["y"])
    g = Builder("slstm", 5)
    states = ["h", "c", "n", "m"]
    scan(g, body, states, "x")
    g.add("Identity", g.dense("hidden", H, 2), outputs=["y"])
    g.save(
        FOLDER / "slstm.onnx",
        {"x": ["batch", "time", F]} | {f"{name}_in": ["batch", H] for name in states},
        {"y": ["batch", "time", 2]} | {f"{name}_out": ["batch", H] for name in states},
    )


def cfc() -> None:
    """CfC (Hasani et al., 2022): h' = s * g + (1 - s) * k, s = sigmoid(-f t), one step.

    f, g and k are layers of input and state; t is the time since the last event, a second input.
    """
    g = Builder("cfc", 6)
    joined = g.add("Concat", "x", "h", axis=1)
    hidden = g.add("Tanh", g.dense(joined, F + H, H))
    first, second, rate = (g.dense(hidden, H, H) for _ in range(3))
    gate = g.add("Sigmoid", g.add("Neg", g.add("Mul", rate, "elapsed_s")))
    rest = g.add("Sub", g.constant(np.float32(1)), gate)
    new = g.add(
        "Add", g.add("Mul", gate, g.add("Tanh", first)), g.add("Mul", rest, g.add("Tanh", second))
    )
    g.add("Identity", new, outputs=["h_new"])
    g.add("Identity", g.dense(new, H, 2), outputs=["y"])
    g.save(
        FOLDER / "cfc.onnx",
        {"x": ["batch", F], "elapsed_s": ["batch", 1], "h": ["batch", H]},
        {"y": ["batch", 2], "h_new": ["batch", H]},
    )


def triton() -> None:
    """A GRU cell whose state pair is declared in Triton's configuration, besides a counter."""
    g = Builder("step", 7)
    z = g.add("Sigmoid", g.add("Add", g.dense("INPUT", F, H), g.dense("STATE", H, H)))
    new = g.add("Tanh", g.add("Add", g.dense("INPUT", F, H), g.dense("STATE", H, H)))
    kept = g.add("Mul", g.add("Sub", g.constant(np.float32(1)), z), "STATE")
    after = g.add("Add", kept, g.add("Mul", z, new))
    g.add("Identity", after, outputs=["MEMORY"])
    count = g.add("Add", "SEEN", g.constant(np.int64(1)), outputs=["COUNT"])
    mean = g.add("ReduceMean", after, g.constant([1]), keepdims=1)
    total = g.add("Mul", mean, g.add("Cast", count, to=TensorProto.FLOAT))
    g.add("Identity", total, outputs=["OUTPUT"])
    g.save(
        FOLDER / "triton" / "counting_gru" / "1" / "model.onnx",
        {"INPUT": ["batch", F], "STATE": ["batch", H], "SEEN": (TensorProto.INT64, ["batch", 1])},
        {
            "OUTPUT": ["batch", 1],
            "MEMORY": ["batch", H],
            "COUNT": (TensorProto.INT64, ["batch", 1]),
        },
    )
    folder = FOLDER / "triton" / "counting_gru"
    values = np.random.default_rng(8).normal(0, 0.3, H).astype("<f4")
    (folder / "initial_state").mkdir(exist_ok=True)
    (folder / "initial_state" / "memory.bin").write_bytes(values.tobytes())
    (folder / "config.pbtxt").write_text(CONFIG)


CONFIG = """\
name: "counting_gru"
backend: "onnxruntime"
max_batch_size: 32
input [ { name: "INPUT", data_type: TYPE_FP32, dims: [ 4 ] } ]
output [ { name: "OUTPUT", data_type: TYPE_FP32, dims: [ 1 ] } ]
sequence_batching {
  oldest { max_candidate_sequences: 1024 }
  state [
    {
      input_name: "STATE"
      output_name: "MEMORY"
      data_type: TYPE_FP32
      dims: [ 8 ]
      initial_state: { name: "memory", data_type: TYPE_FP32, dims: [ 8 ], data_file: "memory.bin" }
    },
    {
      input_name: "SEEN"
      output_name: "COUNT"
      data_type: TYPE_INT64
      dims: [ 1 ]
      initial_state: { name: "none yet", data_type: TYPE_INT64, dims: [ 1 ], zero_data: true }
    }
  ]
}
instance_group [ { count: 2, kind: KIND_CPU } ]  # ignored
"""


if __name__ == "__main__":
    residual_lstm()
    min_gru()
    slstm()
    cfc()
    triton()
