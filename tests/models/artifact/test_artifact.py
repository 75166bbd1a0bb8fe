"""Artifacts: writing, loading and replacing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.fingerprint import compute_fingerprint
from models.artifact.writing import write_artifact
from models.errors import ArtifactError
from models.spec.layout import output_spec, state_spec
from models.spec.model import parse_spec
from tests.models.artifact.artifacts import METRICS, SPEC, WEIGHTS, manifest_of
from tests.support.models import random_weights


def test_an_artifact_round_trips(artifact_dir: Path) -> None:
    artifact = load_artifact(artifact_dir)

    assert artifact.path == artifact_dir
    assert artifact.spec == SPEC
    assert artifact.fingerprint == compute_fingerprint(SPEC, WEIGHTS)
    assert artifact.version == artifact.fingerprint.hex()[:12]
    assert artifact.state == state_spec(SPEC)
    assert artifact.outputs == output_spec(SPEC)
    assert artifact.manifest["metrics"] == METRICS
    assert artifact.manifest["training"] == {"epochs": 3}
    assert artifact.weights.keys() == WEIGHTS.keys()
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(artifact.weights[name], array)
        with pytest.raises(ValueError, match="read-only"):
            artifact.weights[name][...] = 0


def test_write_artifact_returns_the_loaded_artifact(tmp_path: Path) -> None:
    written = write_artifact(tmp_path / "a", SPEC, WEIGHTS)
    loaded = load_artifact(tmp_path / "a")

    assert isinstance(written, Artifact)
    assert (written.path, written.fingerprint) == (loaded.path, loaded.fingerprint)
    assert written.manifest == loaded.manifest
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_the_manifest_contains_the_derived_layouts(artifact_dir: Path) -> None:
    manifest = manifest_of(artifact_dir)

    assert manifest["format"] == 1
    assert manifest["name"] == "small"
    assert manifest["input_features"] == 13
    assert manifest["state"]["lstm_1.carry"] == {"shape": [3], "dtype": "float32"}
    assert manifest["state"]["clock.last_ms"] == {"shape": [], "dtype": "int64"}
    assert manifest["outputs"]["range"] == {
        "shape": [2, 3],
        "labels": ["0.1", "0.5", "0.9"],
        "per": "step",
    }
    assert set(manifest["files"]) == {
        "graph.onnx",
        "weights.safetensors",
        "report.json",
        "plots/skill.png",
    }
    assert (manifest["graph"], manifest["runtimes"]) == (
        "graph.onnx",
        ["onnxruntime", "tensorflow"],
    )
    assert manifest["libraries"]["numpy"] == np.__version__


def test_equal_models_are_written_as_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_artifact(tmp_path / name, SPEC, dict(reversed(WEIGHTS.items())))

    for file in ("manifest.json", "weights.safetensors", "graph.onnx"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_additional_files_are_copied_from_paths(tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_text("skill")

    artifact = write_artifact(tmp_path / "a", SPEC, WEIGHTS, files={"x/report.txt": source})

    assert (artifact.path / "x" / "report.txt").read_text() == "skill"


def test_a_model_of_raw_features_needs_no_events(tmp_path: Path) -> None:
    spec = parse_spec(
        {
            "name": "raw",
            "features": 2,
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [{"kind": "sequence", "name": "h"}],
        }
    )
    artifact = write_artifact(tmp_path / "raw", spec, random_weights(spec))

    assert artifact.state.int_size == 0
    assert load_artifact(tmp_path / "raw").spec == spec


def test_unlisted_files_and_renames_are_ignored(artifact_dir: Path, tmp_path: Path) -> None:
    (artifact_dir / "notes.txt").write_text("mine")
    moved = tmp_path / "elsewhere"
    shutil.move(artifact_dir, moved)

    assert load_artifact(moved).spec == SPEC


def test_an_artifact_is_replaced_only_on_request(artifact_dir: Path) -> None:
    other = random_weights(SPEC, seed=8)

    with pytest.raises(ArtifactError, match=r"is an artifact already; .* --overwrite"):
        write_artifact(artifact_dir, SPEC, other)
    assert load_artifact(artifact_dir).fingerprint == compute_fingerprint(SPEC, WEIGHTS)

    write_artifact(artifact_dir, SPEC, other, overwrite=True)
    assert load_artifact(artifact_dir).fingerprint == compute_fingerprint(SPEC, other)
    assert [entry.name for entry in artifact_dir.parent.iterdir()] == ["small"]
    assert not (artifact_dir / "report.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_directories_are_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "precious.txt").write_text("x")
    file.write_text("x")

    for path in (folder, file):
        with pytest.raises(ArtifactError, match="not an artifact"):
            write_artifact(path, SPEC, WEIGHTS, overwrite=overwrite)
    assert (folder / "precious.txt").exists()


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    assert write_artifact(tmp_path / "a", SPEC, WEIGHTS).spec == SPEC


def test_a_failed_write_leaves_the_old_artifact(
    artifact_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_artifact(artifact_dir, SPEC, random_weights(SPEC, seed=8), overwrite=True)

    monkeypatch.undo()
    assert load_artifact(artifact_dir).fingerprint == compute_fingerprint(SPEC, WEIGHTS)
    assert [entry.name for entry in artifact_dir.parent.iterdir()] == ["small"]


def test_a_failed_replacement_is_rolled_back(
    artifact_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old artifact was moved aside, and the new one cannot take its place."""
    rename, failures = Path.rename, [OSError(5, "Input/output error")]

    def fail_once(path: Path, target: Path) -> Path:
        if target == artifact_dir and failures:
            raise failures.pop()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output"):
        write_artifact(artifact_dir, SPEC, random_weights(SPEC, seed=8), overwrite=True)

    assert load_artifact(artifact_dir).fingerprint == compute_fingerprint(SPEC, WEIGHTS)
    assert [entry.name for entry in artifact_dir.parent.iterdir()] == ["small"]


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "a/../../x",
        "",
        ".",
        "a//b",
        "./a",
        "a\\b",
        "a\0b",
        "a\nb",
        "\ud800",
        "manifest.json",
        "weights.safetensors",
        "graph.onnx",
    ],
)
def test_unsafe_and_reserved_file_names_are_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="file name"):
        write_artifact(tmp_path / "a", SPEC, WEIGHTS, files={name: b""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad", [{"x": float("nan")}, {"x": np.float32(1)}, {"x": object()}, {"x": float("inf")}]
)
def test_metrics_must_be_finite_json(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="finite JSON"):
        write_artifact(tmp_path / "a", SPEC, WEIGHTS, metrics=bad)
