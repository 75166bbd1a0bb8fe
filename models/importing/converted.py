"""A converted Keras layer, and what every converter checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import keras
import numpy as np
from numpy.typing import NDArray

from models.spec.layers import ActivationName

FLOAT32 = (
    "build the model again under keras.config.set_dtype_policy('float32'), and set_weights to "
    "this one's get_weights"
)


class UnsupportedLayerError(Exception):
    """The reason why a layer is unsupported; internal to this package."""


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """A converted layer.

    Attributes:
        data: the layer as plain spec data without name and inputs; empty if the layer has no
            effect in serving and is omitted.
        weights: its weights by kind, such as `kernel`.
        note: a note for the user, or empty.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    note: str = ""


def expect_float32(layer: Any) -> None:
    """Reject a layer with a dtype policy of other precision."""
    if layer.compute_dtype != "float32" or layer.variable_dtype != "float32":
        raise UnsupportedLayerError(
            f"it computes in {layer.compute_dtype} with {layer.variable_dtype} weights, "
            f"expected float32; {FLOAT32}"
        )


def expect_features_axis(axis: Any, rank: int) -> None:
    """Reject an axis that is not the last one."""
    axes = list(axis) if isinstance(axis, (list, tuple)) else [axis]
    if [index % rank for index in axes] != [rank - 1]:
        raise UnsupportedLayerError(
            f"axis={axis}: expected the last axis, the features, since a stream has no fixed steps"
        )


def activation_name(function: Callable[[Any], Any]) -> str:
    """The name of a Keras activation that a specification has."""
    name = keras.activations.serialize(function)
    name = name if isinstance(name, str) else getattr(function, "__name__", repr(function))
    if name not in get_args(ActivationName) or keras.activations.get(name) is not function:
        raise UnsupportedLayerError(
            f"activation {name!r}: expected one of {sorted(get_args(ActivationName))}"
        )
    return name


def weights_of(owner: Any, *kinds: str) -> dict[str, NDArray[np.float32]]:
    """Copies of the owner's variables of those kinds; a kind it does not use is left out."""
    variables = {kind: getattr(owner, kind, None) for kind in kinds}
    return {
        kind: np.array(variable.value.numpy(), np.float32)
        for kind, variable in variables.items()
        if variable is not None
    }
