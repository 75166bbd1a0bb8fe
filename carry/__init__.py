"""Carry's Python API: train, import and evaluate models, read their artifacts, send events.

`import carry` loads nothing; a name loads what it needs when it is used first. A program's own
module or folder `models` is neither imported nor replaced.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from carry.own_packages import PrivateModels
from carry.public import EXTRAS, add_arguments, naming_extra

if TYPE_CHECKING:
    from carry import client
    from carry_client import AsyncCarry as AsyncClient
    from carry_client import Carry as Client
    from carry_client import Problem, Producer
    from models.artifact.artifact import Artifact
    from models.artifact.artifact import load_artifact as load
    from models.artifact.writing import write_artifact as save
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
    "AsyncClient",
    "Client",
    "DataError",
    "GraphUnsupportedError",
    "ImportReport",
    "ImportedModelError",
    "Limits",
    "ModelSpec",
    "ModelsError",
    "Problem",
    "Producer",
    "SpecError",
    "StateError",
    "VerdictError",
    "client",
    "compare",
    "evaluate",
    "import_keras_model",
    "import_onnx_model",
    "initialise_artifact",
    "load",
    "log_model",
    "onnx_options",
    "parse_spec",
    "pull_model",
    "read_spec",
    "save",
    "train",
    "train_frame",
]

_MODULES = {
    "carry.models.artifact.artifact": ("Artifact",),
    "carry.models.commands": ("compare", "evaluate", "train"),
    "carry.models.errors": (
        *("ArtifactError", "DataError", "GraphUnsupportedError", "ImportedModelError"),
        *("ModelsError", "SpecError", "StateError", "VerdictError"),
    ),
    "carry.models.importing.isolation": ("Limits",),
    "carry.models.importing.packaging": (
        *("ImportReport", "import_keras_model", "import_onnx_model", "onnx_options"),
    ),
    "carry.models.networks.initial_artifact": ("initialise_artifact",),
    "carry.models.registry": ("log_model", "pull_model"),
    "carry.models.spec.model": ("ModelSpec", "parse_spec"),
    "carry.models.spec.spec_file": ("read_spec",),
    "carry.models.training.train_frame": ("train_frame",),
    "carry_client": ("Problem", "Producer"),
}
_HOMES = {name: (module, name) for module, names in _MODULES.items() for name in names} | {
    "AsyncClient": ("carry_client", "AsyncCarry"),
    "Client": ("carry_client", "Carry"),
    "load": ("carry.models.artifact.artifact", "load_artifact"),
    "save": ("carry.models.artifact.writing", "write_artifact"),
}

sys.meta_path.insert(0, PrivateModels())


def __getattr__(name: str) -> object:
    """Load a name of the API when it is used first."""
    if name == "client":
        return import_module("carry.client")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    with naming_extra(name):
        value: Any = getattr(import_module(module), attribute)
    if name in EXTRAS:
        value = naming_extra(name)(value)
        if module == "carry.models.commands":
            add_arguments(value)
        # it is pickled by its public name
        value.__module__, value.__qualname__ = __name__, name
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
