"""Conversion of an untrusted model in a separate process with resource limits.

The file is opened once and copied into a private folder; the copy keeps the file extension, by
which Keras chooses a reader. The process works in that folder (`main`), and its output there is
plain data, a `Conversion`, validated like any other input. Anything else ends it without one, also
the end of the process that started it. All its processes and files are removed at the end.

The limits hold on Linux; other systems may not enforce the one on memory. Only on Linux processes
that left the group are ended too, unless they replaced their environment.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from models.artifact.files import open_regular
from models.artifact.manifest import MAX_ARTIFACT_BYTES
from models.errors import ImportedModelError, ModelsError
from models.spec.onnx_network import Axes

TASK_NAME = "task.json"
"""JSON input of the worker process, in its folder: arguments have a limited length."""
RESULT_NAME = "result.json"
WEIGHTS_NAME = "weights.safetensors"
GRAPH_NAME = "graph.onnx"
ERROR_NAME = "error.txt"
"""Output files of the process: a `Conversion`, its weights and an imported graph, or an error."""
OUT_OF_MEMORY = "out of memory"
"""The error of a process that reached its memory limit."""
_is_missing_package = re.compile(
    "ModuleNotFoundError: (No module named '(keras|tensorflow|onnxruntime)')"
).fullmatch


class OnnxOptions(BaseModel):
    """What the user says about an ONNX graph.

    Attributes:
        states: state output by state input.
        inputs: inputs of features, in the order of a row's columns.
        outputs: outputs that replies contain; by default all that are not states.
        lengths: input [B] of the rows' lengths.
        mask: input [B, T] that is true at each step of a row.
        initial: initial values by state input: a number, or the bytes of a `.npy` file in
            base 64.
        constants: values of inputs that are the same in every call, such as a sampling rate.
        features: F, the columns of a row, if the graph does not declare them.
        context: C, the values of earlier rows that the graph reads in front of each row.
        labels: names along the last axis by output.
        axes: order of the axes; found by the importer by default.
        triton: content of Triton's `config.pbtxt`.
        triton_folder: folder of the Triton model, where the files of initial states are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    states: dict[str, str] = {}
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    lengths: str | None = None
    mask: str | None = None
    initial: dict[str, float | str] = {}
    constants: dict[str, float] = {}
    features: Annotated[int, Field(ge=1, le=16384)] | None = None
    context: Annotated[int, Field(ge=1, le=2**20)] | None = None
    labels: dict[str, tuple[str, ...]] = {}
    axes: Axes | None = None
    triton: str | None = None
    triton_folder: str | None = None


class KerasOptions(BaseModel):
    """Options of the import of a Keras model.

    Attributes:
        code: a Python file with its own classes and functions, which is run.
        states: state output by state input.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str | None = None
    states: dict[str, str] = {}


class Conversion(BaseModel):
    """A converted model without its weights, as plain, untrusted data.

    Attributes:
        spec: the specification.
        notes: what the user should know, one sentence each.
        verified: what was compared or measured, by name.
        keras: the version of Keras; None for an ONNX graph.
        layers: Keras name, Keras class and name in the spec ("" if it was left out).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    spec: dict[str, Any]
    notes: tuple[str, ...]
    verified: dict[str, Any]
    keras: str | None = None
    layers: tuple[tuple[str, str, str], ...] = ()


METADATA_NAME = "keras_metadata.pb"
"""The configuration of a Keras 2 model in a SavedModel folder."""
MAGIC_BYTES = {".keras": b"PK", ".h5": b"\x89HDF\r\n\x1a\n", ".hdf5": b"\x89HDF\r\n\x1a\n"}
"""File extensions, by which Keras chooses a reader, and the first bytes of such a file."""
PYTORCH_SUFFIXES = (".pt", ".pth", ".pt2", ".safetensors")
WORKER_ARGUMENTS = (
    *("-P", "-c"),
    "from carry.models.importing.isolation import main; main()",
)
"""Arguments of Python for the process: its working directory is not on the import path, and other
packages called `models` do not matter."""
MAX_RESULT_BYTES = 16 * 2**20
PR_SET_PDEATHSIG: Final = 1
KILL_ROUNDS: Final = 100
"""Most searches for processes that left the group: code may start them for ever."""
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

Converted = tuple[Conversion, bytes, bytes | None]
"""A converted model, its weights or initial values as safetensors, and its graph; untrusted."""


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


