"""Layers that compute each value from itself: `affine` and `prelu`, as TensorFlow ops."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

Tensor = Any


class Affine:
    """(x - shift) scale + offset, with constants that training does not change."""

    def __init__(self, name: str, width: int):
        def constant(kind: str, value: float) -> Any:
            values = np.full(width, value, np.float32)
            return keras.Variable(values, trainable=False, dtype="float32", name=f"{name}_{kind}")

        self.shift = constant("shift", 0.0)
        self.scale = constant("scale", 1.0)
        self.offset = constant("offset", 0.0)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return (x - self.shift) * self.scale + self.offset


class Prelu:
    """x where x >= 0, slope x elsewhere (He et al., "Delving deep into rectifiers", 2015)."""

    def __init__(self, name: str, width: int):
        zeros = np.zeros(width, np.float32)
        self.slope = keras.Variable(zeros, dtype="float32", name=f"{name}_slope")

    def __call__(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return tf.where(x >= 0, x, self.slope * x)
