"""Conversion of an untrusted model in a separate process with resource limits.

The file is opened once and copied into a private folder; the copy keeps the file extension, by
which Keras chooses a reader. The process (`models.importing.worker`) works in that folder, and its
output there is plain data, validated like any other input. All its processes and files are removed
at the end.

The limits hold on Linux; other systems may not enforce the one on memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.artifact.files import open_regular
from models.artifact.graphs import GRAPH_NAME
from models.artifact.manifest import MAX_ARTIFACT_BYTES
from models.errors import ImportedModelError
from models.importing.onnx_options import OnnxConversion, OnnxOptions
from models.importing.result import (
    ERROR_NAME,
    OUT_OF_MEMORY,
    RESULT_NAME,
    WEIGHTS_NAME,
    Conversion,
)

METADATA_NAME = "keras_metadata.pb"
"""The configuration of a Keras 2 model in a SavedModel folder."""
MAGIC_BYTES = {".keras": b"PK", ".h5": b"\x89HDF\r\n\x1a\n", ".hdf5": b"\x89HDF\r\n\x1a\n"}
"""File extensions, by which Keras chooses a reader, and the first bytes of such a file."""
PYTORCH_SUFFIXES = (".pt", ".pth", ".pt2", ".safetensors")
WORKER_ARGUMENTS = (
    *("-P", "-c"),
    "from carry.own_packages import load_own_packages\n"
    "load_own_packages('models')\n"
    "from models.importing.worker import main\n"
    "main()",
)
"""Arguments of Python for the process: its working directory is not on the import path, and other
packages called `models` do not matter."""
MAX_RESULT_BYTES = 16 * 2**20
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "KERAS_BACKEND": "tensorflow",
    "MALLOC_ARENA_MAX": "2",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
}
"""Keeps address space for the model: no memory for each core, or for a GPU."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits for reading and verifying a model.

    Attributes:
        memory_bytes: address space, of which Keras and TensorFlow need 2 GiB.
        time_s: limit on wall-clock time and on CPU time, in seconds.
        file_bytes: largest model file, and largest file that may be written.
        open_files: files that may be open at a time.
    """

    memory_bytes: int = 8 * 2**30
    time_s: float = 600.0
    file_bytes: int = MAX_ARTIFACT_BYTES
    open_files: int = 256


def convert_isolated(path: Path, name: str, limits: Limits) -> tuple[Conversion, bytes]:
    """Run `models.importing.conversion.convert` in another process.

    Returns:
        The conversion, and the weights as safetensors; both are untrusted.

    Raises:
        ImportedModelError: as `convert`; the file cannot be read, is too large or does not match
            its extension; a limit was reached; the process died.
    """
    with tempfile.TemporaryDirectory(prefix="carry-import-") as folder:
        copy = Path(folder) / ("model" if path.is_dir() else f"model{_suffix(path)}")
        _run_in(path, copy, {"name": name}, limits)
        return _results(path, Conversion, copy.parent, (WEIGHTS_NAME,), limits)


def convert_onnx_isolated(
    path: Path, name: str, options: OnnxOptions, limits: Limits
) -> tuple[OnnxConversion, bytes, bytes]:
    """Run `models.importing.onnx_conversion.convert_onnx` in another process.

    Returns:
        The conversion, the initial values as safetensors and the graph; all are untrusted.

    Raises:
        ImportedModelError: as `convert_isolated`.
    """
    with tempfile.TemporaryDirectory(prefix="carry-import-") as folder:
        copy = Path(folder) / "model.onnx"
        task = {
            "name": name,
            "folder": str(path.parent.resolve()),
            "onnx": options.model_dump(mode="json"),
        }
        _run_in(path, copy, task, limits)
        names = (WEIGHTS_NAME, GRAPH_NAME)
        return _results(path, OnnxConversion, copy.parent, names, limits)


def _run_in(path: Path, copy: Path, task: dict[str, Any], limits: Limits) -> None:
    """Copy the file, and run the process in the folder of the copy.

    Raises:
        ImportedModelError: the process reported an error, or ended without a result.
    """
    if path.is_dir():
        _copy_folder(path, copy, limits)
    else:
        _copy(path, copy, limits)
    _run(path, copy, task, limits)
    error = copy.parent / ERROR_NAME
    if error.exists():
        message = _read_output(error, MAX_RESULT_BYTES, path).decode("utf-8", "replace")
        if message == OUT_OF_MEMORY:
            message = f"{path}: reading it needs more than {_memory_limit(limits)}"
        raise ImportedModelError(message)


def _results(
    path: Path, kind: type[Any], folder: Path, names: tuple[str, ...], limits: Limits
) -> tuple[Any, ...]:
    """The validated result, and the contents of other files of the process's output."""
    result = _read_output(folder / RESULT_NAME, MAX_RESULT_BYTES, path)
    rest = [_read_output(folder / name, limits.file_bytes, path) for name in names]
    try:
        return kind.model_validate_json(result), *rest
    except ValueError as error:
        raise ImportedModelError(f"{path}: the import gave an invalid result: {error}") from error


