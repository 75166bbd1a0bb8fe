"""Masks: padding of training sequences, which streams do not have.

Keras computes the mask of `Masking` and of `Embedding(mask_zero=True)` by operations besides the
layers: the input differs from a constant. On events that never equal it the mask is all true, and
the layers compute what they compute without it; so it is left out, and a note says which
events not to send. A mask of anything else is not supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from models.importing.states import Value

_CONSTANT = ("ZerosLike", "OnesLike")
"""Operations whose result does not depend on the values that they read."""


def is_mask(node: Any) -> bool:
    """Whether a node of the Keras model is an operation that computes a mask."""
    is_operation = not isinstance(node.operation, keras.layers.Layer)
    return is_operation and all(tensor.dtype == "bool" for tensor in node.outputs)


def read_mask(node: Any, reads: Sequence[Value], notes: list[str]) -> Value:
    """The mask that such a node computes; rejected if it depends on anything but padding.

    Args:
        node: the Keras node.
        reads: what it reads.
        notes: what the user should know is added here.
    """
    operation, shape = node.operation, tuple(node.outputs[0].shape)
    kind = type(operation).__name__
    masks = [value for value in reads if value.mask]
    others = [] if kind in _CONSTANT else [value for value in reads if not value.mask]
    marks_padding = kind == "NotEqual" and len(reads) == 1 and reads[0].columns is not None
    if marks_padding:
        (constant,) = [value for value in node.arguments.args if not hasattr(value, "shape")]
        every = "" if len(reads[0].shape) == 2 else "every value "
        notes.append(
            f"a mask (Masking, mask_zero) marks padding of training sequences, {reads[0].owner} "
            f"with {every}{constant:g}; a stream has no padding and such an event counts like any "
            "other: do not send it"
        )
    refused = (bool(others) and not marks_padding) or any(mask.refused for mask in masks)
    return Value("", shape, f"{kind} {operation.name!r}", refused=refused, mask=True)
