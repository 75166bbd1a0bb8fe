"""Conversion of a Keras model file, verified against the original, in this process."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from numpy.typing import NDArray

from models.errors import ImportedModelError
from models.importing.graph import translate
from models.importing.reading import read_keras_model
from models.importing.result import Conversion
from models.importing.verification import verify


def convert(path: Path, name: str, where: str) -> tuple[Conversion, dict[str, NDArray[np.float32]]]:
    """Read a `.keras` or `.h5` file, translate its model and verify the translation.

    Args:
        path: the file; no other process may write to it.
        name: the packaged model's name, a lower-case slug.
        where: the file's name, for errors.

    Returns:
        The conversion, and the weights by name.

    Raises:
        ImportedModelError: the file cannot be read, has unsupported layers, or its outputs differ
            from the translation's.
        MemoryError: the process reached its memory limit.
    """
    model = read_keras_model(path, where)
    try:
        translation = translate(model, name)
    except ImportedModelError as error:
        raise ImportedModelError(f"{where}: {error}") from error
    lengths, sequences, largest = verify(model, translation, where)
    conversion = Conversion(
        spec=translation.spec.model_dump(mode="json"),
        keras=keras.__version__,
        layers=translation.layers,
        notes=translation.notes,
        lengths_steps=lengths,
        sequences=sequences,
        largest_difference=largest,
    )
    return conversion, translation.weights
