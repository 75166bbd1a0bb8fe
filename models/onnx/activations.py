"""Keras activations as ONNX nodes, and as functions of ONNX recurrent operators.

All of them exist as nodes. Inside LSTM and GRU an activation is one of the operator's functions;
activations without one are rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

from models.errors import GraphUnsupportedError
from models.onnx.nodes import Nodes, Value
from models.spec.layers import ActivationName

_HARD_SIGMOID = {"alpha": 1 / 6, "beta": 0.5}
_LEAKY_SLOPE = 0.2
_NODES: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "hard_sigmoid": ("HardSigmoid", _HARD_SIGMOID),
    "tanh": ("Tanh", {}),
    "softplus": ("Softplus", {}),
    "softsign": ("Softsign", {}),
    "elu": ("Elu", {"alpha": 1.0}),
    "selu": ("Selu", {}),
    "exponential": ("Exp", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": _LEAKY_SLOPE}),
}


@dataclass(frozen=True, slots=True)
class CellFunction:
    """A function inside a recurrent operator; the numbers only if it takes them."""

    name: str
    alpha: float | None = None
    beta: float | None = None


_CELL_FUNCTIONS = {
    "linear": CellFunction("Affine", 1.0, 0.0),
    "relu": CellFunction("Relu"),
    "sigmoid": CellFunction("Sigmoid"),
    "hard_sigmoid": CellFunction("HardSigmoid", _HARD_SIGMOID["alpha"], _HARD_SIGMOID["beta"]),
    "tanh": CellFunction("Tanh"),
    "softplus": CellFunction("Softplus"),
    "softsign": CellFunction("Softsign"),
    "elu": CellFunction("Elu", 1.0),
    "leaky_relu": CellFunction("LeakyRelu", _LEAKY_SLOPE),
}


def activation(nodes: Nodes, name: ActivationName, x: Value) -> Value:
    """The activation of every value; softmax over the last axis."""
    match name:
        case "linear":
            return x
        case "softmax":
            return nodes.add("Softmax", x, axis=-1)
        case "silu":
            return nodes.add("Mul", x, nodes.add("Sigmoid", x))
        case "gelu":
            # x / 2 (1 + erf(x / sqrt 2))
            error = nodes.add("Erf", nodes.add("Mul", x, nodes.number(1 / sqrt(2))))
            share = nodes.add("Add", error, nodes.number(1.0))
            return nodes.add("Mul", nodes.add("Mul", x, nodes.number(0.5)), share)
    operator, attributes = _NODES[name]
    return nodes.add(operator, x, **attributes)


def cell_function(layer: str, name: ActivationName) -> CellFunction:
    """The function of that name inside LSTM and GRU.

    Raises:
        GraphUnsupportedError: the operators have none like it; `layer` is named.
    """
    function = _CELL_FUNCTIONS.get(name)
    if function is None:
        raise GraphUnsupportedError(
            f"layer {layer!r}: ONNX' recurrent operators have no activation {name!r}, "
            f"expected one of {sorted(_CELL_FUNCTIONS)}"
        )
    return function
