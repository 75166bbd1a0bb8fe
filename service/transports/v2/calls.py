"""Inference requests resolved against their model: the tensor that it takes, and the outputs.

Everything here is pure: no I/O, no waiting, no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from msgspec.structs import replace

from models.spec.layout import Output
from service.codec.decoding import format_value, invalid, load_json
from service.codec.limits import Limit
from service.codec.request_reader import with_stream
from service.core.errors import CarryError, MalformedBody
from service.core.values import Chunk, SequenceInput, Steps
from service.pipeline.served_model import ServedModel
from service.transports.v1.context import ModelCodec
from service.transports.v2.parameters import InferParameters
from service.transports.v2.values import (
    BOOL,
    BYTES,
    FP32,
    InferRequest,
    InputTensor,
    byte_elements,
    flags,
    float_values,
)

INPUTS: Final = "inputs"
EVENTS: Final = "events"

ATTENTION: Final = "attention."
"""Before the name of a layer that attends over the chunk: the output of its weights."""

STATE: Final = "state."
"""Before the name of a part of the state: the output of its values after the chunk."""
RESET: Final = "reset"


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
        values: the tensor of rows or of events; without its data once that is read.
        resets: of the chunk or of each sequence, the ascending indexes of the steps before which
            the state is reset; empty without such a tensor.
    """

    request: InferRequest
    codec: ModelCodec
    parameters: InferParameters
    signature: Signature
    values: InputTensor
    resets: Sequence[Sequence[int]] = ()

    @property
    def is_final(self) -> bool:
        """Whether the chunk closes its stream."""
        return self.parameters.ends and self.codec.served.blocks is not None

    def read(self) -> Chunk | list[SequenceInput]:
        """The chunk of a request for a stream, or the sequences to predict.

        Raises:
            FinalUnsupported, ResetsUnsupported, InvalidInput, ChunkTooLong
        """
        reader, parameters = self.codec.reader, self.parameters
        steps, rate = reader.steps, parameters.false_alarms_per_day
        read = self._read_rows if self.values.name == INPUTS else self._read_events
        if parameters.stream is None:
            sequences: list[SequenceInput] = []
            for at, own in enumerate(read(reader.limits.sequence, 1)):
                inside = f"sequences[{at}]"
                resets = self.resets[at] if self.resets else None
                own = steps.add_options(own, inside, resets, rate, is_chunk=False)
                sequences.append(SequenceInput(own, None))
            reader.check_total(sequences)
            return sequences
        return self.read_chunk(parameters.stream)

    def read_chunk(self, stream: str) -> Chunk:
        """The chunk of a request for this stream.

        Raises:
            FinalUnsupported, ResetsUnsupported, InvalidInput, ChunkTooLong
        """
        reader, parameters = self.codec.reader, self.parameters
        rate = parameters.false_alarms_per_day
        read = self._read_rows if self.values.name == INPUTS else self._read_events
        try:
            [own] = read(reader.limits.chunk, 0 if self.is_final else 1)
            if rate is not None or self.resets or own.resets:
                resets = self.resets[0] if self.resets else None
                own = reader.steps.add_options(own, "", resets, rate, is_chunk=True)
        except CarryError as error:
            with_stream(stream, error)
            raise
        chunk = reader.build_chunk(
            parameters.position,
            parameters.epoch,
            own,
            reader.key(stream),
            None,
            final=self.is_final,
            dry_run=parameters.dry_run,
        )
        return replace(chunk, starts_over=True) if parameters.starts_over else chunk

    def _read_rows(self, limit: Limit, min_steps: int) -> list[Steps]:
        """The rows of the chunk or of each sequence."""
        steps, values = self.codec.reader.steps, float_values(self.values, "inputs[0]")
        read = steps.flat_rows if isinstance(values, np.ndarray) else steps.packed_rows
        if self.parameters.stream is not None:
            return [read(values, "", limit, min_steps)]  # type: ignore[arg-type]
        count = 1 if self.signature.batch is None else self.signature.batch
        size = len(values) // max(count, 1)
        return [
            read(values[at * size : (at + 1) * size], f"sequences[{at}]", limit, min_steps)  # type: ignore[arg-type]
            for at in range(count)
        ]

    def _read_events(self, limit: Limit, min_steps: int) -> list[Steps]:
        """The events of the chunk or of each sequence, of which each element is one in JSON."""
        steps, elements = self.codec.reader.steps, byte_elements(self.values, "inputs[0]")
        is_chunk = self.parameters.stream is not None
        count = 1 if is_chunk or self.signature.batch is None else self.signature.batch
        size = len(elements) // max(count, 1)
        read: list[Steps] = []
        for sequence in range(count):
            inside = "" if is_chunk else f"sequences[{sequence}]"
            at = f"{inside}.events" if inside else "events"
            first = sequence * size
            events = [
                steps.event(_load_event(element, first + index), f"{at}[{index}]")
                for index, element in enumerate(elements[first : first + size])
            ]
            read.append(steps.events(events, inside, limit, min_steps))
        return read


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
