"""Keras models as people have them that are imported; `rejected_models` has those that are not.

A model joins with its name, and every accepted one is served by the same service
(`test_table`). They are small: the layers count, not their sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers as kl
from numpy.typing import NDArray

Floats = NDArray[np.float32]

FEATURES = 3
STEPS = 8
"""Events of a sequence, and the window of models that fix it."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A model that is imported, and what it must become.

    Attributes:
        build: builds it.
        heads: names of its outputs, in Keras' order.
        notes: words of the notes that tell the user what to know.
        states: index of an output of Keras -> the state part that it is.
        codes: column -> number of codes.
        features: columns of a row.
        inputs: the arguments of the Keras model for rows [1, T, F].
    """

    build: Callable[[], keras.Model]
    heads: tuple[str, ...] = ("output",)
    notes: tuple[str, ...] = ()
    states: Mapping[int, str] = field(default_factory=dict)
    codes: Mapping[int, int] = field(default_factory=dict)
    features: int = FEATURES
    inputs: Callable[[Floats], Any] = lambda rows: rows


def sequence(steps: int | None = None) -> Any:
    return kl.Input((steps, FEATURES), name="rows")


def sequential(*layers: Any, steps: int | None = None) -> Callable[[], keras.Model]:
    """A model of new layers at each call: `layers` are functions without arguments."""
    return lambda: keras.Sequential([sequence(steps), *(layer() for layer in layers)])


def lstm(units: int = 4, **options: Any) -> Callable[[], Any]:
    return lambda: kl.LSTM(units, **{"return_sequences": True, **options})


def dense(units: int = 2, **options: Any) -> Callable[[], Any]:
    return lambda: kl.Dense(units, **options)


def cells(*kinds: type, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        made = [kind(3 + index) for index, kind in enumerate(kinds)]
        cell = made[0] if len(made) == 1 else made
        return kl.RNN(cell, **{"return_sequences": True, **options})

    return build


def explicit_lstm() -> keras.Model:
    """The pattern of the post: (x, h, c) -> (y, h, c)."""
    rows, hidden, carry = sequence(), kl.Input((4,), name="h"), kl.Input((4,), name="c")
    values, h, c = kl.LSTM(4, return_sequences=True, return_state=True, name="cell")(
        rows, initial_state=[hidden, carry]
    )
    return keras.Model([rows, hidden, carry], [kl.Dense(2)(values), h, c])


def explicit_layers() -> keras.Model:
    rows, one, two = sequence(), kl.Input((4,), name="h1"), kl.Input((3,), name="h2")
    first, h1 = kl.GRU(4, return_sequences=True, return_state=True, name="below")(
        rows, initial_state=one
    )
    second, h2 = kl.SimpleRNN(3, return_state=True, name="above")(first, initial_state=two)
    return keras.Model(
        {"rows": rows, "h1": one, "h2": two}, {"y": kl.Dense(2)(second), "h1": h1, "h2": h2}
    )


def explicit_cells() -> keras.Model:
    rows = sequence()
    states = [kl.Input((size,), name=f"s{index}") for index, size in enumerate((3, 3, 4))]
    values, pair, last = kl.RNN(
        [kl.LSTMCell(3), kl.GRUCell(4)], return_sequences=True, return_state=True, name="cells"
    )(rows, initial_state=(states[:2], states[2]))
    return keras.Model([rows, *states], [values, *pair, last])


def named_outputs() -> keras.Model:
    rows = sequence()
    values = kl.LSTM(4, return_sequences=True)(rows)
    return keras.Model(rows, {"Reg-1": kl.Dense(1)(values), "class": kl.Dense(3)(values)})


def listed_outputs() -> keras.Model:
    rows = sequence()
    values = kl.LSTM(4, return_sequences=True)(rows)
    last = kl.GRU(3)(values)
    return keras.Model(rows, [kl.Dense(1, name="Now")(values), kl.Dense(2, name="out of 5")(last)])


def last_slice() -> keras.Model:
    rows = sequence()
    return keras.Model(rows, kl.Dense(2)(kl.LSTM(4, return_sequences=True)(rows)[:, -1, :]))


def last_value_added() -> keras.Model:
    """Predicts the difference to some of the inputs, which are sliced."""
    rows = sequence()
    change = kl.Dense(2)(kl.GRU(4, return_sequences=True)(rows[..., 1:]))
    return keras.Model(rows, kl.Add()([change, rows[..., :2]]))


def sliced_gates() -> keras.Model:
    rows = sequence()
    values = kl.LSTM(4, return_sequences=True)(rows)
    return keras.Model(rows, kl.Multiply()([values[..., :2], values[:, :, 2:]]))


def normalised() -> keras.Model:
    layer = kl.Normalization()
    layer.adapt(np.random.default_rng(1).normal(3.0, 2.0, (4, 5, FEATURES)))
    return keras.Sequential([sequence(), layer, kl.LSTM(4), kl.Dense(1)])


def standardised_target() -> keras.Model:
    inverse = kl.Normalization(axis=None, mean=3.0, variance=4.0, invert=True)
    return keras.Sequential([sequence(), kl.GRU(4, return_sequences=True), kl.Dense(2), inverse])


def coded(mask_zero: bool = False) -> keras.Model:
    codes = kl.Input((None,), dtype="int32", name="word")
    words = kl.Embedding(6, 4, mask_zero=mask_zero)(codes)
    return keras.Model(codes, kl.Dense(6, activation="softmax")(kl.LSTM(4)(words)))


def numbers_and_codes() -> keras.Model:
    rows, store = sequence(), kl.Input((None,), dtype="int32", name="store")
    day = kl.Input((None,), dtype="int32", name="day")
    both = kl.Concatenate()(
        [kl.Embedding(5, 2)(store), kl.Dense(3)(rows), kl.Dropout(0.1)(kl.Embedding(7, 3)(day))]
    )
    return keras.Model([rows, store, day], kl.Dense(1)(kl.GRU(4, return_sequences=True)(both)))


def coded_column() -> keras.Model:
    rows = sequence()
    both = kl.Concatenate()([rows[..., 1:], kl.Embedding(5, 2)(rows[..., 0])])
    return keras.Model(rows, kl.Dense(1)(kl.LSTM(4, return_sequences=True)(both)))


def two_sequences() -> keras.Model:
    one, two = kl.Input((None, 1), name="price"), kl.Input((None, 2), name="weather")
    branches = [kl.LSTM(3, return_sequences=True)(one), kl.GRU(3, return_sequences=True)(two)]
    return keras.Model([one, two], kl.Dense(1)(kl.Average()(branches)))


def one_series() -> keras.Model:
    return keras.Sequential(
        [kl.Input((STEPS,)), kl.Reshape((STEPS, 1)), kl.LSTM(4), kl.Flatten(), kl.Dense(1)]
    )


def residual() -> keras.Model:
    rows = sequence()
    below = kl.LSTM(FEATURES, return_sequences=True)(rows)
    above = kl.GRU(FEATURES, return_sequences=True)(kl.Add()([rows, below]))
    return keras.Model(rows, kl.Dense(2, activation="tanh")(above + below))


def nested() -> keras.Model:
    inner = keras.Sequential([sequence(), kl.GRU(4, return_sequences=True), kl.Dense(3)])
    rows = sequence()
    return keras.Model(rows, kl.LSTM(2, return_sequences=True)(inner(rows)))


def seq2seq() -> keras.Model:
    rows = sequence()
    values, *states = kl.LSTM(4, return_sequences=True, return_state=True)(rows)
    above = kl.LSTM(4, return_sequences=True)(values, initial_state=states)
    return keras.Model(rows, kl.Dense(2)(above))


def dilated() -> keras.Model:
    def block(x: Any, dilation: int) -> Any:
        y = kl.Conv1D(3, 2, padding="causal", dilation_rate=dilation, activation="relu")(x)
        return kl.Add()([x, kl.LayerNormalization()(y)])

    rows = sequence()
    return keras.Model(rows, kl.Dense(1)(block(block(block(rows, 1), 2), 4)))


def zeros(*sizes: int) -> list[Floats]:
    return [np.zeros((1, size), np.float32) for size in sizes]


LAST = "served with an output for every step, the last one equal"
STATES = "the inputs that hold states are the stream's state"
WINDOW = f"the original reads windows of {STEPS} events"

ACCEPTED: dict[str, Accepted] = {
    "lstm": Accepted(sequential(lstm(), dense())),
    "lstm-last": Accepted(sequential(lstm(return_sequences=False), dense(1)), notes=(LAST,)),
    "deep": Accepted(
        sequential(
            lstm(dropout=0.2),
            lambda: kl.BatchNormalization(),
            lambda: kl.GRU(3, return_sequences=True, reset_after=False),
            lambda: kl.Dropout(0.3),
            lambda: kl.TimeDistributed(kl.Dense(3, activation="gelu")),
            lambda: kl.Softmax(),
        )
    ),
    "stateful": Accepted(
        lambda: keras.Sequential(
            [
                kl.Input(batch_shape=(1, STEPS, FEATURES)),
                kl.LSTM(4, return_sequences=True, stateful=True),
                kl.Dense(1),
            ]
        )
    ),
    "window": Accepted(
        sequential(lstm(return_sequences=False), dense(1), steps=STEPS), notes=(LAST, WINDOW)
    ),
    "several-steps": Accepted(
        sequential(lstm(return_sequences=False), dense(6), lambda: kl.Reshape((3, 2))),
        notes=(LAST,),
    ),
    "simple-rnn": Accepted(
        sequential(lambda: kl.SimpleRNN(4, return_sequences=True, activation="relu"), dense())
    ),
    "lstm-cell": Accepted(sequential(cells(kl.LSTMCell), dense())),
    "gru-cell": Accepted(sequential(cells(kl.GRUCell), dense())),
    "simple-rnn-cell": Accepted(sequential(cells(kl.SimpleRNNCell), dense())),
    "stacked-cells": Accepted(sequential(cells(kl.LSTMCell, kl.LSTMCell), dense())),
    "mixed-cells": Accepted(
        sequential(cells(kl.GRUCell, kl.LSTMCell, kl.SimpleRNNCell, return_sequences=False)),
        notes=(LAST,),
    ),
    "explicit-lstm": Accepted(
        explicit_lstm,
        notes=(f"{STATES}, zero for a new stream: 'h' is 'cell.hidden', 'c' is 'cell.carry'",),
        states={1: "cell.hidden", 2: "cell.carry"},
        inputs=lambda rows: [rows, *zeros(4, 4)],
    ),
    "explicit-layers": Accepted(
        explicit_layers,
        heads=("y",),
        notes=(STATES,),
        states={0: "below.hidden", 1: "above.hidden"},
        inputs=lambda rows: {"rows": rows, "h1": zeros(4)[0], "h2": zeros(3)[0]},
    ),
    "explicit-cells": Accepted(
        explicit_cells,
        heads=("cells",),
        states={1: "cells_1.hidden", 2: "cells_1.carry", 3: "cells_2.hidden"},
        inputs=lambda rows: [rows, *zeros(3, 3, 4)],
    ),
    "named-outputs": Accepted(named_outputs, heads=("Reg-1", "class")),
    "listed-outputs": Accepted(
        listed_outputs,
        heads=("Now", "out_of_5"),
        notes=("output 'out of 5' is called 'out_of_5'",),
    ),
    "layer-called-out": Accepted(sequential(lstm(), dense(name="out")), heads=("out",)),
    "last-slice": Accepted(last_slice, notes=("x[:, -1]: " + LAST,)),
    "sliced-inputs": Accepted(last_value_added),
    "sliced-values": Accepted(sliced_gates),
    "normalization": Accepted(normalised),
    "inverse-normalization": Accepted(standardised_target),
    "rescaling": Accepted(
        sequential(lambda: kl.Rescaling([0.5, 2.0, -1.0], offset=0.1), lstm(), dense())
    ),
    "masking": Accepted(
        sequential(lambda: kl.Masking(mask_value=-1.0), lstm(), dense()),
        notes=("marks padding of training sequences, input 'rows' with every value -1;",),
    ),
    "leaky-relu": Accepted(sequential(lstm(), dense(3), lambda: kl.LeakyReLU(negative_slope=0.3))),
    "prelu": Accepted(sequential(lstm(), dense(3), lambda: kl.PReLU(shared_axes=[1]))),
    "codes": Accepted(
        coded, codes={0: 6}, features=1, inputs=lambda rows: rows[..., 0].astype(np.int32)
    ),
    "padded-codes": Accepted(
        lambda: coded(mask_zero=True),
        notes=("input 'word' with 0;", "feature_0 holds codes 0 to 5"),
        codes={0: 6},
        features=1,
        inputs=lambda rows: rows[..., 0].astype(np.int32),
    ),
    "numbers-and-codes": Accepted(
        numbers_and_codes,
        notes=("the inputs are columns of one row of 5: 'rows' [0 to 2], 'store' [3], 'day' [4]",),
        codes={3: 5, 4: 7},
        features=5,
        inputs=lambda rows: [
            rows[..., :3],
            rows[..., 3].astype(np.int32),
            rows[..., 4].astype(np.int32),
        ],
    ),
    "coded-column": Accepted(coded_column, codes={0: 5}),
    "two-sequences": Accepted(two_sequences, inputs=lambda rows: [rows[..., :1], rows[..., 1:]]),
    "one-series": Accepted(one_series, features=1, inputs=lambda rows: rows[..., 0]),
    "conv-lstm": Accepted(
        sequential(lambda: kl.Conv1D(4, 3, padding="causal", activation="relu"), lstm(), dense())
    ),
    "dilated": Accepted(dilated),
    "residual": Accepted(residual),
    "nested": Accepted(nested),
    "seq2seq": Accepted(seq2seq, notes=("chunking per_chunk",)),
    "bidirectional": Accepted(
        sequential(lambda: kl.Bidirectional(kl.LSTM(3, return_sequences=True)), dense()),
        notes=("chunking whole",),
    ),
}
