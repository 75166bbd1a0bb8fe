"""`carry import`: import a Keras model or an ONNX graph as an artifact, verified.

A separate process with resource limits (`models.importing.isolation`) reads the model without
running its code. A Keras model is translated layer by layer, and compared with the original on
random sequences (`models.importing.verification`); the states and axes of an ONNX graph are found,
and what the service promises of it is measured (`models.importing.onnx_proof`). This process takes
the result as untrusted data, and packages it. Nothing is written unless every comparison agrees.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.artifact.artifact import Artifact
from models.artifact.files import open_regular
from models.artifact.weights import read_weights
from models.artifact.writing import write_artifact
from models.errors import ArtifactError, ImportedModelError, SpecError
from models.importing.isolation import (
    Converted,
    KerasOptions,
    Limits,
    OnnxOptions,
    convert_isolated,
    replace_control_characters,
)
from models.importing.triton_config import MAX_CONFIG_BYTES
from models.spec.model import parse_spec
from models.spec.onnx_network import Axes, OnnxNetwork

MAX_INITIAL_BYTES = 2**24
MAX_LABEL_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What was imported, and how it was verified.

    Attributes:
        artifact: the artifact that was written.
        notes: notes for the user, one sentence each.
        verified: what was compared or measured, by name. Of a Keras model `lengths_steps`, the
            lengths of the random sequences, `sequences`, how many of each, and
            `largest_difference`, the largest |a - b| over all their outputs.
        layers: Keras name, Keras class and name in the spec ("" if it was left out).
    """

    artifact: Artifact
    notes: tuple[str, ...]
    verified: Mapping[str, Any]
    layers: tuple[tuple[str, str, str], ...] = ()

    def lines(self) -> list[str]:
        """The report as lines of text."""
        network, checks = self.artifact.spec.onnx, self.verified
        lines = [] if network is None else _graph_lines(network, checks)
        if "largest_difference" in checks:
            lines += [
                f"equal to the original within {checks['largest_difference']:.1e} on "
                f"{checks['sequences']} sequences each of {sorted(set(checks['lengths_steps']))} "
                "steps"
            ]
        lines += [f"note: {note}" for note in self.notes]
        return list(map(replace_control_characters, lines))


def import_keras_model(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    overwrite: bool = False,
    reset_every: int | None = None,
    limits: Limits | None = None,
    code: Path | None = None,
    states: Sequence[str] = (),
) -> ImportReport:
    """Package the model of a `.keras` or `.h5` file, or of a SavedModel folder of Keras 2.

    Args:
        path: the file or folder.
        out: the directory to make.
        name: the packaged model's name, a lower-case slug; the file's by default.
        overwrite: whether an artifact that is already there is replaced.
        reset_every: the model's `reset_every`.
        limits: resource limits for reading and verifying the model.
        code: a Python file with the model's own classes and functions. It is run, in the process
            that reads the model: give only code that you trust.
        states: state pairs, `IN=OUT`, of a model with states as inputs that names do not tell.

    Raises:
        ImportedModelError: the file cannot be read, has unsupported layers (each is named with the
            reason), gives outputs that differ from the packaged model's by more than |a - b| <=
            1e-5 + 1e-5 |b|, or reached a limit.
        ArtifactError: `out` is occupied.
    """
    path, pairs = Path(path), _split("--state", states, "NAME_OF_INPUT=NAME_OF_OUTPUT")
    options = KerasOptions(code=None if code is None else str(code.resolve()), states=pairs)
    converted = convert_isolated(path, name or slug(path.stem), options, limits or Limits())
    return package(path, converted, out, overwrite=overwrite, reset_every=reset_every)


def import_onnx_model(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    options: OnnxOptions | None = None,
    overwrite: bool = False,
    reset_every: int | None = None,
    limits: Limits | None = None,
) -> ImportReport:
    """Package an ONNX graph whose states are inputs and outputs; the rest as `import_keras_model`.

    Args:
        name: the packaged model's name, a lower-case slug; `default_name` otherwise.
        options: what is known of the graph; the rest is found.

    Raises:
        ImportedModelError: the graph cannot be served, its state pairs are not certain, or a limit
            was reached; the message gives the reason and an alternative.
        ArtifactError: `out` is occupied.
    """
    path, options = Path(path), options or OnnxOptions()
    own_name = name or default_name(path, options)
    converted = convert_isolated(path, own_name, options, limits or Limits())
    return package(path, converted, out, overwrite=overwrite, reset_every=reset_every)


