"""Weights of a model as safetensors, and their validation against the spec.

The weights of an imported ONNX graph are in the graph. Its file of weights contains the initial
values of state parts that do not start from zero, by the names of the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from models.errors import ArtifactError
from models.spec.layout import network_state, weight_shapes
from models.spec.model import ModelSpec


def weights_bytes(weights: Mapping[str, NDArray[Any]]) -> bytes:
    """Encode weights as safetensors; equal weights have equal bytes."""
    # safetensors copies the memory of an array, so a transposed view would be stored wrongly.
    return bytes(
        safetensors.numpy.save(
            {name: np.ascontiguousarray(array) for name, array in sorted(weights.items())}
        )
    )


def read_weights(spec: ModelSpec, data: bytes, where: str) -> dict[str, NDArray[Any]]:
    """Decode weights and validate them against a spec; the arrays are read-only.

    Args:
        where: the file's name for errors.

    Raises:
        ArtifactError: they are not safetensors, or do not match the spec.
    """
    try:
        weights = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{where}: expected safetensors, got {error}") from error
    check_weights(spec, weights, where)
    for array in weights.values():
        array.setflags(write=False)
    return dict(weights)


def check_weights(spec: ModelSpec, weights: Mapping[str, NDArray[Any]], where: str) -> None:
    """Validate weights against a spec.

    Raises:
        ArtifactError: a weight is missing or unknown, of another shape or type, or not finite.
    """
    expected = _expected_weights(spec)
    missing = [] if spec.onnx is not None else sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise ArtifactError(
            f"{where}: the weights do not match the spec: missing {missing}, unknown {unknown}"
        )
    for name, array in weights.items():
        shape, dtype = expected[name]
        if array.shape != shape or array.dtype != dtype:
            raise ArtifactError(
                f"{where}: weight {name!r}: expected {dtype} {list(shape)}, "
                f"got {array.dtype} {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise ArtifactError(f"{where}: weight {name!r}: expected finite values")


def _expected_weights(spec: ModelSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every weight; of an imported graph, of every part of its state."""
    if spec.onnx is not None:
        return {part.name: (part.shape, part.dtype) for part in network_state(spec).parts}
    return {name: (shape, "float32") for name, shape in weight_shapes(spec).items()}
