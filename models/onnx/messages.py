"""ONNX files as protobuf messages: what Carry writes and inspects, and the nodes of a new graph.

The library of protobuf reads and writes them, as in ONNX Runtime, which requires it: a file that is
written to mislead is read here as it is run. Fields that are not listed are kept, not inspected.
The package `onnx` is not used, because the service derives the graph of every model that it loads:
importing it takes 60 to 80 ms and 12 MB in each process, and 31 MB on disk.

The messages are those of onnx.proto of ONNX 1.18, and the library `onnx` writes the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import count as counting
from math import prod
from typing import Any, Final, TypeAlias

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

GRAPH_FORMAT = "1"
"""Increased when the meaning of a name changes; older graphs are then regenerated."""

ROWS = "rows"
"""Input float32 [B, T, F], B >= 1, T >= 1; a categorical column holds its code."""
LENGTHS = "lengths"
"""Input int32 [B], each 1..T."""
STATES = "states"
"""Input float32 [B, N], packed as `models.spec.layout.network_state` says."""
OUTPUTS = "outputs"
"""Output float32 [B, T, O], packed as `models.spec.layout.output_spec` says."""
STATES_AFTER = "states_after"
"""Output float32 [B, N], the state after each row's last valid step."""

MARK_FORMAT = "carry.graph_format"
MARK_FINGERPRINT = "carry.fingerprint"
"""Keys of the graph's own metadata: `GRAPH_FORMAT`, and the model's fingerprint in hex."""


_SCHEMA: Final = {
    "ModelProto": "1 ir_version int64, 2 producer_name bytes, 7 graph GraphProto, "
    "8 opset_import OperatorSetIdProto*, 14 metadata_props MetadataProto*, "
    "20 training_info TrainingInfoProto*, 25 functions FunctionProto*",
    "OperatorSetIdProto": "1 domain string, 2 version int64",
    "MetadataProto": "1 key bytes, 2 value bytes",
    "TrainingInfoProto": "1 initialization GraphProto, 2 algorithm GraphProto",
    "FunctionProto": "1 name string, 4 input string*, 5 output string*, 7 node NodeProto*, "
    "10 domain string, 11 attribute_proto AttributeProto*",
    "GraphProto": "1 node NodeProto*, 2 name bytes, 5 initializer TensorProto*, "
    "11 input ValueInfoProto*, 12 output ValueInfoProto*, "
    "15 sparse_initializer SparseTensorProto*",
    "NodeProto": "1 input string*, 2 output string*, 3 name string, 4 op_type string, "
    "5 attribute AttributeProto*, 7 domain string",
    "AttributeProto": "1 name string, 2 f float, 3 i int64, 4 s bytes, 5 t TensorProto, "
    "6 g GraphProto, 7 floats float*, 8 ints int64*, 9 strings bytes*, 10 tensors TensorProto*, "
    "11 graphs GraphProto*, 20 type int32, 22 sparse_tensor SparseTensorProto, "
    "23 sparse_tensors SparseTensorProto*",
    "SparseTensorProto": "1 values TensorProto, 2 indices TensorProto",
    "TensorProto": "1 dims int64*, 2 data_type int32, 4 float_data float*, 5 int32_data int32*, "
    "7 int64_data int64*, 8 name string, 9 raw_data bytes, 10 double_data double*, "
    "11 uint64_data uint64*, 13 external_data EntryProto*, 14 data_location int32",
    "EntryProto": "1 key string, 2 value string",
    "ValueInfoProto": "1 name string, 2 type TypeProto",
    "TypeProto": "1 tensor_type TensorTypeProto",
    "TensorTypeProto": "1 elem_type int32, 2 shape TensorShapeProto",
    "TensorShapeProto": "1 dim DimensionProto*",
    "DimensionProto": "1 dim_value int64, 2 dim_param bytes",
}
"""Number, name and type of the fields of each message; a star marks repeated ones.

Strings must be UTF-8, so that two names do not become one; bytes are strings that are not read.
"""


def _message_types() -> list[Any]:
    """The class of each message of the schema, in its order."""
    field_types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="carry/onnx.proto", package="onnx")
    file.syntax, file.edition = "editions", descriptor_pb2.EDITION_2023
    file.options.features.repeated_field_encoding = descriptor_pb2.FeatureSet.EXPANDED
    file.options.features.utf8_validation = descriptor_pb2.FeatureSet.VERIFY
    for name, text in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for each in text.split(", "):
            number, field, kind = each.removesuffix("*").split()
            made = message.field.add(name=field, number=int(number))
            made.label = (
                field_types.LABEL_REPEATED if each.endswith("*") else field_types.LABEL_OPTIONAL
            )
            if kind in _SCHEMA:
                made.type, made.type_name = field_types.TYPE_MESSAGE, f".onnx.{kind}"
            else:
                made.type = field_types.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    types = (pool.FindMessageTypeByName(f"onnx.{name}") for name in _SCHEMA)
    return [message_factory.GetMessageClass(each) for each in types]


