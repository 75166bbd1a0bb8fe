"""The arguments of a built Keras model, and calls of it on random sequences."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import keras
import numpy as np
from keras import layers as kl
from numpy.typing import NDArray

from models.errors import ImportedModelError
from models.importing import verification
from models.importing.keras_inputs import unique_output_name


@dataclass(frozen=True, slots=True)
class ArgumentInput:
    """One input of a Keras model, an argument of its call.

    Attributes:
        name: its name.
        has_steps: whether it has values for each event, [batch, steps, ...]; otherwise they belong
            to the stream, [batch, ...].
        shape: of the values of one event or stream.
        dtype: its Keras dtype.
    """

    name: str
    has_steps: bool
    shape: tuple[int, ...]
    dtype: str

    @property
    def width(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class CalledSequence:
    """Random rows, and what the model gives for them.

    Attributes:
        rows: float32 [B, T, F].
        outputs: of the model, flattened.
    """

    rows: NDArray[np.float32]
    outputs: Sequence[NDArray[Any]]


def inputs_of(model: Any) -> tuple[list[Any], list[ArgumentInput], int | None]:
    """The arguments of a model, its inputs, and the number of steps that they fix."""
    if hasattr(model, "_nodes_by_depth"):
        structure: list[Any] = [model._inputs_struct]
        keys = [str(tensor.name) for tensor in keras.tree.flatten(structure)]
    else:
        shapes = getattr(model, "_build_shapes_dict", None) or {}
        shapes = shapes.get("shapes_dict", shapes)
        spec = partial(keras.tree.map_shape_structure, lambda shape: kl.InputSpec("float32", shape))
        structure = [spec(value) for value in shapes.values()]
        keys = [
            re.sub("_?shape$", "", key) + (f"_{at}" if at else "")
            for key, value in zip(shapes, structure, strict=True)
            for at in range(len(keras.tree.flatten(value)))
        ]
    tensors = keras.tree.flatten(structure)
    shapes = [tuple(tensor.shape)[1:] for tensor in tensors]
    series = {shape[0] for shape in shapes if len(shape) > 1} or {s[0] for s in shapes if s}
    steps = series.pop() if len(series) == 1 and hasattr(model, "_nodes_by_depth") else None
    inputs, used = [], set[str]()
    for key, tensor, shape in zip(keys, tensors, shapes, strict=True):
        has_steps = len(shape) > 1 or (len(shape) == 1 and shape[0] in (None, steps))
        own = shape[1:] if has_steps else shape
        dtype = str(tensor.dtype)
        if any(size is None for size in own) or not dtype.startswith(("float", "int", "bool")):
            raise ImportedModelError(
                "expected inputs of numbers [batch, steps, ...] or [batch, values] of fixed sizes, "
                f"got {key!r} {dtype} {list(tensor.shape)}"
            )
        name = unique_output_name(used, plain_name(key))
        inputs.append(ArgumentInput(name, has_steps, own, dtype))
    if not any(each.has_steps for each in inputs):
        raise ImportedModelError(
            f"expected an input [batch, steps, ...], got {[list(t.shape) for t in tensors]}"
        )
    return structure, inputs, steps


def call_model(
    model: Any,
    structure: Any,
    inputs: Sequence[ArgumentInput],
    lengths: Sequence[int],
    held: Collection[int] = (),
) -> Iterator[CalledSequence]:
    """Call the model on random sequences; inputs `held` are states, and zero."""
    random = np.random.default_rng(verification.SEED)
    batches = {tensor.shape[0] for tensor in keras.tree.flatten(structure)} - {None}
    rows = max(batches) if batches and hasattr(model, "_nodes_by_depth") else verification.BATCH
    codes = [layer.input_dim for layer in layers_of(model) if isinstance(layer, kl.Embedding)]
    for length in lengths:
        columns, values = [], []
        for at, each in enumerate(inputs):
            size = (rows, length if each.has_steps else 1, each.width)
            value = random.standard_normal(size)
            if not each.dtype.startswith("float"):
                value = random.integers(1, max(2, min(codes, default=2)), size).astype(float)
            if at in held:
                value = np.zeros(size)
            else:
                columns.append(np.broadcast_to(value, (rows, length, each.width)))
            shape = (rows, *([length] if each.has_steps else []), *each.shape)
            values.append(value.astype(each.dtype).reshape(shape))
        verification.reset(model)
        outputs = model(*keras.tree.pack_sequence_as(structure, values), training=False)
        yield CalledSequence(
            np.concatenate(columns, axis=-1).astype(np.float32),
            [np.asarray(value) for value in keras.tree.flatten(outputs)],
        )


def layers_of(model: Any) -> list[Any]:
    """All layers and cells of a model."""
    return list(model._flatten_layers())


def plain_name(name: str) -> str:
    """A name for a tensor of a graph that resembles a Keras name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-") or "value"
