"""Artifacts in an MLflow model registry: log one as a version of a registered model, or take one.

The files are logged as they are; MLflow loads nothing of them. The registry is the one that MLflow
is configured for (`MLFLOW_TRACKING_URI`, `MLFLOW_REGISTRY_URI`). Needs the extra `mlflow`.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.manifest import MANIFEST_NAME
from models.artifact.writing import copy_artifact
from models.errors import ArtifactError

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER: Final = "carry"
"""The folder of an artifact among the files of a run."""

_is_registry_uri = re.compile(r"models:/[^/@]+(/[0-9]+|@[^/@]+)").fullmatch


def log_model(
    artifact: Path | str,
    *,
    registered_model_name: str | None = None,
    alias: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Log an artifact to MLflow and register it as a new version.

    It is logged to the active run, or else to a new one, with the metrics of its manifest.

    Args:
        artifact: its directory.
        registered_model_name: by default the model's name.
        alias: set on the new version.
        metrics: further metrics of the run.

    Returns:
        The URI of the new version, such as `models:/flights/3`.

    Raises:
        ArtifactError: it is no valid artifact, or the registry cannot be used.
        ModuleNotFoundError: the extra `mlflow` is not installed.
    """
    mlflow = _import_mlflow()
    loaded = load_artifact(Path(artifact))
    name = registered_model_name or loaded.spec.name
    try:
        active = mlflow.active_run()
        run = active or mlflow.start_run(run_name=f"{loaded.spec.name} {loaded.version}")
        try:
            mlflow.log_metrics({**dict(_scalars(loaded.manifest["metrics"])), **(metrics or {})})
            mlflow.set_tags({"carry.model": loaded.spec.name, "carry.version": loaded.version})
            mlflow.log_artifacts(str(loaded.path), FOLDER)
        finally:
            if active is None:
                mlflow.end_run()
        client: MlflowClient = mlflow.MlflowClient()
        try:
            client.create_registered_model(name)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        registered = client.create_model_version(
            name,
            source=f"{run.info.artifact_uri}/{FOLDER}",
            run_id=run.info.run_id,
            tags={"carry.fingerprint": loaded.fingerprint.hex()},
        )
        if alias is not None:
            client.set_registered_model_alias(name, alias, registered.version)
    except mlflow.MlflowException as error:
        raise ArtifactError(f"{artifact}: MLflow did not register it: {error}") from error
    return f"models:/{name}/{registered.version}"


def pull_model(uri: str, out: Path | str, *, overwrite: bool = False) -> Artifact:
    """Download an artifact from an MLflow registry and verify it.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        out: the directory to write; it appears as a whole or not at all.
        overwrite: whether to replace an artifact there.

    Raises:
        ArtifactError: there is no such version, it is no valid artifact, or `out` exists.
        ModuleNotFoundError: the extra `mlflow` is not installed.
    """
    if not _is_registry_uri(uri):
        raise ArtifactError(f"expected models:/NAME@ALIAS or models:/NAME/VERSION, got {uri!r}")
    mlflow = _import_mlflow()
    with tempfile.TemporaryDirectory(prefix="carry-") as temporary:
        try:
            downloaded = mlflow.artifacts.download_artifacts(uri, dst_path=temporary)
        except (mlflow.MlflowException, OSError) as error:
            hint = ""
            if not (os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_REGISTRY_URI")):
                hint = "; MLFLOW_TRACKING_URI, the address of the registry, is not set"
            raise ArtifactError(f"{uri}: cannot be read: {error}{hint}") from error
        if not Path(downloaded, MANIFEST_NAME).is_file():
            raise ArtifactError(
                f"{uri}: expected an artifact that `carry.log_model` logged, got files without a "
                f"{MANIFEST_NAME}"
            )
        return copy_artifact(Path(downloaded), Path(out), overwrite=overwrite)


def _import_mlflow() -> Any:
    # MLflow reports its use to its makers unless this is set
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    return cast(Any, mlflow)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers in nested metrics, under names such as `held_out.late.log_loss`."""
    for key, value in values.items():
        name = re.sub(r"[^\w./ -]", "_", f"{prefix}{key}")
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{name}.")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield name, float(value)
