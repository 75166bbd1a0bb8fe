"""Messages of V2 over gRPC: requests as they are received, replies, and the status of an error.

The details of a status are `code: detail`. Its trailing metadata is `carry-error` (the code),
`carry-problem-bin` (the problem document of the HTTP API, JSON) and, for a temporary error,
`grpc-retry-pushback-ms`, which gRPC's own retries follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message
from grpc import StatusCode
from msgspec.structs import replace

from service.access.caller import PREDICT, Caller
from service.codec.decoding import decode_element, detach_error, invalid
from service.codec.media import Media, dumps
from service.core import errors
from service.core.errors import BodyTooLarge, CarryError, MalformedBody
from service.server import errors as http_errors
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.common.stream_order import PendingChunk
from service.transports.v1.problems import problem
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.inference import InferCall, Inference, InferReply
from service.transports.v2.request import (
    InferRequest,
    Parameter,
    RequestedOutput,
    parse_parameters,
    parse_sequence_id,
)
from service.transports.v2.tensors import BOOL, BYTES, FP32, MAX_RANK, InputTensor, Shape

MAX_FIELDS: Final = 1000
"""Most fields of a long message, besides the elements of its tensors."""

_CONTENTS: Final = {FP32: "fp32_contents", BYTES: "bytes_contents", BOOL: "bool_contents"}
_INPUTS: Final = pb.ModelInferRequest.INPUTS_FIELD_NUMBER
_RAW: Final = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_NO_HEAD: Final = pb.ModelInferRequest()
_NO_REQUEST: Final = InferRequest("", ())

STATUS_CODES: Final[Mapping[type[CarryError], StatusCode]] = {
    errors.BadRequest: StatusCode.INVALID_ARGUMENT,
    http_errors.RequestTimeout: StatusCode.DEADLINE_EXCEEDED,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.Forbidden: StatusCode.PERMISSION_DENIED,
    errors.NotFound: StatusCode.NOT_FOUND,
    http_errors.MethodNotAllowed: StatusCode.UNIMPLEMENTED,
    errors.StreamRejection: StatusCode.FAILED_PRECONDITION,
    errors.AlreadyApplied: StatusCode.ALREADY_EXISTS,
    errors.StreamExists: StatusCode.ALREADY_EXISTS,
    errors.Conflict: StatusCode.ABORTED,
    errors.ServiceFailure: StatusCode.INTERNAL,
    errors.StateDamaged: StatusCode.DATA_LOSS,
    errors.StoreUnavailable: StatusCode.UNAVAILABLE,
    errors.StoreRefused: StatusCode.UNAVAILABLE,
    errors.OutcomeUnknown: StatusCode.UNKNOWN,
    errors.NotDurable: StatusCode.UNKNOWN,
    errors.DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    errors.Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    http_errors.TooManyConnections: StatusCode.RESOURCE_EXHAUSTED,
    errors.ShuttingDown: StatusCode.UNAVAILABLE,
}
"""By the class of an error, or the nearest of its base classes."""

M = TypeVar("M", bound=Message)


class InferMessage(PendingChunk):
    """One received request: decoded at once, a long one when it is its turn.

    Its `stream` is model and stream; empty if it names no valid stream.

    Attributes:
        head: the message; if it is long, without its tensors; empty if it cannot be parsed.
        size: its length in bytes.
        is_dry_run: whether it changes nothing.
        outcome: its response in a stream of requests, once it may be sent.
    """

    __slots__ = ("_data", "_request", "head", "is_dry_run", "size")

    def __init__(self, data: bytes):
        self.size = len(data)
        self.head = _NO_HEAD
        self._data: bytes | None = None
        self._request: InferRequest | CarryError
        try:
            if self.size < LONG_BYTES:
                self.head = parse(pb.ModelInferRequest, data)
                inputs = _inputs(self.head)
            else:
                self.head, self._data = parse(pb.ModelInferRequest, _head(data)), data
                inputs = []
            self._request = request = _decode_request(self.head, inputs)
            parameters = request.parameters
            stream, self.is_dry_run = parameters.stream, parameters.dry_run
            appends = parameters.position is None and not parameters.starts_over
        except CarryError as error:
            self._request, sent = detach_error(error), self.head.parameters
            stream, appends = _stream_of(self.head), True
            self.is_dry_run = "dry_run" in sent and sent["dry_run"].bool_param
        super().__init__("" if stream is None else f"{self.head.model_name}/{stream}")
        self.appends = appends

    async def read(self, inference: Inference, caller: Caller, deadline_s: float) -> InferCall:
        """Read the request, whose bytes are dropped.

        Raises:
            CarryError
        """
        request, data = self._request, self._data
        self._request, self._data = _NO_REQUEST, None
        if isinstance(request, CarryError):
            raise request
        if data is None:
            return inference.read(caller, request, deadline_s)
        stream = request.parameters.stream
        inference.served(caller, PREDICT, request.model, request.version, stream)

        def read() -> InferCall:
            inputs = _inputs(parse(pb.ModelInferRequest, data))
            return inference.read(caller, replace(request, inputs=inputs), deadline_s)

        return await inference.api.long_bodies.read(self.size, deadline_s, read)

    def drop(self) -> None:
        """Drop what was received: the request is answered, and waits for earlier ones."""
        self.head, self._request = _NO_HEAD, _NO_REQUEST


def parse(kind: type[M], data: bytes) -> M:
    """The message in these bytes.

    Raises:
        MalformedBody
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise _malformed(kind.DESCRIPTOR.full_name) from error


