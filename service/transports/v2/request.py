"""Requests of the V2 protocol, of HTTP and gRPC alike: their tensors and outputs.

A transport decodes its bytes to an `InferRequest`. `make_signature` checks its tensor and its
outputs against the model, `read_steps` makes the steps of its values by the model's reader, which
reads the bodies of the HTTP API too, so that limits, errors and digests are the same. Everything
here is pure: no I/O, no waiting, no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from models.spec.layout import Output
from service.codec.decoding import format_value, invalid, load_json
from service.codec.request_reader import RequestReader
from service.codec.settings import Limit
from service.core.errors import MalformedBody
from service.core.values import Chunk, SequenceInput, Steps
from service.pipeline.served_model import ServedModel
from service.transports.v1.context import ModelCodec
from service.transports.v2.parameters import NO_PARAMETERS, InferParameters
from service.transports.v2.tensors import (
    BOOL,
    BYTES,
    FP32,
    InputTensor,
    byte_elements,
    flags,
    float_values,
)

INPUTS: Final = "inputs"
EVENTS: Final = "events"
RESET: Final = "reset"

ATTENTION: Final = "attention."
"""Before the name of a layer that attends over the chunk: the output of its weights."""

STATE: Final = "state."
"""Before the name of a part of the state: the output of its values after the chunk."""


class RequestedOutput(NamedTuple):
    """An output that a request names, and over HTTP whether it is returned in the binary format."""

    name: str
    is_binary: bool = True


class InferRequest(msgspec.Struct, frozen=True, gc=False):
    """A request, the values of its tensors not yet read.

    Attributes:
        version: the model's version; empty for the one that is served.
        id: returned in the reply.
        outputs: the outputs to return; empty for all.
    """

    model: str
    inputs: Sequence[InputTensor]
    parameters: InferParameters = NO_PARAMETERS
    outputs: tuple[RequestedOutput, ...] = ()
    version: str = ""
    id: str = ""


class SelectedOutput(NamedTuple):
    """An output to return.

    Attributes:
        output: None for a part of the state.
        columns: of the packed rows of outputs.
    """

    name: str
    is_binary: bool
    output: Output | None
    columns: slice


class Signature(msgspec.Struct, frozen=True, eq=False):
    """What a tensor's name and shape and the requested outputs determine; shared by such requests.

    It is equal to itself only.

    Attributes:
        outputs: the outputs to return.
        steps: T.
        batch: length of the leading axis of the outputs; None if there is none.
        has_state: whether parts of the state are among the outputs.
        has_binary: whether an output is returned in the binary format.
    """

    codec: ModelCodec
    outputs: Sequence[SelectedOutput]
    steps: int
    batch: int | None
    has_state: bool
    has_binary: bool


def input_names(served: ServedModel) -> list[str]:
    """The tensors that a model takes, of which a request has one."""
    return [INPUTS] if served.events is None else [EVENTS, INPUTS]


class InferCall(msgspec.Struct, frozen=True, gc=False):
    """A request that was read: without its tensors.

    Attributes:
        id: returned in the reply.
        work: the chunk, or the sequences to predict.
        deadline_s: when the client stops waiting, on the monotonic clock.
        deletes: whether the stream is deleted after the chunk.
    """

    signature: Signature
    id: str
    work: Chunk | Sequence[SequenceInput]
    deadline_s: float
    deletes: bool


def make_signature(
    codec: ModelCodec,
    name: str,
    datatype: str,
    shape: tuple[int, ...],
    outputs: tuple[RequestedOutput, ...],
    binary_by_default: bool,
) -> Signature:
    """The signature of a request.

    Raises:
        InvalidInput: the model has no such tensor, or no such output.
    """
    selected = _select_outputs(codec.served, outputs, binary_by_default)
    _check_tensor(codec.served, name, datatype, shape)
    rank = 2 if name == INPUTS else 1
    return Signature(
        codec,
        selected,
        shape[-rank],
        None if len(shape) == rank else shape[0],
        any(output.output is None for output in selected),
        any(output.is_binary for output in selected),
    )


def _select_outputs(
    served: ServedModel, requested: Sequence[RequestedOutput], binary_by_default: bool
) -> Sequence[SelectedOutput]:
    """The requested outputs, in their order; if there are none, all outputs of the model."""
    layout = served.outputs
    known: dict[str, tuple[Output | None, slice]] = {
        output.name: (output, layout.slices[output.name]) for output in layout.outputs
    }
    if not requested:
        return [SelectedOutput(name, binary_by_default, *each) for name, each in known.items()]
    first = layout.size - len(layout.attention)
    for at, layer in enumerate(layout.attention, start=first):
        known.setdefault(f"{ATTENTION}{layer}", (Output(layer, ()), slice(at, at + 1)))
    for part in served.state.parts:
        known.setdefault(f"{STATE}{part.name}", (None, slice(0)))
    selected: dict[str, SelectedOutput] = {}
    for at, (name, is_binary) in enumerate(requested):
        if name not in known or name in selected:
            expected = f"each once of {', '.join(known)}"
            raise invalid(f"outputs[{at}].name", expected, repr(name[:100]))
        selected[name] = SelectedOutput(name, is_binary, *known[name])
    return [*selected.values()]


def _check_tensor(served: ServedModel, name: str, datatype: str, shape: tuple[int, ...]) -> None:
    """Reject a tensor with another name, type or shape than the model takes."""
    at = "inputs[0]"
    names = input_names(served)
    if name not in names:
        raise invalid(f"{at}.name", " or ".join(names), repr(name[:100]))
    expected_type = FP32 if name == INPUTS else BYTES
    if datatype != expected_type:
        raise invalid(f"{at}.datatype", expected_type, repr(datatype[:100]))
    steps: list[Any] = ["T", served.input_features] if name == INPUTS else ["T"]
    fits = len(steps) <= len(shape) <= len(steps) + 1 and min(shape) >= 0
    if not fits or (name == INPUTS and shape[-1] != served.input_features):
        shapes = [f"[{', '.join(map(str, axes))}]" for axes in (steps, ["B", *steps])]
        raise invalid(f"{at}.shape", " or ".join(shapes), list(shape)[:16])


def check_chunk(signature: Signature) -> None:
    """Reject a tensor of several sequences, and chunks for a model that needs whole sequences."""
    signature.codec.reader.check_accepts_chunks()
    if signature.batch not in (None, 1):
        expected = "1 in front, since a chunk of a sequence is of one stream"
        raise invalid("inputs[0].shape", expected, signature.batch)


def read_resets(tensor: InputTensor, signature: Signature) -> list[list[int]]:
    """The ascending indexes of the steps before which the chunk, or each sequence, is reset: those
    that the second tensor marks.

    Raises:
        InvalidInput: it is not the tensor of resets.
    """
    at = "inputs[1]"
    if tensor.name != RESET:
        raise invalid(f"{at}.name", RESET, repr(tensor.name[:100]))
    if tensor.datatype != BOOL:
        raise invalid(f"{at}.datatype", BOOL, repr(tensor.datatype[:100]))
    batch = () if signature.batch is None else (signature.batch,)
    expected = [*batch, signature.steps]
    if list(tensor.shape) != expected:
        raise invalid(f"{at}.shape", f"{expected}, a value for each step", list(tensor.shape)[:16])
    marks = np.array(flags(tensor, at), np.bool_).reshape(expected if batch else [1, *expected])
    return [np.flatnonzero(row).tolist() for row in marks]


def read_steps(
    reader: RequestReader, tensor: InputTensor, count: int | None, limit: Limit, min_steps: int = 1
) -> list[Steps]:
    """The steps of a tensor of rows or of events.

    Args:
        count: number of sequences; None for a chunk.

    Raises:
        InvalidInput, ChunkTooLong
    """
    read: Any = reader.steps.packed_rows
    values: Any
    if tensor.name == EVENTS:
        read = partial(_read_events, reader)
        elements = byte_elements(tensor, "inputs[0]")
        values = [_load_event(element, at) for at, element in enumerate(elements)]
    else:
        values = float_values(tensor, "inputs[0]")
        if not isinstance(values, bytes):
            read = reader.steps.flat_rows
    if count is None:
        return [read(values, "", limit, min_steps)]
    size = len(values) // max(count, 1)
    return [
        read(values[at * size : (at + 1) * size], f"sequences[{at}]", limit, min_steps)
        for at in range(count)
    ]


def _read_events(
    reader: RequestReader, events: Sequence[object], inside: str, limit: Limit, min_steps: int
) -> Steps:
    at = f"{inside}.events" if inside else "events"
    checked = [reader.steps.event(event, f"{at}[{index}]") for index, event in enumerate(events)]
    return reader.steps.events(checked, inside, limit, min_steps)


def _load_event(element: bytes, index: int) -> dict[str, Any]:
    """An element of the tensor of events.

    Raises:
        InvalidInput: it is not one JSON object.
    """
    at, expected = f"inputs[0].data[{index}]", "an event: one JSON object"
    try:
        event = load_json(element)
    except MalformedBody as error:
        got = f"a string that cannot be parsed ({error.facts['got']})"
        raise invalid(at, expected, got) from error
    if not isinstance(event, dict):
        raise invalid(at, expected, format_value(event))
    return event
