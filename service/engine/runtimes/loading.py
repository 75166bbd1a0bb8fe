"""Chooses and opens a runtime for each model. They are optional dependencies, imported when opened.

`auto` prefers ONNX Runtime, which is faster and smaller (docs/decisions/runtimes.md). TensorFlow,
which needs 0.8 GiB, is imported only if a model needs it. The graph that ONNX Runtime runs is
generated from spec and weights, never read from the artifact.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import structlog

from models.artifact.artifact import Artifact
from models.artifact.graphs import ONNXRUNTIME, TENSORFLOW
from service.core.errors import OperatorError
from service.engine.runtimes.base import Runtime

log = structlog.get_logger(__name__)

RUNTIMES = (ONNXRUNTIME, TENSORFLOW)
"""The runtimes of this version, in the order in which `auto` tries them."""
AUTO = "auto"


class RuntimeUnavailableError(OperatorError):
    """The chosen runtime cannot run the models; the message is one line that says what to do."""


class RuntimeMissingError(RuntimeUnavailableError):
    """runtime_missing: the runtime's library is not installed."""


class RuntimeUnsupportedError(RuntimeUnavailableError):
    """runtime_unsupported: the runtime cannot run a model."""


def open_runtimes(wanted: str, artifacts: Sequence[Artifact], threads: int) -> list[Runtime]:
    """Open a runtime for each model, not yet warmed up, and log the choices.

    Args:
        wanted: one of `RUNTIMES` for every model, or `auto`: the first that can run the model.
            Imported ONNX graphs run on ONNX Runtime in any case.
        artifacts: the models.
        threads: threads that one step may use.

    Raises:
        RuntimeMissingError: no installed library can run a model, or the wanted one is missing.
        RuntimeUnsupportedError: the wanted runtime cannot run a model.
        ArtifactError: the runtime rejects a model's graph.
        ValueError: there is no such runtime.
    """
    if wanted not in (AUTO, *RUNTIMES):
        raise ValueError(f"expected one of the runtimes {[AUTO, *RUNTIMES]}, got {wanted!r}")
    choices = [_choose(artifact, wanted) for artifact in artifacts]
    opened = [
        open_runtime(name, artifact, threads)
        for artifact, (name, _) in zip(artifacts, choices, strict=True)
    ]
    for artifact, (name, reason) in zip(artifacts, choices, strict=True):
        log.info("runtime", model=artifact.spec.name, runtime=name, reason=reason)
        if name == ONNXRUNTIME and artifact.differing_graphs:
            log.warning(
                "graph_differs",
                path=str(artifact.path),
                files=artifact.differing_graphs,
                hint=f"not run; `carry graph {artifact.path}` writes the graph of these weights",
            )
    return opened


def open_decoders(
    runtimes: Sequence[Runtime], artifacts: Sequence[Artifact], threads: int
) -> list[Runtime | None]:
    """Open a runtime of the same kind for each model's decoder; None for a model without one."""
    return [
        None
        if artifact.decoder is None
        else open_runtime(runtime.name, artifact.decoder, threads, decoding=True)
        for runtime, artifact in zip(runtimes, artifacts, strict=True)
    ]


def open_runtime(name: str, artifact: Artifact, threads: int, *, decoding: bool = False) -> Runtime:
    """Open the runtime of that name for one model; see `open_runtimes`.

    Args:
        decoding: whether the model is a decoder's step (`Artifact.decoder`).
    """
    try:
        missing = _missing_graph(artifact) if name == ONNXRUNTIME else None
        if missing is not None:
            raise RuntimeUnsupportedError(f"runtime_unsupported: {missing}")
        import_runtime(name)
        runtime: Runtime
        if name == ONNXRUNTIME:
            from service.engine.runtimes.onnx import OnnxRuntime

            runtime = OnnxRuntime(artifact, threads)
        else:
            from service.engine.runtimes.tensorflow import TensorflowRuntime

            runtime = TensorflowRuntime(artifact, threads, decoding=decoding)
    except ModuleNotFoundError as error:
        raise RuntimeMissingError(
            f"runtime_missing: the runtime {name!r} needs {error.name!r}: "
            f"pip install {_INSTALL[name]}"
        ) from error
    if artifact.spec.detection is None:
        return runtime
    from service.engine.runtimes.detecting import DetectingRuntime

    return DetectingRuntime(runtime, artifact)


def import_runtime(name: str) -> None:
    """Import a runtime and its library. That opens no session and starts no threads, so that
    this process can be forked afterwards.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    if name == TENSORFLOW:
        # log errors only, and sum in the same order on every processor
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import_module(_MODULES[name])


_MODULES = {ONNXRUNTIME: f"{__package__}.onnx", TENSORFLOW: f"{__package__}.tensorflow"}
_INSTALL = {ONNXRUNTIME: "onnxruntime", TENSORFLOW: "'carry[tensorflow]'"}


def _choose(artifact: Artifact, wanted: str) -> tuple[str, str]:
    """The runtime of a model, and why."""
    if artifact.network is not None:
        return ONNXRUNTIME, "the model is an ONNX graph"
    if wanted != AUTO:
        return wanted, "as configured"
    installed = [name for name in RUNTIMES if find_spec(name) is not None]
    if not installed:
        raise RuntimeMissingError(
            "runtime_missing: neither runtime is installed: pip install onnxruntime"
        )
    missing = _missing_graph(artifact)
    if missing is None and ONNXRUNTIME in installed:
        return ONNXRUNTIME, "the model has a graph"
    if TENSORFLOW not in installed:
        raise RuntimeMissingError(
            f"runtime_missing: {missing}; only 'tensorflow' can run it: "
            f"pip install {_INSTALL[TENSORFLOW]}"
        )
    return TENSORFLOW, missing or "onnxruntime is not installed"


def _missing_graph(artifact: Artifact) -> str | None:
    """Why ONNX Runtime cannot run the model; None if it can."""
    if artifact.graphs.rejection is None:
        return None
    return f"{artifact.path}: no graph can represent the model: {artifact.graphs.rejection}"
