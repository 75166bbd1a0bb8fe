"""Importing Keras models with `Bidirectional`: whole sequences, equal to the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as kl
from numpy.typing import NDArray

from models.artifact.artifact import load_artifact
from models.importing import verification
from models.importing.keras_graph import translate
from models.networks.build import StepNetwork
from models.spec.layout import output_spec
from tests.models.importing.saving import import_error, import_here, import_model, save_model

# Keras 3 writes its variables through a NumPy protocol that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

LSTM: dict[str, Any] = {"kind": kl.LSTM}
GRU: dict[str, Any] = {"kind": kl.GRU, "reset_after": True}
OLD_GRU: dict[str, Any] = {"kind": kl.GRU, "reset_after": False}


def cell(options: dict[str, Any], units: int = 3, **more: Any) -> Any:
    """A Keras layer that returns its sequence."""
    options_of_layer = {"return_sequences": True, **options, **more}
    return options_of_layer.pop("kind")(units, **options_of_layer)


def predict_whole(folder: Path, rows: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Return the packaged model's outputs for whole sequences, from the zero state."""
    artifact = load_artifact(folder / "out")
    network = StepNetwork(artifact.spec)
    network.set_weights(artifact.weights)
    lengths = np.full(len(rows), rows.shape[1], np.int32)
    state = np.zeros((len(rows), network.state_size), np.float32)
    outputs, _ = network.step(rows, lengths, state)
    return dict(output_spec(artifact.spec).by_name(np.asarray(outputs)))


def random_rows(steps: int, features: int) -> NDArray[np.float32]:
    return np.random.default_rng(steps).normal(size=(2, steps, features)).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "merge"),
    [(LSTM, "concat"), (LSTM, "sum"), (GRU, "mul"), (GRU, "concat"), (OLD_GRU, "ave")],
    ids=["lstm-concat", "lstm-sum", "gru-mul", "gru-concat", "old_gru-ave"],
)
def test_every_merge_mode_and_cell_equals_the_original(
    tmp_path: Path, options: dict[str, Any], merge: str
) -> None:
    both = kl.Bidirectional(cell(options, use_bias=merge != "sum"), merge_mode=merge, name="both")
    model = keras.Sequential([kl.Input((None, 2)), both])
    report = import_model(model, tmp_path, seed=len(merge))
    layer = report.artifact.spec.layers[0]
    assert (layer.kind, layer.name) == ("bidirectional", "both")
    assert report.artifact.spec.chunking == "whole"
    assert report.artifact.graphs.data is not None
    assert report.verified["lengths_steps"] == (1, 6)
    rows = random_rows(4, 2)
    np.testing.assert_allclose(
        predict_whole(tmp_path, rows)["both"], np.asarray(model(rows)), rtol=1e-5, atol=1e-5
    )


def test_bidirectional_layers_between_others_equal_the_original(tmp_path: Path) -> None:
    model = keras.Sequential(
        [
            kl.Input((None, 2)),
            kl.Dense(3),
            kl.Bidirectional(kl.LSTM(3, return_sequences=True, dropout=0.1), merge_mode="sum"),
            kl.LayerNormalization(),
            kl.Bidirectional(kl.GRU(2, return_sequences=True)),
            kl.LSTM(3),
            kl.Dense(2, activation="softmax"),
        ]
    )
    report = import_model(model, tmp_path)
    rows = random_rows(4, 2)
    np.testing.assert_allclose(
        predict_whole(tmp_path, rows)["output"][:, -1],
        np.asarray(model(rows)),
        rtol=1e-5,
        atol=1e-5,
    )
    prefix = "chunking whole: it takes whole sequences of at most 1024 steps (predict)"
    assert any(note.startswith(prefix) for note in report.notes)


