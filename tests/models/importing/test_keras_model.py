"""Importing small Keras models: outputs equal the original's, unsupported layers are named."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers as kl

from models.artifact.artifact import load_artifact
from models.artifact.weights import weights_bytes
from models.errors import ImportedModelError
from models.importing.packaging import package
from models.importing.results import Conversion
from models.networks.build import StepNetwork
from models.spec.model import parse_spec
from tests.models.importing.saving import import_error, import_here, import_model, save_model
from tests.support.oracle import contracting_weights

# Keras 3 writes its variables through a NumPy protocol that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def test_sequential_model_equals_the_original(tmp_path: Path) -> None:
    model = keras.Sequential(
        [
            kl.Input((None, 3)),
            kl.Dense(6, activation="gelu", name="Inlet Proj"),
            kl.LSTM(5, return_sequences=True, dropout=0.2, recurrent_dropout=0.1),
            kl.BatchNormalization(),
            kl.GaussianNoise(0.1),
            kl.GRU(4, return_sequences=True, reset_after=False, use_bias=False),
            kl.LayerNormalization(scale=False),
            kl.SpatialDropout1D(0.2),
            kl.LeakyReLU(negative_slope=0.2),
            kl.TimeDistributed(kl.Dense(3, activation="tanh")),
            kl.Softmax(),
        ]
    )
    report = import_model(model, tmp_path, reset_every=7)
    assert report.artifact.spec.name == "my-model"
    assert report.artifact.spec.reset_every == 7
    assert report.verified["largest_difference"] < 1e-5
    assert report.verified["lengths_steps"] == (1, 6)
    kinds = [layer.kind for layer in report.artifact.spec.layers]
    assert kinds == [
        "dense",
        "lstm",
        "batch_normalization",
        "gru",
        "layer_normalization",
        "activation",
        "dense",
        "activation",
    ]
    assert report.layers[0] == ("Inlet Proj", "Dense", "inlet_proj")
    assert any("GaussianNoise" in note for note in report.notes)

    artifact = load_artifact(tmp_path / "out")
    network = StepNetwork(artifact.spec)
    network.set_weights(artifact.weights)
    rows = np.random.default_rng(1).normal(size=(2, 9, 3)).astype(np.float32)
    state = np.zeros((2, network.state_size), np.float32)
    outputs, _ = network.step(rows, np.array([9, 9], np.int32), state)
    np.testing.assert_allclose(outputs, np.asarray(model(rows)), rtol=1e-5, atol=1e-5)


def test_stateful_model_carries_its_state_like_the_original(tmp_path: Path) -> None:
    model = keras.Sequential(
        [
            kl.Input(batch_shape=(4, 6, 2)),
            kl.LSTM(5, return_sequences=True, stateful=True),
            kl.GRU(3, return_sequences=True, stateful=True),
            kl.Dense(2),
        ]
    )
    report = import_model(model, tmp_path)
    assert report.verified["lengths_steps"] == (6, 6, 6)
    assert report.verified["sequences"] == 4
    assert report.verified["largest_difference"] < 1e-5


def test_functional_model_with_residuals_and_two_outputs_is_imported(tmp_path: Path) -> None:
    rows = kl.Input((None, 4))
    first = kl.LSTM(4, return_sequences=True, name="first")(rows)
    added = kl.Add(name="residual")([rows, first])
    second = kl.GRU(4, return_sequences=True, name="second")(added)
    plus = second + added
    times = second * plus
    mixed = kl.Concatenate()([kl.Average()([plus, second]), kl.Multiply()([times, added]), rows])
    one = kl.Dense(2, name="One")(mixed)
    two = kl.Dense(1, activation="sigmoid", name="two")(first)
    report = import_model(keras.Model(rows, [one, two]), tmp_path)
    assert [head.name for head in report.artifact.spec.heads] == ["One", "two"]
    assert report.verified["largest_difference"] < 1e-5


def test_returned_states_and_last_steps_are_noted(tmp_path: Path) -> None:
    rows = kl.Input((None, 2))
    sequence, hidden, carry = kl.LSTM(
        3, return_sequences=True, return_state=True, name="inner", stateful=False
    )(rows)
    last = kl.Dense(2)(kl.GRU(3)(sequence))
    report = import_model(keras.Model(rows, [last, hidden, carry]), tmp_path)
    assert [head.name for head in report.artifact.spec.heads] == ["output"]
    assert "output 1 is the state part 'inner.hidden', not an output" in report.notes
    assert "output 2 is the state part 'inner.carry', not an output" in report.notes
    assert any("return_sequences=False" in note for note in report.notes)


def test_nested_models_are_flattened(tmp_path: Path) -> None:
    inner = keras.Sequential([kl.Input((None, 3)), kl.LSTM(3, return_sequences=True, name="cell")])
    model = keras.Sequential(
        [kl.Input((None, 3)), kl.GRU(3, return_sequences=True, name="cell"), inner, kl.Dense(1)]
    )
    report = import_model(model, tmp_path)
    assert [layer.name for layer in report.artifact.spec.layers][:2] == ["cell", "cell_2"]
    assert report.verified["largest_difference"] < 1e-5


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_h5_file_is_read(tmp_path: Path) -> None:
    model = keras.Sequential([kl.Input((None, 2)), kl.LSTM(3, return_sequences=True)])
    report = import_here(save_model(model, tmp_path / "m.h5"), tmp_path / "out", name="from-h5")
    assert report.artifact.spec.name == "from-h5"
    assert report.verified["largest_difference"] < 1e-5


def test_all_unsupported_layers_are_named(tmp_path: Path) -> None:
    error = import_error(_model_of_unsupported_layers(), tmp_path)
    for reason in (
        "Masking 'skip': it would skip steps",
        "Conv1D 'window': padding='same': it looks at several steps",
        "Bidirectional 'both': it wraps SimpleRNN",
        "GRU 'back': go_backwards=True",
        "LSTM 'odd': activation 'mish'",
        "LayerNormalization 'over_steps': axis=",
        "Dense 'double': it computes in float64",
    ):
        assert reason in error
    assert "'fine'" not in error


def _model_of_unsupported_layers() -> keras.Model:
    return keras.Sequential(
        [
            kl.Input((8, 3)),
            kl.Conv1D(4, 3, padding="same", name="window"),
            kl.Masking(name="skip"),
            kl.Bidirectional(kl.SimpleRNN(3, return_sequences=True), name="both"),
            kl.GRU(3, return_sequences=True, go_backwards=True, name="back"),
            kl.LSTM(3, return_sequences=True, activation="mish", name="odd"),
            kl.LayerNormalization(axis=1, name="over_steps"),
            kl.Dense(2, dtype="float64", name="double"),
            kl.LSTM(3, return_sequences=True, name="fine"),
        ]
    )


PLAIN_ONLY: list[tuple[kl.Layer, str]] = [
    (kl.ReLU(max_value=6.0, name="odd"), "ReLU 'odd': max_value=6.0, threshold=0.0"),
    (kl.ReLU(threshold=0.1, name="odd"), "ReLU 'odd': max_value=None, threshold=0.1"),
    (kl.PReLU(name="odd"), "PReLU 'odd': it has numbers of shape [4, 3]; expected one"),
    (kl.ELU(alpha=0.5, name="odd"), "ELU 'odd': alpha=0.5"),
    (kl.Softmax(axis=1, name="odd"), "Softmax 'odd': axis=1"),
    (kl.BatchNormalization(axis=1, name="odd"), "BatchNormalization 'odd': axis=1"),
    (kl.TimeDistributed(kl.Masking(name="m"), name="odd"), "'odd': it wraps Masking 'm'"),
]


@pytest.mark.parametrize(("layer", "words"), PLAIN_ONLY, ids=[words for _, words in PLAIN_ONLY])
def test_options_that_change_outputs_are_rejected(
    tmp_path: Path, layer: kl.Layer, words: str
) -> None:
    """Including options whose effect the random sequences of the verification would miss."""
    model = keras.Sequential([kl.Input((4, 3)), kl.LSTM(3, return_sequences=True), layer])
    assert words in import_error(model, tmp_path)


def test_activations_with_default_options_are_imported(tmp_path: Path) -> None:
    layers = [kl.ReLU(), kl.LSTM(3, return_sequences=True), kl.ELU(), kl.ReLU(negative_slope=0.2)]
    report = import_model(keras.Sequential([kl.Input((None, 3)), *layers]), tmp_path)
    kinds = [getattr(layer, "activation", "") for layer in report.artifact.spec.layers]
    assert kinds == ["relu", "tanh", "elu", "leaky_relu"]


def test_shared_layers_and_constants_are_rejected(tmp_path: Path) -> None:
    rows = kl.Input((None, 3))
    shared = kl.GRU(3, return_sequences=True, name="shared")
    sequence = kl.GRU(3, return_sequences=True, name="fine")(shared(shared(rows)))
    error = import_error(keras.Model(rows, sequence * 0.5), tmp_path)
    assert "GRU 'shared': it is used 2 times" in error
    assert "Multiply" in error
    assert "'fine'" not in error


def test_broadcasting_merges_are_rejected(tmp_path: Path) -> None:
    rows = kl.Input((None, 3))
    wide = kl.LSTM(4, return_sequences=True)(rows)
    model = keras.Model(rows, kl.Add(name="spread")([wide, kl.Dense(1)(rows)]))
    assert "Add 'spread': it broadcasts widths [4, 1]" in import_error(model, tmp_path)


def test_model_without_a_recurrent_layer_is_rejected(tmp_path: Path) -> None:
    model = keras.Sequential([kl.Input((None, 3)), kl.Dense(2)])
    assert "at least one recurrent layer" in import_error(model, tmp_path)


@pytest.mark.parametrize("shape", [(3,), (None, None), (2, 4, 3)])
def test_other_inputs_are_rejected(tmp_path: Path, shape: tuple[int | None, ...]) -> None:
    model = keras.Sequential([kl.Input(shape), kl.Activation("relu")])
    assert "expected inputs of shape [batch, steps, features]" in import_error(model, tmp_path)


def test_code_is_rejected_before_it_is_loaded(tmp_path: Path) -> None:
    model = keras.Sequential(
        [
            kl.Input((None, 3)),
            kl.Lambda(lambda x: x * 2, name="code", output_shape=(None, 3)),
            kl.MaxPooling1D(name="pool"),
            kl.LSTM(3, return_sequences=True),
        ]
    )
    error = import_error(model, tmp_path)
    assert "Lambda 'code': it contains code" in error
    assert "MaxPooling1D 'pool'" in error


def test_classes_outside_keras_are_rejected_before_they_are_imported(tmp_path: Path) -> None:
    model = keras.Sequential([kl.Input((None, 3)), kl.LSTM(3, return_sequences=True, name="cell")])
    path = save_model(model, tmp_path / "m.keras")
    hostile = tmp_path / "changed.keras"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(hostile, "w") as new:
        for item in old.namelist():
            data = old.read(item)
            if item == "config.json":
                config = json.loads(data)
                entry = config["config"]["layers"][1]
                entry["module"], entry["class_name"] = "no_such_module.inside", "Popper"
                data = json.dumps(config).encode()
            new.writestr(item, data)
    with pytest.raises(ImportedModelError, match="Popper 'cell': "):
        import_here(hostile, tmp_path / "out")


class OwnLayer(kl.Layer):
    """A custom layer."""

    def call(self, rows: object) -> object:
        return rows


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_custom_layers_are_named_with_other_unsupported_ones(tmp_path: Path, suffix: str) -> None:
    model = keras.Sequential(
        [
            kl.Input((None, 3)),
            OwnLayer(name="own"),
            kl.LSTM(3, return_sequences=True),
            kl.MaxPooling1D(name="pool"),
        ]
    )
    path = save_model(model, tmp_path / f"m.{suffix}")
    with pytest.raises(ImportedModelError) as caught:
        import_here(path, tmp_path / "out")
    assert "OwnLayer 'own': " in str(caught.value)
    assert "MaxPooling1D 'pool': " in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"\x89HDF\r\n\x1a\n broken"])
def test_damaged_files_are_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.keras"
    path.write_bytes(content)
    with pytest.raises(ImportedModelError, match="expected a whole Keras model"):
        import_here(path, tmp_path / "out")


def test_weights_missing_from_the_file_are_rejected(tmp_path: Path) -> None:
    model = keras.Sequential([kl.Input((None, 3)), kl.LSTM(3, return_sequences=True)])
    path = save_model(model, tmp_path / "m.keras")
    weightless = tmp_path / "changed.keras"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(weightless, "w") as new:
        for item in old.namelist():
            if not item.endswith(".h5"):
                new.writestr(item, old.read(item))
    with pytest.raises(ImportedModelError, match="Keras cannot load it"):
        import_here(weightless, tmp_path / "out")


def test_verification_detects_different_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scale_weights(network: StepNetwork, weights: dict[str, np.ndarray]) -> None:
        set_weights(network, {name: value * 1.001 for name, value in weights.items()})

    set_weights = StepNetwork.set_weights
    monkeypatch.setattr(StepNetwork, "set_weights", scale_weights)
    model = keras.Sequential([kl.Input((None, 3)), kl.LSTM(3, return_sequences=True)])
    assert "the packaged model gives" in import_error(model, tmp_path)


@pytest.mark.parametrize("chunking", ["invisible", "per_chunk"])
def test_verification_detects_state_that_is_reset_between_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunking: str
) -> None:
    """Whole sequences agree: only chunked ones show that every chunk starts from zero."""
    step = StepNetwork.step
    monkeypatch.setattr(
        StepNetwork,
        "step",
        lambda network, rows, lengths, state: step(network, rows, lengths, 0 * state),
    )
    rows = kl.Input((None, 3))
    sequence, *states = kl.LSTM(3, return_sequences=True, return_state=True)(rows)
    if chunking == "per_chunk":
        sequence = kl.LSTM(3, return_sequences=True)(sequence, initial_state=states)
    assert "the packaged model gives" in import_error(keras.Model(rows, sequence), tmp_path)


def test_original_that_overflows_is_rejected(tmp_path: Path) -> None:
    model = keras.Sequential(
        [kl.Input((None, 3)), kl.LSTM(3, return_sequences=True), kl.Dense(1), kl.Dense(1)]
    )
    path = save_model(model, tmp_path / "m.keras")
    model.layers[-2].kernel.assign(np.full((3, 1), 1e30))
    model.layers[-1].kernel.assign([[1e30]])
    model.save(path)
    with pytest.raises(ImportedModelError, match="expected finite outputs"):
        import_here(path, tmp_path / "out")


def test_a_model_that_only_tensorflow_can_run_is_noted(tmp_path: Path) -> None:
    layers = [{"kind": "lstm", "units": 2, "activation": "gelu"}]
    heads = [{"kind": "sequence", "name": "h"}]
    data = {"name": "m", "features": 1, "layers": layers, "heads": heads}
    spec = parse_spec(data)
    weights = weights_bytes(contracting_weights(spec, 1))
    conversion = Conversion(
        spec=data,
        notes=(),
        verified={},
    )
    report = package(tmp_path / "m.keras", (conversion, weights, None), tmp_path / "out")
    (note,) = report.notes
    assert note.startswith("only TensorFlow can run this model: ")
    assert "'gelu'" in note
