"""A model on disk: a directory with `manifest.json`, weights, graph and its reports.

The manifest holds the spec, what follows from it (state layout, outputs, fingerprint), which
runtimes can run it, how the model was trained and a SHA-256 of every file; its own `checksum`
covers the rest of the manifest and through it the whole directory. Nothing in an artifact is
code.

`graph.onnx` is the same network as spec and weights, written out for ONNX Runtime when the
model is packaged, and `decoder.onnx` one step of its decoder, where it has one. They decide no
number and are no part of the fingerprint. A model that no graph can hold has none, and its
manifest says why; one packaged before there were graphs gets its own from `add_graph`.

Loading refuses whatever is damaged, of another format or does not fit itself, and says
which file and why. Writing is atomic: a directory under the final name is complete.
Files that the manifest does not list are left alone and not read.
"""

from __future__ import annotations

import hashlib
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

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from models.decoder import decoder_weights
from models.errors import ArtifactError, GraphUnsupportedError, SpecError
from models.files import inside, replace_file, sync_directory, write_new
from models.fingerprint import canonical_json, fingerprint
from models.layout import OutputSpec, network_state, output_spec, state_spec, weight_shapes
from models.spec import ModelSpec, parse_spec
from models.state import StateSpec

FORMAT = 1
ONNXRUNTIME = "onnxruntime"
TENSORFLOW = "tensorflow"
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "weights.safetensors"
GRAPH_NAME = "graph.onnx"
DECODER_GRAPH_NAME = "decoder.onnx"

FloatArray = NDArray[np.float32]

_OWN_NAMES = (MANIFEST_NAME, WEIGHTS_NAME, GRAPH_NAME, DECODER_GRAPH_NAME)
_VERSION_DIGITS = 12
_UNSAID = {"chunking": "invisible"}
"""What a manifest means that was written before its key was."""
_LIBRARIES = (
    "carry",
    "keras",
    "numpy",
    "onnx",
    "polars",
    "pydantic",
    "safetensors",
    "tensorflow",
    "tensorflow-cpu",
)


@dataclass(frozen=True, eq=False)
class Artifact:
    """One loaded model.

    Attributes:
        path: its directory.
        spec: the fitted spec.
        weights: float32 arrays by name, read-only.
        fingerprint: 16 bytes; see `models.fingerprint`.
        version: the fingerprint's first 12 hexadecimal digits.
        manifest: the whole manifest as plain data.
        graph: the model's ONNX graph, or None where the artifact has none.
        decoder_graph: the ONNX graph of a decoder's step; None where there is no decoder or no
            graph.
    """

    path: Path
    spec: ModelSpec
    weights: Mapping[str, FloatArray]
    fingerprint: bytes
    version: str
    manifest: Mapping[str, Any]
    graph: bytes | None = None
    decoder_graph: bytes | None = None

    @cached_property
    def decoder(self) -> Artifact | None:
        """The network of a decoder's step, for runtimes, as if packaged by itself."""
        spec = self.spec.decoder_network
        if spec is None:
            return None
        weights = MappingProxyType(decoder_weights(self.weights))
        mark = fingerprint(spec, weights)
        return Artifact(
            self.path, spec, weights, mark, _version(mark), self.manifest, self.decoder_graph
        )

    @property
    def graph_refused(self) -> str | None:
        """Why no graph can hold the model; None where one can, or none was tried yet."""
        return self.manifest.get("graph_refused")

    @cached_property
    def state(self) -> StateSpec:
        """The layout of a stream's state."""
        return state_spec(self.spec)

    @cached_property
    def network_state(self) -> StateSpec:
        """The parts of it that a runtime takes and gives; they come first among its floats."""
        return network_state(self.spec)

    @cached_property
    def outputs(self) -> OutputSpec:
        """The layout of the outputs of one step."""
        return output_spec(self.spec)


def write_artifact(
    path: Path,
    spec: ModelSpec,
    weights: Mapping[str, FloatArray],
    *,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] = MappingProxyType({}),
    overwrite: bool = False,
) -> Artifact:
    """Write a model and return it as `load_artifact` reads it.

    Args:
        path: the directory to make; its parents are made too.
        spec: a fitted spec.
        weights: every weight of `models.layout.weight_shapes(spec)`, float32 and finite.
        metrics: what was measured, plain JSON data.
        training: how it was trained, plain JSON data.
        files: more files by name (such as `report.json`, `plots/skill.png`): their bytes, or
            the path of a file to copy.
        overwrite: whether an artifact that is already there is replaced.

    Raises:
        ArtifactError: spec or weights that do not fit, data that is not JSON, a file name
            that is taken or leads out of the directory, or a path that is occupied.
    """
    path = Path(path)
    _check_fitted(spec, str(path))
    _check_weights(spec, weights, str(path))
    graph = _graph(spec, weights, str(path))
    contents: dict[str, bytes] = {WEIGHTS_NAME: _weights_bytes(weights), **graph.files}
    for name, content in dict(files).items():
        if name in _OWN_NAMES or not inside(name):
            raise ArtifactError(f"{path}: expected a file name inside the artifact, got {name!r}")
        contents[name] = content.read_bytes() if isinstance(content, Path) else content
    manifest = _sealed(
        {
            "format": FORMAT,
            **_derived(spec, fingerprint(spec, weights)),
            "weights": WEIGHTS_NAME,
            **graph.facts,
            "metrics": dict(metrics or {}),
            "training": dict(training or {}),
            "libraries": _library_versions(),
            "files": {name: _file_entry(data) for name, data in sorted(contents.items())},
            "spec": spec.model_dump(mode="json"),
        },
        str(path),
    )
    _check_target(path, overwrite)

    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        made.mkdir()
        for name, data in contents.items():
            write_new(made / name, data)
        write_new(made / MANIFEST_NAME, _manifest_bytes(manifest))
        for folder in {made, *(made.joinpath(name).parent for name in contents)}:
            sync_directory(folder)
        artifact = load_artifact(made)
        _move_into_place(made, path)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return replace(artifact, path=path)