def parse_short(kind: type[M], data: bytes) -> M:
    """Parse a message of a kind that is always short.

    Raises:
        BodyTooLarge, MalformedBody
    """
    if len(data) >= LONG_BYTES:
        raise BodyTooLarge(
            f"message: expected less than {LONG_BYTES} bytes, got {len(data)}",
            expected=LONG_BYTES,
            got=len(data),
        )
    return parse(kind, data)


def _head(data: bytes) -> bytes:
    """A long message without its tensors, of which each byte could become an object.

    Raises:
        MalformedBody, InvalidInput
    """
    parts, count = [], 0
    for number, begin, start, end in _fields(data, 0, len(data)):
        count += 1
        if number == _INPUTS:
            count += sum(1 for _ in islice(_fields(data, start, end), MAX_FIELDS))
        if count > MAX_FIELDS:
            raise invalid("message", f"at most {MAX_FIELDS} fields", "more")
        if number not in (_INPUTS, _RAW):
            parts.append(data[begin:end])
    head = b"".join(parts)
    if len(head) >= LONG_BYTES:
        expected = f"less than {LONG_BYTES} bytes besides the tensors"
        raise invalid("message", expected, f"{len(head)} bytes")
    return head


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message in the wire format: number, begin, and begin and end of the value.

    Raises:
        MalformedBody
    """
    while at < end:
        begin = at
        key, at = _varint(data, at)
        start = at
        match key & 7:
            case 0:
                _, at = _varint(data, at)
            case 1 | 5:
                at += 8 if key & 7 == 1 else 4
            case 2:
                length, start = _varint(data, at)
                at = start + length
            case _:
                raise _malformed()
        if at > end:
            raise _malformed()
        yield key >> 3, begin, start, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and the place after it."""
    value = 0
    for shift, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise _malformed()


def _malformed(expected: str = pb.ModelInferRequest.DESCRIPTOR.full_name) -> MalformedBody:
    return MalformedBody(
        f"message: expected {expected}, got bytes that cannot be parsed as one",
        at="message",
        expected=expected,
        got="other bytes",
    )


