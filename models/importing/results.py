"""What passes between the process that converts a model and the one that packages it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

RESULT_NAME = "result.json"
WEIGHTS_NAME = "weights.safetensors"
GRAPH_NAME = "graph.onnx"
ERROR_NAME = "error.txt"
"""Output files of the process: a `Conversion`, its weights and an imported graph, or an error."""
OUT_OF_MEMORY = "out of memory"
"""The error of a process that reached its memory limit."""


class OnnxOptions(BaseModel):
    """What the user says about an ONNX graph.

    Attributes:
        states: state output by state input.
        inputs: inputs of features, in the order of a row's columns.
        outputs: outputs that replies contain; by default all that are not states.
        lengths: input [B] of the rows' lengths.
        mask: input [B, T] that is true at each step of a row.
        initial: initial values by state input: a number, or the bytes of a `.npy` file in
            base 64.
        axes: order of the axes; found by the importer by default.
        triton: content of Triton's `config.pbtxt`.
        triton_folder: folder of the Triton model, where the files of initial states are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    states: dict[str, str] = {}
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    lengths: str | None = None
    mask: str | None = None
    initial: dict[str, float | str] = {}
    axes: Literal["batch_major", "time_major", "step"] | None = None
    triton: str | None = None
    triton_folder: str | None = None


class Conversion(BaseModel):
    """A converted model without its weights, as plain, untrusted data.

    Attributes:
        spec: the specification.
        notes: what the user should know, one sentence each.
        verified: what was compared or measured, by name.
        keras: the version of Keras; None for an ONNX graph.
        layers: Keras name, Keras class and name in the spec ("" if it was left out).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    spec: dict[str, Any]
    notes: tuple[str, ...]
    verified: dict[str, Any]
    keras: str | None = None
    layers: tuple[tuple[str, str, str], ...] = ()
