"""Reads what an ONNX file declares: inputs, outputs, operators; and rejects what cannot be served.

The file is parsed here and by ONNX Runtime, in the importing process only. Nothing is run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact.files import inside, open_regular
from models.errors import ArtifactError, ImportedModelError
from models.onnx.decoding import (
    DecodingError,
    decode_string,
    embed_external_data,
    fields,
    local_functions,
    operators,
    walk,
)
from models.onnx.library import open_session

MAX_GRAPH_BYTES = 2**31 - 1
"""Longest protobuf message, and so the largest graph with its weights."""

_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({name})": name for name in ("int8", "int16", "int32", "int64")},
    **{f"tensor({name})": name for name in ("uint8", "uint16", "uint32", "uint64")},
}
_DOMAINS = ("", "ai.onnx.ml", "com.microsoft")
"""Domains whose operators ONNX Runtime contains."""
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"}
_RANDOM.add("RandomUniformLike")
_ELEMENTS = {1: "f4", 2: "u1", 3: "i1", 4: "u2", 5: "i2", 6: "i4", 7: "i8", 9: "?", 10: "f2"}
_ELEMENTS |= {11: "f8", 12: "u4"}
"""Element types, TensorProto.DataType, in NumPy's letters."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A declared input or output.

    Attributes:
        name: its name.
        shape: its dimensions: a size, a name, or None for an unknown one.
        dtype: NumPy's name of the element type, or ONNX's type if a service cannot use it.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str

    @property
    def is_usable(self) -> bool:
        """Whether it is a tensor of numbers or booleans."""
        return self.dtype in _TYPES.values()

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype} [{sizes}]"