def onnx_options(
    *,
    states: Sequence[str] = (),
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    lengths: str | None = None,
    mask: str | None = None,
    initial: Sequence[str] = (),
    constants: Sequence[str] = (),
    features: int | None = None,
    context: int | None = None,
    labels: Sequence[str] = (),
    axes: Axes | None = None,
    triton: Path | None = None,
) -> OnnxOptions:
    """The options of an import, from those of the command line; the rest as in `OnnxOptions`.

    Args:
        states: state pairs, `IN=OUT`.
        initial: initial values, `IN=NUMBER` or `IN=FILE.npy`.
        constants: values of inputs, `IN=NUMBER`.
        labels: names along the last axis of outputs, `OUT=NAME,NAME`, or a text file with one name
            a line, `OUT=FILE.txt`.
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
    fixed: dict[str, float] = {}
    for name, value in _split("--constant", constants, "NAME=NUMBER").items():
        try:
            fixed[name] = float(value)
        except ValueError:
            raise ImportedModelError(f"--constant {name}={value}: expected NAME=NUMBER") from None
    return OnnxOptions(
        states=_split("--state", states, "NAME_OF_INPUT=NAME_OF_OUTPUT"),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        lengths=lengths,
        mask=mask,
        initial=values,
        constants=fixed,
        features=features,
        context=context,
        labels={
            output: _read_labels(value)
            for output, value in _split("--labels", labels, "OUTPUT=NAME,NAME").items()
        },
        axes=axes,
        triton=text,
        triton_folder=None if triton is None else str(triton.parent.resolve()),
    )


def slug(stem: str) -> str:
    """Turn a file name into a model name."""
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:63] or "imported"


def default_name(path: Path, options: OnnxOptions) -> str:
    """The file's name as a model name; the folder's for a model of Triton.

    All files of a Triton repository are called `model.onnx`, and its models are named by folder.
    """
    folder = options.triton_folder
    return slug(path.stem if folder is None else Path(folder).name)


def package(
    path: Path,
    converted: Converted,
    out: Path,
    *,
    overwrite: bool = False,
    reset_every: int | None = None,
) -> ImportReport:
    """Write the artifact of a converted model, which is validated here.

    Args:
        path: the original file.
        out: the directory to make.

    Raises:
        ImportedModelError: specification, weights and graph do not fit each other.
        ArtifactError: `out` is occupied.
    """
    conversion, weights, graph = converted
    try:
        data = {**conversion.spec, "reset_every": reset_every}
        spec = parse_spec(data, f"{path}: the imported model")
        arrays = read_weights(spec, weights, str(path))
    except (SpecError, ArtifactError) as error:
        raise ImportedModelError(str(error)) from error
    # a name that is not UTF-8 cannot be in JSON
    file = path.name.encode("utf-8", "replace").decode()
    origin = {"file": file, **conversion.model_dump(exclude={"spec"}, exclude_defaults=True)}
    training = {"imported": origin}
    artifact = write_artifact(
        out, spec, arrays, network=graph, training=training, overwrite=overwrite
    )
    notes = conversion.notes
    if artifact.graphs.rejection is not None:
        notes += (
            f"only TensorFlow can run this model: {artifact.graphs.rejection}. A service with it "
            "needs the extra `tensorflow` and about 1 GiB more memory in each worker",
        )
    return ImportReport(artifact, notes, conversion.verified, conversion.layers)


def _graph_lines(network: OnnxNetwork, checks: Mapping[str, Any]) -> list[str]:
    states = ", ".join(
        f"{pair.input} -> {pair.output} {pair.dtype} {list(pair.shape)}, batch axis "
        f"{pair.batch_axis}"
        for pair in network.states
    )
    outputs = ", ".join(f"{output.name} {list(output.shape)}" for output in network.outputs)
    measured = ", ".join(
        f"{name.replace('_', ' ')} " + (f"within {checks[name]:.1e}" if checks[name] else "exactly")
        for name in ("batch_equals_alone", "cut_equals_whole", "padding_invisible")
        if name in checks
    )
    times = ", ".join(f"{name} {us} us" for name, us in checks["us_per_step"].items())
    return [
        f"features: {', '.join(each.name for each in network.inputs)}, {network.features} "
        f"columns, {network.axes}",
        f"states: {states}",
        f"outputs: {outputs}",
        f"chunking: {network.chunking}; measured: {measured}",
        f"batching: {network.batching} (a step of rows of different lengths: {times})",
    ]


def _split(option: str, given: Sequence[str], form: str) -> dict[str, str]:
    """Options of the form `NAME=VALUE`."""
    values: dict[str, str] = {}
    for each in given:
        name, _, value = each.partition("=")
        if not name or not value or name in values:
            raise ImportedModelError(f"{option} {each}: expected {form}, each name once")
        values[name] = value
    return values


def _read_labels(value: str) -> tuple[str, ...]:
    """Names separated by commas, or the lines of a text file."""
    if not value.endswith(".txt"):
        return tuple(value.split(","))
    text = _read(Path(value), MAX_LABEL_BYTES).decode("utf-8", "replace")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _read(file: Path, most_bytes: int) -> bytes:
    try:
        with open_regular(file) as stream:
            data = stream.read(most_bytes + 1)
    except OSError as error:
        raise ImportedModelError(f"{file}: cannot be read: {error.strerror}") from error
    if len(data) > most_bytes:
        raise ImportedModelError(f"{file}: expected at most {most_bytes} bytes")
    return data
