"""Keras models as people have them that no specification describes: graphs of one event."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers as kl
from keras import ops

from tests.models.importing.accepted_models import (
    FEATURES,
    LAST,
    STATES,
    STEPS,
    WINDOW,
    Accepted,
    Floats,
    dense,
    gru,
    lstm,
    of_rows,
    sequence,
    sequential,
    zeros,
)
from tests.models.importing.own_layers import (
    Forecaster,
    Leaky,
    Periodic,
    Smoother,
    Stepper,
    doubled,
    squared,
)

STREAM = "['about'] belong to the stream: every row repeats their values"


def recurrent(*cells: Any, **options: Any) -> Any:
    cell = cells[0] if len(cells) == 1 else list(cells)
    return kl.RNN(cell, **{"return_sequences": True, **options})


def subclassed() -> keras.Model:
    model = Forecaster()
    model(np.zeros((1, 2, FEATURES), np.float32))
    return model


def stepper() -> keras.Model:
    model = Stepper()
    model([np.zeros((1, 2, FEATURES), np.float32), np.zeros((1, 4), np.float32)])
    return model


def explicit_cell() -> keras.Model:
    rows, state = sequence(), kl.Input((4,), name="h")
    values, after = recurrent(Leaky(4), return_state=True)(rows, initial_state=state)
    return keras.Model([rows, state], {"y": values, "h": after})


def explicit_layer() -> keras.Model:
    """The layer unrolls its steps, so their number is fixed."""
    rows, mean = sequence(STEPS), kl.Input((FEATURES,), name="mean")
    values, after = Smoother()(rows, mean)
    return keras.Model([rows, mean], [kl.Dense(2, name="out")(values), after])


def conditioned(returned: bool = True) -> keras.Model:
    """The state starts from what is known of the stream."""
    rows, about = sequence(), kl.Input((2,), name="about")
    start = kl.Dense(4, activation="tanh")(about) if returned else about
    units = 4 if returned else 2
    return keras.Model([rows, about], kl.GRU(units)(rows, initial_state=start))


def wide_and_deep() -> keras.Model:
    rows, about = sequence(), kl.Input((2,), name="about")
    both = kl.Concatenate()([kl.LSTM(4)(rows), kl.Dense(3, activation="relu")(about)])
    return keras.Model([rows, about], kl.Dense(1)(both))


def store() -> keras.Model:
    """A code of the stream is embedded, and repeated at every event of a window."""
    rows, about = sequence(STEPS), kl.Input((1,), dtype="int32", name="about")
    known = kl.RepeatVector(STEPS)(kl.Flatten()(kl.Embedding(5, 2)(about)))
    return keras.Model([rows, about], kl.Dense(1)(kl.LSTM(4)(kl.Concatenate()([rows, known]))))


def frames() -> keras.Model:
    image = kl.Input((4, 4, 1))
    values = kl.MaxPooling2D()(kl.Conv2D(3, 3, padding="same", activation="relu")(image))
    inner = keras.Model(image, kl.Flatten()(values))
    video = kl.Input((None, 4, 4, 1))
    return keras.Model(video, kl.Dense(1)(kl.GRU(4)(kl.TimeDistributed(inner)(video))))


def video(layer: Any, *shape: int) -> keras.Model:
    frames = kl.Input((None, *shape))
    return keras.Model(frames, kl.Dense(2)(kl.Flatten()(layer(frames))))


def arithmetic(rows: Any) -> Any:
    values = lstm()()(rows * 0.5 + 1.0)
    return kl.Dense(1)(ops.tanh(values) - ops.mean(values, axis=-1, keepdims=True))


def twins() -> keras.Model:
    """Two sequences through one layer, each with a state of its own."""
    one, two = kl.Input((None, 2), name="one"), kl.Input((None, 2), name="two")
    shared = kl.LSTM(4, name="shared")
    return keras.Model([one, two], kl.Dense(1)(kl.Subtract()([shared(one), shared(two)])))


def gated_convolutions(rows: Any) -> Any:
    for rate in (1, 2, 4):
        filtered = kl.Conv1D(3, 2, padding="causal", dilation_rate=rate, activation="tanh")(rows)
        gate = kl.Conv1D(3, 2, padding="causal", dilation_rate=rate, activation="celu")(rows)
        rows = rows + filtered * ops.sigmoid(gate)
    return kl.Dense(1)(rows)


def framed(*shape: int) -> Any:
    return lambda rows: rows.reshape(*rows.shape[:2], *shape)


def with_about(rows: Floats) -> Any:
    return [rows[..., :FEATURES], rows[:, 0, FEATURES:]]


EXPORTED: dict[str, Accepted] = {
    "custom-cell": Accepted(sequential(lambda: recurrent(Leaky(4)), dense())),
    "learned-start": Accepted(sequential(lambda: recurrent(Leaky(4, learned=True)), lstm())),
    "custom-and-lstm-cells": Accepted(
        sequential(lambda: recurrent(Leaky(4), kl.LSTMCell(3), return_sequences=False)),
        notes=(LAST,),
    ),
    "custom-layer": Accepted(sequential(lambda: Periodic(4), lstm(), dense())),
    "custom-activation": Accepted(sequential(lstm(activation=squared), dense(1))),
    "named-lambda": Accepted(
        sequential(lambda: kl.Lambda(doubled, output_shape=(None, FEATURES)), lstm())
    ),
    "subclassed": Accepted(subclassed, heads=("forecast",)),
    "explicit-subclassed": Accepted(
        stepper,
        heads=("output_0",),
        notes=(f"{STATES}, zero for a new stream: 'input_1'",),
        states={1: "input_1"},
        inputs=lambda rows: [rows, *zeros(4)],
    ),
    "explicit-cell": Accepted(
        explicit_cell,
        heads=("y",),
        notes=(STATES,),
        states={0: "h"},
        inputs=lambda rows: [rows, *zeros(4)],
    ),
    "explicit-layer": Accepted(
        explicit_layer,
        heads=("out",),
        states={1: "mean"},
        inputs=lambda rows: [rows, *zeros(FEATURES)],
    ),
    "conditioned": Accepted(
        conditioned,
        notes=(f"{STREAM}; states start from those of the first event", LAST),
        features=5,
        of_events=3,
        inputs=with_about,
    ),
    "given-start": Accepted(
        lambda: conditioned(returned=False),
        notes=(STREAM,),
        features=5,
        of_events=3,
        inputs=with_about,
    ),
    "wide-and-deep": Accepted(
        wide_and_deep, notes=(STREAM,), features=5, of_events=3, inputs=with_about
    ),
    "store": Accepted(
        store,
        notes=(STREAM, WINDOW),
        features=4,
        of_events=3,
        codes={3: 5},
        inputs=lambda rows: [rows[..., :3], rows[:, 0, 3:].astype(np.int32)],
    ),
    "frames": Accepted(frames, features=16, inputs=framed(4, 4, 1)),
    "conv-lstm-1d": Accepted(
        lambda: video(kl.ConvLSTM1D(2, 2), 5, 2), features=10, inputs=framed(5, 2)
    ),
    "conv-lstm-2d": Accepted(
        lambda: video(kl.ConvLSTM2D(2, 3, padding="same"), 3, 3, 1),
        features=9,
        inputs=framed(3, 3, 1),
    ),
    "decoder": Accepted(
        sequential(
            lstm(return_sequences=False),
            lambda: kl.RepeatVector(6),
            gru(3),
            lambda: kl.TimeDistributed(kl.Dense(1)),
        ),
        notes=(LAST,),
    ),
    "autoencoder": Accepted(
        sequential(
            lstm(return_sequences=False),
            lambda: kl.RepeatVector(STEPS),
            lstm(),
            dense(),
            steps=STEPS,
        ),
        notes=(LAST, WINDOW),
    ),
    "arithmetic": Accepted(of_rows(arithmetic)),
    "einsum": Accepted(
        sequential(lstm(), lambda: kl.EinsumDense("btf,fg->btg", (None, 3), bias_axes="g"))
    ),
    "odd-activations": Accepted(
        sequential(
            lstm(activation="celu"),
            gru(recurrent_activation="hard_sigmoid", activation="squareplus"),
            lambda: kl.ReLU(max_value=5.0, threshold=0.1),
            lambda: kl.ELU(alpha=0.5),
        )
    ),
    "twins": Accepted(
        twins, notes=(LAST,), features=4, inputs=lambda rows: [rows[..., :2], rows[..., 2:]]
    ),
    "arranged": Accepted(
        sequential(lstm(return_sequences=False), dense(6), lambda: kl.Reshape((3, 2)), dense(1)),
        notes=(LAST,),
    ),
    "broadcast": Accepted(of_rows(lambda rows: kl.Add()([lstm()()(rows), kl.Dense(1)(rows)]))),
    "group-and-spectral-norm": Accepted(
        sequential(
            lstm(),
            lambda: kl.TimeDistributed(kl.GroupNormalization(2)),
            lambda: kl.SpectralNormalization(kl.Dense(2)),
        )
    ),
    "gated-convolutions": Accepted(of_rows(gated_convolutions)),
}
"""They are imported with the code of `own_layers`."""
