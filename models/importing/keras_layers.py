"""Converts one Keras layer, with its weights, to layers of a `ModelSpec`.

Supported are the Keras layers that work step by step with equal results under carried state, and
`Bidirectional`, which makes a model of whole sequences. Everything else, and every option that
would change results, is rejected with the reason and an alternative. Only exact Keras classes are
supported: a subclass may compute anything. A recurrent cell is a layer of the specification:
`RNN([LSTMCell(8), GRUCell(4)])` becomes two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import keras
import numpy as np
from keras import layers as kl
from numpy.typing import NDArray

from models.spec.layers import ActivationName

EXPORT = "export the model to ONNX and run carry import MODEL.onnx"
NOT_LOADED = (
    "which is not loaded; give the Python file that defines it (carry import MODEL.keras OUT "
    f"--code FILE.py), or {EXPORT}"
)
OWN_CLASS = f"it is a custom class, {NOT_LOADED}"
OPERATION = (
    "it is an operation of keras.ops, not a layer; use the layer of the same effect, such as "
    "Activation('tanh') or Rescaling"
)
_SHORTER = (
    "it gives fewer outputs than events; leave it out, or use Conv1D with padding='causal' and "
    "dilation_rate"
)
_WHOLE = (
    "it looks at the whole sequence at once, and a stream has only the events so far; take the "
    "last step (return_sequences=False), or describe attention over the stream in a SPEC.yaml"
)
_CONVOLUTION = "it looks at several steps at once; use Conv1D with padding='causal'"
_CELL = f"this cell is not supported; use LSTM, GRU or SimpleRNN, or {EXPORT}"
_VOCABULARY = (
    "it reads a vocabulary; pass its codes as an input to Embedding, or describe the field as "
    "categorical in a SPEC.yaml"
)
_OLD_OPERATION = (
    "it is an operation of Keras 2 outside a layer; build the model again with Keras 3, where a "
    "slice such as x[:, -1] is supported"
)
REASONS = {
    "ConvLSTM1D": _CELL,
    "ConvLSTM2D": _CELL,
    "ConvLSTM3D": _CELL,
    "Lambda": (
        "it contains code, which is neither loaded nor run; use a layer of the same effect "
        "(Rescaling, Activation, a slice such as x[:, -1]), or a named function of a file that "
        "--code FILE.py gives"
    ),
    "Flatten": (
        "it flattens all steps into one row, and a stream has no fixed number of them; take the "
        "last step (return_sequences=False or x[:, -1])"
    ),
    "Permute": "it exchanges steps and features; leave it out",
    "RepeatVector": (
        "it repeats the last step, as autoencoders and encoder/decoder models do; to find "
        "anomalies use the `anomaly` head, to forecast the `decoder` of a SPEC.yaml"
    ),
    "SeparableConv1D": _CONVOLUTION,
    "DepthwiseConv1D": _CONVOLUTION,
    "Conv1DTranspose": _CONVOLUTION,
    "ZeroPadding1D": _CONVOLUTION,
    "Cropping1D": _SHORTER,
    "UpSampling1D": "it gives more outputs than events; leave it out",
    "MaxPooling1D": _SHORTER,
    "AveragePooling1D": _SHORTER,
    "GlobalMaxPooling1D": _WHOLE,
    "GlobalAveragePooling1D": _WHOLE,
    "Attention": _WHOLE,
    "AdditiveAttention": _WHOLE,
    "MultiHeadAttention": _WHOLE,
    "GroupQueryAttention": _WHOLE,
    "CategoryEncoding": (
        "it reads one code of an event otherwise than a sequence of them; use an Embedding, whose "
        "weights are the identity matrix"
    ),
    "StringLookup": _VOCABULARY,
    "IntegerLookup": _VOCABULARY,
    "TextVectorization": _VOCABULARY,
    "SlicingOpLambda": _OLD_OPERATION,
    "TFOpLambda": _OLD_OPERATION,
    "TFSMLayer": f"it runs a SavedModel, which is not loaded; {EXPORT}",
}
"""Reasons why layers of a class are unsupported, each with an alternative."""
LEAKY_RELU_SLOPE = 0.2
"""The slope of `leaky_relu`, which is the default of `keras.activations.leaky_relu`."""
LAST_STEP = "served with an output for every step, the last one equal"
_CELLS: dict[type, tuple[str, tuple[str, ...]]] = {
    kl.LSTMCell: ("lstm", ("hidden", "carry")),
    kl.GRUCell: ("gru", ("hidden",)),
    kl.SimpleRNNCell: ("simple_rnn", ("hidden",)),
}
"""Kinds of cells, and their state parts in Keras' order."""
_MERGE_MODES = ("concat", "sum", "mul", "ave")

