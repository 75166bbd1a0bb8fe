"""Messages and calls of the V2 protocol over gRPC, in a descriptor pool of their own.

`tritonclient` registers the same names in the default pool, so that a process which imports it
cannot import the service's `v2_pb2`: its descriptors are read from the generated file.
"""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from numpy.typing import NDArray

from tests.support.machine import REPOSITORY

GENERATED = REPOSITORY / "service/transports/v2/grpc/v2_pb2.py"


def _pool() -> DescriptorPool:
    calls = [
        node for node in ast.walk(ast.parse(GENERATED.read_text())) if isinstance(node, ast.Call)
    ]
    (file,) = [each.args[0] for each in calls if "AddSerializedFile" in ast.unparse(each.func)]
    pool = DescriptorPool()
    pool.AddSerializedFile(ast.literal_eval(file))
    return pool


_POOL = _pool()
METHODS: dict[str, Any] = {
    method.name: method
    for method in _POOL.FindServiceByName("inference.GRPCInferenceService").methods
}
"""Descriptors of the RPCs, by name."""


def message_class(name: str) -> Any:
    """The class of a message: `ModelInferRequest`, for example."""
    return GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))


def infer_request(model: str, rows: NDArray[Any], stream: str, **parameters: int | str) -> Any:
    """The message of a chunk, rows [T, F] of a stream, with further parameters."""
    message = message_class("ModelInferRequest")(model_name=model)
    message.inputs.add(name="inputs", datatype="FP32", shape=rows.shape)
    message.raw_input_contents.append(rows.astype("<f4").tobytes())
    for name, value in {"sequence_id": stream, **parameters}.items():
        kind = "int64_param" if isinstance(value, int) else "string_param"
        setattr(message.parameters[name], kind, value)
    return message


def read_outputs(response: Any) -> dict[str, NDArray[np.float32]]:
    """The outputs of a response by name."""
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {one.name: np.frombuffer(data, "<f4").reshape(one.shape) for one, data in pairs}


def callable_of(channel: Any, method: str) -> Any:
    """What calls a method on a channel of `grpc` or `grpc.aio`."""
    described = METHODS[method]
    kind = channel.stream_stream if method == "ModelStreamInfer" else channel.unary_unary
    return kind(
        f"/{described.containing_service.full_name}/{method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_class(described.output_type.name).FromString,
    )
