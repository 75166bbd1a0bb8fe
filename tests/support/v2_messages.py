"""The messages of the V2 protocol's `.proto`, in a descriptor pool of their own.

`tritonclient` registers the same names in the default pool, so that a process which imports it
cannot import the service's `v2_pb2`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from tests.support.machine import REPOSITORY

PROTO = REPOSITORY / "service/transports/v2/grpc/v2.proto"


def _pool() -> DescriptorPool:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors"
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO.parent}"]
        subprocess.run([*command, f"--descriptor_set_out={out}", PROTO.name], check=True)
        described = FileDescriptorSet.FromString(out.read_bytes())
    pool = DescriptorPool()
    for file in described.file:
        pool.Add(file)
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
