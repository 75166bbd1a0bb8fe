"""What an imported Keras model is called, what its report says, and which files are rejected."""

from __future__ import annotations

import zipfile
from pathlib import Path

import keras
import pytest
from keras import layers as kl

from models.artifact.artifact import load_artifact
from models.artifact.weights import weights_bytes
from models.errors import ImportedModelError
from models.importing.isolation import Conversion
from models.importing.keras_graph import translate
from models.importing.packaging import package
from models.spec.model import parse_spec
from tests.models.importing.accepted_models import gru, lstm
from tests.models.importing.saving import import_here, import_model, save_model
from tests.support.oracle import contracting_weights


def test_the_report_names_what_each_layer_became(tmp_path: Path) -> None:
    layers = [
        kl.Dense(6, name="Inlet Proj"),
        lstm(name="cell")(),
        keras.Sequential([kl.Input((None, 4)), gru(name="cell")()], name="inner"),
        kl.LeakyReLU(negative_slope=0.2, name="leaky"),
        kl.GaussianNoise(0.1, name="noise"),
    ]
    model = keras.Sequential([kl.Input((None, 3)), *layers])
    report = import_model(model, tmp_path, reset_every=7)
    assert report.artifact.spec.name == "my-model"
    assert load_artifact(tmp_path / "out").spec.reset_every == 7
    assert report.layers == (
        ("Inlet Proj", "Dense", "inlet_proj"),
        ("cell", "LSTM", "cell"),
        ("cell", "GRU", "cell_2"),
        ("leaky", "LeakyReLU", "leaky"),
        ("noise", "GaussianNoise", ""),
    )
    assert [layer.kind for layer in report.artifact.spec.layers][-1] == "activation"
    assert report.verified["lengths_steps"] == (1, 6)
    assert 0 < report.verified["largest_difference"] < 1e-5
    assert report.lines()[0].startswith("equal to the original within")


def test_returned_states_and_last_steps_are_noted(tmp_path: Path) -> None:
    rows = kl.Input((None, 2))
    sequence, hidden, carry = lstm(return_state=True, name="inner")()(rows)
    last = kl.Dense(2)(kl.GRU(3)(sequence))
    report = import_model(keras.Model(rows, [last, hidden, carry]), tmp_path)
    assert [head.name for head in report.artifact.spec.heads] == ["output"]
    assert "output 1 is the state part 'inner.hidden', not an output" in report.notes
    assert "output 2 is the state part 'inner.carry', not an output" in report.notes
    assert any("return_sequences=False" in note for note in report.notes)


def test_the_five_tensors_of_both_directions_are_outputs_and_state_parts(tmp_path: Path) -> None:
    rows = kl.Input((None, 2))
    both = kl.Bidirectional(lstm(return_state=True)(), name="both")
    report = import_model(keras.Model(rows, both(rows)), tmp_path)
    parts = ("forward.hidden", "forward.carry", "backward.hidden", "backward.carry")
    for index, part in enumerate(parts, start=1):
        assert f"output {index} is the state part 'both.{part}', not an output" in report.notes


def test_max_chunk_steps_covers_the_fixed_steps_of_the_original() -> None:
    model = keras.Sequential([kl.Input((1100, 1)), kl.Bidirectional(gru(1)())])
    assert translate(model, "long").spec.chunk_limit == 1100


def test_hdf5_files_are_read(tmp_path: Path) -> None:
    model = keras.Sequential([kl.Input((None, 2)), kl.Bidirectional(gru()())])
    report = import_here(save_model(model, tmp_path / "m.h5"), tmp_path / "out", name="from-h5")
    assert report.artifact.spec.name == "from-h5"
    assert report.artifact.spec.layers[0].kind == "bidirectional"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"\x89HDF\r\n\x1a\n broken"])
def test_damaged_files_are_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.keras"
    path.write_bytes(content)
    with pytest.raises(ImportedModelError, match="expected a whole Keras model"):
        import_here(path, tmp_path / "out")


def test_weights_missing_from_the_file_are_rejected(tmp_path: Path) -> None:
    model = keras.Sequential([kl.Input((None, 3)), lstm()()])
    path, weightless = save_model(model, tmp_path / "m.keras"), tmp_path / "changed.keras"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(weightless, "w") as new:
        for item in old.namelist():
            if not item.endswith(".h5"):
                new.writestr(item, old.read(item))
    with pytest.raises(ImportedModelError, match="Keras cannot load it"):
        import_here(weightless, tmp_path / "out")


def test_a_model_that_only_tensorflow_can_run_is_noted(tmp_path: Path) -> None:
    layers = [{"kind": "lstm", "units": 2, "activation": "gelu"}]
    heads = [{"kind": "sequence", "name": "h"}]
    data = {"name": "m", "features": 1, "layers": layers, "heads": heads}
    weights = weights_bytes(contracting_weights(parse_spec(data), 1))
    converted = Conversion(spec=data, notes=(), verified={}), weights, None
    (note,) = package(tmp_path / "m.keras", converted, tmp_path / "out").notes
    assert note.startswith("only TensorFlow can run this model: ")
    assert "'gelu'" in note
