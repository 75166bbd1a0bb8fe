"""Artifacts in an MLflow registry on SQLite."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import carry
from carry import ArtifactError
from models.artifact.artifact import Artifact
from models.artifact.manifest import read_manifest
from models.artifact.writing import write_artifact
from tests.support.models import random_weights, small_spec

pytestmark = pytest.mark.filterwarnings("default")  # MLflow uses what its libraries deprecate


def write_example(path: Path) -> Artifact:
    """An artifact with metrics, one of them a list."""
    spec = small_spec()
    metrics = {"late": {"log_loss": 0.5}, "by_month": [0.5, None]}
    return write_artifact(
        path, spec, random_weights(spec), metrics=metrics, files={"a/b.txt": b"c"}
    )


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MLflow with a registry and a store of artifacts of its own."""
    module = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/registry.db"
    module.set_tracking_uri(uri)
    module.set_registry_uri(uri)
    yield module
    module.set_tracking_uri(None)
    module.set_registry_uri(None)


def test_a_registered_version_is_pulled_as_it_was_logged(mlflow: Any, tmp_path: Path) -> None:
    original = write_example(tmp_path / "original")
    uri = carry.log_model(original.path, alias="nightly", metrics={"score": 0.25})
    assert uri == f"models:/{original.spec.name}/1"
    for number, source in enumerate([uri, f"models:/{original.spec.name}@nightly"]):
        pulled = carry.pull_model(source, tmp_path / f"pulled-{number}")
        assert pulled.fingerprint == original.fingerprint
        assert read_manifest(pulled.path) == read_manifest(original.path)
        assert (pulled.path / "a/b.txt").read_bytes() == b"c"
    client = mlflow.MlflowClient()
    version = client.get_model_version(original.spec.name, "1")
    assert version.tags == {"carry.fingerprint": original.fingerprint.hex()}
    assert client.get_run(version.run_id).data.metrics == {"score": 0.25, "late.log_loss": 0.5}


def test_a_new_version_is_logged_to_the_active_run(mlflow: Any, tmp_path: Path) -> None:
    original = write_example(tmp_path / "original")
    carry.log_model(original.path, registered_model_name="other")
    with mlflow.start_run() as run:
        assert carry.log_model(original.path, registered_model_name="other") == "models:/other/2"
    assert mlflow.MlflowClient().get_model_version("other", "2").run_id == run.info.run_id


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("flights", "expected models:/NAME@ALIAS or models:/NAME/VERSION, got 'flights'"),
        ("models:/nope/1", "models:/nope/1: cannot be read: .*nope"),
        ("models:/example@nope", "models:/example@nope: cannot be read: .*nope"),
    ],
)
def test_what_is_not_in_the_registry_is_named(
    mlflow: Any, tmp_path: Path, uri: str, message: str
) -> None:
    carry.log_model(write_example(tmp_path / "original").path, registered_model_name="example")
    with pytest.raises(ArtifactError, match=message):
        carry.pull_model(uri, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_registry_that_was_not_named_is_told(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ArtifactError, match=r"MLFLOW_TRACKING_URI, .*, is not set"):
        carry.pull_model("models:/nope/1", tmp_path / "out")


def test_a_model_that_carry_did_not_log_is_rejected(mlflow: Any, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "MLmodel").write_text("flavors: {}\n")
    client = mlflow.MlflowClient()
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(tmp_path / "foreign"))
    with pytest.raises(ArtifactError, match=r"expected an artifact that `carry.log_model` logged"):
        carry.pull_model("models:/foreign/1", tmp_path / "out")


def test_a_damaged_artifact_leaves_nothing_and_another_one_stays(
    mlflow: Any, tmp_path: Path
) -> None:
    original = write_example(tmp_path / "original")
    uri = carry.log_model(original.path)
    kept = carry.pull_model(uri, tmp_path / "out")
    with pytest.raises(ArtifactError, match="is an artifact already"):
        carry.pull_model(uri, tmp_path / "out")
    (weights,) = tmp_path.glob("mlruns/**/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="weights"):
        carry.pull_model(uri, tmp_path / "out", overwrite=True)
    assert carry.load(tmp_path / "out").fingerprint == kept.fingerprint
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_what_is_no_artifact_is_not_logged(mlflow: Any, tmp_path: Path) -> None:
    original = write_example(tmp_path / "original")
    shutil.rmtree(original.path)
    with pytest.raises(ArtifactError, match="manifest"):
        carry.log_model(original.path)
