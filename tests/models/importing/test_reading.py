"""The configuration of a Keras model is checked before anything is built."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import pytest
from keras import layers as kl

from models.errors import ImportedModelError
from tests.models.importing.hostile import Edit, recurrent, save_edited, two_models
from tests.models.importing.saving import import_here, save_model


def change(**members: Any) -> Edit:
    return lambda layer: layer.update(members)


def activation(value: Any) -> Edit:
    return lambda layer: layer["config"].update(activation=value)


CODE = {"class_name": "__lambda__", "config": {"value": "4wAAAA=="}}
DOWNLOAD = {"module": "keras.utils", "class_name": "get_file", "config": {"origin": "file:///x"}}
FUNCTION = {"module": "builtins", "class_name": "function", "config": "exec"}
OBJECTS: dict[str, tuple[Edit, str]] = {
    "layer of code": (change(class_name="Lambda"), "Lambda 'cell': it contains code"),
    "layer that loads a SavedModel": (change(class_name="TFSMLayer"), "TFSMLayer 'cell'"),
    "layer that reads a vocabulary": (change(class_name="StringLookup"), "StringLookup 'cell'"),
    "layer of another library": (change(class_name="TorchModuleWrapper"), "TorchModuleWrapper"),
    "registered class": (
        change(registered_name="own>Evil"),
        "LSTM 'cell': it is a custom class",
    ),
    "class of another module": (
        change(module="no_such_module.inside", class_name="Popper"),
        "Popper 'cell': it comes from 'no_such_module.inside'",
    ),
    "class that is none": (change(class_name="Popper"), "Popper 'cell': it is a custom class"),
    "operation": (
        change(module="keras.src.ops.core", class_name="Map"),
        "Map 'cell': it is an operation of keras.ops",
    ),
    "function of a namespace": (change(class_name="deserialize"), "deserialize 'cell'"),
    "class that is no string": (change(class_name=["LSTM"]), "['LSTM'] 'cell'"),
    "lambda": (activation(CODE), "__lambda__ 'cell'"),
    "downloading function": (activation(DOWNLOAD), "get_file 'cell'"),
    "function": (activation(FUNCTION), "function 'cell': it comes from 'builtins'"),
    "in a list": (activation([[{"a": CODE}]]), "__lambda__ 'cell'"),
    "to compile": (change(compile_config={"loss": FUNCTION}), "function 'cell'"),
    "to build": (change(build_config={"x": CODE}), "__lambda__ 'cell'"),
}


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize(("edit", "words"), OBJECTS.values(), ids=OBJECTS.keys())
def test_objects_that_are_not_on_the_allowlist_are_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, edit: Edit, words: str
) -> None:
    monkeypatch.setattr(keras.saving, "load_model", None)  # calling it would be a TypeError
    path = save_edited(tmp_path / f"m{suffix}", edit)
    with pytest.raises(ImportedModelError) as caught:
        import_here(path, tmp_path / "out")
    assert words in str(caught.value)


def test_the_file_that_is_checked_is_the_one_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras.saving, "load_model", None)
    path = two_models(tmp_path / "m.h5", kl.Lambda(abs, name="code", output_shape=(None, 3)))
    assert zipfile.is_zipfile(path)
    with pytest.raises(ImportedModelError, match="Lambda 'code': it contains code"):
        import_here(path, tmp_path / "out")


def custom_loss(truth: Any, predictions: Any) -> Any:
    return keras.ops.mean(keras.ops.abs(truth - predictions))


def test_a_compiled_model_is_imported(tmp_path: Path) -> None:
    """With known losses, and with a custom one, which is not loaded."""
    model = recurrent()
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 5)), keras.losses.Huber()
    )
    model.optimizer.build(model.trainable_variables)
    outer = keras.Sequential([kl.Input((None, 3)), model])
    outer.compile("adam", custom_loss, metrics=[keras.metrics.MeanSquaredError()])
    report = import_here(save_model(outer, tmp_path / "m.keras"), tmp_path / "out")
    assert report.verified["largest_difference"] < 1e-5


CONFIGURATIONS = [b"", b"[]", b"{", b"null", b"[" * 100_000, b"{" + b'"a":{' * 100_000]
CONFIGURATIONS += [b'{"class_name": "Sequential"}', b'{"class_name": "Sequential", "config": [1]}']
CONFIGURATIONS += [b'{"class_name": "Functional", "config": {"layers": 3}}', b"\xff"]


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("content", CONFIGURATIONS, ids=lambda content: content[:20])
def test_a_malformed_configuration_is_rejected(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"m{suffix}"
    with zipfile.ZipFile(path, "w") if suffix == ".keras" else h5py.File(path, "w") as file:
        if suffix == ".keras":
            file.writestr("config.json", content)
        else:
            file.attrs.create("model_config", content[:60_000], dtype=h5py.string_dtype())
    with pytest.raises(ImportedModelError):
        import_here(path, tmp_path / "out")


def test_a_configuration_that_is_not_text_is_rejected(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["model_config"] = [1.0, 2.0]
    with pytest.raises(ImportedModelError, match="expected a whole Keras model"):
        import_here(tmp_path / "m.h5", tmp_path / "out")


def test_an_oversized_configuration_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b" " * (16 * 2**20 + 1))
    with pytest.raises(ImportedModelError, match="16777217 bytes, more than 16777216"):
        import_here(path, tmp_path / "out")


def biases(file: h5py.File) -> list[str]:
    """The LSTM's bias, 12 numbers."""
    names: list[str] = []
    file.visititems(
        lambda name, item: names.append(name) if getattr(item, "shape", None) == (12,) else None
    )
    return names


def link_externally(group: h5py.Group, secret: Path) -> None:
    """Add a link to an object in another file."""
    group["bias"] = h5py.ExternalLink(str(secret), "/bias")


def store_externally(group: h5py.Group, secret: Path) -> None:
    """Add a dataset whose bytes are in another file."""
    place = (str(secret), 0, h5py.h5f.UNLIMITED)
    group.create_dataset("bias", shape=(12,), dtype="f4", external=[place])


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("name_it", [link_externally, store_externally])
def test_weights_linked_from_another_file_are_rejected(
    tmp_path: Path, suffix: str, name_it: Callable[[h5py.Group, Path], None]
) -> None:
    path, secret = save_model(recurrent(), tmp_path / f"m{suffix}"), tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["bias"] = [1.0] * 12
    tree = path
    if suffix == ".keras":
        with zipfile.ZipFile(path) as old:
            entries = {name: old.read(name) for name in old.namelist()}
        tree = tmp_path / "model.weights.h5"
        tree.write_bytes(entries.pop(tree.name))
    with h5py.File(tree, "r+") as file:
        (bias,) = biases(file)
        group, name = file[bias].parent, bias.rpartition("/")[2]
        del group[name]
        name_it(group, secret)
        group.move("bias", name)
    if suffix == ".keras":
        with zipfile.ZipFile(path, "w") as new:
            for name, data in entries.items():
                new.writestr(name, data)
            new.write(tree, tree.name)
    with pytest.raises(ImportedModelError, match=r"[Ee]xternal"):
        import_here(path, tmp_path / "out")
