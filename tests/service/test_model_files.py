"""Versions that are loaded from the models' folder, and what is rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.artifact.writing import write_artifact
from models.errors import ArtifactError
from models.spec.model import parse_spec
from service import model_files
from service.model_files import VersionFiles, available_bytes, load_models
from service.pipeline.settings import ModelSettings
from tests.support.oracle import contracting_weights
from tests.support.pipelines import SPEC


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two versions of `probe`, one of them behind a link, and another model."""
    write_artifact(tmp_path / "elsewhere", SPEC, contracting_weights(SPEC, 1))
    models = tmp_path / "models"
    write_artifact(models / "probe" / "b", SPEC, contracting_weights(SPEC, 2))
    (models / "probe" / "a").symlink_to(tmp_path / "elsewhere")
    other = parse_spec({**SPEC.model_dump(mode="json"), "name": "other"})
    write_artifact(models / "other", other, contracting_weights(other, 3))
    return models


def test_last_version_of_a_model_is_loaded_at_the_start(folder: Path) -> None:
    paths = [artifact.path for artifact in load_models(folder)]
    assert paths == [folder / "other", folder / "probe" / "b"]


def test_damaged_versions_do_not_keep_a_service_from_starting(folder: Path) -> None:
    weights = folder / "probe" / "b" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for only in (None, "probe"):
        assert load_models(folder, only)[-1].path == folder / "probe" / "a"
    (folder / "probe" / "b" / "manifest.json").write_text("{")
    assert load_models(folder, "probe")[0].path == folder / "probe" / "a"
    (folder / "probe" / "a").unlink()
    with pytest.raises(ArtifactError, match="expected JSON"):
        load_models(folder)


def test_versions_are_loaded_warm_by_their_paths(folder: Path) -> None:
    load = VersionFiles(ModelSettings(models_dir=folder))
    for path in ("probe/a", "probe/b"):
        served = load("probe", path)
        assert served.is_warm
        assert load.path_of(served) == path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../elsewhere", "inside the folder"),
        ("/etc", "inside the folder"),
        ("probe", "manifest"),
        ("other", "'other'"),
        ("models/probe/a", "such as probe/VERSION"),
    ],
)
def test_path_that_is_no_version_of_the_model_is_rejected(
    folder: Path, path: str, reason: str
) -> None:
    load = VersionFiles(ModelSettings(models_dir=folder))
    with pytest.raises(ArtifactError, match=reason):
        load("probe", path)


def test_version_that_is_damaged_or_too_large_is_rejected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = VersionFiles(ModelSettings(models_dir=folder))
    monkeypatch.setattr(model_files, "available_bytes", lambda: 1000)
    with pytest.raises(ArtifactError, match="free memory"):
        load("probe", "probe/b")
    monkeypatch.setattr(model_files, "available_bytes", lambda: None)
    weights = folder / "probe" / "b" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="weights"):
        load("probe", "probe/b")


def test_cached_files_of_a_container_count_as_free_memory(tmp_path: Path) -> None:
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    7000 kB\n")
    (group / "memory.current").write_text("1900000\n")
    (group / "memory.stat").write_text("anon 900000\nactive_file 200000\ninactive_file 800000\n")
    (group / "memory.max").write_text("2000000\n")
    assert available_bytes(tmp_path) == 900_000
    (group / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) == 7000 * 1024
    assert available_bytes(tmp_path / "other") is None
