"""Options of the import of an ONNX graph, and what the importing process returns."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class OnnxOptions(BaseModel):
    """What the user says about a graph.

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


class OnnxConversion(BaseModel):
    """An imported graph without its bytes, as plain, untrusted data.

    Attributes:
        spec: the specification.
        notes: what the user should know, one sentence each.
        verified: what was measured, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    spec: dict[str, Any]
    notes: tuple[str, ...]
    verified: dict[str, Any]
