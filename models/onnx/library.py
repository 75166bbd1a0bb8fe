"""Imports ONNX Runtime with telemetry disabled, and opens its sessions; only this module does.

Its official builds send events about the machine and the models to Microsoft, and write a machine
identifier into the user's cache directory, unless this variable is set before the library is
loaded. Set ORT_DISABLE_TELEMETRY=0 to allow it.

Sessions have the same options for generated and imported graphs. One thread needs no pool; more
threads sleep between calls instead of spinning. Memory is allocated per call: an arena would keep
the size of the largest batch and is no faster (docs/decisions/runtimes.md).
"""

from __future__ import annotations

import os
from typing import Any

from models.errors import ArtifactError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime", "open_session"]

ERRORS_ONLY = 3
"""Log severity; ONNX Runtime warns about devices that are not used."""


def open_session(graph: bytes, threads: int, where: str) -> Any:
    """Open a session of a graph.

    Args:
        threads: threads inside one operator.
        where: the graph's place, for errors.

    Raises:
        ArtifactError: ONNX Runtime rejects the graph.
    """
    onnxruntime.set_default_logger_severity(ERRORS_ONLY)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # not ONNX Runtime's own format, which it recognises by bytes that a protobuf file may have too:
    # what was checked is the protobuf
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise ArtifactError(f"{where}: ONNX Runtime rejects the graph: {error}") from error