_TYPES: Final = dict(zip(_SCHEMA, _message_types(), strict=True))
ModelProto: Final = _TYPES["ModelProto"]
GraphProto: Final = _TYPES["GraphProto"]
NodeProto: Final = _TYPES["NodeProto"]
AttributeProto: Final = _TYPES["AttributeProto"]
TensorProto: Final = _TYPES["TensorProto"]
ValueInfoProto: Final = _TYPES["ValueInfoProto"]


class DataType(IntEnum):
    """Element types, TensorProto.DataType; the names are NumPy's in capitals."""

    FLOAT32 = 1
    UINT8 = 2
    INT8 = 3
    UINT16 = 4
    INT16 = 5
    INT32 = 6
    INT64 = 7
    BOOL = 9
    FLOAT16 = 10
    FLOAT64 = 11
    UINT32 = 12


class AttributeType(IntEnum):
    """AttributeProto.AttributeType, and the field of its value as the name in capitals."""

    F = 1
    I = 2  # noqa: E741, the name of the field
    S = 3
    G = 5
    FLOATS = 6
    INTS = 7
    STRINGS = 8


class DecodingError(ValueError):
    """The bytes are not the messages of an ONNX file."""


def parse_model(data: bytes) -> Any:
    """The ModelProto of an ONNX file.

    Raises:
        DecodingError: the bytes are not such a message, or it contains no graph.
    """
    try:
        model = ModelProto.FromString(data)
    except DecodeError as error:
        raise DecodingError(str(error)) from error
    if not model.HasField("graph"):
        raise DecodingError("it contains no graph")
    return model


def inner_messages(message: Any, kind: Any) -> Iterator[Any]:
    """Every message of a type inside a message, at any depth; itself, if it is one."""
    if isinstance(message, kind):
        yield message
    if isinstance(message, TensorProto):
        return  # reading its fields would copy its elements
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else (value,):
                yield from inner_messages(each, kind)


def is_external(tensor: Any) -> bool:
    """Whether the elements of a TensorProto are in another file."""
    return bool(tensor.data_location or tensor.external_data)


def operator_name(domain: str, name: str) -> str:
    """An operator or function: its name, behind its domain unless that is the default one."""
    return name if domain in ("", "ai.onnx") else f"{domain}.{name}"


def attribute(name: str, value: Any) -> Any:
    """The AttributeProto of a number, a string, a graph, or a list of numbers or strings."""
    match value:
        case GraphProto():
            kind = AttributeType.G
        case float():
            kind = AttributeType.F
        case int():
            kind = AttributeType.I
        case str():
            kind, value = AttributeType.S, value.encode()
        case [float(), *_]:
            kind = AttributeType.FLOATS
        case [int(), *_]:
            kind = AttributeType.INTS
        case [str(), *_]:
            kind, value = AttributeType.STRINGS, [each.encode() for each in value]
        case _:
            raise TypeError(f"attribute {name!r}: expected a number, string or graph: {value!r}")
    return AttributeProto(name=name, type=kind, **{kind.name.lower(): value})


def tensor_value(name: str, dtype: DataType, shape: Iterable[str | int]) -> Any:
    """The ValueInfoProto of a tensor; a dynamic dimension is given by name."""
    value = ValueInfoProto(name=name)
    value.type.tensor_type.elem_type = dtype
    for size in shape:
        if isinstance(size, str):
            value.type.tensor_type.shape.dim.add(dim_param=size.encode())
        else:
            value.type.tensor_type.shape.dim.add(dim_value=size)
    return value


def tensor_of(name: str, array: NDArray[Any]) -> Any:
    """The TensorProto of an array."""
    raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    kind = DataType[array.dtype.name.upper()]
    return TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=raw)


def tensor_array(tensor: Any) -> NDArray[Any]:
    """The elements of a TensorProto.

    Raises:
        DecodingError: of another element type, or without all its elements.
    """
    try:
        name = DataType(tensor.data_type).name.lower()
    except ValueError as error:
        raise DecodingError(f"a tensor of element type {tensor.data_type}") from error
    typed = next((each for kind in _TYPED if len(each := getattr(tensor, f"{kind}_data"))), None)
    values: NDArray[Any]
    if typed is None:
        values = np.frombuffer(tensor.raw_data, np.dtype(name).newbyteorder("<"))
    elif name == "float16":  # its bits
        values = np.array(typed).astype(np.uint16).view(np.float16)
    else:
        values = np.array(typed).astype(name)
    if values.size != np.prod(tensor.dims):
        raise DecodingError(f"a tensor of {values.size} values of the shape {list(tensor.dims)}")
    return values.reshape(tuple(tensor.dims))


