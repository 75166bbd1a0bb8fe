"""Rejected Keras models: the error names the layer and what to do, and that works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as kl

from models.importing.isolation import KerasOptions
from tests.models.importing.accepted_models import (
    FEATURES,
    STEPS,
    dense,
    gru,
    lstm,
    of_rows,
    sequential,
)
from tests.models.importing.exported_models import recurrent
from tests.models.importing.own_layers import Drifting, Leaky, TwoMeans, doubled
from tests.models.importing.saving import OWN_CODE, import_error, import_model


@dataclass(frozen=True, slots=True)
class Way:
    """A rejected model, and what its error says to do.

    Attributes:
        words: of the error.
        rejected: builds the rejected model.
        instead: builds the model that is imported instead; the same one by default.
        options: of the first import.
    """

    words: tuple[str, ...]
    rejected: Callable[[], keras.Model]
    instead: Callable[[], keras.Model] | None = None
    options: KerasOptions = OWN_CODE


def two_means() -> keras.Model:
    model, state = TwoMeans(), np.zeros((1, FEATURES), np.float32)
    model([np.zeros((1, 2, FEATURES), np.float32), state, state])
    return model


def half() -> keras.Model:
    layers = [kl.LSTM(4, dtype="mixed_float16", name="half"), kl.Dense(1, dtype="float32")]
    return keras.Sequential([kl.Input((None, FEATURES)), *layers])


def rebuilt() -> keras.Model:
    model = keras.Sequential([kl.Input((None, FEATURES)), kl.LSTM(4), kl.Dense(1)])
    model.set_weights(half().get_weights())
    return model


def coded(layer: Callable[[], Any]) -> keras.Model:
    codes = kl.Input((None,), dtype="int32", name="code")
    return keras.Model(codes, lstm()()(layer()(codes)))


def identity() -> Any:
    return kl.Embedding(4, 4, embeddings_initializer="identity")


def attended(rows: Any) -> Any:
    values = lstm()()(rows)
    return kl.Dense(1)(kl.Attention(name="looks")([values, values]))


WAYS = {
    "own-class": Way(
        ("Leaky 'own_cell': it comes from", "--code FILE.py"),
        sequential(lambda: recurrent(Leaky(4, name="own_cell"))),
        options=KerasOptions(),
    ),
    "lambda": Way(
        ("Lambda 'twice': it contains code", "a named function", "--code FILE.py"),
        sequential(
            lambda: kl.Lambda(lambda x: x * 2, output_shape=(None, FEATURES), name="twice"), lstm()
        ),
        sequential(lambda: kl.Lambda(doubled, output_shape=(None, FEATURES)), lstm()),
    ),
    "memory-inside": Way(
        ("Drifting 'drift': layers of this class", "only from the state of an RNN (of any cell)"),
        sequential(lstm(), lambda: Drifting(name="drift")),
        sequential(lstm(), lambda: recurrent(Leaky(4))),
    ),
    "wrong-states": Way(
        ("the packaged model gives", "the original gives"),
        two_means,
        options=OWN_CODE.model_copy(
            update={"states": {"input_1": "output_2", "input_2": "output_1"}}
        ),
    ),
    "precision": Way(
        ("LSTM 'half': it computes in float16", "set_dtype_policy('float32')", "set_weights"),
        half,
        rebuilt,
    ),
    "pooling": Way(
        ("GlobalAveragePooling1D 'mean': it looks at the whole", "return_sequences=False"),
        sequential(lstm(), lambda: kl.GlobalAveragePooling1D(name="mean"), dense(1)),
        sequential(lstm(return_sequences=False), dense(1)),
    ),
    "attention": Way(
        ("Attention 'looks': it looks at the whole", "return_sequences=False"),
        of_rows(attended),
        sequential(lstm(return_sequences=False), dense(1)),
    ),
    "flatten": Way(
        ("Flatten 'flat': it flattens all steps", "x[:, -1]"),
        sequential(lstm(), lambda: kl.Flatten(name="flat"), dense(1), steps=STEPS),
        of_rows(lambda rows: kl.Dense(1)(lstm()()(rows)[:, -1]), STEPS),
    ),
    "later-rows": Way(
        ("Conv1D 'window': padding='same'", "padding='causal'"),
        sequential(lambda: kl.Conv1D(4, 3, padding="same", name="window"), gru()),
        sequential(lambda: kl.Conv1D(4, 3, padding="causal", name="window"), gru()),
    ),
    "one-hot": Way(
        ("CategoryEncoding 'codes'", "use an Embedding, whose weights are the identity matrix"),
        lambda: coded(lambda: kl.CategoryEncoding(4, output_mode="one_hot", name="codes")),
        lambda: coded(identity),
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_what_the_error_says_to_do_works(name: str, tmp_path: Path) -> None:
    way = WAYS[name]
    error = import_error(way.rejected(), tmp_path, way.options)
    for words in way.words:
        assert words in error, error
    report = import_model((way.instead or way.rejected)(), tmp_path)
    assert report.verified["largest_difference"] < 1e-5
