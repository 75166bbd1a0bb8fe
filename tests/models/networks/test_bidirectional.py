"""Bidirectional layers: the post's five tensors, Keras' own wrapper, the state, dropout."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from models.errors import SpecError
from models.networks.build import StepNetwork
from models.spec.layout import layer_widths, state_spec
from models.spec.model import ModelSpec, parse_spec
from tests.models.networks.running import CLOSE, Floats, network_of, step
from tests.models.networks.specs import CELLS, MERGES, two_way


def spec_of(*layers: dict[str, Any], features: int = 3) -> ModelSpec:
    heads = [{"kind": "sequence", "name": "output"}]
    return parse_spec({"name": "m", "features": features, "layers": layers, "heads": heads})


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("cell", CELLS)
def test_returned_tensors_equal_those_of_keras(cell: str, merge: str) -> None:
    """Keras' wrapper returns the sequence, then h and c forward, then h and c backward; the
    second layer starts from all of them."""
    spec = spec_of(
        two_way(cell, merge=merge), two_way(cell, starts_from="bidirectional_1", merge=merge)
    )
    network = network_of(spec, 1)
    keras_cell = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU}[cell]
    first, second = (
        keras.layers.Bidirectional(
            keras_cell(4, return_sequences=True, return_state=True), merge_mode=merge
        )
        for _ in range(2)
    )
    rows = np.random.default_rng(2).normal(size=(2, 7, 3)).astype(np.float32)
    first.build(rows.shape)
    second.build((2, 7, layer_widths(spec)["bidirectional_1"]))
    weights = network.get_weights()
    for number, layer in enumerate((first, second), 1):
        prefix = f"bidirectional_{number}."
        layer.set_weights([value for name, value in weights.items() if name.startswith(prefix)])
    sequence, *states = first(rows)
    assert len(states) == {"lstm": 4, "gru": 2}[cell]
    expected, *_ = second(sequence, initial_state=states)
    outputs, after = step(network, rows, [7, 7], np.zeros((2, network.state_size), np.float32))
    np.testing.assert_allclose(outputs, expected, **CLOSE)
    np.testing.assert_allclose(after, np.concatenate(states, axis=-1), **CLOSE)


def test_state_has_a_part_for_each_cell_without_starts_from() -> None:
    spec = spec_of(two_way(), two_way(starts_from="bidirectional_1"), two_way("gru"))
    one, two = "bidirectional_1", "bidirectional_3"
    assert [part.name for part in state_spec(spec).parts] == [
        *(f"{one}.forward.hidden", f"{one}.forward.carry"),
        *(f"{one}.backward.hidden", f"{one}.backward.carry"),
        *(f"{two}.forward.hidden", f"{two}.backward.hidden"),
    ]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([two_way(starts_from="other")], "expected a recurrent layer before it"),
        ([two_way(), two_way(units=5, starts_from="bidirectional_1")], r"forward.hidden \[5\]"),
        ([two_way(), two_way("gru", starts_from="bidirectional_1")], r"backward.carry \[4\]"),
        ([{"kind": "lstm", "units": 4}, two_way(starts_from="lstm_1")], "starts from 'lstm_1'"),
        ([two_way(starts_from="bidirectional_1")], "layer before it"),
        ([two_way(reset_after=False)], "an option of the gru cell"),
        ([two_way(merge="avg")], "merge"),
    ],
)
def test_invalid_bidirectional_layers_are_rejected(
    layers: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(*layers)


def test_dropout_follows_its_seed_in_both_directions() -> None:
    network = StepNetwork(spec_of(two_way(units=8, dropout=0.5, recurrent_dropout=0.5)))
    rows, lengths = np.ones((2, 5, 3), np.float32), np.array([5, 5], np.int32)
    state = np.zeros((2, network.state_size), np.float32)

    def training_outputs(seed: int) -> Floats:
        network.reseed(seed)
        return np.asarray(network.step(rows, lengths, state, training=True)[0])

    first, repeated, other = training_outputs(1), training_outputs(1), training_outputs(2)
    np.testing.assert_array_equal(first, repeated)
    assert (np.abs(first - other).reshape(10, 2, 8).max(axis=(0, 2)) > 1e-3).all()