_TYPED: Final = ("float", "int32", "int64", "double", "uint64")
"""Fields with the elements of a tensor that has no raw data."""


Value: TypeAlias = str
"""The name of a tensor in the graph; "" for an omitted optional input."""

MOST = np.iinfo(np.int64).max
"""As the end of a slice: up to the last element."""


class Nodes:
    """The nodes and constants added so far, in execution order.

    Args:
        graph: the GraphProto that they are added to.
    """

    def __init__(self, graph: Any):
        self.graph = graph
        self._constants = graph
        self._names = counting(1)
        self._known: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def inner(self) -> Nodes:
        """For the body of a loop: its own nodes, constants and names shared with these.

        A body sees every value around it; its constants are the graph's.
        """
        body = Nodes(GraphProto())
        body._constants, body._names, body._known = self._constants, self._names, self._known
        return body

    def add(self, operator: str, *inputs: Value, name: Value = "", **attributes: Any) -> Value:
        """Add a node with one output.

        Args:
            operator: an operator of the default ONNX domain.
            inputs: its inputs in order.
            name: the output's name if the graph's contract fixes it.
            attributes: the node's attributes; None leaves one out.
        """
        output = name or self.name()
        self._append(operator, inputs, [output], attributes)
        return output

    def add_many(self, operator: str, *inputs: Value, count: int, **attributes: Any) -> list[Value]:
        """Add a node with `count` outputs; the rest as for `add`."""
        outputs = [self.name() for _ in range(count)]
        self._append(operator, inputs, outputs, attributes)
        return outputs

    def split(self, value: Value, sizes: Sequence[int], axis: int) -> list[Value]:
        """Cut a tensor along an axis; sizes add up to its length there."""
        if len(sizes) == 1:
            return [value]
        return self.add_many("Split", value, self.integers(*sizes), count=len(sizes), axis=axis)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Join tensors along an axis."""
        return values[0] if len(values) == 1 else self.add("Concat", *values, axis=axis)

    def part(self, value: Value, start: int, stop: int, axis: int) -> Value:
        """The elements start..stop of a tensor along an axis; `stop` may be negative."""
        return self.add(
            "Slice", value, self.integers(start), self.integers(stop), self.integers(axis)
        )

    def column(self, value: Value, index: int) -> Value:
        """One column: [..., W] -> [...]."""
        return self.add("Gather", value, self.constant(np.array(index, np.int64)), axis=-1)

    def steps(self, x: Value) -> Value:
        """0, 1, ... T - 1 of a sequence [T, ...], int64 [T]."""
        count = self.column(self.add("Shape", x), 0)
        zero, one = (self.constant(np.array(number, np.int64)) for number in (0, 1))
        return self.add("Range", zero, count, one)

    def constant(self, array: NDArray[Any]) -> Value:
        """A constant tensor."""
        raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        key = (array.dtype.name, array.shape, hashlib.sha256(raw).digest())
        if key not in self._known:
            self._known[key] = f"c{len(self._known)}"
            self._constants.initializer.add(
                name=self._known[key],
                data_type=DataType[array.dtype.name.upper()],
                dims=array.shape,
                raw_data=raw,
            )
        return self._known[key]

    def number(self, value: float) -> Value:
        """A float32 scalar."""
        return self.constant(np.array(value, np.float32))

    def integers(self, *values: int) -> Value:
        """An int64 vector, as axes, sizes and bounds are given."""
        return self.constant(np.array(values, np.int64))

    @property
    def constant_bytes(self) -> int:
        """Bytes of all constants."""
        return sum(prod(shape) * np.dtype(dtype).itemsize for dtype, shape, _ in self._known)

    def _append(
        self,
        operator: str,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        attributes: Mapping[str, Any],
    ) -> None:
        self.graph.node.add(
            input=inputs,
            output=outputs,
            op_type=operator,
            attribute=[
                attribute(name, attributes[name])
                for name in sorted(attributes)
                if attributes[name] is not None
            ],
        )

    def name(self) -> Value:
        """A name that no value has yet, for a value that another graph makes."""
        return f"v{next(self._names)}"


def find_backward_layer(model: Any) -> str | None:
    """Say which layer of a ModelProto reads sequences backwards, and what to do; None: no layer."""
    for node in inner_messages(model, NodeProto):
        for each in node.attribute:
            if each.name == "direction" and each.s != b"forward":
                layer = f"{each.s.decode()} {node.op_type} {node.name or node.output[0]!r}"
                return (
                    f"the {layer} reads the sequence backwards, so that an output depends on "
                    "events to come; train and export a model of forward layers"
                )
    return None