def load_artifact(path: Path) -> Artifact:
    """Read and check a model.

    Raises:
        ArtifactError: naming the file and the reason: no directory or no manifest there, a
            manifest that is not JSON, is of another format or fails its checksum, a file that
            is missing, changed or outside the directory, a spec that is wrong or not fitted,
            weights that do not fit it, or a state layout, outputs or fingerprint that do not
            follow from it.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    where = f"{path / MANIFEST_NAME}"
    contents = _read_files(path, manifest)
    try:
        spec = parse_spec(manifest.get("spec"), f"{where}: spec")
    except SpecError as error:
        raise ArtifactError(str(error)) from error
    _check_fitted(spec, where)
    name = manifest.get("weights")
    if not isinstance(name, str) or name not in contents:
        raise ArtifactError(f"{where}: expected `weights` to name one of its files, got {name!r}")
    weights = _read_weights(spec, contents[name], f"{path / name}")
    mark = fingerprint(spec, weights)
    for key, expected in _derived(spec, mark).items():
        given = manifest.get(key, _UNSAID.get(key))
        if given != expected:
            raise ArtifactError(
                f"{where}: `{key}` does not follow from spec and weights: "
                f"expected {_short(expected)}, got {_short(given)}"
            )
    return Artifact(
        path,
        spec,
        MappingProxyType(weights),
        mark,
        _version(mark),
        manifest,
        _listed(manifest, "graph", contents, where),
        _listed(manifest, "decoder_graph", contents, where),
    )


def _listed(
    manifest: Mapping[str, Any], key: str, contents: Mapping[str, bytes], where: str
) -> bytes | None:
    """The file that the manifest names under a key, if it names one."""
    name = manifest.get(key)
    if name is not None and name not in contents:
        raise ArtifactError(f"{where}: expected `{key}` to name one of its files: {name!r}")
    return None if name is None else contents[name]


def add_graph(path: Path) -> Artifact:
    """Write the graph of an artifact anew, in place; everything else stays as it is.

    At every moment the directory is a whole artifact, before with the old graph or with none.

    Raises:
        ArtifactError: the artifact is refused, or its graph cannot be written now.
        GraphUnsupportedError: no graph can hold the model; the manifest says so from now on.
    """
    path = Path(path)
    artifact = load_artifact(path)
    graph = _graph(artifact.spec, artifact.weights, str(path))
    manifest = dict(artifact.manifest)
    old = {manifest.pop(key, None) for key in ("graph", "decoder_graph")}
    manifest.pop("graph_refused", None)
    gone = {*old, GRAPH_NAME, DECODER_GRAPH_NAME}
    manifest["files"] = {
        name: entry for name, entry in manifest["files"].items() if name not in gone
    }
    if old != {None}:
        without = {**manifest, "runtimes": [TENSORFLOW]}
        replace_file(path / MANIFEST_NAME, _manifest_bytes(_sealed(without, str(path))))
    for name, data in graph.files.items():
        replace_file(path / name, data)
        manifest["files"][name] = _file_entry(data)
    manifest.update(graph.facts)
    replace_file(path / MANIFEST_NAME, _manifest_bytes(_sealed(manifest, str(path))))
    if graph.refused is not None:
        raise GraphUnsupportedError(f"{path}: {graph.refused}")
    return load_artifact(path)


@dataclass(frozen=True, slots=True)
class _Graph:
    """The graphs' files, or why there can be none."""

    data: bytes | None = None
    decoder: bytes | None = None
    refused: str | None = None

    @property
    def files(self) -> dict[str, bytes]:
        found = {GRAPH_NAME: self.data, DECODER_GRAPH_NAME: self.decoder}
        return {name: data for name, data in found.items() if data is not None}

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        if self.data is None:
            return {"runtimes": [TENSORFLOW], "graph_refused": self.refused}
        facts: dict[str, Any] = {"runtimes": [ONNXRUNTIME, TENSORFLOW], "graph": GRAPH_NAME}
        if self.decoder is not None:
            facts["decoder_graph"] = DECODER_GRAPH_NAME
        return facts


