"""Converts one Keras layer, with its weights, to layers of a `ModelSpec`.

`convert_layer` supports the Keras layers that work step by step with equal results under carried
state, and `Bidirectional`, which makes a model of whole sequences. Everything else, and every
option that would change results, is rejected with the reason and an alternative. Only exact Keras
classes are supported: a subclass may compute anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers as kl
from numpy.typing import NDArray

from models.importing.converted import (
    ConvertedLayer,
    UnsupportedLayerError,
    activation_name,
    expect_features_axis,
    expect_float32,
    weights_of,
)
from models.importing.reasons import OPERATION, reason_unsupported
from models.importing.recurrent import convert_bidirectional, convert_recurrent

LEAKY_RELU_SLOPE = 0.2
"""The slope of `leaky_relu`, which is the default of `keras.activations.leaky_relu`."""

Converted = tuple[ConvertedLayer, ...]


def convert_layer(layer: Any, shape: tuple[Any, ...]) -> Converted:
    """Translate one built Keras layer.

    Args:
        layer: the layer.
        shape: of the tensors it reads, [batch, steps, features] or [batch, features].

    Returns:
        The layers that it becomes, each reading the one before it.

    Raises:
        UnsupportedLayerError: the reason why it is not supported.
    """
    kind = type(layer)
    if not isinstance(layer, keras.layers.Layer):
        raise UnsupportedLayerError(OPERATION)
    if kind in _RECURRENT:
        expect_float32(layer)
        return _RECURRENT[kind](layer, len(shape))
    if kind not in _CONVERTERS:
        raise UnsupportedLayerError(reason_unsupported(kind.__name__))
    expect_float32(layer)
    return (_CONVERTERS[kind](layer, shape),)


def is_known(class_name: str) -> bool:
    """Whether a layer of that class can be imported, its options aside."""
    kinds = (*_CONVERTERS, *_RECURRENT, *FRONT_LAYERS, kl.InputLayer, kl.StackedRNNCells)
    return class_name in {kind.__name__ for kind in kinds}


FRONT_LAYERS = (kl.Embedding, kl.Masking, kl.Reshape)
"""Layers that `models.importing.graph` converts, since what they read decides what they are."""


def _dense(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    _expect_plain(layer)
    data = {
        "kind": "dense",
        "units": layer.units,
        "activation": activation_name(layer.activation),
        "use_bias": layer.use_bias,
    }
    return ConvertedLayer(data, weights_of(layer, "kernel", "bias"))


def _expect_plain(layer: Any) -> None:
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        raise UnsupportedLayerError("expected plain float32 weights, neither LoRA nor quantised")


def _conv1d(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    _expect_plain(layer)
    (size,), (stride,), (dilation,) = layer.kernel_size, layer.strides, layer.dilation_rate
    if len(shape) != 3 or layer.data_format != "channels_last":
        raise UnsupportedLayerError("expected [batch, steps, features], channels last")
    if stride != 1:
        raise UnsupportedLayerError(
            f"strides={stride}: it gives fewer outputs than events; use strides=1 and dilation_rate"
        )
    if layer.groups != 1:
        raise UnsupportedLayerError(
            f"groups={layer.groups}: expected 1; use a Conv1D for each group and Concatenate"
        )
    if layer.padding != "causal" and size > 1:
        raise UnsupportedLayerError(
            f"padding={layer.padding!r}: it looks at several steps at once, later ones among them; "
            "train it with padding='causal', which reads earlier steps alone"
        )
    data = {
        "kind": "conv1d",
        "units": layer.filters,
        "kernel_size": size,
        "dilation": dilation,
        "activation": activation_name(layer.activation),
        "use_bias": layer.use_bias,
    }
    return ConvertedLayer(data, weights_of(layer, "kernel", "bias"))


def _layer_or_batch_normalization(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    expect_features_axis(layer.axis, len(shape))
    if getattr(layer, "rms_scaling", False):
        raise UnsupportedLayerError("rms_scaling=True: expected False")
    batch = isinstance(layer, kl.BatchNormalization)
    data = {
        "kind": "batch_normalization" if batch else "layer_normalization",
        "epsilon": layer.epsilon,
        "center": layer.center,
        "scale": layer.scale,
    }
    kinds = ["gamma"] if layer.scale else []
    kinds += ["beta"] if layer.center else []
    kinds += ["moving_mean", "moving_variance"] if batch else []
    return ConvertedLayer(data, weights_of(layer, *kinds))


def _normalization(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    """(x - mean) / max(sqrt(variance), epsilon), or its inverse."""
    if layer.axis:
        expect_features_axis(layer.axis, len(shape))
    mean, variance = np.asarray(layer.mean, np.float64), np.asarray(layer.variance, np.float64)
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return _affine(shape[-1], scale=deviation, offset=mean)
    return _affine(shape[-1], shift=mean, scale=1 / deviation)


def _rescaling(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    return _affine(shape[-1], scale=layer.scale, offset=layer.offset)


def _affine(width: int, shift: Any = 0.0, scale: Any = 1.0, offset: Any = 0.0) -> ConvertedLayer:
    def constant(value: Any) -> NDArray[np.float32]:
        values = np.asarray(value, np.float32)
        if values.size not in (1, width):
            raise UnsupportedLayerError(
                f"expected one number, or one for each of {width} values, got {values.size}"
            )
        return np.full(width, values.ravel(), np.float32)

    weights = {"shift": constant(shift), "scale": constant(scale), "offset": constant(offset)}
    return ConvertedLayer({"kind": "affine"}, weights)


def _activation_layer(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    return ConvertedLayer({"kind": "activation", "activation": activation_name(layer.activation)})


def _relu(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    if layer.max_value is not None or layer.threshold:
        raise UnsupportedLayerError(
            f"max_value={layer.max_value}, threshold={layer.threshold}: expected a plain ReLU; "
            "activation 'hard_sigmoid' is bounded too"
        )
    return _leaky_relu(layer, shape)


def _leaky_relu(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    slope = float(layer.negative_slope)
    if slope == 0.0:
        return ConvertedLayer({"kind": "activation", "activation": "relu"})
    if np.isclose(slope, LEAKY_RELU_SLOPE, rtol=1e-6):
        return ConvertedLayer({"kind": "activation", "activation": "leaky_relu"})
    return ConvertedLayer({"kind": "prelu"}, {"slope": np.full(shape[-1], slope, np.float32)})


def _prelu(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    slope = np.asarray(layer.alpha.value.numpy(), np.float32)
    if slope.size not in (1, shape[-1]):
        raise UnsupportedLayerError(
            f"it has slopes {list(slope.shape)}, others at every step; expected one for each of "
            f"{shape[-1]} values: PReLU(shared_axes=[1])"
        )
    return ConvertedLayer({"kind": "prelu"}, {"slope": np.full(shape[-1], slope.ravel())})


def _elu(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    if layer.alpha != 1.0:
        raise UnsupportedLayerError(f"alpha={layer.alpha}: expected 1, or PReLU or LeakyReLU")
    return ConvertedLayer({"kind": "activation", "activation": "elu"})


def _softmax(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    expect_features_axis(layer.axis, len(shape))
    return ConvertedLayer({"kind": "activation", "activation": "softmax"})


def _dropout(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    if not 0 <= layer.rate < 1 or layer.noise_shape is not None:
        return _identity(layer, shape)
    return ConvertedLayer({"kind": "dropout", "rate": float(layer.rate)})


def _identity(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    return ConvertedLayer(note="active in training only, left out")


def _flatten(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    if len(shape) != 2:
        raise UnsupportedLayerError(reason_unsupported("Flatten"))
    return ConvertedLayer()


def _merge(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    if isinstance(layer, kl.Concatenate):
        expect_features_axis(layer.axis, len(shape))
    return ConvertedLayer({"kind": type(layer).__name__.lower()})


def _time_distributed(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    inner = layer.layer
    if type(inner) not in _PER_STEP:
        raise UnsupportedLayerError(
            f"it wraps {type(inner).__name__} {inner.name!r}; expected one of "
            f"{sorted(kind.__name__ for kind in _PER_STEP)}"
        )
    expect_float32(inner)
    return _PER_STEP[type(inner)](inner, (shape[0], *shape[2:]))


_PER_STEP: dict[type, Callable[[Any, tuple[Any, ...]], ConvertedLayer]] = {
    kl.Dense: _dense,
    kl.Activation: _activation_layer,
    kl.ReLU: _relu,
    kl.LeakyReLU: _leaky_relu,
    kl.PReLU: _prelu,
    kl.ELU: _elu,
    kl.Softmax: _softmax,
    kl.Dropout: _dropout,
    kl.LayerNormalization: _layer_or_batch_normalization,
    kl.BatchNormalization: _layer_or_batch_normalization,
    kl.Normalization: _normalization,
    kl.Rescaling: _rescaling,
    kl.Identity: _identity,
}
_CONVERTERS: dict[type, Callable[[Any, tuple[Any, ...]], ConvertedLayer]] = {
    **_PER_STEP,
    kl.Conv1D: _conv1d,
    kl.SpatialDropout1D: _identity,
    kl.GaussianNoise: _identity,
    kl.GaussianDropout: _identity,
    kl.AlphaDropout: _identity,
    kl.ActivityRegularization: _identity,
    kl.Flatten: _flatten,
    kl.TimeDistributed: _time_distributed,
    kl.Add: _merge,
    kl.Multiply: _merge,
    kl.Average: _merge,
    kl.Concatenate: _merge,
}
_RECURRENT: dict[type, Callable[[Any, int], Converted]] = {
    kl.LSTM: convert_recurrent,
    kl.GRU: convert_recurrent,
    kl.SimpleRNN: convert_recurrent,
    kl.RNN: convert_recurrent,
    kl.Bidirectional: convert_bidirectional,
}
