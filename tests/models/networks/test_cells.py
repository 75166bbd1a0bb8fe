"""The LSTM's options, alone and together: against the oracle, and beside Keras' own LSTM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from models.spec.model import ModelSpec, parse_spec
from tests.models.networks.running import assert_oracle, network_of, run_in_chunks
from tests.models.networks.specs import COMBINATIONS, OPTIONS, sequences


def one_layer(*, units: int = 5, **options: Any) -> ModelSpec:
    return parse_spec(
        {
            "name": "m",
            "features": 2,
            "layers": [{"kind": "lstm", "name": "cell", "units": units, **options}],
            "heads": [{"kind": "sequence", "name": "output"}],
        }
    )


@pytest.mark.parametrize("options", COMBINATIONS, ids="-".join)
def test_every_combination_equals_the_oracle_with_any_chunking(options: dict[str, Any]) -> None:
    spec = one_layer(**options)
    network = network_of(spec)
    random = np.random.default_rng(4)
    streams = sequences(random, [11, 1, 6], 2)
    states = random.uniform(-1, 1, (3, network.state_size)).astype(np.float32)
    outputs, after, _ = run_in_chunks(network, streams, states, random)
    assert_oracle(network, streams, states, outputs, after)


def test_gradients_reach_every_weight() -> None:
    network = network_of(one_layer(**OPTIONS, dropout=0.2, recurrent_dropout=0.2))
    rows = np.random.default_rng(7).normal(size=(2, 5, 2)).astype(np.float32)
    state = np.full((2, 8), 0.3, np.float32)
    with tf.GradientTape() as tape:
        outputs, _ = network.step(rows, np.array([5, 3], np.int32), state, training=True)
        loss = tf.reduce_sum(tf.square(outputs))
    gradients = tape.gradient(loss, [variable.value for variable in network.trainable_variables])
    assert len(gradients) == 9
    for gradient in gradients:
        assert np.abs(np.asarray(gradient)).max() > 0