def _graph(spec: ModelSpec, weights: Mapping[str, FloatArray], where: str) -> _Graph:
    try:
        from models.onnx.graph import write_graph
    except ModuleNotFoundError as error:
        raise ArtifactError(
            f"{where}: packaging a model needs {error.name!r}: pip install onnx"
        ) from error
    try:
        network = spec.decoder_network
        decoder = None if network is None else write_graph(network, decoder_weights(weights))
        return _Graph(write_graph(spec, weights), decoder)
    except GraphUnsupportedError as error:
        return _Graph(refused=str(error))


def _derived(spec: ModelSpec, mark: bytes) -> dict[str, Any]:
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
        "fingerprint": mark.hex(),
        "version": _version(mark),
    }


def _sealed(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The manifest with its checksum, as plain data."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    try:
        # What is read back has lists for tuples and text for every key; it must be the same.
        plain: dict[str, Any] = json.loads(canonical_json({**rest, "checksum": _checksum(rest)}))
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{where}: expected metrics and training to be plain, finite JSON data, got {error}"
        ) from error
    return plain


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _file_entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}


def _checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ArtifactError(f"{path}: expected a directory with {MANIFEST_NAME}")
    file = path / MANIFEST_NAME
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{file}: expected a JSON object, got {type(manifest).__name__}")
    form = manifest.get("format")
    if form != FORMAT or isinstance(form, bool):
        raise ArtifactError(f"{file}: expected artifact format {FORMAT}, got {form!r}")
    try:
        expected = _checksum(manifest)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: expected finite numbers, got {error}") from error
    if manifest.get("checksum") != expected:
        raise ArtifactError(
            f"{file}: changed since it was written: its checksum is "
            f"{manifest.get('checksum')!r}, its content gives {expected!r}"
        )
    return manifest


def _read_files(path: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        raise ArtifactError(f"{path / MANIFEST_NAME}: expected `files`, an object")
    contents: dict[str, bytes] = {}
    for name, entry in listed.items():
        file = path / name
        if not inside(name) or not file.resolve().is_relative_to(path.resolve()):
            raise ArtifactError(
                f"{path / MANIFEST_NAME}: expected file names inside the artifact, got {name!r}"
            )
        if not isinstance(entry, dict):
            raise ArtifactError(f"{path / MANIFEST_NAME}: expected `files.{name}` to be an object")
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from error
        if len(data) != entry.get("size_bytes"):
            raise ArtifactError(
                f"{file}: expected {entry.get('size_bytes')} bytes, got {len(data)}"
            )
        if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
            raise ArtifactError(f"{file}: changed since it was written (SHA-256 differs)")
        contents[name] = data
    return contents


def _weights_bytes(weights: Mapping[str, FloatArray]) -> bytes:
    # safetensors writes the buffer as it lies, so a transposed view would be stored wrongly.
    return bytes(
        safetensors.numpy.save(
            {name: np.ascontiguousarray(array) for name, array in sorted(weights.items())}
        )
    )


def _read_weights(spec: ModelSpec, data: bytes, where: str) -> dict[str, FloatArray]:
    try:
        weights = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{where}: expected safetensors, got {error}") from error
    _check_weights(spec, weights, where)
    for array in weights.values():
        array.setflags(write=False)
    return dict(weights)


def _check_weights(spec: ModelSpec, weights: Mapping[str, NDArray[Any]], where: str) -> None:
    shapes = weight_shapes(spec)
    missing = sorted(shapes.keys() - weights.keys())
    unknown = sorted(weights.keys() - shapes.keys())
    if missing or unknown:
        raise ArtifactError(
            f"{where}: the weights do not fit the spec: missing {missing}, unknown {unknown}"
        )
    for name, shape in shapes.items():
        array = weights[name]
        if array.shape != shape or array.dtype != np.float32:
            raise ArtifactError(
                f"{where}: weight {name!r}: expected float32 {list(shape)}, "
                f"got {array.dtype} {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise ArtifactError(f"{where}: weight {name!r}: expected finite values")


def _check_fitted(spec: ModelSpec, where: str) -> None:
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
        raise ArtifactError(f"{path}: is there and is no artifact; expected a free path")
    if not overwrite:
        raise ArtifactError(f"{path}: holds an artifact already; expected a free path")


def _move_into_place(made: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        made.rename(path)
        sync_directory(path.parent)
        return
    old = path.parent / f".{path.name}.{secrets.token_hex(6)}.old"
    path.rename(old)
    try:
        made.rename(path)
    except OSError:
        old.rename(path)
        raise
    sync_directory(path.parent)
    shutil.rmtree(old)


def _library_versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _version(mark: bytes) -> str:
    return mark.hex()[:_VERSION_DIGITS]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}..."