Weights = Mapping[str, NDArray[np.float32]]


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
    weights: Weights = field(default_factory=dict)
    note: str = ""


Converted = tuple[ConvertedLayer, ...]


def convert_layer(layer: Any, shape: tuple[Any, ...]) -> Converted:
    """The layers that a built Keras layer becomes, each reading the one before it.

    Args:
        shape: of the tensors it reads, [batch, steps, features] or [batch, features].

    Raises:
        UnsupportedLayerError: the reason why it is not supported.
    """
    kind = type(layer)
    if not isinstance(layer, kl.Layer):
        raise UnsupportedLayerError(OPERATION)
    if kind in _RECURRENT:
        expect_float32(layer)
        return _RECURRENT[kind](layer)
    if kind not in _CONVERTERS:
        raise UnsupportedLayerError(reason_unsupported(kind.__name__))
    expect_float32(layer)
    return (_CONVERTERS[kind](layer, shape),)


def reason_unsupported(class_name: str) -> str:
    """Why layers of that class are unsupported, and an alternative."""
    return REASONS.get(class_name, f"layers of this class are not supported; {EXPORT}")


def state_parts(layer: Any) -> list[tuple[str, ...]]:
    """The state parts of each cell that a Keras layer starts from and returns, in Keras' order.

    A bidirectional layer is one layer of the specification, with the parts of both directions.
    """
    if isinstance(layer, kl.Bidirectional):
        (inner,) = state_parts(layer.forward_layer)
        return [tuple(f"{side}.{part}" for side in ("forward", "backward") for part in inner)]
    if not isinstance(layer, kl.RNN):
        return []
    return [_CELLS.get(type(cell), ("", ()))[1] for cell in _cells_of(layer)]


def expect_float32(layer: Any) -> None:
    """Reject a layer with a dtype policy of other precision, or with weights in other forms."""
    if layer.compute_dtype != "float32" or layer.variable_dtype != "float32":
        raise UnsupportedLayerError(
            f"it computes in {layer.compute_dtype} with {layer.variable_dtype} weights, expected "
            "float32; build the model again under keras.config.set_dtype_policy('float32'), and "
            "set_weights to this one's get_weights"
        )
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        raise UnsupportedLayerError("expected plain float32 weights, neither LoRA nor quantised")


def _expect_features_axis(axis: Any, rank: int) -> None:
    """Reject an axis that is not the last one."""
    axes = list(axis) if isinstance(axis, (list, tuple)) else [axis]
    if [index % rank for index in axes] != [rank - 1]:
        raise UnsupportedLayerError(
            f"axis={axis}: expected the last axis, the features, since a stream has no fixed steps"
        )


def _activation_name(function: Callable[[Any], Any]) -> str:
    """The name of a Keras activation that a specification has."""
    name = keras.activations.serialize(function)
    name = name if isinstance(name, str) else getattr(function, "__name__", repr(function))
    if name not in get_args(ActivationName) or keras.activations.get(name) is not function:
        raise UnsupportedLayerError(
            f"activation {name!r}: expected one of {sorted(get_args(ActivationName))}"
        )
    return name


def _weights(owner: Any, *kinds: str) -> Weights:
    """Copies of the owner's variables of those kinds; a kind it does not use is left out."""
    variables = {kind: getattr(owner, kind, None) for kind in kinds}
    return {
        kind: np.array(variable.value.numpy(), np.float32)
        for kind, variable in variables.items()
        if variable is not None
    }


def _cells_of(layer: Any) -> list[Any]:
    """The Keras cells of a recurrent layer, from its input to its output."""
    cell = layer.cell
    return list(cell.cells) if isinstance(cell, kl.StackedRNNCells) else [cell]


def _recurrent(layer: Any) -> Converted:
    """An `LSTM`, `GRU`, `SimpleRNN` or `RNN` layer: one layer for each cell."""
    if layer.go_backwards:
        raise UnsupportedLayerError(
            "go_backwards=True reads the sequence from its end, and a stream has none yet; use "
            "go_backwards=False, or Bidirectional for whole sequences"
        )
    cells = [_cell(cell) for cell in _cells_of(layer)]
    if not layer.return_sequences:
        cells[-1] = replace(cells[-1], note=f"return_sequences=False: {LAST_STEP}")
    return tuple(cells)