def test_the_five_returned_tensors_are_outputs_and_state_parts(tmp_path: Path) -> None:
    rows = kl.Input((None, 2))
    both = kl.Bidirectional(cell(LSTM, return_state=True), name="both")
    report = import_model(keras.Model(rows, both(rows)), tmp_path)
    parts = ("forward.hidden", "forward.carry", "backward.hidden", "backward.carry")
    for index, part in enumerate(parts, start=1):
        assert f"output {index} is the state part 'both.{part}', not an output" in report.notes


def test_a_stateful_model_is_verified_from_the_zero_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FromZero(StepNetwork):
        def step(self, rows: Any, lengths: Any, state: Any, training: bool = False) -> Any:
            return super().step(rows, lengths, state * 0, training)

    monkeypatch.setattr(verification, "StepNetwork", FromZero)
    model = keras.Sequential(
        [
            kl.Input(batch_shape=(2, 4, 2)),
            kl.LSTM(3, return_sequences=True, stateful=True),
            kl.Bidirectional(cell(LSTM, stateful=True)),
        ]
    )
    report = import_model(model, tmp_path)
    assert report.verified["lengths_steps"] == (4, 4, 4)
    assert "stateful=True is left out: each sequence begins in the zero state" in report.notes


def test_max_chunk_steps_covers_the_fixed_steps_of_the_original() -> None:
    model = keras.Sequential([kl.Input((1100, 1)), kl.Bidirectional(cell(GRU, units=1))])
    assert translate(model, "long").spec.chunk_limit == 1100


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_h5_file_is_read(tmp_path: Path) -> None:
    model = keras.Sequential([kl.Input((None, 2)), kl.Bidirectional(cell(GRU))])
    report = import_here(save_model(model, tmp_path / "m.h5"), tmp_path / "out")
    assert report.artifact.spec.layers[0].kind == "bidirectional"


def test_swapped_directions_fail_the_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap_directions(network: StepNetwork, weights: dict[str, NDArray[np.float32]]) -> None:
        other = {"forward": "backward", "backward": "forward"}
        names = {name: name.split(".") for name in weights}
        set_weights(network, {n: weights[f"{a}.{other[b]}.{c}"] for n, (a, b, c) in names.items()})

    set_weights = StepNetwork.set_weights
    monkeypatch.setattr(StepNetwork, "set_weights", swap_directions)
    model = keras.Sequential([kl.Input((None, 2)), kl.Bidirectional(cell(LSTM), merge_mode="sum")])
    assert "the packaged model gives" in import_error(model, tmp_path)


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (lambda: kl.Bidirectional(kl.LSTM(3), name="both"), "return_sequences=False joins"),
        (
            lambda: kl.Bidirectional(
                cell(LSTM, go_backwards=True), backward_layer=cell(LSTM), name="both"
            ),
            "go_backwards=True",
        ),
        (lambda: kl.Bidirectional(cell(LSTM, dtype="float64"), name="both"), "it computes in"),
        (
            lambda: kl.Bidirectional(
                cell(LSTM), backward_layer=cell(GRU, go_backwards=True), name="both"
            ),
            "it wraps GRU",
        ),
        (
            lambda: kl.Bidirectional(
                cell(LSTM),
                backward_layer=cell(LSTM, units=4, activation="relu", go_backwards=True),
                name="both",
            ),
            "its backward_layer differs in ['units', 'activation']",
        ),
    ],
    ids=["last", "go_backwards", "float64", "two_cells", "two_options"],
)
def test_unsupported_options_are_named(tmp_path: Path, wrapper: Any, message: str) -> None:
    model = keras.Sequential([kl.Input((None, 2)), wrapper()])
    assert f"Bidirectional 'both': {message}" in import_error(model, tmp_path)


def test_unmerged_directions_are_rejected(tmp_path: Path) -> None:
    rows = kl.Input((None, 2))
    both = kl.Bidirectional(cell(LSTM), merge_mode=None, name="both")
    error = import_error(keras.Model(rows, both(rows)), tmp_path)
    assert "Bidirectional 'both': merge_mode=None: expected one of" in error
