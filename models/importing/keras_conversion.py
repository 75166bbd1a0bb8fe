"""Converts a Keras model file: layer by layer to a specification, or else to an ONNX graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
from numpy.typing import NDArray

from models.errors import ImportedModelError
from models.importing.isolation import Conversion, KerasOptions
from models.importing.keras_export import export_keras
from models.importing.keras_file import read_keras_model
from models.importing.keras_graph import translate
from models.importing.keras_quantised import dequantise
from models.importing.verification import verify

ALONE = (
    "in which layers read one event at a time, and the past only from the state of an RNN (of any "
    "cell), of a causal Conv1D, or of inputs whose new values are outputs"
)


def convert_keras(
    path: Path,
    name: str,
    options: KerasOptions | None = None,
) -> tuple[Conversion, dict[str, NDArray[Any]], bytes | None]:
    """Read a Keras model, convert it and verify the result, in this process.

    Args:
        path: a `.keras` or `.h5` file, or a SavedModel folder of Keras 2; no other process may
            write to it.
        name: the packaged model's name, a lower-case slug.
        options: what the user says about it.

    Returns:
        The conversion, the weights (or initial values) by name, and the graph if it has one.

    Raises:
        ImportedModelError: the file cannot be read, or the outputs of the converted model differ
            from the original's.
        MemoryError: the process reached its memory limit.
    """
    options = options or KerasOptions()
    model = read_keras_model(path, Path(options.code) if options.code else None)
    model = getattr(model, "_functional", None) or model
    model, notes = dequantise(model)
    try:
        translation = translate(model, name)
    except ImportedModelError as error:
        conversion, values, graph = _export(model, name, options, error)
        return conversion.model_copy(update={"notes": (*notes, *conversion.notes)}), values, graph
    conversion = Conversion(
        spec=translation.spec.model_dump(mode="json"),
        keras=keras.__version__,
        layers=translation.layers,
        notes=(*notes, *translation.notes),
        verified=verify(model, translation),
    )
    return conversion, translation.weights, None


def _export(
    model: Any, name: str, options: KerasOptions, rejection: ImportedModelError
) -> tuple[Conversion, dict[str, NDArray[Any]], bytes]:
    """Export what cannot be described; if it cannot be exported either, both reasons are given."""
    try:
        conversion, values, graph = export_keras(
            getattr(model, "_functional", None) or model, name, options.states
        )
    except MemoryError:
        raise
    except Exception as error:  # Keras and TensorFlow raise any
        reason = " ".join(str(error).split())[:1000]
        raise ImportedModelError(
            f"{rejection}\nnor can the model be exported as a graph of one event, {ALONE}: {reason}"
        ) from error
    return conversion, values, graph
