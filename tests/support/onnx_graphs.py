"""The ONNX graphs of `examples/onnx`, imported in this process, and run by ONNX Runtime alone.

`graphs` is the recipe of the examples as a module; its `Builder` writes other graphs for tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact.weights import weights_bytes
from models.importing.onnx_conversion import convert_onnx
from models.importing.packaging import ImportReport, onnx_options, package
from models.onnx.library import onnxruntime


def _recipe(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("example_graphs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLES = Path(__file__).parents[2] / "examples" / "onnx"
graphs = _recipe(EXAMPLES / "graphs.py")

Floats = NDArray[np.float32]


def import_here(path: Path, out: Path, name: str = "graph", **options: Any) -> ImportReport:
    """Import a graph in this process, which takes a tenth of a second."""
    conversion, initial, graph = convert_onnx(path, path.parent, name, onnx_options(**options))
    return package(path, (conversion, weights_bytes(initial), graph), out)


@dataclass(frozen=True)
class Example:
    """One graph, and how ONNX Runtime is called with it.

    Attributes:
        states: shape of each state input with B = 1.
        outputs: the output that is compared, and the state outputs in the order of `states`.
        axes: `batch`, `time` or `step`.
        inputs: columns of each input of features.
    """

    file: str
    states: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    axes: str = "batch"
    inputs: Mapping[str, slice] = field(default_factory=lambda: {"x": slice(None)})
    dtypes: Mapping[str, str] = field(default_factory=dict)
    lengths: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    features: int = 4

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return EXAMPLES / self.file

    def initial(self) -> dict[str, NDArray[Any]]:
        """States of a new stream."""
        return {
            name: np.zeros(shape, self.dtypes.get(name, "float32"))
            for name, shape in self.states.items()
        }

    def whole(
        self, rows: Floats, states: dict[str, NDArray[Any]] | None = None
    ) -> tuple[Floats, dict[str, NDArray[Any]]]:
        """Outputs [T, O] and the last states of a whole sequence, by ONNX Runtime."""
        session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        states = self.initial() if states is None else states
        calls = [rows[at] for at in range(len(rows))] if self.axes == "step" else [rows]
        outputs = []
        for call in calls:
            lead = {"batch": call[np.newaxis], "time": call[:, np.newaxis]}
            batch = lead.get(self.axes, call[np.newaxis])
            feeds = {name: batch[..., columns] for name, columns in self.inputs.items()}
            if self.lengths:
                feeds["lengths"] = np.array([len(rows)], np.int32)
            output, *after = session.run(list(self.outputs), {**feeds, **states})
            outputs.append(output.reshape(-1, output.shape[-1]))
            states = dict(zip(self.states, after, strict=True))
        return np.concatenate(outputs), states


MEMORY = np.fromfile(EXAMPLES / "triton/counting_gru/initial_state/memory.bin", "<f4")


class CountingGru(Example):
    """The Triton entry, whose first state begins with the values of a file."""

    def initial(self) -> dict[str, NDArray[Any]]:
        """States of a new stream."""
        return {"STATE": MEMORY[np.newaxis], "SEEN": np.zeros((1, 1), np.int64)}


EXAMPLE_GRAPHS = {
    "torch-lstm": Example("torch_lstm.onnx", {"h0": (2, 1, 8), "c0": (2, 1, 8)}, ("y", "hn", "cn")),
    "torch-gru": Example("torch_gru.onnx", {"h_in": (1, 1, 8)}, ("y", "h_out"), axes="time"),
    "torch-gru-cell": Example(
        "torch_gru_cell.onnx", {"hidden": (1, 8)}, ("next_hidden", "next_hidden"), axes="step"
    ),
    "residual-lstm": Example(
        "residual_lstm.onnx",
        {"h_in": (2, 1, 8), "c_in": (2, 1, 8)},
        ("y", "h_out", "c_out"),
        lengths=True,
    ),
    "min-gru": Example("min_gru.onnx", {"h_in": (1, 8)}, ("y", "h_out")),
    "slstm": Example(
        "slstm.onnx",
        {f"{name}_in": (1, 8) for name in "hcnm"},
        ("y", *(f"{name}_out" for name in "hcnm")),
    ),
    "cfc": Example(
        "cfc.onnx",
        {"h": (1, 8)},
        ("y", "h_new"),
        axes="step",
        inputs={"x": slice(0, 4), "elapsed_s": slice(4, 5)},
        options={"inputs": ("x", "elapsed_s")},
        features=5,
    ),
    "counting-gru": CountingGru(
        "triton/counting_gru/1/model.onnx",
        {"STATE": (1, 8), "SEEN": (1, 1)},
        ("OUTPUT", "MEMORY", "COUNT"),
        axes="step",
        inputs={"INPUT": slice(0, 4)},
        options={"triton": EXAMPLES / "triton/counting_gru/config.pbtxt"},
    ),
}
