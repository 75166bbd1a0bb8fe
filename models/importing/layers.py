"""Converts one Keras layer, with its weights, to a layer of a `ModelSpec`.

`convert_layer` supports the Keras layers that work step by step with equal results under carried
state, and `Bidirectional`, which makes a model of whole sequences. Everything else, and every
option that would change results, is rejected with the reason. Only exact Keras classes are
supported: a subclass may compute anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import keras
import numpy as np
from keras import layers as kl
from numpy.typing import NDArray

from models.spec.layers import ActivationName

LEAKY_RELU_SLOPE = 0.2
"""The slope of `leaky_relu`, which is the default of `keras.activations.leaky_relu`."""


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


def convert_layer(layer: Any, rank: int) -> ConvertedLayer:
    """Translate one built Keras layer.

    Args:
        layer: the layer.
        rank: axes of the tensors it reads, 3 for [batch, steps, features].

    Raises:
        UnsupportedLayerError: the reason why it is not supported.
    """
    kind = type(layer)
    if not isinstance(layer, keras.layers.Layer):
        raise UnsupportedLayerError("it is not a layer; use the layer of the same effect")
    if kind not in _CONVERTERS:
        raise UnsupportedLayerError(reason_unsupported(kind.__name__))
    _expect_float32(layer)
    return _CONVERTERS[kind](layer, rank)


def reason_unsupported(class_name: str) -> str:
    """Why layers of that class are unsupported."""
    return _REASONS.get(class_name, "layers of this class are not supported")


def is_known(class_name: str) -> bool:
    """Whether a layer of that class can be imported, its options aside."""
    return class_name in {kind.__name__ for kind in _CONVERTERS} | {"InputLayer"}


_STEPS = "it looks at several steps at once, and a stream has only those that came"
_SHAPE = "it rearranges the axes of steps and features"
_MASKED = "it would skip steps that look like padding; every event of a stream counts"
_MERGE_MODES = ("concat", "sum", "mul", "ave")
_REASONS = {
    "RNN": "it holds a cell of its own; use LSTM or GRU",
    "StackedRNNCells": "it holds cells of its own; use LSTM or GRU layers",
    "SimpleRNN": "this cell is not among those served; use LSTM or GRU",
    "ConvLSTM1D": "this cell is not among those served; use LSTM or GRU",
    "ConvLSTM2D": "this cell is not among those served; use LSTM or GRU",
    "ConvLSTM3D": "this cell is not among those served; use LSTM or GRU",
    "Masking": _MASKED,
    "Embedding": "the model would take codes; a row of inputs holds float features",
    "Lambda": "it holds code, which is neither loaded nor run",
    "Flatten": _SHAPE,
    "Reshape": _SHAPE,
    "Permute": _SHAPE,
    "RepeatVector": _SHAPE,
    "Conv1D": _STEPS,
    "SeparableConv1D": _STEPS,
    "DepthwiseConv1D": _STEPS,
    "Conv1DTranspose": _STEPS,
    "MaxPooling1D": _STEPS,
    "AveragePooling1D": _STEPS,
    "GlobalMaxPooling1D": _STEPS,
    "GlobalAveragePooling1D": _STEPS,
    "Attention": _STEPS,
    "AdditiveAttention": _STEPS,
    "MultiHeadAttention": _STEPS,
    "GroupQueryAttention": _STEPS,
}


def _recurrent(layer: Any, rank: int) -> ConvertedLayer:
    if layer.go_backwards:
        raise UnsupportedLayerError("go_backwards=True reads the sequence from its end")
    note = ""
    if not layer.return_sequences:
        note = "return_sequences=False: served with an output for every step, the last one equal"
    data = {"kind": type(layer).__name__.lower(), **_cell_options(layer)}
    return ConvertedLayer(data, _cell_weights(layer), note)


def _bidirectional(layer: Any, rank: int) -> ConvertedLayer:
    forward, backward = layer.forward_layer, layer.backward_layer
    for direction in (forward, backward):
        if type(direction) not in (kl.LSTM, kl.GRU) or type(direction) is not type(forward):
            raise UnsupportedLayerError(
                f"it wraps {type(direction).__name__} {direction.name!r}; expected two LSTM or "
                "two GRU"
            )
        _expect_float32(direction)
    if forward.go_backwards:
        raise UnsupportedLayerError("go_backwards=True: its first layer would read from the end")
    if layer.merge_mode not in _MERGE_MODES:
        raise UnsupportedLayerError(
            f"merge_mode={layer.merge_mode}: expected one of {list(_MERGE_MODES)}"
        )
    if not layer.return_sequences:
        raise UnsupportedLayerError(
            "return_sequences=False joins the forward layer's last step with the backward "
            "layer's first, which is the output of no step; expected return_sequences=True"
        )
    options, others = _cell_options(forward), _cell_options(backward)
    differ = [name for name, value in options.items() if others[name] != value]
    if differ:
        raise UnsupportedLayerError(
            f"its backward_layer differs in {differ}; expected equal options"
        )
    data = {
        "kind": "bidirectional",
        "cell": type(forward).__name__.lower(),
        "merge": layer.merge_mode,
        **options,
    }
    weights = {
        f"{name}.{kind}": value
        for name, direction in (("forward", forward), ("backward", backward))
        for kind, value in _cell_weights(direction).items()
    }
    return ConvertedLayer(data, weights)


def _cell_options(layer: Any) -> dict[str, Any]:
    options = {
        "units": layer.units,
        "activation": _activation(layer.activation),
        "recurrent_activation": _activation(layer.recurrent_activation),
        "use_bias": layer.use_bias,
        "dropout": layer.dropout,
        "recurrent_dropout": layer.recurrent_dropout,
    }
    if isinstance(layer, kl.GRU):
        options["reset_after"] = bool(layer.reset_after)
    return options


def _cell_weights(layer: Any) -> dict[str, NDArray[np.float32]]:
    return _weights(layer.cell, "kernel", "recurrent_kernel", "bias")


def _dense(layer: Any, rank: int) -> ConvertedLayer:
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        raise UnsupportedLayerError("expected plain float32 weights, neither LoRA nor quantised")
    data = {
        "kind": "dense",
        "units": layer.units,
        "activation": _activation(layer.activation),
        "use_bias": layer.use_bias,
    }
    return ConvertedLayer(data, _weights(layer, "kernel", "bias"))


def _normalization(layer: Any, rank: int) -> ConvertedLayer:
    _expect_features_axis(layer.axis, rank)
    if getattr(layer, "rms_scaling", False):
        raise UnsupportedLayerError("rms_scaling=True is not carried")
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
    return ConvertedLayer(data, _weights(layer, *kinds))


def _activation_layer(layer: Any, rank: int) -> ConvertedLayer:
    return ConvertedLayer({"kind": "activation", "activation": _activation(layer.activation)})


def _relu(layer: Any, rank: int) -> ConvertedLayer:
    if layer.max_value is not None or layer.threshold:
        raise UnsupportedLayerError(
            f"max_value={layer.max_value}, threshold={layer.threshold}: expected a plain ReLU"
        )
    return _leaky(float(layer.negative_slope))


def _leaky_relu(layer: Any, rank: int) -> ConvertedLayer:
    return _leaky(float(layer.negative_slope))


def _leaky(slope: float) -> ConvertedLayer:
    if slope == 0.0:
        return ConvertedLayer({"kind": "activation", "activation": "relu"})
    if not np.isclose(slope, LEAKY_RELU_SLOPE, rtol=1e-6):
        raise UnsupportedLayerError(f"negative_slope={slope}: expected {LEAKY_RELU_SLOPE} or 0")
    return ConvertedLayer({"kind": "activation", "activation": "leaky_relu"})


def _elu(layer: Any, rank: int) -> ConvertedLayer:
    if layer.alpha != 1.0:
        raise UnsupportedLayerError(f"alpha={layer.alpha}: expected 1")
    return ConvertedLayer({"kind": "activation", "activation": "elu"})


def _softmax(layer: Any, rank: int) -> ConvertedLayer:
    _expect_features_axis(layer.axis, rank)
    return ConvertedLayer({"kind": "activation", "activation": "softmax"})


def _dropout(layer: Any, rank: int) -> ConvertedLayer:
    if not 0 <= layer.rate < 1 or layer.noise_shape is not None:
        return _identity(layer, rank)
    return ConvertedLayer({"kind": "dropout", "rate": float(layer.rate)})


def _identity(layer: Any, rank: int) -> ConvertedLayer:
    return ConvertedLayer(note="active in training only, left out")


def _merge(layer: Any, rank: int) -> ConvertedLayer:
    if isinstance(layer, kl.Concatenate):
        _expect_features_axis(layer.axis, rank)
    return ConvertedLayer({"kind": type(layer).__name__.lower()})


def _time_distributed(layer: Any, rank: int) -> ConvertedLayer:
    inner = layer.layer
    if type(inner) not in _PER_STEP:
        raise UnsupportedLayerError(
            f"it wraps {type(inner).__name__} {inner.name!r}; expected one of "
            f"{sorted(kind.__name__ for kind in _PER_STEP)}"
        )
    return convert_layer(inner, rank - 1)


def _expect_float32(layer: Any) -> None:
    if layer.compute_dtype != "float32" or layer.variable_dtype != "float32":
        raise UnsupportedLayerError(
            f"it computes in {layer.compute_dtype} with {layer.variable_dtype} weights, "
            "expected float32"
        )


def _expect_features_axis(axis: Any, rank: int) -> None:
    axes = list(axis) if isinstance(axis, (list, tuple)) else [axis]
    if [index % rank for index in axes] != [rank - 1]:
        raise UnsupportedLayerError(f"axis={axis}: expected the last axis, the features")


def _activation(function: Callable[[Any], Any]) -> str:
    name = keras.activations.serialize(function)
    name = name if isinstance(name, str) else getattr(function, "__name__", repr(function))
    if name not in get_args(ActivationName) or keras.activations.get(name) is not function:
        raise UnsupportedLayerError(
            f"activation {name!r}: expected one of {sorted(get_args(ActivationName))}"
        )
    return name


def _weights(owner: Any, *kinds: str) -> dict[str, NDArray[np.float32]]:
    """Copies of the owner's variables of those kinds; a kind it does not use is left out."""
    variables = {kind: getattr(owner, kind, None) for kind in kinds}
    return {
        kind: np.array(variable.value.numpy(), np.float32)
        for kind, variable in variables.items()
        if variable is not None
    }


_PER_STEP: dict[type, Callable[[Any, int], ConvertedLayer]] = {
    kl.Dense: _dense,
    kl.Activation: _activation_layer,
    kl.ReLU: _relu,
    kl.LeakyReLU: _leaky_relu,
    kl.ELU: _elu,
    kl.Softmax: _softmax,
    kl.Dropout: _dropout,
    kl.LayerNormalization: _normalization,
    kl.BatchNormalization: _normalization,
    kl.Identity: _identity,
}
_CONVERTERS: dict[type, Callable[[Any, int], ConvertedLayer]] = {
    **_PER_STEP,
    kl.LSTM: _recurrent,
    kl.GRU: _recurrent,
    kl.Bidirectional: _bidirectional,
    kl.SpatialDropout1D: _identity,
    kl.GaussianNoise: _identity,
    kl.GaussianDropout: _identity,
    kl.AlphaDropout: _identity,
    kl.ActivityRegularization: _identity,
    kl.TimeDistributed: _time_distributed,
    kl.Add: _merge,
    kl.Multiply: _merge,
    kl.Average: _merge,
    kl.Concatenate: _merge,
}
