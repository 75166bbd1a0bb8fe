"""Turns a Keras model of int8 weights into one of float32 weights.

Keras rounds the inputs of such a layer to int8 too, so its outputs differ from those of the float32
weights by about a hundredth; a note says by how much they do.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers as kl

from models.errors import ImportedModelError
from models.importing.keras_calls import call_model, inputs_of, layers_of

_FLOAT32 = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}}
_TABLES = {kl.Dense: "kernel", kl.EinsumDense: "kernel", kl.Embedding: "embeddings"}
STEPS = 9


def dequantise(model: Any) -> tuple[Any, tuple[str, ...]]:
    """The model with float32 weights, and what the user should know; itself if it has them.

    Raises:
        ImportedModelError: it is quantised otherwise than to int8.
    """
    modes = {each.name: getattr(each, "quantization_mode", None) for each in layers_of(model)}
    quantised = {name: mode for name, mode in modes.items() if mode is not None}
    if not quantised:
        return model, ()
    if others := {name: mode for name, mode in quantised.items() if mode != "int8"}:
        raise ImportedModelError(
            f"expected layers of float32 or int8 weights, got {others}; import the model from "
            "before model.quantize()"
        )
    config = _without_quantisation(keras.saving.serialize_keras_object(model))
    plain = keras.saving.deserialize_keras_object(config)
    for layer, own in zip(layers_of(model), layers_of(plain), strict=True):
        if own._layers:
            continue  # its parts follow
        weights = layer.get_weights()
        if layer.name in quantised:
            table = _TABLES[type(layer)]
            values = getattr(layer, f"_{table}").numpy().astype(np.float32)
            scale = getattr(layer, f"{table}_scale").numpy()
            scale = scale[:, np.newaxis] if table == "embeddings" else scale
            bias = getattr(layer, "bias", None)
            weights = [values / scale, *([] if bias is None else [bias.numpy()])]
        own.set_weights(weights)
    structure, inputs, steps = inputs_of(model)
    lengths = [steps or STEPS]
    ((before,), (after,)) = (
        list(call_model(each, structure, inputs, lengths)) for each in (model, plain)
    )
    pairs = zip(before.outputs, after.outputs, strict=True)
    gap = max(float(np.abs(one - other).max()) for one, other in pairs)
    return plain, (
        f"the int8 weights of {sorted(quantised)} are converted to float32; on random rows outputs "
        f"differ from the quantised model's by up to {gap:.1e}",
    )


def _without_quantisation(config: Any) -> Any:
    if isinstance(config, list):
        return [_without_quantisation(each) for each in config]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "QuantizedDTypePolicy":
        return _FLOAT32
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return {key: _without_quantisation(value) for key, value in kept.items()}
