"""Importing Keras models whose layers start from the states that another layer returned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as kl
from numpy.typing import NDArray

from models.artifact.artifact import load_artifact
from models.importing import verification
from models.networks.build import StepNetwork
from tests.models.importing.saving import import_error, import_model

# Keras 3 writes its variables through a NumPy protocol that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

CELLS = {
    "lstm": lambda **options: kl.LSTM(3, return_sequences=True, **options),
    "gru": lambda **options: kl.GRU(3, return_sequences=True, **options),
    "old_gru": lambda **options: kl.GRU(3, return_sequences=True, reset_after=False, **options),
}
Floats = NDArray[np.float32]


def random_rows(steps: int) -> Floats:
    return np.random.default_rng(steps).normal(size=(2, steps, 2)).astype(np.float32)


@pytest.mark.parametrize("kind", CELLS)
def test_each_chunk_is_one_call_from_the_carried_state(tmp_path: Path, kind: str) -> None:
    below, above = CELLS[kind](return_state=True, name="below"), CELLS[kind](name="above")
    rows = kl.Input((None, 2))
    sequence, *states = below(rows)
    report = import_model(keras.Model(rows, above(sequence, initial_state=states)), tmp_path)
    assert report.artifact.spec.chunking == "per_chunk"
    assert report.artifact.graphs.data is not None
    assert any("('above' from 'below')" in note for note in report.notes)

    artifact = load_artifact(tmp_path / "out")
    network = StepNetwork(artifact.spec)
    network.set_weights(artifact.weights)
    layer_states: Any = [np.zeros((2, 3), np.float32)] * len(states)
    state: Any = np.zeros((2, network.state_size), np.float32)
    for steps in (2, 1, 4):
        chunk = random_rows(steps)
        sequence, *layer_states = below(chunk, initial_state=layer_states)
        expected = np.asarray(above(sequence, initial_state=layer_states))
        outputs, state = network.step(chunk, np.full(2, steps, np.int32), state)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            state, np.concatenate(layer_states, axis=-1), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "merge"), [("lstm", "concat"), ("gru", "ave"), ("old_gru", "concat")]
)
def test_all_states_of_a_bidirectional_layer_are_passed_on(
    tmp_path: Path, kind: str, merge: str
) -> None:
    rows = kl.Input((None, 2))
    below = kl.Bidirectional(CELLS[kind](return_state=True), merge_mode=merge, name="below")
    above = kl.Bidirectional(CELLS[kind](), merge_mode=merge, name="above")
    sequence, *states = below(rows)
    assert len(states) == (4 if kind == "lstm" else 2)
    model = keras.Model(rows, [sequence, above(sequence, initial_state=states)])
    report = import_model(model, tmp_path)
    assert report.artifact.spec.chunking == "whole"

    network = StepNetwork(report.artifact.spec)
    network.set_weights(report.artifact.weights)
    chunk = random_rows(4)
    zero = np.zeros((2, network.state_size), np.float32)
    outputs, _ = network.step(chunk, np.full(2, 4, np.int32), zero)
    expected = np.concatenate([np.asarray(value) for value in model(chunk)], axis=-1)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_states_are_passed_through_several_layers_and_nested_models(tmp_path: Path) -> None:
    rows = kl.Input((None, 2))
    _, *states = kl.LSTM(3, return_state=True, name="first")(rows)
    _, *states = kl.LSTM(3, return_state=True, name="second")(rows, states)
    inputs = [kl.Input((None, 2)), kl.Input((3,)), kl.Input((3,))]
    last = kl.LSTM(3, name="last")(inputs[0], initial_state=inputs[1:])
    outputs = keras.Model(inputs, last)([rows, *states])
    report = import_model(keras.Model(rows, kl.Dense(2)(outputs)), tmp_path)
    starts = [getattr(layer, "starts_from", None) for layer in report.artifact.spec.layers]
    assert starts == [None, "first", "second", None]


def test_verification_uses_the_fixed_steps_of_the_original(tmp_path: Path) -> None:
    rows = kl.Input(batch_shape=(2, 5, 2))
    sequence, state = CELLS["gru"](return_state=True, stateful=True, unroll=True)(rows)
    model = keras.Model(rows, CELLS["gru"](stateful=True)(sequence, initial_state=state))
    report = import_model(model, tmp_path)
    assert (report.verified["lengths_steps"], report.verified["sequences"]) == ((5, 5, 5), 2)


@pytest.mark.parametrize("lost", ["handed", "carried"])
def test_verification_detects_a_lost_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    class Forgetful(StepNetwork):
        def _recurrent(
            self, layer: Any, x: Any, initial: list[Any], mask: Any, training: bool
        ) -> Any:
            if (layer.starts_from is not None) == (lost == "handed"):
                initial = [value * 0 for value in initial]
            return super()._recurrent(layer, x, initial, mask, training)

    monkeypatch.setattr(verification, "StepNetwork", Forgetful)
    rows = kl.Input((None, 2))
    sequence, *states = CELLS["lstm"](return_state=True)(rows)
    model = keras.Model(rows, CELLS["lstm"]()(sequence, initial_state=states))
    assert "the packaged model gives" in import_error(model, tmp_path)


def _below(rows: Any) -> Any:
    return CELLS["lstm"](return_state=True, name="below")(rows)


def _swapped(rows: Any) -> Any:
    sequence, hidden, carry = _below(rows)
    return CELLS["lstm"](name="above")(sequence, initial_state=[carry, hidden])


def _directions_swapped(rows: Any) -> Any:
    both = kl.Bidirectional(CELLS["lstm"](return_state=True), name="both")
    sequence, *states = both(rows)
    above = kl.Bidirectional(CELLS["lstm"](), name="above")
    return above(sequence, initial_state=[*states[2:], *states[:2]])


def _one_direction(rows: Any) -> Any:
    both = kl.Bidirectional(CELLS["lstm"](return_state=True), name="both")
    sequence, *states = both(rows)
    return CELLS["lstm"](name="above")(sequence, initial_state=states[:2])


def _two_layers(rows: Any) -> Any:
    sequence, hidden, _ = _below(rows)
    sequence, _, carry = CELLS["lstm"](return_state=True, name="other")(sequence)
    return CELLS["lstm"](name="above")(sequence, initial_state=[hidden, carry])


def _another_cell(rows: Any) -> Any:
    sequence, _, carry = _below(rows)
    return CELLS["gru"](name="above")(sequence, initial_state=carry)


def _dense(rows: Any) -> Any:
    start = kl.Dense(3, name="start")(kl.LSTM(2)(rows))
    return CELLS["gru"](name="above")(rows, initial_state=start)


def _constant(rows: Any) -> Any:
    return CELLS["gru"](name="above")(rows, initial_state=keras.ops.ones((3, 3)))


def _mask(rows: Any) -> Any:
    return CELLS["gru"](name="above")(rows, mask=keras.ops.ones((3, 7), "bool"))


def _state_as_output(rows: Any) -> Any:
    sequence, *states = _below(rows)
    return CELLS["lstm"](return_state=True, name="above")(sequence, initial_state=states)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            _swapped,
            "LSTM 'above': its initial_state is ['carry', 'hidden'] of LSTM 'below'; expected "
            "its ['hidden', 'carry'], in this order",
        ),
        (
            _directions_swapped,
            "Bidirectional 'above': its initial_state is ['backward.hidden', 'backward.carry', "
            "'forward.hidden', 'forward.carry'] of Bidirectional 'both'; expected its "
            "['forward.hidden', 'forward.carry', 'backward.hidden', 'backward.carry'], in",
        ),
        (
            _one_direction,
            "LSTM 'above': its initial_state is ['forward.hidden', 'forward.carry'] of "
            "Bidirectional 'both'; expected its ['hidden', 'carry']",
        ),
        (
            _two_layers,
            "LSTM 'above': its initial_state comes from LSTM 'below' and LSTM 'other'; expected",
        ),
        (_another_cell, "GRU 'above': its initial_state is ['carry'] of LSTM 'below'; expected"),
        (_dense, "GRU 'above': its initial_state is the output of Dense 'start'; a layer starts"),
        (_constant, "GRU 'above': its initial_state is a constant; a layer starts from"),
        (_mask, "GRU 'above': it is called with a mask"),
        (_state_as_output, "LSTM 'above': output 1 of the model is its returned state"),
    ],
)
def test_other_initial_states_are_rejected(
    tmp_path: Path, network: Callable[[Any], Any], message: str
) -> None:
    rows = kl.Input((None, 2))
    assert message in import_error(keras.Model(rows, network(rows)), tmp_path)


def test_states_of_a_rejected_layer_are_not_reported_again(tmp_path: Path) -> None:
    rows = kl.Input((None, 2))
    sequence, *states = CELLS["lstm"](return_state=True, go_backwards=True, name="back")(rows)
    error = import_error(keras.Model(rows, CELLS["lstm"](name="above")(sequence, states)), tmp_path)
    assert "LSTM 'back': go_backwards=True" in error
    assert "'above'" not in error
