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
        of_events: how many of them change from event to event; the others belong to the stream.
        inputs: the arguments of the Keras model for rows [1, T, F].
    """

    build: Callable[[], keras.Model]
    heads: tuple[str, ...] = ("output",)
    notes: tuple[str, ...] = ()
    states: Mapping[int, str] = field(default_factory=dict)
    codes: Mapping[int, int] = field(default_factory=dict)
    features: int = FEATURES
    of_events: int | None = None
    inputs: Callable[[Floats], Any] = lambda rows: rows


def sequence(steps: int | None = None) -> Any:
    return kl.Input((steps, FEATURES), name="rows")


def sequential(*layers: Any, steps: int | None = None) -> Callable[[], keras.Model]:
    """A model of new layers at each call: `layers` are functions without arguments."""
    return lambda: keras.Sequential([sequence(steps), *(layer() for layer in layers)])


def of_rows(network: Callable[[Any], Any], steps: int | None = None) -> Callable[[], keras.Model]:
    """A functional model of one input."""

    def build() -> keras.Model:
        rows = sequence(steps)
        return keras.Model(rows, network(rows))

    return build


def lstm(units: int = 4, **options: Any) -> Callable[[], Any]:
    return lambda: kl.LSTM(units, **{"return_sequences": True, **options})


def gru(units: int = 4, **options: Any) -> Callable[[], Any]:
    return lambda: kl.GRU(units, **{"return_sequences": True, **options})


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


def named_heads(rows: Any) -> dict[str, Any]:
    values = lstm()()(rows)
    return {"Reg-1": kl.Dense(1)(values), "class": kl.Dense(3)(values)}


def listed_heads(rows: Any) -> list[Any]:
    values = lstm()()(rows)
    return [kl.Dense(1, name="Now")(values), kl.Dense(2, name="out of 5")(kl.GRU(3)(values))]


def gated(rows: Any) -> Any:
    values = lstm()()(rows)
    return kl.Multiply()([values[..., :2], values[:, :, 2:]])


def coded_column(rows: Any) -> Any:
    both = kl.Concatenate()([rows[..., 1:], kl.Embedding(5, 2)(rows[..., 0])])
    return kl.Dense(1)(lstm()()(both))


def compared(rows: Any) -> Any:
    """Every way to merge two layers of a width, as layers and as operations."""
    one, two = lstm()()(rows), kl.UnitNormalization()(gru()()(rows))
    three = kl.Maximum()([one, two]) - kl.Minimum()([kl.RMSNormalization()(one), two])
    return kl.Dense(2)(
        kl.Subtract()([keras.ops.maximum(three, one), keras.ops.minimum(three, two)])
    )


def normalised() -> keras.Model:
    layer = kl.Normalization()
    layer.adapt(np.random.default_rng(1).normal(3.0, 2.0, (4, 5, FEATURES)))
    return keras.Sequential([sequence(), layer, kl.LSTM(4), kl.Dense(1)])


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


def two_sequences() -> keras.Model:
    one, two = kl.Input((None, 1), name="price"), kl.Input((None, 2), name="weather")
    branches = [kl.LSTM(3, return_sequences=True)(one), kl.GRU(3, return_sequences=True)(two)]
    return keras.Model([one, two], kl.Dense(1)(kl.Average()(branches)))


def residual(rows: Any) -> Any:
    below = lstm(FEATURES)()(rows)
    added = kl.Add()([rows, below])
    above = gru(FEATURES)()(added)
    plus = above + below
    averaged = kl.Average()([plus, above])
    mixed = kl.Concatenate()([averaged, kl.Multiply()([above * plus, added]), rows])
    return kl.Dense(2, activation="tanh")(mixed)


def seq2seq() -> keras.Model:
    """States are passed through several layers, one in another model."""
    rows = sequence()
    _, *states = kl.LSTM(4, return_state=True, name="first")(rows)
    values, *states = lstm(return_state=True, name="second")()(rows, initial_state=states)
    inputs = [kl.Input((None, 4)), kl.Input((4,)), kl.Input((4,))]
    above = keras.Model(inputs, lstm(name="last")()(inputs[0], initial_state=inputs[1:]))
    return keras.Model(rows, kl.Dense(2)(above([values, *states])))


def both_handed(layer: Callable[..., Callable[[], Any]], merge: str, **options: Any) -> keras.Model:
    """All states of a bidirectional layer are passed on."""
    rows = sequence()
    below = kl.Bidirectional(layer(return_state=True, **options)(), merge_mode=merge, name="below")
    values, *states = below(rows)
    above = kl.Bidirectional(layer(**options)(), merge_mode=merge, name="above")
    return keras.Model(rows, [values, above(values, initial_state=states)])


def bidirectional(layer: Callable[[], Any], merge: str) -> Callable[[], Any]:
    return lambda: kl.Bidirectional(layer(), merge_mode=merge)


def shared_dense(rows: Any) -> Any:
    layer = kl.Dense(FEATURES, activation="mish", name="twice")
    return kl.Dense(1)(gru()()(layer(layer(rows))))


def dilated(rows: Any) -> Any:
    for rate in (1, 2, 4):
        y = kl.Conv1D(3, 2, padding="causal", dilation_rate=rate, activation="relu")(rows)
        rows = kl.Add()([rows, kl.LayerNormalization()(y)])
    return kl.Dense(1)(rows)


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
            dense(6, activation="gelu", name="Inlet Proj"),
            lstm(dropout=0.2, recurrent_dropout=0.1),
            lambda: kl.BatchNormalization(),
            lambda: kl.GaussianNoise(0.1),
            gru(3, reset_after=False, use_bias=False),
            lambda: kl.LayerNormalization(scale=False),
            lambda: kl.Dropout(0.3),
            lambda: kl.SpatialDropout1D(0.2),
            lambda: kl.ELU(),
            lambda: kl.LeakyReLU(negative_slope=0.2),
            lambda: kl.ReLU(),
            lambda: kl.TimeDistributed(kl.Dense(3, activation="tanh")),
            lambda: kl.Softmax(),
        ),
        notes=("GaussianNoise",),
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
    "gru-cell": Accepted(sequential(cells(kl.GRUCell), dense())),
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
    "named-outputs": Accepted(of_rows(named_heads), heads=("Reg-1", "class")),
    "listed-outputs": Accepted(
        of_rows(listed_heads),
        heads=("Now", "out_of_5"),
        notes=("output 'out of 5' is called 'out_of_5'",),
    ),
    "layer-called-out": Accepted(sequential(lstm(), dense(name="out")), heads=("out",)),
    "last-slice": Accepted(
        of_rows(lambda rows: kl.Dense(2)(lstm()()(rows)[:, -1, :])), notes=("x[:, -1]: " + LAST,)
    ),
    "sliced-inputs": Accepted(
        of_rows(lambda rows: kl.Add()([kl.Dense(2)(gru()()(rows[..., 1:])), rows[..., :2]]))
    ),
    "sliced-values": Accepted(of_rows(gated)),
    "normalization": Accepted(normalised),
    "inverse-normalization": Accepted(
        sequential(
            gru(), dense(), lambda: kl.Normalization(None, mean=3.0, variance=4.0, invert=True)
        )
    ),
    "rescaling": Accepted(
        sequential(lambda: kl.Rescaling([0.5, 2.0, -1.0], offset=0.1), lstm(), dense())
    ),
    "masking": Accepted(
        sequential(lambda: kl.Masking(mask_value=-1.0), lstm(), dense()),
        notes=("marks padding of training sequences, input 'rows' with every value -1;",),
    ),
    "merges-and-norms": Accepted(of_rows(compared)),
    "activations": Accepted(
        sequential(
            lstm(),
            dense(4, activation="mish"),
            dense(4, activation="relu6"),
            dense(4, activation="hard_silu"),
            lambda: kl.ReLU(max_value=6.0),
            dense(3, activation="log_softmax"),
        )
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
    "coded-column": Accepted(of_rows(coded_column), codes={0: 5}),
    "two-sequences": Accepted(two_sequences, inputs=lambda rows: [rows[..., :1], rows[..., 1:]]),
    "one-series": Accepted(
        lambda: keras.Sequential(
            [kl.Input((STEPS,)), kl.Reshape((STEPS, 1)), kl.LSTM(4), kl.Flatten(), kl.Dense(1)]
        ),
        features=1,
        inputs=lambda rows: rows[..., 0],
    ),
    "conv-lstm": Accepted(
        sequential(lambda: kl.Conv1D(4, 3, padding="causal", activation="relu"), lstm(), dense())
    ),
    "dilated": Accepted(of_rows(dilated)),
    "shared-dense": Accepted(of_rows(shared_dense)),
    "residual": Accepted(of_rows(residual)),
    "nested": Accepted(
        sequential(sequential(gru(name="cell"), dense(3)), lstm(2, name="cell")), heads=("cell",)
    ),
    "seq2seq": Accepted(seq2seq, notes=("chunking per_chunk", "'second' from 'first'")),
    "bidirectional": Accepted(
        sequential(
            dense(3),
            bidirectional(lstm(3, dropout=0.1), "concat"),
            lambda: kl.LayerNormalization(scale=False),
            bidirectional(lstm(use_bias=False), "sum"),
            lstm(return_sequences=False),
            dense(2, activation="softmax"),
        ),
        notes=("chunking whole: it takes whole sequences of at most 1024 steps (predict)", LAST),
    ),
    "bidirectional-gru": Accepted(
        sequential(
            bidirectional(gru(), "mul"),
            bidirectional(gru(), "concat"),
            bidirectional(gru(reset_after=False), "ave"),
            dense(),
        ),
        notes=("chunking whole",),
    ),
    "bidirectional-states": Accepted(
        lambda: both_handed(lstm, "concat"), ("below", "above"), notes=("chunking whole",)
    ),
    "bidirectional-gru-states": Accepted(
        lambda: both_handed(gru, "ave", reset_after=False), ("below", "above")
    ),
}
