"""Writes the SavedModel folder of a Keras 2 model, and its outputs, for the tests.

    pip install tf-keras && python tests/models/importing/saved_model/recipe.py

TensorFlow's graph, `saved_model.pb`, is not kept: importing does not read it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import tf_keras

HERE = Path(__file__).parent


def main() -> None:
    """Write `keras2/` and `keras2.npz` beside this file."""
    layers, random = tf_keras.layers, np.random.default_rng(5)
    rows = layers.Input((None, 3), name="rows")
    values = layers.Masking()(rows)
    values = layers.GRU(4, return_sequences=True, name="below")(values)
    values = layers.BatchNormalization()(values)
    cells = [layers.LSTMCell(3), layers.LSTMCell(2)]
    values = layers.RNN(cells, return_sequences=True, name="cells")(values)
    values = layers.Add()([layers.TimeDistributed(layers.Dense(2))(values), values])
    outputs = [layers.Dense(1, name="Level")(values), layers.LSTM(3, name="last")(values)]
    model = tf_keras.Model(rows, outputs)
    for weight in model.weights:
        drawn = random.uniform(-0.4, 0.4, weight.shape)
        weight.assign(drawn + ("gamma" in weight.name or "variance" in weight.name))
    model.compile("adam", "mse")
    folder = HERE / "keras2"
    shutil.rmtree(folder, ignore_errors=True)
    model.save(folder, save_format="tf")
    for name in ("saved_model.pb", "fingerprint.pb"):
        (folder / name).unlink()
    sequence = random.normal(size=(2, 9, 3)).astype(np.float32)
    level, last = model.predict(sequence, verbose=0)
    np.savez(HERE / "keras2.npz", rows=sequence, level=level, last=last)


if __name__ == "__main__":
    main()
