"""`carry import`: package a Keras model as an artifact, proven equal to the original.

The model is read without running code of its own, translated layer by layer, and run
beside the original on random sequences (`models.importing.proof`). Nothing is written unless
every output agrees.

It refuses what cannot be carried, naming each layer by class and name with the reason,
and a packaged model whose outputs differ from the original's by more than
|a - b| <= 1e-5 + 1e-5 |b|.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import keras

from models.artifact import Artifact, write_artifact
from models.errors import ImportedModelError
from models.importing.graph import translate
from models.importing.proof import prove
from models.importing.reading import read_keras_model


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What was imported and how well it agrees with the original.

    Attributes:
        artifact: the artifact that was written.
        layers: Keras name, Keras class and name in the spec ("" where it was left out).
        notes: what the user should know, one sentence each.
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
    path: Path, out: Path, *, name: str | None = None, overwrite: bool = False
) -> ImportReport:
    """Package the model of a `.keras` or `.h5` file.

    Args:
        path: the file.
        out: the directory to make.
        name: the packaged model's name, a lower-case slug; the file's by default.
        overwrite: whether an artifact that is already there is replaced.

    Raises:
        ImportedModelError: the file cannot be read, holds layers that cannot be carried, or
            gives other numbers than the packaged model.
        ArtifactError: `out` is occupied.
    """
    path = Path(path)
    model = read_keras_model(path)
    try:
        translation = translate(model, name or _slug(path.stem))
    except ImportedModelError as error:
        raise ImportedModelError(f"{path}: {error}") from error
    lengths, batch, largest = prove(model, translation, str(path))
    imported = {
        "file": path.name,
        "keras": keras.__version__,
        "layers": [list(row) for row in translation.layers],
        "notes": list(translation.notes),
        "verified": {
            "lengths_steps": list(lengths),
            "sequences": batch,
            "largest_difference": largest,
        },
    }
    artifact = write_artifact(
        out,
        translation.spec,
        translation.weights,
        training={"imported": imported},
        overwrite=overwrite,
    )
    return ImportReport(artifact, translation.layers, translation.notes, lengths, batch, largest)


def _slug(stem: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:63] or "imported"
