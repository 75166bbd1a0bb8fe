"""Normalisations and affine layers as nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models.onnx.messages import Nodes, Value
from models.spec.layers import (
    UNIT_NORM_EPSILON,
    AffineLayer,
    BatchNormalizationLayer,
    LayerNormalizationLayer,
    RmsNormalizationLayer,
)

Weights = Mapping[str, NDArray[np.float32]]


def layer_normalization(
    nodes: Nodes, layer: LayerNormalizationLayer, weights: Weights, x: Value, width: int
) -> Value:
    """(x - mean) / sqrt(variance + epsilon) over the last axis, scaled and shifted."""
    scale = weights.get(f"{layer.name}.gamma")
    offset = weights.get(f"{layer.name}.beta")
    constants = [nodes.constant(np.ones(width, np.float32) if scale is None else scale)]
    if offset is not None:
        constants.append(nodes.constant(offset))
    return nodes.add("LayerNormalization", x, *constants, axis=-1, epsilon=layer.epsilon)


def rms_normalization(
    nodes: Nodes, layer: RmsNormalizationLayer, weights: Weights, x: Value
) -> Value:
    """x scale / sqrt(mean(x^2) + epsilon) over the last axis."""
    squares = nodes.add("ReduceMean", nodes.add("Mul", x, x), nodes.integers(2), keepdims=1)
    root = nodes.add("Sqrt", nodes.add("Add", squares, nodes.number(layer.epsilon)))
    scale = nodes.constant(weights[f"{layer.name}.scale"])
    return nodes.add("Mul", nodes.add("Div", x, root), scale)


def unit_normalization(nodes: Nodes, x: Value) -> Value:
    """x / sqrt(max(sum(x^2), 1e-12)) over the last axis."""
    total = nodes.add("ReduceSumSquare", x, nodes.integers(2), keepdims=1)
    total = nodes.add("Max", total, nodes.number(UNIT_NORM_EPSILON))
    return nodes.add("Div", x, nodes.add("Sqrt", total))


def batch_normalization(
    nodes: Nodes, layer: BatchNormalizationLayer, weights: Weights, x: Value
) -> Value:
    """With its moving statistics it is one factor and one offset per column."""
    exact = {
        kind: np.asarray(weights[f"{layer.name}.{kind}"], np.float64)
        for kind in ("gamma", "beta", "moving_mean", "moving_variance")
        if f"{layer.name}.{kind}" in weights
    }
    factor = exact.get("gamma", 1.0) / np.sqrt(exact["moving_variance"] + layer.epsilon)
    offset = exact.get("beta", 0.0) - exact["moving_mean"] * factor
    product = nodes.add("Mul", x, nodes.constant(factor.astype(np.float32)))
    return nodes.add("Add", product, nodes.constant(offset.astype(np.float32)))


def affine(nodes: Nodes, layer: AffineLayer, weights: Weights, x: Value) -> Value:
    """(x - shift) scale + offset; constants without effect are left out."""
    for operator, kind, neutral in (("Sub", "shift", 0), ("Mul", "scale", 1), ("Add", "offset", 0)):
        constant = weights[f"{layer.name}.{kind}"]
        if (constant != neutral).any():
            x = nodes.add(operator, x, nodes.constant(constant))
    return x
