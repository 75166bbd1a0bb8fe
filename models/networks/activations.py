"""Keras activations by name, with a correctly rounded tanh.

They are Keras' own, except for tanh: XLA's float32 tanh is off by up to four units in the
last place, which five steps of a small LSTM carry into the eighth decimal. Through float64
it is rounded correctly, at a few per cent of a step's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import tensorflow as tf

from models.spec.layers import ActivationName

Activation: TypeAlias = str | Callable[[Any], Any]


def activation_of(name: ActivationName) -> Activation:
    """The value of a Keras layer's `activation` argument for that name."""
    return _tanh if name == "tanh" else name


def _tanh(x: Any) -> Any:
    return tf.cast(tf.tanh(tf.cast(x, tf.float64)), tf.float32)
