"""Inference requests resolved against their model: the tensor that it takes, and the outputs.

Everything here is pure: no I/O, no waiting, no state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from models.spec.layout import Output
from service.codec.long_bodies.long_reader import MAX_EVENT_BYTES
from service.codec.media import Media, dumps, list_parts, object_parts
from service.pipeline.served_model import ServedModel
from service.transports.v1.context import ModelCodec
from service.transports.v2.json_errors import json_error
from service.transports.v2.parameters import InferParameters
from service.transports.v2.values import (
    BOOL,
    BYTES,
    FP32,
    InferRequest,
    InputTensor,
    flags,
    float32_bytes,
    invalid,
    iter_byte_elements,
)

INPUTS: Final = "inputs"
EVENTS: Final = "events"

ATTENTION: Final = "attention."
"""Before the name of a layer that attends over the chunk: the output of its weights."""

STATE: Final = "state."
"""Before the name of a part of the state: the output of its values after the chunk."""
RESET: Final = "reset"

_EVENT: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


class SelectedOutput(NamedTuple):
    """An output to return.

    Attributes:
        output: None for a part of the state.
        columns: of the packed rows of outputs.
    """

    name: str
    output: Output | None = None
    columns: slice = slice(0)


class Signature(NamedTuple):
    """What follows from a tensor's name and shape, and from the names of the outputs.

    Attributes:
        outputs: the outputs to return.
        steps: T.
        batch: length of the leading axis of the outputs; None if there is none.
        has_state: whether parts of the state are among the outputs.
    """

    outputs: Sequence[SelectedOutput]
    steps: int
    batch: int | None
    has_state: bool


class ResolvedCall(NamedTuple):
    """A request, resolved against its model.

    Attributes:
        values: the rows in the binary format, or the events, each in JSON.
        resets: of the chunk or of each sequence, the ascending indexes of the steps before which
            the state is reset; empty without such a tensor.
    """

    request: InferRequest
    codec: ModelCodec
    parameters: InferParameters
    signature: Signature
    values: bytes | list[bytes]
    resets: Sequence[Sequence[int]] = ()

    @property
    def is_final(self) -> bool:
        """Whether the chunk closes its stream."""
        return self.parameters.ends and self.codec.served.blocks is not None

    def encode_body(self) -> tuple[bytes, Media]:
        """The chunk or the sequences as a body of the HTTP API."""
        media, name = Media.JSON, EVENTS
        if isinstance(self.values, bytes):
            media, name = Media.MSGPACK, INPUTS
        parameters, values = self.parameters, self.values
        rate = parameters.false_alarms_per_day
        if parameters.stream is not None:
            members: dict[str, Any] = {"position": parameters.position, "epoch": parameters.epoch}
            present = {key: value for key, value in members.items() if value is not None}
            if self.is_final:
                present["final"] = True
            if parameters.dry_run:
                present["dry_run"] = True
            if rate is not None:
                present["false_alarms_per_day"] = rate
            if self.resets:
                present["resets"] = self.resets[0]
            others = {key: [dumps(media, value)] for key, value in present.items()}
            parts = object_parts(media, {name: _encoded_values(values), **others})
            return b"".join(parts), media
        count = 1 if self.signature.batch is None else self.signature.batch
        size = len(values) // max(count, 1)
        sequences = []
        for at in range(count):
            encoded = {name: _encoded_values(values[at * size : (at + 1) * size])}
            if rate is not None:
                encoded["false_alarms_per_day"] = [dumps(media, rate)]
            if self.resets:
                encoded["resets"] = [dumps(media, self.resets[at])]
            sequences.append(object_parts(media, encoded))
        return b"".join(object_parts(media, {"sequences": list_parts(media, sequences)})), media


def input_names(served: ServedModel) -> list[str]:
    """The tensors that a model takes, of which a request has one."""
    return [INPUTS] if served.events is None else [EVENTS, INPUTS]


def output_shape(output: Output) -> tuple[int, ...]:
    """The shape of one step of an output; of one that is given once for a chunk, its shape, which
    has at least one axis."""
    return output.shape or ((1,) if output.per == "chunk" else ())


def _selected_outputs(served: ServedModel, names: Sequence[str]) -> Sequence[SelectedOutput]:
    """The outputs with these names, in this order; without names all outputs of the model."""
    layout = served.outputs
    known = {
        output.name: SelectedOutput(output.name, output, layout.slices[output.name])
        for output in layout.outputs
    }
    if not names:
        return list(known.values())
    first = layout.size - len(layout.attention)
    for at, layer in enumerate(layout.attention, start=first):
        name = f"{ATTENTION}{layer}"
        known.setdefault(name, SelectedOutput(name, Output(name, ()), slice(at, at + 1)))
    for part in served.state.parts:
        name = f"{STATE}{part.name}"
        known.setdefault(name, SelectedOutput(name))
    for at, name in enumerate(names):
        if name not in known or name in names[:at]:
            expected = f"each once of {', '.join(known)}"
            raise invalid(f"outputs[{at}].name", expected, repr(name[:100]))
    return [known[name] for name in names]


def _encoded_values(values: bytes | list[bytes]) -> list[bytes]:
    """Rows in MessagePack, or events in JSON, in parts."""
    if isinstance(values, bytes):
        return [b"\xc6", len(values).to_bytes(4, "big"), values]
    return [b"[", b",".join(values), b"]"]


def make_signature(
    codec: ModelCodec, name: str, datatype: str, shape: tuple[int, ...], outputs: tuple[str, ...]
) -> Signature:
    """The signature of a request.

    Raises:
        InvalidInput: the model has no such tensor, or no such output.
    """
    selected = _selected_outputs(codec.served, outputs)
    _check_tensor(codec.served, name, datatype, shape)
    rank = 2 if name == INPUTS else 1
    batch = None if len(shape) == rank else shape[0]
    has_state = any(output.output is None for output in selected)
    return Signature(selected, shape[-rank], batch, has_state)


def check_chunk(codec: ModelCodec, signature: Signature) -> None:
    """Reject a tensor of several sequences, and chunks for a model that needs whole sequences."""
    codec.reader.check_accepts_chunks()
    if signature.batch not in (None, 1):
        expected = "1 in front, since a chunk of a sequence is of one stream"
        raise invalid("inputs[0].shape", expected, signature.batch)


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


def read_resets(tensors: Sequence[InputTensor], signature: Signature) -> list[list[int]]:
    """The indexes that the tensors after the first one mark, of the chunk or of each sequence.

    Raises:
        InvalidInput: they are more than one, or it is not the tensor of resets.
    """
    if not tensors:
        return []
    at, tensor = "inputs[1]", tensors[0]
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


def read_values(tensor: InputTensor) -> bytes | list[bytes]:
    """The values of a tensor whose name and datatype are checked, as in `ResolvedCall`.

    Raises:
        InvalidInput
    """
    is_rows = tensor.name == INPUTS
    return float32_bytes(tensor, "inputs[0]") if is_rows else list(iter_events(tensor))


def iter_events(tensor: InputTensor) -> Iterator[bytes]:
    """The elements of a BYTES tensor, each an object in JSON.

    Raises:
        InvalidInput
    """
    for index, event in enumerate(iter_byte_elements(tensor, "inputs[0]")):
        at = f"inputs[0].data[{index}]"
        if len(event) > MAX_EVENT_BYTES:
            raise invalid(at, f"an event of at most {MAX_EVENT_BYTES} bytes", f"{len(event)} bytes")
        try:
            _EVENT.decode(event)
        except msgspec.ValidationError as error:
            got = json_error(error).facts["got"]
            raise invalid(at, "an event: one JSON object", got) from error
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            got = f"a string that cannot be parsed ({error})"
            raise invalid(at, "an event: one JSON object", got) from error
        yield event