@dataclass(frozen=True, slots=True)
class Signature:
    """What a graph declares.

    Attributes:
        inputs: in the graph's order; inputs with a default value behind the others.
        outputs: in the graph's order.
        defaults: values of the inputs that have one.
        session: a session of the graph.
        graph: the ONNX file, with all its data.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    defaults: Mapping[str, NDArray[Any]]
    session: Any
    graph: bytes

    def __str__(self) -> str:
        return "".join(
            f"\n  {kind}: {'; '.join(str(tensor) for tensor in tensors)}"
            for kind, tensors in (("inputs", self.inputs), ("outputs", self.outputs))
        )


def read_signature(path: Path, folder: Path, most_bytes: int = MAX_GRAPH_BYTES) -> Signature:
    """Read an ONNX file.

    Args:
        path: the file; no other process may write to it.
        folder: the folder of the original, where files with its weights may be.
        most_bytes: largest graph with its weights.

    Raises:
        ImportedModelError: it is no ONNX file, refers to a file that cannot be embedded, has
            operators that ONNX Runtime does not contain or that draw random numbers, or ONNX
            Runtime rejects it.
    """
    data = path.read_bytes()
    try:
        if not any(number == 7 for number, _, _ in fields(memoryview(data))):
            raise DecodingError("it contains no graph")
        used, local = operators(data), local_functions(data)
        data = embed_external_data(data, _external_reader(folder, most_bytes))
    except DecodingError as error:
        raise ImportedModelError(
            f"expected an ONNX file (a protobuf message ModelProto), got other bytes: {error}"
        ) from error
    if len(data) > most_bytes:
        raise ImportedModelError(
            f"expected a graph of at most {most_bytes} bytes with its weights, the longest "
            f"protobuf message, got {len(data)}; store the weights as float16"
        )
    _check_operators(used, local)
    try:
        session = open_session(data, 1, "graph")
    except ArtifactError as error:
        raise ImportedModelError(_rejection(str(error))) from error
    overridable = [_tensor(each) for each in session.get_overridable_initializers()]
    inputs = [_tensor(each) for each in session.get_inputs()]
    known = {each.name for each in inputs}
    inputs += [each for each in overridable if each.name not in known]
    return Signature(
        tuple(inputs),
        tuple(_tensor(each) for each in session.get_outputs()),
        _default_values(data, {each.name for each in overridable}),
        session,
        data,
    )


def _tensor(declared: Any) -> Tensor:
    shape = tuple(size if isinstance(size, int | str) else None for size in declared.shape)
    return Tensor(declared.name, shape, _TYPES.get(declared.type, declared.type))


def _check_operators(used: set[tuple[str, str]], local: set[tuple[str, str]]) -> None:
    foreign = sorted(used - local, key=str)
    custom = [f"{domain}.{name}" for domain, name in foreign if domain not in _DOMAINS]
    if custom:
        raise ImportedModelError(
            f"expected operators of ONNX (ai.onnx, ai.onnx.ml, com.microsoft), got {custom}; "
            "export the model with standard operators, in PyTorch without custom ones"
        )
    random = sorted(name for domain, name in used if not domain and name in _RANDOM)
    if random:
        raise ImportedModelError(
            f"expected a graph without random numbers, got the operators {random}; export the "
            "model for inference (in PyTorch after `model.eval()`)"
        )


def _rejection(message: str) -> str:
    """What to do about a rejection by ONNX Runtime."""
    hint = "check the file with `python -m onnx.checker`, or export it again"
    if re.search(r"[Oo]pset|IR version|ir_version", message):
        hint = "export the model for an older opset, in PyTorch `opset_version=18`"
    elif "Could not find an implementation" in message or "not a registered" in message:
        hint = "export the model with other operators or in float32"
    first = message.partition(" rejects the graph: ")[2] or message
    return f"ONNX Runtime rejects the graph: {' '.join(first.split())[:500]}; {hint}"


def _external_reader(folder: Path, most_bytes: int) -> Callable[[dict[str, str]], bytes]:
    """Reads the data of a tensor from a file in the folder of the model, and nowhere else."""
    remaining = most_bytes

    def read(entries: dict[str, str]) -> bytes:
        nonlocal remaining
        location = entries.get("location", "")
        if not inside(location):
            raise ImportedModelError(
                f"expected weights inside the model or in a file beside it, got the file "
                f"{location!r}; export it as one file, in PyTorch `external_data=False`"
            )
        try:
            offset, length = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
        except ValueError as error:
            raise DecodingError(f"the place of its weights in {location!r}: {error}") from error
        if not 0 <= offset <= sys.maxsize:
            raise DecodingError(f"the place of its weights in {location!r}: {offset} bytes")
        try:
            with open_regular(folder / location, folder) as stream:
                stream.seek(offset)
                data = stream.read(min(length, remaining + 1) if length >= 0 else remaining + 1)
        except OSError as error:
            raise ImportedModelError(
                f"its weights are in the file {location!r}, which cannot be read: "
                f"{error.strerror}; put it beside the model, or export the model as one file"
            ) from error
        if length > len(data) and len(data) <= remaining:
            raise ImportedModelError(
                f"its weights are in the file {location!r}: expected {length} bytes at {offset}, "
                f"got {len(data)}"
            )
        remaining -= len(data)
        if remaining < 0:
            raise ImportedModelError(
                f"expected weights of at most {most_bytes} bytes, the longest protobuf message; "
                "store them as float16, or serve fewer layers"
            )
        return data

    return read


def _default_values(graph: bytes, names: set[str]) -> dict[str, NDArray[Any]]:
    """The values of initializers of the main graph."""
    values: dict[str, NDArray[Any]] = {}
    if not names:
        return values
    for kind, message in walk(memoryview(graph)):
        if kind == "tensor":
            name = next(
                (decode_string(value) for number, value, _ in fields(message) if number == 8), ""
            )
            if name in names:
                values[name] = tensor_value(message)
    return values


def tensor_value(tensor: memoryview) -> NDArray[Any]:
    """The value of a TensorProto.

    Raises:
        DecodingError: of another element type, or without all its values.
    """
    shape: list[int] = []
    element, raw = 0, b""
    typed: dict[int, list[int | memoryview]] = {}
    for number, value, _ in fields(tensor):
        if number == 1:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, int):
            element = value
        elif number == 9 and not isinstance(value, int):
            raw = bytes(value)
        elif number in (4, 5, 7, 10, 11):
            typed.setdefault(number, []).append(value)
    if element not in _ELEMENTS:
        raise DecodingError(f"a tensor of element type {element}")
    dtype = np.dtype(_ELEMENTS[element]).newbyteorder("<")
    if typed:
        number, pieces = next(iter(typed.items()))
        if number in (4, 10):
            raw = b"".join(bytes(piece) for piece in pieces if not isinstance(piece, int))
        else:
            numbers = [n for p in pieces for n in ([p] if isinstance(p, int) else _varints(p))]
            words = np.array(numbers, np.uint64).view(np.int64)
            if element == 10:  # the bits of float16
                return words.astype(np.uint16).view(np.float16).reshape(shape)
            return words.astype(dtype).reshape(shape)
    values = np.frombuffer(raw, dtype)
    if values.size != int(np.prod(shape)):
        raise DecodingError(f"a tensor of {values.size} values of the shape {shape}")
    return values.reshape(shape)


def _varints(packed: memoryview) -> list[int]:
    numbers, value, shift = [], 0, 0
    for byte in packed:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value & (2**64 - 1))
            value = shift = 0
    return numbers