def _cell(cell: Any) -> ConvertedLayer:
    if type(cell) not in _CELLS:
        raise UnsupportedLayerError(
            f"it holds a {type(cell).__name__}; expected "
            f"{', '.join(sorted(known.__name__ for known in _CELLS))}"
        )
    expect_float32(cell)
    data = {
        "kind": _CELLS[type(cell)][0],
        "units": cell.units,
        "activation": _activation_name(cell.activation),
        "use_bias": cell.use_bias,
        "dropout": cell.dropout,
        "recurrent_dropout": cell.recurrent_dropout,
    }
    if not isinstance(cell, kl.SimpleRNNCell):
        data["recurrent_activation"] = _activation_name(cell.recurrent_activation)
    if isinstance(cell, kl.GRUCell):
        data["reset_after"] = bool(cell.reset_after)
    return ConvertedLayer(data, _weights(cell, "kernel", "recurrent_kernel", "bias"))


def _bidirectional(layer: Any) -> Converted:
    """A `Bidirectional` layer of two LSTM or two GRU."""
    forward, backward = layer.forward_layer, layer.backward_layer
    for direction in (forward, backward):
        if type(direction) not in (kl.LSTM, kl.GRU) or type(direction) is not type(forward):
            raise UnsupportedLayerError(
                f"it wraps {type(direction).__name__} {direction.name!r}; expected two LSTM or "
                "two GRU"
            )
        expect_float32(direction)
    if forward.go_backwards:
        raise UnsupportedLayerError("go_backwards=True: its first layer would read from the end")
    if layer.merge_mode not in _MERGE_MODES:
        raise UnsupportedLayerError(
            f"merge_mode={layer.merge_mode}: expected one of {list(_MERGE_MODES)}"
        )
    if not layer.return_sequences:
        raise UnsupportedLayerError(
            "return_sequences=False joins the forward layer's last step with the backward "
            "layer's first, which is the output of no step; expected return_sequences=True, or "
            "an LSTM or GRU without Bidirectional, which can serve streams"
        )
    cells = {"forward": _cell(forward.cell), "backward": _cell(backward.cell)}
    data = dict(cells["forward"].data)
    differ = [name for name, value in data.items() if cells["backward"].data[name] != value]
    if differ:
        raise UnsupportedLayerError(
            f"its backward_layer differs in {differ}; expected equal options"
        )
    data = {**data, "cell": data["kind"], "kind": "bidirectional", "merge": layer.merge_mode}
    weights = {f"{side}.{k}": value for side in cells for k, value in cells[side].weights.items()}
    return (ConvertedLayer(data, weights),)


