"""Writes artifacts, atomically: a directory under the final name is complete."""

from __future__ import annotations

import importlib.metadata
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from models.artifact.artifact import (
    WEIGHTS_NAME,
    Artifact,
    check_fitted,
    derived_entries,
    load_artifact,
)
from models.artifact.files import inside, replace_file, sync_directory, write_new
from models.artifact.fingerprint import compute_fingerprint
from models.artifact.graphs import (
    DECODER_GRAPH_NAME,
    GRAPH_NAME,
    TENSORFLOW,
    Graphs,
    write_graphs,
)
from models.artifact.manifest import (
    FORMAT,
    MANIFEST_NAME,
    add_checksum,
    file_entry,
    manifest_bytes,
    read_files,
    read_manifest,
)
from models.artifact.weights import check_weights, weights_bytes
from models.errors import ArtifactError, GraphUnsupportedError
from models.spec.model import ModelSpec
from models.spec.state import FloatArray

_OWN_NAMES = (MANIFEST_NAME, WEIGHTS_NAME, GRAPH_NAME, DECODER_GRAPH_NAME)
_LIBRARIES = (
    "carry",
    "keras",
    "numpy",
    "onnxruntime",
    "polars",
    "pydantic",
    "safetensors",
    "tensorflow",
    "tensorflow-cpu",
)


def write_artifact(
    path: Path,
    spec: ModelSpec,
    weights: Mapping[str, FloatArray],
    *,
    network: bytes | None = None,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] = MappingProxyType({}),
    overwrite: bool = False,
) -> Artifact:
    """Write a model and return it as `load_artifact` reads it.

    Args:
        path: the directory to create, with its parents.
        spec: a fitted spec.
        weights: every weight of `models.spec.layout.weight_shapes(spec)`, float32 and finite; of an
            imported graph, initial values by state part.
        network: the imported graph, if the spec is one's.
        metrics: evaluation results as JSON data.
        training: training metadata as JSON data.
        files: additional files by name (such as `report.json`, `plots/skill.png`): their bytes, or
            the path of a file to copy.
        overwrite: whether to replace an existing artifact.

    Raises:
        ArtifactError: invalid spec or weights, data that is not JSON, a file name
            that is reserved or leads out of the directory, or a path that exists.
    """
    path = Path(path)
    check_fitted(spec, str(path))
    check_weights(spec, weights, str(path))
    if (spec.onnx is None) != (network is None):
        raise ArtifactError(
            f"{path}: expected an ONNX graph together with its signature `onnx`; "
            "`carry import MODEL.onnx` packages both"
        )
    graphs = write_graphs(spec, weights) if network is None else Graphs(network, imported=True)
    contents: dict[str, bytes] = {WEIGHTS_NAME: weights_bytes(weights), **graphs.files}
    for name, content in dict(files).items():
        if name in _OWN_NAMES or not inside(name):
            raise ArtifactError(f"{path}: expected a file name inside the artifact, got {name!r}")
        contents[name] = content.read_bytes() if isinstance(content, Path) else content
    manifest = add_checksum(
        {
            "format": FORMAT,
            **derived_entries(spec, compute_fingerprint(spec, weights, network)),
            "weights": WEIGHTS_NAME,
            **graphs.manifest_entries,
            "metrics": dict(metrics or {}),
            "training": dict(training or {}),
            "libraries": _library_versions(),
            "files": {name: file_entry(data) for name, data in sorted(contents.items())},
            "spec": spec.model_dump(mode="json"),
        },
        str(path),
    )
    _check_target(path, overwrite)

    with _new_directory(path) as temporary:
        for name, data in contents.items():
            write_new(temporary / name, data)
        write_new(temporary / MANIFEST_NAME, manifest_bytes(manifest))
        artifact = load_artifact(temporary)
    return replace(artifact, path=path)


def copy_artifact(source: Path, path: Path, *, overwrite: bool = False) -> Artifact:
    """Copy an artifact's manifest and the files that it lists, atomically, and verify the copy.

    Raises:
        ArtifactError: the source is invalid, or the path exists.
    """
    manifest = read_manifest(source)
    read_files(source, manifest, ())
    _check_target(path, overwrite)
    with _new_directory(path) as temporary:
        for name in [*manifest["files"], MANIFEST_NAME]:
            write_new(temporary / name, (source / name).read_bytes())
        artifact = load_artifact(temporary)
    return replace(artifact, path=path)


@contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that is moved to the path at the end of the block, if it succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        for folder in {temporary, *(file.parent for file in temporary.rglob("*"))}:
            sync_directory(folder)
        _move_into_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def add_measurements(path: Path, measured: Mapping[str, Any]) -> Artifact:
    """Write what was measured of an artifact into its manifest; nothing else changes.

    Args:
        measured: `burn_in`, `ranges` or both, as `models.training.measurements` gives them.

    Raises:
        ArtifactError: the artifact is invalid.
    """
    path = Path(path)
    manifest = {**load_artifact(path).manifest, **measured}
    replace_file(path / MANIFEST_NAME, manifest_bytes(add_checksum(manifest, str(path))))
    return load_artifact(path)


def add_graph(path: Path) -> Artifact:
    """Rewrite the graphs of an artifact in place; nothing else changes.

    The directory is a valid artifact at every time, with the old graphs, none or the new ones.

    Raises:
        ArtifactError: the artifact is invalid.
        GraphUnsupportedError: the model cannot be exported; the manifest then gives the reason.
    """
    path = Path(path)
    artifact = load_artifact(path)
    if artifact.network is not None:
        return artifact
    graphs = artifact.graphs
    manifest = dict(artifact.manifest)
    old = [manifest.pop(key, None) for key in ("graph", "decoder_graph")]
    manifest.pop("graph_refused", None)
    manifest["files"] = {
        name: entry
        for name, entry in manifest["files"].items()
        if name not in (GRAPH_NAME, DECODER_GRAPH_NAME)
    }
    if old != [None, None]:
        without = {**manifest, "runtimes": [TENSORFLOW]}
        replace_file(path / MANIFEST_NAME, manifest_bytes(add_checksum(without, str(path))))
    for name, data in graphs.files.items():
        replace_file(path / name, data)
        manifest["files"][name] = file_entry(data)
    manifest.update(graphs.manifest_entries)
    replace_file(path / MANIFEST_NAME, manifest_bytes(add_checksum(manifest, str(path))))
    if graphs.rejection is not None:
        raise GraphUnsupportedError(f"{path}: {graphs.rejection}")
    return load_artifact(path)


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / MANIFEST_NAME).is_file():
        raise ArtifactError(f"{path}: exists and is not an artifact; expected a new path")
    if not overwrite:
        raise ArtifactError(f"{path}: is an artifact already; expected a new path, or --overwrite")


def _move_into_place(temporary: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        temporary.rename(path)
        sync_directory(path.parent)
        return
    old = path.parent / f".{path.name}.{secrets.token_hex(6)}.old"
    path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        old.rename(path)
        raise
    sync_directory(path.parent)
    shutil.rmtree(old)


def _library_versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
