"""Loads artifacts: directories with `manifest.json`, weights, graphs and reports.

The manifest contains the spec, derived data (state layout, outputs, fingerprint), the supported
runtimes, training metadata and a SHA-256 of every file; its `checksum`
covers the rest of the manifest and thereby the whole directory. An artifact contains no
code.

`graph.onnx` is the network of spec and weights, exported when the model is packaged, and
`decoder.onnx` one step of its decoder, if it has one. They are for other programs: loading
verifies them like every file, but the service derives its graphs from spec and weights, so
that no file can change an output without changing the fingerprint. A model that cannot be
exported has no graph, and its manifest gives the reason.

The network of an imported ONNX model is the graph itself: there, `graph.onnx` is what runs, and the
fingerprint covers its bytes. A graph is rejected if it refers to data outside of itself, or if its
work may depend on the values of its inputs.

Loading rejects artifacts that are damaged, of another format or inconsistent; errors name the file
and the reason. Files that the manifest does not list are ignored. The modules `manifest`, `weights`
and `graphs` handle the parts, this one the directory as a whole; `writing` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from models.artifact.fingerprint import compute_fingerprint, version_of
from models.artifact.graphs import (
    Graphs,
    write_graphs,
)
from models.artifact.manifest import (
    MANIFEST_NAME,
    file_entry,
    read_files,
    read_manifest,
)
from models.artifact.ranges import Ranges, ranges_of
from models.artifact.weights import read_weights
from models.errors import ArtifactError, SpecError
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

_DEFAULTS = {"chunking": "invisible"}
"""Values of keys that older manifests do not have."""


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
        ranges: of inputs and states on training data; None if they were not measured.
    """

    path: Path
    spec: ModelSpec
    weights: Mapping[str, FloatArray]
    fingerprint: bytes
    version: str
    manifest: Mapping[str, Any]
    network: bytes | None = None
    ranges: Ranges | None = None

    @property
    def burn_in(self) -> int | None:
        """Events after which a state no longer depends on where it was started, within a tolerance.

        None if that was not measured, or if the model does not forget within the windows that it
        was measured on.
        """
        measured = self.manifest.get("burn_in")
        return None if measured is None else measured["events"]

    @cached_property
    def decoder(self) -> Artifact | None:
        """The network of one decoder step as a separate model, for runtimes."""
        spec = self.spec.decoder_network
        if spec is None:
            return None
        weights = MappingProxyType(strip_decoder_prefix(self.weights))
        digest = compute_fingerprint(spec, weights)
        return Artifact(self.path, spec, weights, digest, version_of(digest.hex()), self.manifest)

    @cached_property
    def graphs(self) -> Graphs:
        """The model's ONNX graphs, or the reason why there are none."""
        if self.network is not None:
            return Graphs(self.network, imported=True)
        return write_graphs(self.spec, self.weights)

    def with_alarm_rate(self, rate: float) -> Artifact:
        """A copy of the model, with the same fingerprint, whose alarms follow another rate.

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
    check_fitted(spec, where)
    weights = read_weights(spec, data, f"{path / str(manifest['weights'])}")
    if network is not None and spec.onnx is not None:
        from models.onnx.bounded_work import check_imported_graph  # for imported graphs alone

        check_imported_graph(network, spec.onnx, f"{path / str(manifest['graph'])}")
    digest = compute_fingerprint(spec, weights, network)
    for key, expected in derived_entries(spec, digest).items():
        given = manifest.get(key, _DEFAULTS.get(key))
        if given != expected:
            raise ArtifactError(
                f"{where}: `{key}` differs from that of spec and weights: "
                f"expected {_short(expected)}, got {_short(given)}; if the artifact is one "
                "of another version of Carry: train or import it again"
            )
    for key in ("graph", "decoder_graph"):
        given = manifest.get(key)
        if given is not None and not (isinstance(given, str) and given in manifest["files"]):
            raise ArtifactError(f"{where}: expected `{key}` to name one of its files: {given!r}")
    for key in ("metrics", "training"):
        if not isinstance(manifest.get(key, {}), dict):
            raise ArtifactError(f"{where}: expected `{key}` to be an object")
    _check_burn_in(manifest.get("burn_in"), where)
    return Artifact(
        path,
        spec,
        MappingProxyType(weights),
        digest,
        version_of(digest.hex()),
        manifest,
        network,
        ranges_of(spec, manifest, where),
    )


def _check_burn_in(measured: Any, where: str) -> None:
    if measured is None:
        return
    events = measured.get("events", 0) if isinstance(measured, dict) else 0
    if events is not None and (type(events) is not int or events < 1):
        raise ArtifactError(f"{where}: expected `burn_in.events`, at least 1 or null")


def derived_entries(spec: ModelSpec, digest: bytes) -> dict[str, Any]:
    """The entries of the manifest that follow from spec and fingerprint."""
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
        "version": version_of(digest.hex()),
    }


def check_fitted(spec: ModelSpec, where: str) -> None:
    """Raise ArtifactError if a specification lacks fitted numbers."""
    if spec.detection is not None and spec.detection.fit is None:
        raise ArtifactError(f"{where}: expected a fitted `detection`, as `carry train` writes it")
    if spec.events is not None and not spec.events.fitted:
        open_fields = [field.name for field in spec.events.fields if not field.fitted]
        raise ArtifactError(
            f"{where}: expected a fitted event schema, but these fields lack their numbers: "
            f"{open_fields}"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}..."
