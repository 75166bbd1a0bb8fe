"""The process that reads a foreign model; see `models.importing.isolation`.

It sets its resource limits before it loads any library that reads the file, and writes its result
into its working directory, as `models.importing.result` defines. Anything else ends it without one,
also the end of the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, Final

from models.importing.result import ERROR_NAME, OUT_OF_MEMORY, RESULT_NAME, WEIGHTS_NAME

PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Convert one file, as the JSON object in the first argument says."""
    task = json.loads(sys.argv[1])
    end_with_parent(task["parent"])
    for name, most in task["limits"].items():
        _set_limit(getattr(resource, name), most)
    try:
        if "onnx" in task:
            _convert_onnx(task)
        else:
            _convert(task)
    except MemoryError:
        _write_error(OUT_OF_MEMORY)


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process as soon as its parent has ended, on Linux.

    Args:
        parent: process id of the parent, which may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(1)


def _convert(task: dict[str, Any]) -> None:
    from models.artifact.weights import weights_bytes
    from models.errors import ModelsError
    from models.importing.conversion import convert

    try:
        conversion, weights = convert(Path(task["file"]), task["name"], task["where"])
        Path(WEIGHTS_NAME).write_bytes(weights_bytes(weights))
        Path(RESULT_NAME).write_text(conversion.model_dump_json(), "utf-8")
    except ModelsError as error:
        _write_error(str(error))
    except OSError as error:
        _write_error(f"{task['where']}: {error}")


def _convert_onnx(task: dict[str, Any]) -> None:
    from models.artifact.graphs import GRAPH_NAME
    from models.artifact.weights import weights_bytes
    from models.errors import ModelsError
    from models.importing.onnx_conversion import convert_onnx
    from models.importing.onnx_options import OnnxOptions

    where = task["where"]
    try:
        options = OnnxOptions.model_validate(task["onnx"])
        conversion, graph, initial = convert_onnx(
            Path(task["file"]), Path(task["folder"]), task["name"], options
        )
        Path(GRAPH_NAME).write_bytes(graph)
        Path(WEIGHTS_NAME).write_bytes(weights_bytes(initial))
        Path(RESULT_NAME).write_text(conversion.model_dump_json(), "utf-8")
    except ModelsError as error:
        _write_error(f"{where}: {error}")
    except OSError as error:
        _write_error(f"{where}: {error}")


def _write_error(message: str) -> None:
    Path(ERROR_NAME).write_text(message, "utf-8", "backslashreplace")


def _set_limit(which: int, most: int) -> None:
    """Set a limit, never above the hard limit of this process."""
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard - (which == resource.RLIMIT_CPU))
    # the soft limit on CPU time sends SIGXCPU, which differs from the hard one's SIGKILL
    resource.setrlimit(which, (most, most + (which == resource.RLIMIT_CPU)))
