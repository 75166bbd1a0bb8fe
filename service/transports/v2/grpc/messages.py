"""Messages of inference over gRPC to values, and values to messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from service.codec.decoding import invalid
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.values import (
    BOOL,
    BYTES,
    FP32,
    InferReply,
    InferRequest,
    InputTensor,
    Parameter,
)

_CONTENTS: Final = {
    FP32: "fp32_contents",
    BYTES: "bytes_contents",
    BOOL: "bool_contents",
}


def decode_request(message: pb.ModelInferRequest) -> InferRequest:
    """The value of a request's message.

    Raises:
        InvalidInput
    """
    for index, output in enumerate(message.outputs):
        _reject_parameters(f"outputs[{index}]", output.parameters)
    return InferRequest(
        message.model_name,
        _inputs(message),
        decode_parameters(message),
        [output.name for output in message.outputs],
        message.model_version,
        message.id,
    )


def encode_reply(reply: InferReply) -> pb.ModelInferResponse:
    """The message of a reply, its tensors in the binary format."""
    message = pb.ModelInferResponse(
        model_name=reply.model,
        model_version=reply.version,
        id=reply.id,
        outputs=[
            pb.ModelInferResponse.InferOutputTensor(
                name=output.name, datatype=output.datatype, shape=output.values.shape
            )
            for output in reply.outputs
        ],
        raw_output_contents=[output.data for output in reply.outputs],
    )
    set_parameters(message, reply.parameters)
    return message


def set_parameters(message: pb.ModelInferResponse, parameters: Mapping[str, Parameter]) -> None:
    """Add parameters to a response."""
    for name, value in parameters.items():
        parameter = message.parameters[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            parameter.int64_param = value
        elif isinstance(value, float):
            parameter.double_param = value
        else:
            parameter.string_param = value


def decode_parameters(message: pb.ModelInferRequest) -> dict[str, Parameter]:
    """The parameters of a request.

    Raises:
        InvalidInput: one has no value.
    """
    return {name: decode_parameter(name, value) for name, value in message.parameters.items()}


def decode_parameter(name: str, value: pb.InferParameter) -> Parameter:
    """The value of a parameter.

    Raises:
        InvalidInput: it has none.
    """
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise invalid(f"parameters.{name[:100]}", "a value", "none")
    parameter: Parameter = getattr(value, kind)
    return parameter


def _inputs(message: pb.ModelInferRequest) -> Sequence[InputTensor]:
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
        if raw and tensor.HasField("contents"):
            expected = "none, since raw_input_contents has the values"
            raise invalid(f"inputs[{index}].contents", expected, "some")
        field = _CONTENTS.get(tensor.datatype)
        values = () if field is None else getattr(tensor.contents, field)
        # not a list: its length is checked before its values are copied
        data = raw[index] if raw else values
        tensors.append(InputTensor(tensor.name, tensor.datatype, tensor.shape, data))
    return tensors


def _reject_parameters(at: str, parameters: Mapping[str, pb.InferParameter]) -> None:
    """Reject parameters of a tensor: Carry has neither shared memory nor classification."""
    for name in parameters:
        raise invalid(f"{at}.parameters", "none", repr(name[:100]))
