"""The encoder's state for a decoder: the last observed value of each target."""

from __future__ import annotations

from typing import Any, TypeAlias

import tensorflow as tf

from models.errors import SpecError
from models.spec.model import ModelSpec

Tensor: TypeAlias = Any
"""A tf.Tensor; TensorFlow ships no types."""


def last_observed(spec: ModelSpec, rows: Tensor, mask: Tensor, before: Tensor) -> Tensor:
    """The state part `decoder.last` after the chunk.

    Args:
        spec: a model with a decoder, D targets.
        rows: float32 [B, T, F], encoded.
        mask: bool [B, T], True where a step is valid.
        before: float32 [B, D], the part before the chunk; a target that no valid step has
            keeps its value.

    Returns:
        float32 [B, D].
    """
    if spec.decoder is None or spec.events is None:
        raise SpecError(f"model {spec.name!r}: expected a decoder")
    index = spec.events.column_index
    targets = spec.decoder.targets
    values = tf.gather(rows, [index[name] for name in targets], axis=2)
    present = []
    for name in targets:
        missing = index.get(f"{name}.missing")
        present.append(mask if missing is None else mask & (rows[..., missing] < 0.5))
    steps = tf.range(1, tf.shape(rows)[1] + 1)[tf.newaxis, :, tf.newaxis]
    at = tf.reduce_max(tf.where(tf.stack(present, axis=-1), steps, 0), axis=1)
    series = tf.concat([before[:, tf.newaxis, :], values], axis=1)
    return tf.gather(tf.transpose(series, [0, 2, 1]), at, batch_dims=2)