def convert_isolated(
    path: Path, name: str, options: OnnxOptions | KerasOptions, limits: Limits
) -> Converted:
    """Convert a model in another process.

    Args:
        path: a Keras model, or an ONNX graph.
        name: the packaged model's name, a lower-case slug.
        options: what is known of the model.

    Raises:
        ImportedModelError: the model cannot be converted; the file cannot be read, is too large or
            does not match its extension; a limit was reached; the process died.
    """
    is_onnx = isinstance(options, OnnxOptions)
    with tempfile.TemporaryDirectory(prefix="carry-import-") as folder:
        copy = Path(folder) / f"model{'.onnx' if is_onnx else _keras_suffix(path)}"
        _copy(path, copy, limits)
        task = {
            "name": name,
            "file": copy.name,
            "where": str(path),
            "folder": str(path.parent.resolve()),
            "onnx": is_onnx,
            "options": options.model_dump(mode="json"),
        }
        _run(path, copy, task, limits)
        if (copy.parent / ERROR_NAME).exists():
            message = _output(copy, ERROR_NAME, MAX_RESULT_BYTES, path).decode("utf-8", "replace")
            if message == OUT_OF_MEMORY:
                message = f"{path}: reading it needs more than {_memory_limit(limits)}"
            raise ImportedModelError(
                "\n".join(map(replace_control_characters, message.split("\n")))
            )
        result = _output(copy, RESULT_NAME, MAX_RESULT_BYTES, path)
        weights = _output(copy, WEIGHTS_NAME, limits.file_bytes, path)
        has_graph = (copy.parent / GRAPH_NAME).exists()
        graph = _output(copy, GRAPH_NAME, limits.file_bytes, path) if has_graph else None
    try:
        return Conversion.model_validate_json(result), weights, graph
    except ValueError as error:
        raise ImportedModelError(f"{path}: the import gave an invalid result: {error}") from error


def replace_control_characters(line: str) -> str:
    """A line whose text comes from a file, with `?` for each character that is not printable."""
    return "".join(each if each.isprintable() else "?" for each in line)


def _keras_suffix(path: Path) -> str:
    if path.is_dir():
        return ""
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


def _copy(path: Path, copy: Path, limits: Limits) -> None:
    """Copy a file, or the configuration and the variables of a SavedModel folder."""
    folder, files = (path, _saved_model_files(path)) if path.is_dir() else (None, [None])
    size_bytes = 0
    try:
        for name in files:
            target = copy / (name or "")
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_regular(path / (name or ""), folder) as source, target.open("xb") as out:
                size_bytes += os.fstat(source.fileno()).st_size
                if size_bytes > limits.file_bytes:
                    raise ImportedModelError(
                        f"{path}: expected a file of at most {limits.file_bytes} bytes, got "
                        f"{size_bytes}"
                    )
                begins = MAGIC_BYTES.get(target.suffix, b"")
                if source.read(len(begins)) != begins:
                    raise ImportedModelError(
                        f"{path}: expected {'a ZIP archive' if begins == b'PK' else 'HDF5'}, "
                        f"by its extension, got other first bytes"
                    )
                source.seek(0)
                shutil.copyfileobj(source, out)
    except FileNotFoundError as error:
        raise ImportedModelError(f"{path}: expected a {copy.suffix} file, there is none") from error
    except OSError as error:
        raise ImportedModelError(f"{path}: cannot be read: {error.strerror}") from error


def _saved_model_files(path: Path) -> list[str]:
    """Configuration and variables of a SavedModel folder of Keras 2."""
    variables = sorted(
        f"variables/{file.name}"
        for file in path.glob("variables/*")
        if re.fullmatch(r"variables\.(index|data-\d{5}-of-\d{5})", file.name)
    )
    if not (path / METADATA_NAME).exists() or not variables:
        raise ImportedModelError(
            f"{path}: expected a .keras or .h5 file, or a SavedModel folder with {METADATA_NAME}, "
            "as Keras 2 writes it; a folder of model.export() holds a program without the model's "
            "layers: save the model with model.save('model.keras'), or export it to ONNX"
        )
    return [METADATA_NAME, *variables]