def _suffix(path: Path) -> str:
    for suffix in MAGIC_BYTES:
        if path.name.endswith(suffix):
            return suffix
    if path.suffix in PYTORCH_SUFFIXES:
        raise ImportedModelError(
            f"{path}: expected a Keras model or an ONNX graph, got a file of PyTorch by its name; "
            "export the model with torch.onnx.export, and import the .onnx file"
        )
    raise ImportedModelError(
        f"{path}: expected a .keras or .h5 file, by whose name Keras knows how to read it, or a "
        ".onnx file"
    )


def _copy_folder(path: Path, copy: Path, limits: Limits) -> None:
    """Copy the configuration and the variables of a SavedModel folder.

    Raises:
        ImportedModelError: it has no configuration of a Keras model, or is too large.
    """
    variables = sorted(
        file.relative_to(path)
        for file in path.glob("variables/*")
        if re.fullmatch(r"variables\.(index|data-\d{5}-of-\d{5})", file.name)
    )
    if not (path / METADATA_NAME).exists() or not variables:
        raise ImportedModelError(
            f"{path}: expected a .keras or .h5 file, or a SavedModel folder with {METADATA_NAME}, "
            "as Keras 2 writes it; a folder of model.export() holds a program without the model's "
            "layers: save the model with model.save('model.keras'), or export it to ONNX"
        )
    size_bytes = 0
    try:
        for name in (Path(METADATA_NAME), *variables):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            with open_regular(path / name, path) as source, (copy / name).open("xb") as target:
                size_bytes += os.fstat(source.fileno()).st_size
                if size_bytes > limits.file_bytes:
                    raise ImportedModelError(
                        f"{path}: expected at most {limits.file_bytes} bytes, got {size_bytes}"
                    )
                shutil.copyfileobj(source, target)
    except OSError as error:
        raise ImportedModelError(f"{path}: cannot be read: {error.strerror}") from error


def _copy(path: Path, copy: Path, limits: Limits) -> None:
    begins = MAGIC_BYTES.get(copy.suffix, b"")
    try:
        with open_regular(path) as source, copy.open("xb") as target:
            size = os.fstat(source.fileno()).st_size
            if size > limits.file_bytes:
                raise ImportedModelError(
                    f"{path}: expected a file of at most {limits.file_bytes} bytes, got {size}"
                )
            if source.read(len(begins)) != begins:
                raise ImportedModelError(
                    f"{path}: expected {'a ZIP archive' if begins == b'PK' else 'HDF5'}, "
                    f"by its extension, got other first bytes"
                )
            source.seek(0)
            shutil.copyfileobj(source, target)
    except FileNotFoundError as error:
        raise ImportedModelError(f"{path}: expected a {copy.suffix} file, there is none") from error
    except OSError as error:
        raise ImportedModelError(f"{path}: cannot be read: {error.strerror}") from error


def _run(path: Path, copy: Path, task: dict[str, Any], limits: Limits) -> None:
    """Run the process; raises unless it exits normally and in time."""
    seconds = max(1, int(limits.time_s))
    task = {
        **task,
        "file": copy.name,
        "where": str(path),
        "parent": os.getpid(),
        "limits": {
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_CPU": seconds,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NOFILE": limits.open_files,
            "RLIMIT_CORE": 0,
        },
    }
    stderr_path = copy.parent / "stderr.txt"
    with stderr_path.open("wb") as stderr:
        process = subprocess.Popen(  # noqa: S603, our own program
            [sys.executable, *WORKER_ARGUMENTS, json.dumps(task)],
            cwd=copy.parent,
            env={**os.environ, **_ENVIRONMENT, "TMPDIR": str(copy.parent)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            status = process.wait(limits.time_s)
        except subprocess.TimeoutExpired as error:
            raise ImportedModelError(f"{path}: {_timeout_message(limits)}") from error
        finally:
            with suppress(ProcessLookupError, PermissionError):  # no process is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == -signal.SIGXCPU:
        raise ImportedModelError(f"{path}: {_timeout_message(limits)}")
    if status < 0:
        raise ImportedModelError(
            f"{path}: the process that read it was ended by {signal.Signals(-status).name}; "
            f"it may have needed more than {_memory_limit(limits)}{_crash_hint(copy)}"
        )
    if status > 0:
        with stderr_path.open("rb") as stderr:
            stderr.seek(-min(2000, stderr_path.stat().st_size), os.SEEK_END)
            lines = stderr.read().decode("utf-8", "replace").strip().splitlines() or [""]
        raise ImportedModelError(f"{path}: the process that read it failed: {lines[-1]}")


def _read_output(file: Path, most: int, path: Path) -> bytes:
    """Read a file of the process's output."""
    try:
        with open_regular(file, file.parent) as stream:
            if os.fstat(stream.fileno()).st_size <= most:
                return stream.read(most)
    except OSError:
        pass
    raise ImportedModelError(f"{path}: the process that read it left no result in {file.name}")


def _timeout_message(limits: Limits) -> str:
    return f"reading it took longer than {limits.time_s:g} s"


def _crash_hint(copy: Path) -> str:
    if copy.suffix != ".onnx":
        return ""
    return (
        ", or have an operator for an element type that ONNX Runtime does not support: export the "
        "graph in float32"
    )


def _memory_limit(limits: Limits) -> str:
    return f"{limits.memory_bytes // 2**20} MiB of memory"
