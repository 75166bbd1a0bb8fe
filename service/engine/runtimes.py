"""Which runtime runs a model. Runtimes are extras: imported only when asked for."""

from __future__ import annotations

import os

from models.artifact import Artifact
from service.engine.protocol import Runtime

RUNTIMES = ("tensorflow",)
"""The runtimes of this version, the default first."""


class RuntimeMissingError(Exception):
    """The runtime's library is not installed."""


def open_runtime(name: str, artifact: Artifact, threads: int) -> Runtime:
    """The runtime of that name for one model, not yet warm.

    Raises:
        RuntimeMissingError: its extra of the distribution is not installed.
        ValueError: there is no such runtime.
    """
    if name != "tensorflow":
        raise ValueError(f"expected one of the runtimes {list(RUNTIMES)}, got {name!r}")
    # Quiet at start, errors excepted; and one order of summation, whatever the processor.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        from service.engine.tensorflow_runtime import TensorflowRuntime
    except ModuleNotFoundError as error:
        raise RuntimeMissingError(
            f"the runtime 'tensorflow' needs {error.name!r}: pip install 'carry[tensorflow]'"
        ) from error
    return TensorflowRuntime(artifact, threads)
