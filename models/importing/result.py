"""The result that the importing process returns to the one that packages the model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

RESULT_NAME = "result.json"
WEIGHTS_NAME = "weights.safetensors"
ERROR_NAME = "error.txt"
"""Output files of the process: a `Conversion` and its weights, or an error."""
OUT_OF_MEMORY = "out of memory"
"""The error of a process that reached its memory limit."""


class Conversion(BaseModel):
    """A converted model without its weights, as plain, untrusted data.

    Attributes:
        spec: the specification.
        keras: the version of Keras.
        layers: Keras name, Keras class and name in the spec ("" if it was left out).
        notes: what the user should know, one sentence each.
        lengths_steps: lengths of the random sequences it was verified on, in order.
        sequences: how many sequences of each length.
        largest_difference: largest |a - b| over all outputs of all sequences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    spec: dict[str, Any]
    keras: str
    layers: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    lengths_steps: tuple[int, ...]
    sequences: int
    largest_difference: float
