"""The imported model is compared with the original: no fault of the translation passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as kl
from numpy.typing import NDArray

from models.artifact.artifact import load_artifact
from models.errors import ImportedModelError
from models.importing import verification
from models.networks.build import StepNetwork
from tests.models.importing.accepted_models import gru, lstm
from tests.models.importing.saving import (
    import_error,
    import_here,
    import_model,
    save_model,
    write_model,
)

Weights = dict[str, NDArray[np.float32]]


def handed(kind: Any = lstm) -> keras.Model:
    """The states of a layer are passed to another one."""
    rows = kl.Input((None, 2))
    values, *states = kind(return_state=True, name="below")()(rows)
    return keras.Model(rows, kind(name="above")()(values, initial_state=states))


def plain() -> keras.Model:
    return keras.Sequential([kl.Input((None, 2)), lstm()()])


def both() -> keras.Model:
    layer = kl.Bidirectional(lstm()(), merge_mode="sum", name="both")
    return keras.Sequential([kl.Input((None, 2)), layer])


class Scaled(StepNetwork):
    """With other weights."""

    def set_weights(self, weights: Any) -> None:
        super().set_weights({name: value * 1.001 for name, value in weights.items()})


class Swapped(StepNetwork):
    """With the weights of the other direction."""

    def set_weights(self, weights: Any) -> None:
        other = {"forward": "backward", "backward": "forward"}
        names = {name: name.split(".") for name in weights}
        swapped = {n: weights[f"{a}.{other[b]}.{c}"] for n, (a, b, c) in names.items()}
        super().set_weights(swapped)


class FromZero(StepNetwork):
    """Every chunk starts from zero; whole sequences agree."""

    def step(self, rows: Any, lengths: Any, state: Any, training: bool = False) -> Any:
        return super().step(rows, lengths, state * 0, training)


class Forgetful(StepNetwork):
    """Layers that start from another one start from zero."""

    starts_from = True

    def _recurrent(self, layer: Any, x: Any, initial: list[Any], mask: Any, training: bool) -> Any:
        if (layer.starts_from is not None) == self.starts_from:
            initial = [value * 0 for value in initial]
        return super()._recurrent(layer, x, initial, mask, training)


class Forgetting(Forgetful):
    """Layers with a state of their own start from zero."""

    starts_from = False


@pytest.mark.parametrize(
    ("faulty", "build"),
    [
        (Scaled, plain),
        (Swapped, both),
        (FromZero, plain),
        (FromZero, handed),
        (Forgetful, handed),
        (Forgetting, handed),
    ],
)
def test_faults_of_the_translation_are_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: type, build: Any
) -> None:
    monkeypatch.setattr(verification, "StepNetwork", faulty)
    assert "the packaged model gives" in import_error(build(), tmp_path)


def test_an_original_that_overflows_is_rejected(tmp_path: Path) -> None:
    model = keras.Sequential([kl.Input((None, 3)), lstm()(), kl.Dense(1), kl.Dense(1)])
    path = save_model(model, tmp_path / "m.keras")
    for layer in model.layers[-2:]:
        layer.kernel.assign(np.full(layer.kernel.shape, 1e30))
    write_model(model, path)
    with pytest.raises(ImportedModelError, match="expected finite outputs"):
        import_here(path, tmp_path / "out")


def test_whole_sequences_are_verified_from_the_zero_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "StepNetwork", FromZero)
    layers = [lstm(3, stateful=True)(), kl.Bidirectional(lstm(stateful=True)())]
    report = import_model(keras.Sequential([kl.Input(batch_shape=(2, 4, 2)), *layers]), tmp_path)
    assert report.verified["lengths_steps"] == (4, 4, 4)
    assert "stateful=True is left out: each sequence begins in the zero state" in report.notes


@pytest.mark.parametrize("hand_off", [False, True])
def test_a_stateful_model_is_verified_with_its_steps_and_batch(
    tmp_path: Path, hand_off: bool
) -> None:
    rows = kl.Input(batch_shape=(4, 5, 2))
    values, state = gru(return_state=True, stateful=True, unroll=True)()(rows)
    above = gru(stateful=True)()
    values = above(values, initial_state=state) if hand_off else above(values)
    verified = import_model(keras.Model(rows, values), tmp_path).verified
    assert (verified["lengths_steps"], verified["sequences"]) == ((5, 5, 5), 4)
    assert verified["largest_difference"] < 1e-5


@pytest.mark.parametrize("kind", [lstm, gru])
def test_each_chunk_is_one_call_from_the_carried_state(tmp_path: Path, kind: Any) -> None:
    model = handed(kind)
    artifact = import_model(model, tmp_path).artifact
    assert artifact.spec.chunking == "per_chunk"
    assert artifact.graphs.data is not None
    artifact = load_artifact(tmp_path / "out")
    network = StepNetwork(artifact.spec)
    network.set_weights(artifact.weights)
    below, above = (model.get_layer(name) for name in ("below", "above"))
    layer_states: Any = [np.zeros((2, 4), np.float32)] * (2 if kind is lstm else 1)
    state: Any = np.zeros((2, network.state_size), np.float32)
    for steps in (2, 1, 4):
        chunk = np.random.default_rng(steps).normal(size=(2, steps, 2)).astype(np.float32)
        values, *layer_states = below(chunk, initial_state=layer_states)
        expected = np.asarray(above(values, initial_state=layer_states))
        outputs, state = network.step(chunk, np.full(2, steps, np.int32), state)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
        carried = np.concatenate(layer_states, axis=-1)
        np.testing.assert_allclose(state, carried, rtol=1e-5, atol=1e-5)
