"""Keras models as people have them that are rejected, with the alternative that the error names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers as kl

from tests.models.importing.accepted_models import (
    FEATURES,
    STEPS,
    dense,
    lstm,
    sequence,
    sequential,
)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A model that is rejected, and the words of the reason and of the alternative."""

    build: Callable[[], keras.Model]
    words: tuple[str, ...]


class OwnModel(keras.Model):
    """A subclassed model."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.cell, self.out = kl.LSTM(4, return_sequences=True), kl.Dense(1)

    def call(self, rows: Any) -> Any:
        return self.out(self.cell(rows))


class OwnLayer(kl.Layer):
    """A layer of one's own."""

    def call(self, rows: Any) -> Any:
        return rows


def subclassed() -> keras.Model:
    model = OwnModel()
    model(np.zeros((1, 2, FEATURES), np.float32))
    return model


def mixed_precision() -> keras.Model:
    policy = keras.DTypePolicy("mixed_float16")
    return keras.Sequential([sequence(), kl.LSTM(4, dtype=policy, name="half"), kl.Dense(1)])


def autoencoder() -> keras.Model:
    return keras.Sequential(
        [
            sequence(STEPS),
            kl.LSTM(4),
            kl.RepeatVector(STEPS, name="repeat"),
            kl.LSTM(4, return_sequences=True),
            kl.TimeDistributed(kl.Dense(FEATURES)),
        ]
    )


def shared_layer() -> keras.Model:
    rows, shared = sequence(), kl.LSTM(FEATURES, return_sequences=True, name="twice")
    return keras.Model(rows, shared(shared(rows)))


def forgotten_states() -> keras.Model:
    rows, hidden = sequence(), kl.Input((4,), name="h")
    values = kl.GRU(4, return_sequences=True, name="cell")(rows, initial_state=hidden)
    return keras.Model([rows, hidden], values)


def conditioned() -> keras.Model:
    rows, about = sequence(), kl.Input((5,), name="about")
    start = kl.Dense(4, name="start")(about)
    return keras.Model([rows, about], kl.GRU(4, name="cell")(rows, initial_state=start))


def attending() -> keras.Model:
    rows = sequence()
    values = kl.LSTM(4, return_sequences=True)(rows)
    return keras.Model(rows, kl.Attention(name="looks")([values, values]))


def masked_by_values() -> keras.Model:
    rows = sequence()
    late = keras.ops.greater(rows[..., 0], 0.5)
    return keras.Model(rows, kl.GRU(4, name="cell")(rows, mask=late))


def code_and_number() -> keras.Model:
    rows = sequence()
    both = kl.Concatenate()([rows, kl.Embedding(5, 2, name="code")(rows[..., 0])])
    return keras.Model(rows, kl.LSTM(4)(both))


def first_step() -> keras.Model:
    rows = sequence()
    return keras.Model(rows, kl.Dense(1)(kl.LSTM(4, return_sequences=True)(rows)[:, 0]))


def bare_series() -> keras.Model:
    return keras.Sequential([kl.Input((STEPS,), name="series"), kl.Dense(4, name="wide")])


REJECTED: dict[str, Rejected] = {
    "subclassed": Rejected(
        subclassed, ("got 'OwnModel'", "keras.Model(inputs, outputs)", "carry import MODEL.onnx")
    ),
    "own-layer": Rejected(
        sequential(lambda: OwnLayer(name="mine"), lstm()),
        ("OwnLayer 'mine': ", "keras.Model(inputs, outputs)", "ONNX"),
    ),
    "lambda": Rejected(
        sequential(
            lambda: kl.Lambda(lambda x: x * 2, name="double", output_shape=(None, FEATURES)), lstm()
        ),
        ("Lambda 'double': it contains code", "Rescaling", "ONNX"),
    ),
    "mixed-precision": Rejected(
        mixed_precision, ("LSTM 'half': it computes in float16", "set_dtype_policy('float32')")
    ),
    "autoencoder": Rejected(
        autoencoder, ("RepeatVector 'repeat': it repeats the last step", "`anomaly` head")
    ),
    "conv-same": Rejected(
        sequential(lambda: kl.Conv1D(4, 3, padding="same", name="wide"), lstm()),
        ("Conv1D 'wide': padding='same'", "padding='causal'"),
    ),
    "conv-strides": Rejected(
        sequential(lambda: kl.Conv1D(4, 3, padding="causal", strides=2, name="half"), lstm()),
        ("Conv1D 'half': strides=2", "dilation_rate"),
    ),
    "max-pooling": Rejected(
        sequential(lstm(), lambda: kl.MaxPooling1D(name="pool")),
        ("MaxPooling1D 'pool': it gives fewer outputs", "dilation_rate"),
    ),
    "average-pooling": Rejected(
        sequential(lstm(), lambda: kl.GlobalAveragePooling1D(name="mean")),
        ("GlobalAveragePooling1D 'mean': it looks at the whole", "attention over the stream"),
    ),
    "attention": Rejected(attending, ("Attention 'looks': ", "attention over the stream")),
    "flatten": Rejected(
        sequential(lstm(), lambda: kl.Flatten(name="flat"), dense(), steps=STEPS),
        ("Flatten 'flat': it flattens all steps into one row", "x[:, -1]"),
    ),
    "reshaped-inside": Rejected(
        sequential(
            lstm(return_sequences=False),
            dense(6),
            lambda: kl.Reshape((3, 2)),
            lambda: kl.Dense(1, name="after"),
        ),
        ("Dense 'after': it reads the last step's values", "expected Reshape to be the last layer"),
    ),
    "shared-layer": Rejected(
        shared_layer, ("LSTM 'twice': it is used 2 times", "a separate layer for each")
    ),
    "forgotten-states": Rejected(
        forgotten_states,
        ("GRU 'cell': its initial_state is given as inputs", "cell.hidden", "return_state=True"),
    ),
    "conditioned": Rejected(
        conditioned, ("Dense 'start': it reads input 'about'", "goes into every event")
    ),
    "backwards": Rejected(
        sequential(lstm(go_backwards=True, name="back")),
        ("LSTM 'back': go_backwards=True", "use go_backwards=False"),
    ),
    "bidirectional-last": Rejected(
        sequential(lambda: kl.Bidirectional(kl.GRU(3), name="both"), dense()),
        ("Bidirectional 'both': return_sequences=False", "expected return_sequences=True"),
    ),
    "conv-lstm-cell": Rejected(
        lambda: keras.Sequential(
            [kl.Input((None, 4, 2)), kl.ConvLSTM1D(2, 2, return_sequences=True, name="grid")]
        ),
        ("ConvLSTM1D 'grid': this cell is not supported", "ONNX"),
    ),
    "code-and-number": Rejected(
        code_and_number, ("Embedding 'code': ", "as a number too", "a separate input")
    ),
    "first-step": Rejected(
        first_step, ("GetItem ", "[:, 0, :] takes some of the steps", "x[:, -1]")
    ),
    "masked-inside": Rejected(
        sequential(lstm(), lambda: kl.Masking(name="skip"), lstm()),
        ("Masking 'skip': it would skip steps", "at the front"),
    ),
    "masked-by-values": Rejected(
        masked_by_values, ("GRU 'cell': it is called with a mask", "use Masking at the front")
    ),
    "series-without-axis": Rejected(
        bare_series, ("Dense 'wide': it reads input 'series'", "Reshape((-1, 1))")
    ),
    "no-state": Rejected(sequential(dense()), ("at least one recurrent layer", "simple_rnn")),
}
