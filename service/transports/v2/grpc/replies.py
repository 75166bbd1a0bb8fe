"""Replies of V2 over gRPC.

The usual ones are written without protobuf, which costs three times as much; all others by
protobuf.
"""

from __future__ import annotations

from binascii import hexlify
from typing import Final

from service.codec.media import Media, dumps
from service.core.errors import CarryError
from service.core.memo import Memo
from service.core.values import Reply
from service.transports.v1.problems import problem
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.messages import CACHED_HEADS, LENGTH_DELIMITED, InferMessage
from service.transports.v2.grpc.status import status_details
from service.transports.v2.replies import (
    VERSION,
    InferReply,
    binary_values,
    constant_output,
    reply_to_chunk,
)
from service.transports.v2.request import InferCall, Signature


def encode_reply(reply: InferReply, message: pb.ModelInferResponse) -> pb.ModelInferResponse:
    """Write a reply into an empty message, its tensors in the binary format."""
    message.model_name, message.model_version, message.id = reply.model, reply.version, reply.id
    for output in reply.outputs:
        message.outputs.add(name=output.name, datatype=output.datatype, shape=output.values.shape)
        message.raw_output_contents.append(output.data)
    for name, value in reply.parameters.items():
        parameter = message.parameters[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            parameter.int64_param = value
        else:
            parameter.string_param = str(value)
    return message


class ReplyEncoder:
    """Encodes replies to chunks; what is the same in each reply of a signature is cached.

    Attributes:
        forget: drops what is cached.
    """

    def __init__(self) -> None:
        self._constants = Memo(_constant_fields, CACHED_HEADS)
        self.forget = self._constants.clear

    def encode(self, call: InferCall, reply: Reply, *, in_stream: bool) -> bytes:
        """The bytes of the response to a chunk; of a stream of requests with `in_stream`."""
        constants = self._constants[call.signature]
        is_other = reply.version not in (call.signature.codec.served, None)
        is_usual = reply.output_position is None and reply.warm is None and not is_other
        if constants is None or not is_usual:
            response = encode_reply(reply_to_chunk(call, reply), pb.ModelInferResponse())
            data = response.SerializeToString()
        else:
            before, after, values_head = constants
            head, position = reply.head, _encode_varint(reply.head.position)
            data = b'%b%b"%c\n\x08position\x12%c\x10%b%b%b%b%b%b%b%b%b%b' % (
                before,
                _field(3, call.id.encode()) if call.id else b"",
                len(position) + 13,
                len(position) + 1,
                position,
                b'"\x1b\n\x05epoch\x12\x12\x1a\x10',
                hexlify(head.epoch),
                b'"\x29\n\x03tag\x12\x22\x1a\x20',
                hexlify(head.tag),
                _REPLAYED if reply.replayed else _NOT_REPLAYED,
                b'"\x0d\n\x07created\x12\x02\x08\x01' if reply.created else b"",
                after,
                values_head,
                binary_values(reply.outputs),
            )
        return b"\x12%b%b" % (_LENGTHS[len(data)], data) if in_stream else data


_REPLAYED: Final = b'"\x0e\n\x08replayed\x12\x02\x08\x01'
_NOT_REPLAYED: Final = b'"\x0e\n\x08replayed\x12\x02\x08\x00'


def _constant_fields(signature: Signature) -> tuple[bytes, bytes, bytes] | None:
    """The fields of a response before and after its parameters, and the head of its values, if it
    has one output, with the same shape in every reply."""
    output = constant_output(signature)
    if output is None:
        return None
    names = pb.ModelInferResponse(model_name=signature.codec.served.name, model_version=VERSION)
    tensor = pb.ModelInferResponse()
    tensor.outputs.add(name=output.name, datatype=output.datatype, shape=output.values.shape)
    values_head = b"\x32" + _encode_varint(output.values.nbytes)
    return names.SerializeToString(), tensor.SerializeToString(), values_head


def _field(number: int, value: bytes) -> bytes:
    return b"%c%b%b" % (number << 3 | LENGTH_DELIMITED, _LENGTHS[len(value)], value)


def _encode_varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


_LENGTHS: Final = Memo(_encode_varint, CACHED_HEADS)


def error_response(error: CarryError, message: InferMessage) -> pb.ModelStreamInferResponse:
    """The response to a request of a stream that failed; the stream continues."""
    response = pb.ModelInferResponse(
        model_name=message.model, model_version=message.version, id=message.id
    )
    response.parameters["carry_error"].string_param = error.code
    document = dumps(Media.JSON, problem(error))
    response.parameters["carry_problem"].string_param = document.decode()
    return pb.ModelStreamInferResponse(error_message=status_details(error), infer_response=response)
