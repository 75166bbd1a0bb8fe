"""Reasons why Keras layers are unsupported, each with an alternative."""

from __future__ import annotations

EXPORT = "export the model to ONNX and run carry import MODEL.onnx"
NOT_LOADED = (
    "which is not loaded; build the model of Keras' layers with keras.Model(inputs, outputs), or "
    f"{EXPORT}"
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
_REASONS = {
    "ConvLSTM1D": _CELL,
    "ConvLSTM2D": _CELL,
    "ConvLSTM3D": _CELL,
    "Lambda": (
        "it contains code, which is neither loaded nor run; use a layer of the same effect "
        f"(Rescaling, Activation, a slice such as x[:, -1]), or {EXPORT}"
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
    "Subtract": "layers of this class are not supported; use Rescaling(-1.0) and Add",
    "StringLookup": _VOCABULARY,
    "IntegerLookup": _VOCABULARY,
    "TextVectorization": _VOCABULARY,
    "SlicingOpLambda": _OLD_OPERATION,
    "TFOpLambda": _OLD_OPERATION,
    "TFSMLayer": f"it runs a SavedModel, which is not loaded; {EXPORT}",
}


def has_reason(class_name: str) -> bool:
    """Whether there is a specific reason for that class."""
    return class_name in _REASONS


def reason_unsupported(class_name: str) -> str:
    """Why layers of that class are unsupported, and an alternative."""
    return _REASONS.get(class_name, f"layers of this class are not supported; {EXPORT}")
