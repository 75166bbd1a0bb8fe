"""Which runtime runs the models. Runtimes are extras: imported only when they are opened.

All models of a service run on one runtime. `auto` takes ONNX Runtime, which is faster and
smaller (docs/decisions/runtimes.md), where it is installed and every model has a graph. The graph
that runs is written from spec and weights, never read from the artifact.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import structlog

from models.artifact.artifact import Artifact
from models.artifact.graphs import ONNXRUNTIME, TENSORFLOW
from service.engine.runtimes.base import Runtime

log = structlog.get_logger(__name__)

RUNTIMES = (ONNXRUNTIME, TENSORFLOW)
"""The runtimes of this version, in the order in which `auto` tries them."""
AUTO = "auto"


class RuntimeUnavailableError(Exception):
    """The models cannot be run as asked; the message is one line that says what to do."""


class RuntimeMissingError(RuntimeUnavailableError):
    """runtime_missing: the runtime's library is not installed."""


class RuntimeUnsupportedError(RuntimeUnavailableError):
    """runtime_unsupported: a model cannot be run by the runtime."""


def open_runtimes(wanted: str, artifacts: Sequence[Artifact], threads: int) -> list[Runtime]:
    """A runtime for each model, all of one kind, not yet warm.

    Args:
        wanted: one of `RUNTIMES`, or `auto`.
        artifacts: the models.
        threads: threads that one step may use.

    Raises:
        RuntimeMissingError: the library is not installed.
        RuntimeUnsupportedError: no graph can represent a model, and ONNX Runtime is asked for.
        ArtifactError: the runtime refuses a model's graph.
        ValueError: there is no such runtime.
    """
    if wanted not in (AUTO, *RUNTIMES):
        raise ValueError(f"expected one of the runtimes {[AUTO, *RUNTIMES]}, got {wanted!r}")
    name, reason = _chosen(artifacts) if wanted == AUTO else (wanted, "as asked for")
    opened = [open_runtime(name, artifact, threads) for artifact in artifacts]
    log.info("runtime", runtime=name, reason=reason)
    for artifact in artifacts if name == ONNXRUNTIME else ():
        if artifact.differing_graphs:
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
    """For each model a runtime for its decoder's step, of the same kind; None without one."""
    return [
        None
        if artifact.decoder is None
        else open_runtime(runtime.name, artifact.decoder, threads, decoding=True)
        for runtime, artifact in zip(runtimes, artifacts, strict=True)
    ]


def open_runtime(name: str, artifact: Artifact, threads: int, *, decoding: bool = False) -> Runtime:
    """The runtime of that name for one model; see `open_runtimes`.

    Args:
        decoding: the model is a decoder's step (`Artifact.decoder`).
    """
    try:
        if name == ONNXRUNTIME:
            lacks = _lacks_graph(artifact)
            if lacks is not None:
                raise RuntimeUnsupportedError(f"runtime_unsupported: {lacks}")
            from service.engine.runtimes.onnx import OnnxRuntime

            return OnnxRuntime(artifact, threads)
        # Quiet at start, errors excepted; and one order of summation, whatever the processor.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        from service.engine.runtimes.tensorflow import TensorflowRuntime

        return TensorflowRuntime(artifact, threads, decoding=decoding)
    except ModuleNotFoundError as error:
        raise RuntimeMissingError(
            f"runtime_missing: the runtime {name!r} needs {error.name!r}: "
            f"pip install 'carry[{_EXTRAS[name]}]'"
        ) from error


_EXTRAS = {ONNXRUNTIME: "onnx", TENSORFLOW: "tensorflow"}


def _chosen(artifacts: Sequence[Artifact]) -> tuple[str, str]:
    """What `auto` stands for, and why."""
    installed = [name for name in RUNTIMES if find_spec(name) is not None]
    if not installed:
        raise RuntimeMissingError(
            "runtime_missing: neither runtime is installed: pip install 'carry[onnx]' "
            "or 'carry[tensorflow]'"
        )
    if installed == [TENSORFLOW]:
        return TENSORFLOW, "onnxruntime is not installed"
    if TENSORFLOW in installed:
        for artifact in artifacts:
            lacks = _lacks_graph(artifact)
            if lacks is not None:
                return TENSORFLOW, lacks
    return ONNXRUNTIME, "installed, and every model has a graph"


def _lacks_graph(artifact: Artifact) -> str | None:
    """Why ONNX Runtime cannot run the model; None where it can."""
    if artifact.graphs.refused is None:
        return None
    return f"{artifact.path}: no graph can represent the model: {artifact.graphs.refused}"
