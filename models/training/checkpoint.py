"""Training checkpoints: one file, replaced atomically after every epoch, to resume from.

The file holds the weights, their average, the optimiser's moments, the best weights so far,
the states in which segments ended, and as metadata the finished epochs. It belongs to one spec
and one table; others are rejected. Invariant: a run that is interrupted after any epoch and resumed
ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from models.artifact.fingerprint import canonical_json
from models.errors import ArtifactError
from models.spec.model import ModelSpec
from models.training.labels import Labels

FORMAT = "1"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One epoch's end.

    Attributes:
        arrays: everything numeric, by name.
        history: one record per epoch done.
    """

    arrays: Mapping[str, NDArray[Any]]
    history: tuple[dict[str, Any], ...]


def checkpoint_path(out: Path) -> Path:
    """Where training for the artifact `out` keeps its checkpoint."""
    return out.parent / f".{out.name}.checkpoint.safetensors"


def training_key(
    spec: ModelSpec,
    rows: NDArray[np.float32],
    spans: tuple[tuple[int, int], ...],
    labels: Labels,
) -> str:
    """A digest of all that determines a training run: the fitted spec, encoded data, labels."""
    digest = hashlib.sha256(canonical_json(spec.model_dump(mode="json")))
    digest.update(np.ascontiguousarray(rows).tobytes())
    digest.update(np.asarray(spans, np.int64).tobytes())
    for name, values in labels.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def write_checkpoint(path: Path, key: str, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint at once: a reader finds the old one or the new one."""
    metadata = {"format": FORMAT, "key": key, "history": json.dumps(list(checkpoint.history))}
    arrays = {name: np.ascontiguousarray(array) for name, array in checkpoint.arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(save(arrays, metadata))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_checkpoint(path: Path, key: str) -> Checkpoint:
    """Read what `write_checkpoint` wrote.

    Raises:
        ArtifactError: there is none, it is damaged, or it is of another spec or other data.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: there is no checkpoint to resume from") from error
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: expected a checkpoint, got {error}") from error
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path}: expected checkpoint format {FORMAT}")
    if metadata.get("key") != key:
        raise ArtifactError(f"{path}: was made with another spec or other data")
    return Checkpoint(arrays, tuple(json.loads(metadata["history"])))
