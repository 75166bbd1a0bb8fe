"""`carry import`: import a Keras model as an artifact, verified against the original.

A separate process with resource limits (`models.importing.isolation`) reads the model without
running its code, translates it layer by layer, and compares it with the original on random
sequences (`models.importing.verification`). This process takes specification and weights from there
as untrusted data, and packages them. Nothing is written unless every output agrees.

Models with unsupported layers are rejected, with each layer's class, name and reason, and so is an
imported model whose outputs differ from the original's by more than |a - b| <= 1e-5 + 1e-5 |b|.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from models.artifact.artifact import Artifact, write_artifact
from models.artifact.weights import read_weights
from models.errors import ArtifactError, ImportedModelError, SpecError
from models.importing.isolation import Limits, convert_isolated
from models.importing.result import Conversion
from models.spec.model import parse_spec


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What was imported and how closely it matches the original.

    Attributes:
        artifact: the artifact that was written.
        layers: Keras name, Keras class and name in the spec ("" if it was omitted).
        notes: notes for the user, one sentence each.
        lengths_steps: lengths of the random sequences it was verified on, in order.
        sequences: how many sequences of each length.
        largest_difference: largest |a - b| over all outputs of all sequences.
    """

    artifact: Artifact
    layers: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    lengths_steps: tuple[int, ...]
    sequences: int
    largest_difference: float


def import_keras_model(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    overwrite: bool = False,
    reset_every: int | None = None,
    limits: Limits | None = None,
) -> ImportReport:
    """Package the model of a `.keras` or `.h5` file, or of a SavedModel folder of Keras 2.

    Args:
        path: the file or folder.
        out: the directory to make.
        name: the packaged model's name, a lower-case slug; the file's by default.
        overwrite: whether an artifact that is already there is replaced.
        reset_every: the model's `reset_every`.
        limits: resource limits for reading and verifying the model.

    Raises:
        ImportedModelError: the file cannot be read, has unsupported layers, gives
            other numbers than the packaged model, or reached a limit.
        ArtifactError: `out` is occupied.
    """
    path = Path(path)
    conversion, weights = convert_isolated(path, name or slug(path.stem), limits or Limits())
    return package(path, conversion, weights, out, overwrite=overwrite, reset_every=reset_every)


def package(
    path: Path,
    conversion: Conversion,
    weights: bytes,
    out: Path,
    *,
    overwrite: bool = False,
    reset_every: int | None = None,
) -> ImportReport:
    """Write the artifact of a converted model.

    Args:
        path: the original file.
        conversion: the converted model; validated here.
        weights: safetensors; validated here.
        out: the directory to make.
        overwrite: whether an artifact that is already there is replaced.
        reset_every: the model's `reset_every`.

    Raises:
        ImportedModelError: specification and weights do not fit each other.
        ArtifactError: `out` is occupied.
    """
    try:
        data = {**conversion.spec, "reset_every": reset_every}
        spec = parse_spec(data, f"{path}: the imported model")
        arrays = read_weights(spec, weights, str(path))
    except (SpecError, ArtifactError) as error:
        raise ImportedModelError(str(error)) from error
    origin = {
        "file": path.name,
        "keras": conversion.keras,
        "layers": conversion.layers,
        "notes": conversion.notes,
        "verified": {
            "lengths_steps": conversion.lengths_steps,
            "sequences": conversion.sequences,
            "largest_difference": conversion.largest_difference,
        },
    }
    artifact = write_artifact(out, spec, arrays, training={"imported": origin}, overwrite=overwrite)
    notes = conversion.notes
    if artifact.graphs.refused is not None:
        notes += (
            f"only TensorFlow can run this model: {artifact.graphs.refused}. A service with it "
            "needs the extra `tensorflow` and about 1 GiB more memory in each worker",
        )
    return ImportReport(
        artifact,
        conversion.layers,
        notes,
        conversion.lengths_steps,
        conversion.sequences,
        conversion.largest_difference,
    )


def slug(stem: str) -> str:
    """Turn a file name into a model name."""
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:63] or "imported"
