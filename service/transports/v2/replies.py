"""Replies of the V2 protocol, of HTTP and gRPC alike: from the values of the pipeline to tensors.
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.spec.layout import Output
from models.spec.state import StateSpec
from service.core.errors import StateIncompatible
from service.core.values import NO_STREAM, FloatRows, Prediction, Reply
from service.pipeline.served_model import ServedModel
from service.transports.v2.parameters import Parameter
from service.transports.v2.request import STATE, InferCall, Signature
from service.transports.v2.tensors import BOOL, FP32

VERSION: Final = "1"
"""Version of every model, since clients of Triton expect a whole number; the model's own version,
the beginning of its fingerprint, is accepted as well."""

_DATATYPES: Final = {
    "float32": FP32,
    "float16": "FP16",
    "float64": "FP64",
    "bool": BOOL,
    **{
        f"{kind}{bits}": f"{kind}{bits}".upper()
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
}
"""By the name of NumPy's type."""

_F4: Final = np.dtype("<f4")


class OutputTensor(NamedTuple):
    """An output of a reply: values of any shape, in C order; over HTTP, whether it is returned in
    the binary format."""

    name: str
    values: NDArray[Any]
    is_binary: bool = True

    @property
    def datatype(self) -> str:
        """The datatype of the values."""
        return _DATATYPES[self.values.dtype.name]

    @property
    def data(self) -> bytes:
        """The binary format."""
        return binary_values(self.values)


def binary_values(values: NDArray[Any]) -> bytes:
    """Numbers of any shape, in C order, in the binary format."""
    if values.dtype is not _F4:
        values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return values.tobytes()


class InferReply(NamedTuple):
    """A reply of the V2 protocol."""

    model: str
    version: str
    id: str
    parameters: Mapping[str, Parameter]
    outputs: Sequence[OutputTensor]


def reply_to_chunk(call: InferCall, reply: Reply, *, is_deleted: bool = False) -> InferReply:
    """The reply to a chunk."""
    head = reply.head
    parameters: dict[str, Parameter] = {
        "position": head.position,
        "epoch": head.epoch.hex(),
        "tag": head.tag.hex(),
        "replayed": reply.replayed,
    }
    if reply.dry_run:
        parameters["dry_run"] = True
        if head is NO_STREAM:
            del parameters["epoch"], parameters["tag"]
    if reply.created:
        parameters["created"] = True
    if reply.output_position is not None:
        parameters["output_position"] = reply.output_position
    if reply.warm is not None:
        parameters["carry_warm"] = f"{reply.warm.events}/{reply.warm.of}"
    if is_deleted:
        parameters["deleted"] = True
    version = reply.version
    if version is not None and version is not call.signature.codec.served:
        parameters["carry_version"] = version.version
    return build_reply(call, parameters, [reply])


def build_reply(
    call: InferCall, parameters: dict[str, Parameter], results: Sequence[Reply | Prediction]
) -> InferReply:
    """The reply with the results of each sequence, which have packed outputs [T, O]."""
    signature, served = call.signature, call.signature.codec.served
    has_batch = signature.batch is not None
    rows = _stack([result.outputs for result in results], has_batch)
    states: list[Mapping[str, NDArray[Any]]] = []
    if signature.has_state:
        states = [_layout(served, result).by_name(result.state) for result in results]
    tensors = []
    for name, is_binary, output, columns in signature.outputs:
        if output is None:
            part = name.removeprefix(STATE)
            values = np.ascontiguousarray(_stack([state[part] for state in states], has_batch))
        else:
            values = _output_values(output, rows[..., columns])
        tensors.append(OutputTensor(name, values, is_binary))
    return InferReply(served.name, VERSION, call.id, parameters, tensors)


def _layout(served: ServedModel, result: Reply | Prediction) -> StateSpec:
    """The layout of a result's state, which has the parts that the request asks for.

    Raises:
        StateIncompatible: another version answered, whose states have other parts.
    """
    version = result.version
    if version is None or version.state.parts == served.state.parts:
        return served.state
    applied = "; the chunk was applied" if isinstance(result, Reply) else ""
    raise StateIncompatible(
        f"expected the state of version {served.version}, but version {version.version} answered, "
        f"whose states have other parts{applied}",
        expected=served.version,
        got=version.version,
    )


def constant_output(signature: Signature) -> OutputTensor | None:
    """The output of a reply to a chunk, its values zeros, if there is one, with the same shape in
    every reply; else None."""
    served, [selected, *others] = signature.codec.served, signature.outputs
    output = selected.output
    if others or output is None or output.size != served.outputs.size:
        return None
    if output.per != "step" or served.blocks is not None:
        return None
    lead = () if signature.batch is None else (1,)
    shape = (*lead, signature.steps, *output_shape(output))
    return OutputTensor(output.name, np.zeros(shape, np.float32), selected.is_binary)


def _stack(values: Sequence[NDArray[Any]], has_batch: bool) -> NDArray[Any]:
    """The values of each sequence [B, ...], or of the only one [...]."""
    if not has_batch:
        return values[0]
    return np.stack(values) if len(values) > 1 else values[0][np.newaxis]


def _output_values(output: Output, cut: FloatRows) -> FloatRows:
    """An output of its columns [..., T, O]: [..., T, *shape], or once [..., *shape]."""
    if output.per == "chunk":
        cut = cut[..., -1, :]
    shape = (*cut.shape[:-1], *output_shape(output))
    return np.ascontiguousarray(cut).reshape(shape)


def output_shape(output: Output) -> tuple[int, ...]:
    """The shape of one step of an output; of one that is given once for a chunk, its shape, which
    has at least one axis."""
    return output.shape or ((1,) if output.per == "chunk" else ())
