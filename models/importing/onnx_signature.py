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

from numpy.typing import NDArray

from models.artifact.files import inside, open_regular
from models.errors import ArtifactError, ImportedModelError
from models.onnx.library import open_session
from models.onnx.messages import (
    DecodingError,
    NodeProto,
    TensorProto,
    inner_messages,
    is_external,
    operator_name,
    parse_model,
    tensor_array,
)

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
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Domains whose operators ONNX Runtime contains."""
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"}
_RANDOM.add("RandomUniformLike")


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
        model: the graph as a ModelProto.
        graph: the ONNX file, with all its data.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    defaults: Mapping[str, NDArray[Any]]
    session: Any
    model: Any
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
        model = parse_model(data)
        tensors = [each for each in inner_messages(model, TensorProto) if is_external(each)]
        read = _external_reader(folder, most_bytes)
        for tensor in tensors:
            tensor.raw_data = read({entry.key: entry.value for entry in tensor.external_data})
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    except DecodingError as error:
        raise ImportedModelError(
            f"expected an ONNX file (a protobuf message ModelProto), got other bytes: {error}"
        ) from error
    if model.ByteSize() > most_bytes:
        raise ImportedModelError(
            f"expected a graph of at most {most_bytes} bytes with its weights, the longest "
            f"protobuf message, got {model.ByteSize()}; store the weights as float16"
        )
    if tensors:
        data = model.SerializeToString()
    _check_operators(model)
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
        {
            each.name: tensor_array(each)
            for each in model.graph.initializer
            if each.name in {tensor.name for tensor in overridable}
        },
        session,
        model,
        data,
    )


def _tensor(declared: Any) -> Tensor:
    shape = tuple(size if isinstance(size, int | str) else None for size in declared.shape)
    return Tensor(declared.name, shape, _TYPES.get(declared.type, declared.type))


def _check_operators(model: Any) -> None:
    local = {operator_name(each.domain, each.name) for each in model.functions}
    nodes = [(each.domain, each.op_type) for each in inner_messages(model, NodeProto)]
    custom = sorted(
        name
        for domain, kind in set(nodes)
        if (name := operator_name(domain, kind)) not in local and domain not in _DOMAINS
    )
    if custom:
        raise ImportedModelError(
            f"expected operators of ONNX (ai.onnx, ai.onnx.ml, com.microsoft), got {custom}; "
            "export the model with standard operators, in PyTorch without custom ones"
        )
    random = sorted(_RANDOM.intersection(operator_name(*each) for each in nodes))
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
        place = [entries.get("offset", "0"), entries.get("length", "-1")]
        try:
            offset, length = map(int, place)
            if not 0 <= offset <= sys.maxsize:
                raise ValueError(f"{offset} bytes")
        except ValueError as error:
            raise DecodingError(f"the place of its weights in {location!r}: {error}") from error
        most = remaining + 1
        try:
            with open_regular(folder / location, folder) as stream:
                stream.seek(offset)
                data = stream.read(min(length, most) if length >= 0 else most)
        except OSError as error:
            raise ImportedModelError(
                f"its weights are in the file {location!r}, which cannot be read: "
                f"{error.strerror}; put it beside the model, or export the model as one file"
            ) from error
        remaining -= len(data)
        if remaining < 0:
            raise ImportedModelError(
                f"expected weights of at most {most_bytes} bytes, the longest protobuf message; "
                "store them as float16, or serve fewer layers"
            )
        if length > len(data):
            raise ImportedModelError(
                f"its weights are in the file {location!r}: expected {length} bytes at {offset}, "
                f"got {len(data)}"
            )
        return data

    return read
