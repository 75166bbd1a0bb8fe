"""`carry import`: package a Keras model as an artifact, proven equal to the original.

The model is read without running code of its own, translated layer by layer, and run
beside the original on random sequences of several lengths, cut at random with the state
carried from cut to cut. Nothing is written unless every output agrees.

It refuses what cannot be carried, naming each layer by class and name with the reason,
and a packaged model whose outputs differ from the original's by more than
|a - b| <= 1e-5 + 1e-5 |b|.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact, write_artifact
from models.errors import ImportedModelError
from models.importing.graph import Translation, functional_of, translate
from models.importing.reading import read_keras_model
from models.layout import output_spec, state_spec
from models.networks.build import StepNetwork
from models.state import State

ABSOLUTE_TOLERANCE = 1e-5
RELATIVE_TOLERANCE = 1e-5
LENGTHS_STEPS = (1, 2, 7, 33)
"""Lengths of the random sequences, where the model does not fix the number of steps."""
BATCH = 3
SEED = 20240229

Floats = NDArray[np.float32]


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
    lengths, batch, largest = _verify(model, translation, str(path))
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


def _verify(model: Any, translation: Translation, where: str) -> tuple[tuple[int, ...], int, float]:
    """Run both on random sequences; lengths, sequences of each, and the largest difference.

    A model with `stateful=True` keeps its state from one sequence to the next, and so does
    the packaged one beside it.
    """
    network = StepNetwork(translation.spec)
    network.set_weights(translation.weights)
    fixed_batch, fixed_steps, features = tuple(functional_of(model).inputs[0].shape)
    batch = int(fixed_batch or BATCH)
    lengths = (int(fixed_steps),) * 3 if fixed_steps else LENGTHS_STEPS
    stateful = _reset(model)
    random = np.random.default_rng(SEED)
    zero = np.zeros((batch, network.state_size), np.float32)
    state, largest = zero, 0.0
    for length in lengths:
        rows = random.standard_normal((batch, length, features)).astype(np.float32)
        wanted = _original(model, rows)
        outputs, state = _in_cuts(network, rows, state if stateful else zero, random)
        for output in translation.outputs:
            found = _found(translation, output.head, output.part, outputs, state)
            if output.last_only:
                found = found[:, -1]
            largest = max(largest, _difference(found, wanted[output.index], length, where))
    return lengths, batch, largest


def _original(model: Any, rows: Floats) -> list[Floats]:
    given = keras.tree.map_structure(lambda _: rows, functional_of(model).input)
    return [np.asarray(value) for value in keras.tree.flatten(model(given, training=False))]


def _in_cuts(
    network: StepNetwork, rows: Floats, state: Floats, random: np.random.Generator
) -> tuple[Floats, Floats]:
    """The packaged model over the same rows, in chunks of 1 to 5 steps."""
    parts, at = [], 0
    while at < rows.shape[1]:
        chunk = rows[:, at : at + int(random.integers(1, 6))]
        lengths = np.full(len(rows), chunk.shape[1], np.int32)
        outputs, after = network.step(chunk, lengths, state)
        parts.append(np.asarray(outputs))
        state = np.asarray(after)
        at += chunk.shape[1]
    return np.concatenate(parts, axis=1), state


def _found(
    translation: Translation, head: str | None, part: str | None, outputs: Floats, state: Floats
) -> Floats:
    if head is not None:
        return output_spec(translation.spec).by_name(outputs)[head]
    layout = state_spec(translation.spec)
    ints = np.zeros(0, np.int64)
    return np.stack([layout.by_name(State(row, ints))[str(part)] for row in state])


def _difference(found: Floats, wanted: Floats, length: int, where: str) -> float:
    if found.shape != wanted.shape or not np.isfinite(wanted).all():
        raise ImportedModelError(
            f"{where}: expected finite outputs of shape {list(found.shape)} on a random "
            f"sequence of {length} steps, the original gives {list(wanted.shape)}"
        )
    gap = np.abs(np.float64(found) - wanted)
    excess = gap / (ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * np.abs(wanted))
    if not (excess <= 1).all():
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        raise ImportedModelError(
            f"{where}: the packaged model gives {found[worst]!r} where the original gives "
            f"{wanted[worst]!r} (sequence of {length} steps, largest difference "
            f"{gap.max():.3g}); expected |a - b| <= 1e-5 + 1e-5 |b|. Large recurrent weights "
            "make a network chaotic: any two float32 programs part there"
        )
    return float(gap.max())


def _reset(model: Any) -> bool:
    """Zero the states of `stateful=True` layers, nested ones included; whether there are any."""
    found = False
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False) and hasattr(layer, "reset_state"):
            layer.reset_state()
            found = found or isinstance(layer, keras.layers.RNN)
    return found


def _slug(stem: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:63] or "imported"
