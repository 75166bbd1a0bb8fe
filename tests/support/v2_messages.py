"""The messages of the V2 protocol, in a descriptor pool of their own.

`tritonclient` registers the same names in the default pool, so that a process which imports it
cannot import the service's `v2_pb2`: its descriptors are read from the generated file.
"""

from __future__ import annotations

import ast
from typing import Any

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

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
