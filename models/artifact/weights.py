"""Weights of a model as safetensors, and their validation against the spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from models.errors import ArtifactError
from models.spec.layout import weight_shapes
from models.spec.model import ModelSpec
from models.spec.state import FloatArray


def weights_bytes(weights: Mapping[str, FloatArray]) -> bytes:
    """Encode weights as safetensors; equal weights have equal bytes."""
    # safetensors copies the memory of an array, so a transposed view would be stored wrongly.
    return bytes(
        safetensors.numpy.save(
            {name: np.ascontiguousarray(array) for name, array in sorted(weights.items())}
        )
    )


def read_weights(spec: ModelSpec, data: bytes, where: str) -> dict[str, FloatArray]:
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
    shapes = weight_shapes(spec)
    missing = sorted(shapes.keys() - weights.keys())
    unknown = sorted(weights.keys() - shapes.keys())
    if missing or unknown:
        raise ArtifactError(
            f"{where}: the weights do not match the spec: missing {missing}, unknown {unknown}"
        )
    for name, shape in shapes.items():
        array = weights[name]
        if array.shape != shape or array.dtype != np.float32:
            raise ArtifactError(
                f"{where}: weight {name!r}: expected float32 {list(shape)}, "
                f"got {array.dtype} {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise ArtifactError(f"{where}: weight {name!r}: expected finite values")