def _dense(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    data = {
        "kind": "dense",
        "units": layer.units,
        "activation": _activation_name(layer.activation),
        "use_bias": layer.use_bias,
    }
    return ConvertedLayer(data, _weights(layer, "kernel", "bias"))


def _conv1d(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
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
        "activation": _activation_name(layer.activation),
        "use_bias": layer.use_bias,
    }
    return ConvertedLayer(data, _weights(layer, "kernel", "bias"))


def _layer_or_batch_normalization(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    _expect_features_axis(layer.axis, len(shape))
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
    return ConvertedLayer(data, _weights(layer, *kinds))


def _rms_normalization(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    _expect_features_axis(layer.axis, len(shape))
    data = {"kind": "rms_normalization", "epsilon": layer.epsilon}
    return ConvertedLayer(data, _weights(layer, "scale"))


def _unit_normalization(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    _expect_features_axis(layer.axis, len(shape))
    return ConvertedLayer({"kind": "unit_normalization"})


def _normalization(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    """(x - mean) / max(sqrt(variance), epsilon), or its inverse."""
    if layer.axis:
        _expect_features_axis(layer.axis, len(shape))
    mean, variance = np.asarray(layer.mean, np.float64), np.asarray(layer.variance, np.float64)
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return _affine(shape[-1], scale=deviation, offset=mean)
    return _affine(shape[-1], shift=mean, scale=1 / deviation)


def _affine(width: int, shift: Any = 0.0, scale: Any = 1.0, offset: Any = 0.0) -> ConvertedLayer:
    """(x - shift) * scale + offset."""
    constants = {"shift": shift, "scale": scale, "offset": offset}
    weights = {kind: _per_value(value, width) for kind, value in constants.items()}
    return ConvertedLayer({"kind": "affine"}, weights)


def _per_value(constant: Any, width: int) -> NDArray[np.float32]:
    """One number for each value."""
    numbers = np.asarray(constant, np.float32)
    if numbers.size not in (1, width):
        raise UnsupportedLayerError(
            f"it has numbers of shape {list(numbers.shape)}; expected one, or one for each of "
            f"{width} values: in PReLU, which has others at every step, shared_axes=[1]"
        )
    return np.full(width, numbers.ravel(), np.float32)


def _activation(name: str) -> ConvertedLayer:
    return ConvertedLayer({"kind": "activation", "activation": name})


def _relu(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    if layer.max_value == 6.0 and not layer.threshold and not layer.negative_slope:
        return _activation("relu6")
    if layer.max_value is not None or layer.threshold:
        raise UnsupportedLayerError(
            f"max_value={layer.max_value}, threshold={layer.threshold}: expected a plain ReLU, or "
            "max_value=6"
        )
    return _leaky_relu(layer, shape)


def _leaky_relu(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    slope = float(layer.negative_slope)
    if slope == 0.0 or np.isclose(slope, LEAKY_RELU_SLOPE, rtol=1e-6):
        return _activation("leaky_relu" if slope else "relu")
    return _slopes(slope, shape)


def _slopes(slope: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    return ConvertedLayer({"kind": "prelu"}, {"slope": _per_value(slope, shape[-1])})


def _elu(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    if layer.alpha != 1.0:
        raise UnsupportedLayerError(f"alpha={layer.alpha}: expected 1, or PReLU or LeakyReLU")
    return _activation("elu")


def _softmax(layer: Any, shape: tuple[Any, ...]) -> ConvertedLayer:
    _expect_features_axis(layer.axis, len(shape))
    return _activation("softmax")


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
        _expect_features_axis(layer.axis, len(shape))
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


Converter = Callable[[Any, tuple[Any, ...]], ConvertedLayer]
_PER_STEP: dict[type, Converter] = {
    kl.Dense: _dense,
    kl.Activation: lambda layer, shape: _activation(_activation_name(layer.activation)),
    kl.ReLU: _relu,
    kl.LeakyReLU: _leaky_relu,
    kl.PReLU: lambda layer, shape: _slopes(layer.alpha.value.numpy(), shape),
    kl.ELU: _elu,
    kl.Softmax: _softmax,
    kl.Dropout: _dropout,
    kl.LayerNormalization: _layer_or_batch_normalization,
    kl.BatchNormalization: _layer_or_batch_normalization,
    kl.RMSNormalization: _rms_normalization,
    kl.UnitNormalization: _unit_normalization,
    kl.Normalization: _normalization,
    kl.Rescaling: lambda layer, shape: _affine(shape[-1], 0.0, layer.scale, layer.offset),
    kl.Identity: _identity,
}
_CONVERTERS: dict[type, Converter] = {
    **_PER_STEP,
    kl.Conv1D: _conv1d,
    **dict.fromkeys((kl.SpatialDropout1D, kl.GaussianNoise, kl.GaussianDropout), _identity),
    **dict.fromkeys((kl.AlphaDropout, kl.ActivityRegularization), _identity),
    kl.Flatten: _flatten,
    kl.TimeDistributed: _time_distributed,
    **dict.fromkeys((kl.Add, kl.Subtract, kl.Multiply, kl.Average), _merge),
    **dict.fromkeys((kl.Maximum, kl.Minimum, kl.Concatenate), _merge),
}
_RECURRENT: dict[type, Callable[[Any], Converted]] = {
    **dict.fromkeys((kl.LSTM, kl.GRU, kl.SimpleRNN, kl.RNN), _recurrent),
    kl.Bidirectional: _bidirectional,
}
SUPPORTED = frozenset(
    {*_CONVERTERS, *_RECURRENT, *_CELLS, kl.StackedRNNCells, kl.InputLayer}
    | {kl.Embedding, kl.Masking, kl.Reshape}  # what they read decides what they are
    | {kl.EinsumDense, kl.Discretization}
)
"""Classes of layers and cells that may be loaded."""
