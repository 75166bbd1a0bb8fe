"""Carry's Python API: train, import and evaluate models, and read their artifacts.

`import carry` loads nothing; a name loads what it needs when it is used first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from carry.own_packages import load_own_packages

if TYPE_CHECKING:
    from models.artifact.artifact import Artifact, load_artifact
    from models.commands import compare, evaluate, train
    from models.errors import (
        ArtifactError,
        DataError,
        GraphUnsupportedError,
        ImportedModelError,
        ModelsError,
        SpecError,
        StateError,
        VerdictError,
    )
    from models.importing.isolation import Limits
    from models.importing.packaging import (
        ImportReport,
        import_keras_model,
        import_onnx_model,
        onnx_options,
    )
    from models.networks.initial_artifact import initialise_artifact
    from models.registry import log_model, pull_model
    from models.spec.model import ModelSpec, parse_spec
    from models.spec.spec_file import read_spec
    from models.training.train_frame import train_frame

__all__ = [
    "Artifact",
    "ArtifactError",
    "DataError",
    "GraphUnsupportedError",
    "ImportReport",
    "ImportedModelError",
    "Limits",
    "ModelSpec",
    "ModelsError",
    "SpecError",
    "StateError",
    "VerdictError",
    "compare",
    "evaluate",
    "import_keras_model",
    "import_onnx_model",
    "initialise_artifact",
    "load_artifact",
    "log_model",
    "onnx_options",
    "parse_spec",
    "pull_model",
    "read_spec",
    "train",
    "train_frame",
]

_MODULES = {
    "models.artifact.artifact": ("Artifact", "load_artifact"),
    "models.commands": ("compare", "evaluate", "train"),
    "models.errors": (
        *("ArtifactError", "DataError", "GraphUnsupportedError", "ImportedModelError"),
        *("ModelsError", "SpecError", "StateError", "VerdictError"),
    ),
    "models.importing.isolation": ("Limits",),
    "models.importing.packaging": (
        *("ImportReport", "import_keras_model", "import_onnx_model", "onnx_options"),
    ),
    "models.networks.initial_artifact": ("initialise_artifact",),
    "models.registry": ("log_model", "pull_model"),
    "models.spec.model": ("ModelSpec", "parse_spec"),
    "models.spec.spec_file": ("read_spec",),
    "models.training.train_frame": ("train_frame",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Load a name of the API when it is used first."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load_own_packages("models")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
