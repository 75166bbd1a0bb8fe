"""Checkpoints of long commands: one file of arrays and metadata, replaced atomically.

A checkpoint belongs to one run, which a key names; another run's is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from models.artifact.files import replace_file
from models.errors import ArtifactError

Arrays = Mapping[str, NDArray[Any]]


def write_checkpoint(path: Path, key: str, arrays: Arrays, **metadata: str) -> None:
    """Replace the checkpoint at once: a reader finds the old one or the new one."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    replace_file(path, save(contiguous, {**metadata, "key": key}))


def read_checkpoint(path: Path, key: str) -> tuple[Arrays, dict[str, str]]:
    """The arrays and the metadata that `write_checkpoint` wrote.

    Raises:
        ArtifactError: there is none, it is damaged, or it is another run's.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: there is no checkpoint to resume from") from error
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: expected a checkpoint, got {error}") from error
    if metadata.get("key") != key:
        raise ArtifactError(f"{path}: was made with another model or specification, or other data")
    return arrays, metadata
