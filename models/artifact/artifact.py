"""Writes and loads artifacts: directories with `manifest.json`, weights, graphs and reports.

The manifest contains the spec, derived data (state layout, outputs, fingerprint), the supported
runtimes, training metadata and a SHA-256 of every file; its `checksum`
covers the rest of the manifest and thereby the whole directory. An artifact contains no
code.

`graph.onnx` is the network of spec and weights, exported when the model is packaged, and
`decoder.onnx` one step of its decoder, if it has one. They are for other programs: loading
verifies them like every file, but the service derives its graphs from spec and weights, so
that no file can change an output without changing the fingerprint. A model that cannot be
exported has no graph, and its manifest gives the reason; `add_graph` rewrites the files.

The network of an imported ONNX model is the graph itself: there, `graph.onnx` is what runs, and the
fingerprint covers its bytes. A graph is rejected if it refers to data outside of itself, or if its
work may depend on the values of its inputs.

Loading rejects artifacts that are damaged, of another format or inconsistent; errors name
the file and the reason. Writing is atomic: a directory under the final name is complete.
Files that the manifest does not list are ignored. The modules `manifest`, `weights`
and `graphs` handle the parts; this one writes, reads and validates the directory as a whole.
"""

from __future__ import annotations

import importlib.metadata
import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from models.artifact.files import inside, replace_file, sync_directory, write_new
from models.artifact.fingerprint import compute_fingerprint
from models.artifact.graphs import (
    DECODER_GRAPH_NAME,
    GRAPH_NAME,
    TENSORFLOW,
    Graphs,
    check_imported_graph,
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
from models.artifact.weights import check_weights, read_weights, weights_bytes
from models.errors import ArtifactError, GraphUnsupportedError, SpecError
from models.spec.decoder import strip_decoder_prefix
from models.spec.layout import (
    OutputSpec,
    network_state,
    output_spec,
    runtime_state,
    state_spec,
)
from models.spec.model import ModelSpec, parse_spec
from models.spec.state import FloatArray, StateSpec

WEIGHTS_NAME = "weights.safetensors"

_OWN_NAMES = (MANIFEST_NAME, WEIGHTS_NAME, GRAPH_NAME, DECODER_GRAPH_NAME)
_VERSION_DIGITS = 12
_DEFAULTS = {"chunking": "invisible"}
"""Values of keys that older manifests do not have."""
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


@dataclass(frozen=True, eq=False)
class Artifact:
    """A loaded model.

    Attributes:
        path: its directory.
        spec: the fitted spec.
        weights: float32 arrays by name, read-only; of an imported graph, the initial values of its
            state parts that do not start from zero.
        fingerprint: 16 bytes; see `models.artifact.fingerprint`.
        version: the fingerprint's first 12 hexadecimal digits.
        manifest: the manifest as plain data.
        network: the imported graph; None for a network of layers.
    """

    path: Path
    spec: ModelSpec
    weights: Mapping[str, FloatArray]
    fingerprint: bytes
    version: str
    manifest: Mapping[str, Any]
    network: bytes | None = None

    @cached_property
    def decoder(self) -> Artifact | None:
        """The network of one decoder step as a separate model, for runtimes."""
        spec = self.spec.decoder_network
        if spec is None:
            return None
        weights = MappingProxyType(strip_decoder_prefix(self.weights))
        digest = compute_fingerprint(spec, weights)
        return Artifact(self.path, spec, weights, digest, _version(digest), self.manifest)

    @cached_property
    def graphs(self) -> Graphs:
        """The model's ONNX graphs, or the reason why there are none."""
        if self.network is not None:
            return Graphs(self.network, imported=True)
        return write_graphs(self.spec, self.weights)

    def with_alarm_rate(self, rate: float) -> Artifact:
        """The same model, with the same fingerprint, whose alarms follow another rate.

        Args:
            rate: expected false alarms of one stream in a day.

        Raises:
            ArtifactError: it has no alarms, or none that are so frequent.
        """
        detection = self.spec.detection
        if detection is None or detection.fit is None:
            raise ArtifactError(f"model {self.spec.name!r}: expected `detection`, which has alarms")
        if not 0 < rate <= (max_rate := detection.fit.rates[-1]):
            raise ArtifactError(
                f"model {self.spec.name!r}: expected at most {max_rate:g} false alarms a day, the "
                "highest rate that its alarms have on the data that they are calibrated on; "
                f"got {rate}"
            )
        changed = detection.with_alarm_rate(rate)
        return replace(self, spec=self.spec.model_copy(update={"detection": changed}))

    @property
    def differing_graphs(self) -> list[str]:
        """Names of the graph files that differ from the graphs of spec and weights.

        Another version of Carry wrote them, or they were replaced. They are never run.
        """
        listed = self.manifest["files"]
        return [
            name
            for name, data in self.graphs.files.items()
            if name in listed and listed[name] != file_entry(data)
        ]

    @cached_property
    def state(self) -> StateSpec:
        """The layout of a stream's state, and what a new stream starts from."""
        layout = state_spec(self.spec)
        return layout if self.network is None else replace(layout, initial_values=self.weights)

    @cached_property
    def network_state(self) -> StateSpec:
        """The layout of the parts that the network reads and writes; the first of each row."""
        return network_state(self.spec)

    @cached_property
    def runtime_state(self) -> StateSpec:
        """The layout of the parts that a runtime reads and writes: with those of detection."""
        return runtime_state(self.spec)

    @cached_property
    def outputs(self) -> OutputSpec:
        """The layout of the outputs of one step."""
        return output_spec(self.spec)


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
    _check_fitted(spec, str(path))
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
            **_derived(spec, compute_fingerprint(spec, weights, network)),
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

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        temporary.mkdir()
        for name, data in contents.items():
            write_new(temporary / name, data)
        write_new(temporary / MANIFEST_NAME, manifest_bytes(manifest))
        for folder in {temporary, *(temporary.joinpath(name).parent for name in contents)}:
            sync_directory(folder)
        artifact = load_artifact(temporary)
        _move_into_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return replace(artifact, path=path)


def load_artifact(path: Path) -> Artifact:
    """Load and validate a model.

    Raises:
        ArtifactError: naming the file and the reason: no directory or no manifest there, a
            manifest that is not JSON, is of another format or fails its checksum, a file that
            is missing, changed, too large, outside the directory or no regular file, a spec that
            is invalid or not fitted, weights that do not match it, or a state layout, outputs or
            fingerprint that differ from the derived ones.
    """
    path = Path(path)
    manifest = read_manifest(path)
    where = f"{path / MANIFEST_NAME}"
    described = manifest.get("spec")
    is_imported = isinstance(described, dict) and described.get("onnx") is not None
    keys = ("weights", "graph") if is_imported else ("weights",)
    data, *rest = read_files(path, manifest, keys)
    network = rest[0] if rest else None
    try:
        spec = parse_spec(described, f"{where}: spec")
    except SpecError as error:
        raise ArtifactError(str(error)) from error
    _check_fitted(spec, where)
    weights = read_weights(spec, data, f"{path / str(manifest['weights'])}")
    if network is not None and spec.onnx is not None:
        check_imported_graph(network, spec.onnx, f"{path / str(manifest['graph'])}")
    digest = compute_fingerprint(spec, weights, network)
    for key, expected in _derived(spec, digest).items():
        given = manifest.get(key, _DEFAULTS.get(key))
        if given != expected:
            raise ArtifactError(
                f"{where}: `{key}` differs from that of spec and weights: "
                f"expected {_short(expected)}, got {_short(given)}"
            )
    for key in ("graph", "decoder_graph"):
        given = manifest.get(key)
        if given is not None and not (isinstance(given, str) and given in manifest["files"]):
            raise ArtifactError(f"{where}: expected `{key}` to name one of its files: {given!r}")
    for key in ("metrics", "training"):
        if not isinstance(manifest.get(key, {}), dict):
            raise ArtifactError(f"{where}: expected `{key}` to be an object")
    return Artifact(
        path, spec, MappingProxyType(weights), digest, _version(digest), manifest, network
    )


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


def _derived(spec: ModelSpec, digest: bytes) -> dict[str, Any]:
    return {
        "name": spec.name,
        "input_features": spec.input_features,
        "chunking": spec.chunking,
        "max_chunk_steps": spec.chunk_limit,
        "state": {
            part.name: {"shape": list(part.shape), "dtype": part.dtype}
            for part in state_spec(spec).parts
        },
        "outputs": {
            output.name: {
                "shape": list(output.shape),
                "labels": list(output.labels),
                "per": output.per,
            }
            for output in output_spec(spec).outputs
        },
        "fingerprint": digest.hex(),
        "version": _version(digest),
    }


def _check_fitted(spec: ModelSpec, where: str) -> None:
    if spec.detection is not None and spec.detection.fit is None:
        raise ArtifactError(f"{where}: expected a fitted `detection`, as `carry train` writes it")
    if spec.events is not None and not spec.events.fitted:
        open_fields = [field.name for field in spec.events.fields if not field.fitted]
        raise ArtifactError(
            f"{where}: expected a fitted event schema, but these fields lack their numbers: "
            f"{open_fields}"
        )


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


def _version(digest: bytes) -> str:
    return digest.hex()[:_VERSION_DIGITS]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}..."