def _decode_request(message: pb.ModelInferRequest, inputs: list[InputTensor]) -> InferRequest:
    """The value of a message.

    Raises:
        InvalidInput, InvalidName
    """
    for index, output in enumerate(message.outputs):
        _reject_parameters(f"outputs[{index}]", output.parameters)
    parameters = {name: _parameter(name, value) for name, value in message.parameters.items()}
    return InferRequest(
        message.model_name,
        inputs,
        parse_parameters(parameters),
        tuple([RequestedOutput(output.name) for output in message.outputs]),
        message.model_version,
        message.id,
    )


def _inputs(message: pb.ModelInferRequest) -> list[InputTensor]:
    # before anything is made of each of them
    if not 1 <= len(message.inputs) <= 2:
        expected = "one tensor, optionally followed by reset"
        raise invalid("inputs", expected, len(message.inputs))
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        expected = f"one element for each of {len(message.inputs)} inputs, or none"
        raise invalid("raw_input_contents", expected, len(raw))
    tensors = []
    for index, tensor in enumerate(message.inputs):
        _reject_parameters(f"inputs[{index}]", tensor.parameters)
        # the rest is not copied: each of its bytes may be a number
        axes = list(tensor.shape[: MAX_RANK + 1])
        shape = decode_element(Media.JSON, axes, Shape, f"inputs[{index}].shape")
        if raw and tensor.HasField("contents"):
            expected = "none, since raw_input_contents has the values"
            raise invalid(f"inputs[{index}].contents", expected, "some")
        field = _CONTENTS.get(tensor.datatype)
        values = () if field is None else getattr(tensor.contents, field)
        # not a list: its length is checked before its values are copied
        data = raw[index] if raw else values
        tensors.append(InputTensor(tensor.name, tensor.datatype, shape, data))
    return tensors


def _parameter(name: str, value: pb.InferParameter) -> Parameter:
    """The value of a parameter.

    Raises:
        InvalidInput: it has none.
    """
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise invalid(f"parameters.{name[:100]}", "a value", "none")
    parameter: Parameter = getattr(value, kind)
    return parameter


def _stream_of(head: pb.ModelInferRequest) -> str | None:
    """The stream of a message that is invalid; None if it names no valid one."""
    name = "sequence_id"
    try:
        if name in head.parameters:
            return parse_sequence_id(_parameter(name, head.parameters[name]))
    except CarryError:
        pass
    return None


def _reject_parameters(at: str, parameters: Mapping[str, pb.InferParameter]) -> None:
    """Reject parameters of a tensor: Carry has neither shared memory nor classification."""
    for name in parameters:
        raise invalid(f"{at}.parameters", "none", repr(name[:100]))


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


def error_response(error: CarryError, head: pb.ModelInferRequest) -> pb.ModelStreamInferResponse:
    """The response to a request of a stream that failed; the stream continues."""
    response = pb.ModelInferResponse(
        model_name=head.model_name, model_version=head.model_version, id=head.id
    )
    response.parameters["carry_error"].string_param = error.code
    document = dumps(Media.JSON, problem(error))
    response.parameters["carry_problem"].string_param = document.decode()
    return pb.ModelStreamInferResponse(error_message=status_details(error), infer_response=response)


def status_code(error: CarryError) -> StatusCode:
    """The status code of an error."""
    for kind in type(error).__mro__:
        if kind in STATUS_CODES:
            return STATUS_CODES[kind]
    return StatusCode.UNKNOWN


def status_details(error: CarryError) -> str:
    """The details of a status."""
    return f"{error.code}: {error.detail}"


def trailing_metadata(error: CarryError) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata of an error: its code, and its problem document."""
    document = problem(error)
    content = dumps(Media.JSON, document)
    metadata: tuple[tuple[str, str | bytes], ...] = (
        ("carry-error", error.code),
        ("carry-problem-bin", content),
    )
    if "retry_after_s" in document:
        pushback_ms = str(round(document["retry_after_s"] * 1000))
        metadata = (*metadata, ("grpc-retry-pushback-ms", pushback_ms))
    return metadata
