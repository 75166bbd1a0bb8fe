"""Keras models as people have them that are rejected, with the alternative that the error names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers as kl

from tests.models.importing.accepted_models import (
    FEATURES,
    STEPS,
    dense,
    gru,
    lstm,
    of_rows,
    sequential,
)


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


def of_shape(*shape: int | None) -> Callable[[], keras.Model]:
    return lambda: keras.Sequential([kl.Input(shape), kl.Activation("relu")])


def behind_lstm(layer: Callable[[], Any], steps: int | None = None) -> Callable[[], keras.Model]:
    return sequential(lstm(FEATURES), layer, steps=steps)


def unsupported_layers() -> keras.Model:
    return keras.Sequential(
        [
            kl.Input((8, 3)),
            kl.Conv1D(4, 3, padding="same", name="window"),
            kl.Masking(name="skip"),
            kl.Bidirectional(kl.SimpleRNN(3, return_sequences=True), name="both"),
            kl.GRU(3, return_sequences=True, go_backwards=True, name="back"),
            kl.LSTM(3, return_sequences=True, activation="celu", name="odd"),
            kl.LayerNormalization(axis=1, name="over_steps"),
            kl.Dense(2, dtype="float64", name="double"),
        ]
    )


def attending(rows: Any) -> Any:
    values = kl.LSTM(4, return_sequences=True)(rows)
    return kl.Attention(name="looks")([values, values])


def below(rows: Any, **options: Any) -> Any:
    return lstm(return_state=True, name="below", **options)()(rows)


def both(rows: Any) -> Any:
    layer = lstm(return_state=True)()
    return kl.Bidirectional(layer, name="both")(rows)


def above(rows: Any, states: Any) -> Any:
    return lstm(name="above")()(rows, initial_state=states)


def swapped(rows: Any) -> Any:
    values, hidden, carry = below(rows)
    return above(values, [carry, hidden])


def directions_swapped(rows: Any) -> Any:
    values, *states = both(rows)
    layer = kl.Bidirectional(lstm()(), name="above")
    return layer(values, initial_state=[*states[2:], *states[:2]])


def one_direction(rows: Any) -> Any:
    values, *states = both(rows)
    return above(values, states[:2])


def two_layers(rows: Any) -> Any:
    values, hidden, _ = below(rows)
    values, _, carry = lstm(return_state=True, name="other")()(values)
    return above(values, [hidden, carry])


def another_cell(rows: Any) -> Any:
    values, _, carry = below(rows)
    return gru(name="above")()(values, initial_state=carry)


def from_dense(rows: Any) -> Any:
    start = kl.Dense(4, name="start")(kl.LSTM(2)(rows))
    return gru(name="above")()(rows, initial_state=start)


def state_as_output(rows: Any) -> Any:
    values, *states = below(rows)
    return lstm(return_state=True, name="above")()(values, initial_state=states)


def bidirectional(forward: Any, backward: Any = None, **options: Any) -> Callable[[], keras.Model]:
    def layer() -> Any:
        other = None if backward is None else backward()
        return kl.Bidirectional(forward(), backward_layer=other, name="both", **options)

    return sequential(layer)


REJECTED: dict[str, Callable[[], keras.Model]] = {
    "got 'OwnModel' | --code FILE.py | carry import MODEL.onnx": subclassed,
    "OwnLayer 'mine':  | --code FILE.py | ONNX": sequential(lambda: OwnLayer(name="mine"), lstm()),
    "MaxPooling1D 'pool': it gives fewer outputs | dilation_rate": behind_lstm(
        lambda: kl.MaxPooling1D(name="pool")
    ),
    "Lambda 'double': it contains code | Rescaling | --code FILE.py": sequential(
        lambda: kl.Lambda(lambda x: x * 2, name="double", output_shape=(None, FEATURES)), lstm()
    ),
    "LSTM 'half': it computes in float16 | set_dtype_policy('float32')": sequential(
        lstm(dtype=keras.DTypePolicy("mixed_float16"), name="half")
    ),
    (
        "Masking 'skip': it would skip steps | at the front | Conv1D 'window': padding='same': it "
        "looks at several steps | padding='causal' | Bidirectional 'both': it wraps SimpleRNN | "
        "GRU 'back': go_backwards=True | use go_backwards=False | LSTM 'odd': activation 'celu' | "
        "LayerNormalization 'over_steps': axis= | Dense 'double': it computes in float64"
    ): unsupported_layers,
    "Conv1D 'half': strides=2 | dilation_rate": sequential(
        lambda: kl.Conv1D(4, 3, padding="causal", strides=2, name="half"), lstm()
    ),
    "GlobalAveragePooling1D 'mean': it looks at the whole | attention over the stream": behind_lstm(
        lambda: kl.GlobalAveragePooling1D(name="mean")
    ),
    "Attention 'looks':  | attention over the stream": of_rows(attending),
    "Flatten 'flat': it flattens all steps into one row | x[:, -1]": behind_lstm(
        lambda: kl.Flatten(name="flat"), STEPS
    ),
    "PReLU 'odd': it has numbers of shape [8, 3]; expected one | shared_axes=[1]": behind_lstm(
        lambda: kl.PReLU(name="odd"), STEPS
    ),
    "Softmax 'odd': axis=1": behind_lstm(lambda: kl.Softmax(axis=1, name="odd"), STEPS),
    "BatchNormalization 'odd': axis=1": behind_lstm(
        lambda: kl.BatchNormalization(axis=1, name="odd"), STEPS
    ),
    "Bidirectional 'both': return_sequences=False | expected return_sequences=True": bidirectional(
        gru(return_sequences=False)
    ),
    "Bidirectional 'both': go_backwards=True": bidirectional(lstm(go_backwards=True), lstm()),
    "Bidirectional 'both': it computes in": bidirectional(lstm(dtype="float64")),
    "Bidirectional 'both': it wraps GRU": bidirectional(lstm(), gru(go_backwards=True)),
    "Bidirectional 'both': its backward_layer differs in ['units', 'activation']": bidirectional(
        lstm(), lstm(3, activation="relu", go_backwards=True)
    ),
    "Bidirectional 'both': merge_mode=None: expected one of": of_rows(
        lambda rows: kl.Bidirectional(lstm()(), merge_mode=None, name="both")(rows)
    ),
    (
        "LSTM 'above': its initial_state is ['carry', 'hidden'] of LSTM 'below'; expected its "
        "['hidden', 'carry'], in this order"
    ): of_rows(swapped),
    (
        "Bidirectional 'above': its initial_state is ['backward.hidden', 'backward.carry', "
        "'forward.hidden', 'forward.carry'] of Bidirectional 'both'; expected its "
    ): of_rows(directions_swapped),
    "LSTM 'above': its initial_state is ['forward.hidden', 'forward.carry'] of ": of_rows(
        one_direction
    ),
    "LSTM 'above': its initial_state comes from LSTM 'below' and LSTM 'other'; expected": of_rows(
        two_layers
    ),
    "GRU 'above': its initial_state is ['carry'] of LSTM 'below'; expected": of_rows(another_cell),
    "GRU 'above': its initial_state is the output of Dense 'start'; a layer starts": of_rows(
        from_dense
    ),
    "GRU 'above': its initial_state is a constant; a layer starts from": of_rows(
        lambda rows: gru(name="above")()(rows, initial_state=keras.ops.ones((3, 4)))
    ),
    "GRU 'above': it is called with a mask": of_rows(
        lambda rows: gru(name="above")()(rows, mask=keras.ops.ones((3, 7), "bool"))
    ),
    "GRU 'cell': it is called with a mask | use Masking at the front": of_rows(
        lambda rows: gru(name="cell")()(rows, mask=keras.ops.greater(rows[..., 0], 0.5))
    ),
    "LSTM 'above': output 1 of the model is its returned state": of_rows(state_as_output),
    "GetItem  | [:, 0, :] takes some of the steps | x[:, -1]": of_rows(
        lambda rows: kl.Dense(1)(lstm()()(rows)[:, 0])
    ),
    "Dense 'wide': it reads input 'series' | Reshape((-1, 1))": lambda: keras.Sequential(
        [kl.Input((STEPS,), name="series"), kl.Dense(4, name="wide")]
    ),
    "at least one recurrent layer | simple_rnn": sequential(dense()),
    "of shape [None, 3]; expected inputs of shape [batch, steps, features]": of_shape(3),
    "expected inputs of shape [batch, steps, features] | [(None, None, None)]": of_shape(
        None, None
    ),
    "expected inputs of shape [batch, steps, features] | [(None, 2, 4, 3)]": of_shape(2, 4, 3),
}
"""The reason and the alternatives that the error contains, between `|`, and the model."""