def _run(path: Path, copy: Path, task: dict[str, Any], limits: Limits) -> None:
    """Run the process; raises unless it exits normally and in time."""
    seconds = max(1, int(limits.time_s))
    resources = {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 0,
    }
    task = {**task, "parent": os.getpid(), "limits": resources}
    too_slow = f"{path}: reading it took longer than {limits.time_s:g} s"
    (copy.parent / TASK_NAME).write_text(json.dumps(task))
    stderr_path = copy.parent / "stderr.txt"
    with stderr_path.open("wb") as stderr:
        process = subprocess.Popen(  # noqa: S603, our own program
            [sys.executable, *WORKER_ARGUMENTS],
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
            raise ImportedModelError(too_slow) from error
        finally:
            with suppress(ProcessLookupError, PermissionError):  # no process is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _kill_inheritors(f"TMPDIR={copy.parent}".encode())
    if status == -signal.SIGXCPU:
        raise ImportedModelError(too_slow)
    if status < 0:
        hint = ""
        if task["onnx"]:
            hint = (
                ", or have an operator for an element type that ONNX Runtime does not support: "
                "export the graph in float32"
            )
        raise ImportedModelError(
            f"{path}: the process that read it was ended by {signal.Signals(-status).name}; "
            f"it may have needed more than {_memory_limit(limits)}{hint}"
        )
    if status > 0:
        with stderr_path.open("rb") as stderr:
            stderr.seek(-min(2000, stderr_path.stat().st_size), os.SEEK_END)
            lines = stderr.read().decode("utf-8", "replace").strip().splitlines() or [""]
        if missing := _is_missing_package(lines[-1]):
            raise ModuleNotFoundError(missing[1], name=missing[2])
        raise ImportedModelError(f"{path}: the process that read it failed: {lines[-1]}")


def _kill_inheritors(variable: bytes) -> None:
    """Kill the processes that left the group, by a variable of their environment; on Linux.

    Args:
        variable: with its value, which no other process has.
    """
    for _ in range(KILL_ROUNDS):  # each may have started another meanwhile
        is_alone = True
        for file in Path("/proc").glob("[1-9]*/environ"):
            with suppress(OSError):  # of another user, or ended
                if variable in file.read_bytes().split(b"\0"):
                    is_alone = False
                    os.kill(int(file.parent.name), signal.SIGKILL)
        if is_alone:
            return
        time.sleep(0.01)


def _output(copy: Path, name: str, most: int, path: Path) -> bytes:
    """Read a file of the process's output."""
    with suppress(OSError), open_regular(copy.parent / name, copy.parent) as stream:
        if os.fstat(stream.fileno()).st_size <= most:
            return stream.read(most)
    raise ImportedModelError(f"{path}: the process that read it left no result in {name}")


def _memory_limit(limits: Limits) -> str:
    return f"{limits.memory_bytes // 2**20} MiB of memory"


def main() -> None:
    """Convert one file in this process, by the task in the working directory.

    The limits are set before any library reads the file.
    """
    task = json.loads(Path(TASK_NAME).read_text())
    end_with_parent(task["parent"])
    for name, most in task["limits"].items():
        _set_limit(name, most)
    try:
        convert(task)
    except (MemoryError, ImportError) as error:
        # a library that does not fit fails to load, and the loader has no other error for it
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):
            raise
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


def convert(task: dict[str, Any]) -> None:
    """Convert the file of a task in the working directory, and write result or error there."""
    from models.artifact.weights import weights_bytes

    file, where = Path(task["file"]), task["where"]
    try:
        graph: bytes | None
        if not task["onnx"]:
            from models.importing.keras_conversion import convert_keras

            keras_options = KerasOptions.model_validate(task["options"])
            conversion, weights, graph = convert_keras(file, task["name"], keras_options)
        else:
            from models.importing.onnx_conversion import convert_onnx

            options = OnnxOptions.model_validate(task["options"])
            folder = Path(task["folder"])
            conversion, weights, graph = convert_onnx(file, folder, task["name"], options)
        if graph is not None:
            Path(GRAPH_NAME).write_bytes(graph)
        Path(WEIGHTS_NAME).write_bytes(weights_bytes(weights))
        Path(RESULT_NAME).write_text(conversion.model_dump_json(), "utf-8")
    except (ModelsError, OSError) as error:
        _write_error(f"{where}: {error}")


def _write_error(message: str) -> None:
    Path(ERROR_NAME).write_text(message, "utf-8", "backslashreplace")


def _set_limit(name: str, most: int) -> None:
    """Set a limit, never above the hard limit of this process."""
    import resource  # not on every system

    which: int = getattr(resource, name)
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard - (which == resource.RLIMIT_CPU))
    # the soft limit on CPU time sends SIGXCPU, which differs from the hard one's SIGKILL
    resource.setrlimit(which, (most, most + (which == resource.RLIMIT_CPU)))
