"""`carry import MODEL.onnx`: import an ONNX graph with state pairs as an artifact.

A separate process with resource limits (`models.importing.isolation`) reads the graph, finds its
state pairs (`state_pairs`) and axes (`onnx_axes`), and measures what the service promises
(`onnx_proof`). This process takes graph and signature from there as untrusted data, and packages
them. Nothing is written unless the measurements agree.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.artifact.artifact import Artifact, write_artifact
from models.artifact.files import open_regular
from models.artifact.weights import read_weights
from models.errors import ArtifactError, ImportedModelError, SpecError
from models.importing.isolation import Limits, convert_onnx_isolated
from models.importing.keras_model import slug
from models.importing.onnx_options import OnnxConversion, OnnxOptions
from models.importing.triton_config import MAX_CONFIG_BYTES
from models.spec.model import parse_spec

MAX_INITIAL_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class OnnxReport:
    """What was imported, and what was measured.

    Attributes:
        artifact: the artifact that was written.
        notes: notes for the user, one sentence each.
        verified: the measurements, by name.
    """

    artifact: Artifact
    notes: tuple[str, ...]
    verified: Mapping[str, Any]

    def lines(self) -> list[str]:
        """The report as lines of text."""
        spec, checks = self.artifact.spec, self.verified
        network = spec.onnx
        if network is None:
            return []
        states = ", ".join(
            f"{pair.input} -> {pair.output} {pair.dtype} {list(pair.shape)}, batch axis "
            f"{pair.batch_axis}"
            for pair in network.states
        )
        outputs = ", ".join(f"{output.name} {list(output.shape)}" for output in network.outputs)
        measured = [
            f"{name.replace('_', ' ')} {_within(checks[name])}"
            for name in ("batch_equals_alone", "cut_equals_whole", "padding_invisible")
            if name in checks
        ]
        times = ", ".join(f"{name} {us} us" for name, us in checks["us_per_step"].items())
        return [
            f"features: {', '.join(each.name for each in network.inputs)}, {network.features} "
            f"columns, {network.axes}",
            f"states: {states}",
            f"outputs: {outputs}",
            f"chunking: {network.chunking}; measured: {', '.join(measured)}",
            f"batching: {network.batching} (a step of rows of different lengths: {times})",
            *(f"note: {note}" for note in self.notes),
        ]


def onnx_options(
    *,
    states: Sequence[str] = (),
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    lengths: str | None = None,
    mask: str | None = None,
    initial: Sequence[str] = (),
    axes: Literal["batch_major", "time_major", "step"] | None = None,
    triton: Path | None = None,
) -> OnnxOptions:
    """The options of an import, from those of the command line.

    Args:
        states: state pairs, `IN=OUT`.
        inputs: inputs of features.
        outputs: outputs to serve.
        lengths: the input of lengths.
        mask: the input of the mask.
        initial: initial values, `IN=NUMBER` or `IN=FILE.npy`.
        axes: the order of the axes.
        triton: Triton's `config.pbtxt` of the model.

    Raises:
        ImportedModelError: an option is not of this form, or a file cannot be read.
    """
    text = None if triton is None else _read(triton, MAX_CONFIG_BYTES).decode("utf-8", "replace")
    values: dict[str, float | str] = {}
    for name, value in _split("--initial", initial, "NAME=VALUE or NAME=FILE.npy").items():
        try:
            values[name] = float(value)
        except ValueError:
            data = _read(Path(value), MAX_INITIAL_BYTES)
            values[name] = base64.b64encode(data).decode("ascii")
    return OnnxOptions(
        states=_split("--state", states, "NAME_OF_INPUT=NAME_OF_OUTPUT"),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        lengths=lengths,
        mask=mask,
        initial=values,
        axes=axes,
        triton=text,
        triton_folder=None if triton is None else str(triton.parent.resolve()),
    )


def import_onnx_model(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    options: OnnxOptions | None = None,
    overwrite: bool = False,
    reset_every: int | None = None,
    limits: Limits | None = None,
) -> OnnxReport:
    """Package an ONNX graph whose states are inputs and outputs.

    Args:
        path: the file.
        out: the directory to make.
        name: the packaged model's name, a lower-case slug; `default_name` otherwise.
        options: what is known of the graph; the rest is found.
        overwrite: whether an artifact that is already there is replaced.
        reset_every: the model's `reset_every`.
        limits: resource limits for reading and measuring the model.

    Raises:
        ImportedModelError: the graph cannot be served, its state pairs are not certain, or a limit
            was reached; the message gives the reason and an alternative.
        ArtifactError: `out` is occupied.
    """
    path, options = Path(path), options or OnnxOptions()
    conversion, initial, graph = convert_onnx_isolated(
        path, name or default_name(path, options), options, limits or Limits()
    )
    return package_onnx(
        path, conversion, initial, graph, out, overwrite=overwrite, reset_every=reset_every
    )


def default_name(path: Path, options: OnnxOptions) -> str:
    """The file's name as a model name; the folder's for a model of Triton.

    All files of a Triton repository are called `model.onnx`, and its models are named by folder.
    """
    folder = options.triton_folder
    return slug(path.stem if folder is None else Path(folder).name)


def package_onnx(
    path: Path,
    conversion: OnnxConversion,
    initial: bytes,
    graph: bytes,
    out: Path,
    *,
    overwrite: bool = False,
    reset_every: int | None = None,
) -> OnnxReport:
    """Write the artifact of a converted graph.

    Args:
        path: the original file.
        conversion: the converted model; validated here.
        initial: initial values as safetensors; validated here.
        graph: the ONNX file, with all its data.
        out: the directory to make.
        overwrite: whether an artifact that is already there is replaced.
        reset_every: the model's `reset_every`.

    Raises:
        ImportedModelError: signature, initial values and graph do not fit each other.
        ArtifactError: `out` is occupied.
    """
    try:
        data = {**conversion.spec, "reset_every": reset_every}
        spec = parse_spec(data, f"{path}: the imported model")
        weights = read_weights(spec, initial, str(path))
    except (SpecError, ArtifactError) as error:
        raise ImportedModelError(str(error)) from error
    origin = {"file": path.name, "notes": conversion.notes, "verified": conversion.verified}
    artifact = write_artifact(
        out, spec, weights, network=graph, training={"imported": origin}, overwrite=overwrite
    )
    return OnnxReport(artifact, conversion.notes, conversion.verified)


def _within(distance: float) -> str:
    return f"within {distance:.1e}" if distance else "exactly"


def _split(option: str, given: Sequence[str], form: str) -> dict[str, str]:
    """Options of the form `NAME=VALUE`."""
    values: dict[str, str] = {}
    for each in given:
        name, mark, value = each.partition("=")
        if not mark or not name or not value or name in values:
            raise ImportedModelError(f"{option} {each}: expected {form}, each name once")
        values[name] = value
    return values


def _read(file: Path, most_bytes: int) -> bytes:
    try:
        with open_regular(file) as stream:
            data = stream.read(most_bytes + 1)
    except OSError as error:
        raise ImportedModelError(f"{file}: cannot be read: {error.strerror}") from error
    if len(data) > most_bytes:
        raise ImportedModelError(f"{file}: expected at most {most_bytes} bytes")
    return data
