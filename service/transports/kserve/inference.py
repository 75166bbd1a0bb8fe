"""Inference by KServe's V2 protocol, for HTTP and gRPC alike: a request's value to a reply's value.

    inference = Inference(api, delete_at_end=False)
    reply = await inference.infer(request, deadline_s)        # raises CarryError

A transport decodes its bytes to an `InferRequest`, calls `infer`, and encodes the `InferReply` or
the error; it enforces its own limits on bytes, cancels the call if its client disconnects, and
counts an error with `api.recorder.record_error`. Between `resolve` and `reply_to_chunk` it may also
hand the chunk to the pipeline itself, as the fast path of HTTP does:

    call = inference.resolve(request)                         # short requests only
    reply = inference.reply_to_chunk(call, await pipeline.process(call.work, deadline_s))

A request with a sequence id is a chunk of the stream of that name; without one it is a stateless
prediction. Tensors are `inputs`, FP32 of shape [T, F] or [B, T, F]: encoded rows; or, for a model
with an event schema, `events`, BYTES of shape [T] or [B, T]: each element an event in JSON. B is 1
for a chunk, and the number of sequences for a prediction; the outputs have the same leading axis.
Both become a body of the HTTP API, which its readers validate, so that limits, errors and digests
are the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import orjson
import ormsgpack
import structlog

from models.spec.layout import Output
from service.core.errors import CarryError, ModelNotFound
from service.core.values import Chunk, FloatRows, Precondition, Reply, SequenceInput, StreamKey
from service.pipeline.served_model import ServedModel
from service.transports.http.bodies.request_reader import with_stream
from service.transports.http.bodies.strict_validator import Limit
from service.transports.http.context import ApiContext, ModelWire
from service.transports.http.limits import LONG_BYTES
from service.transports.http.media import Media
from service.transports.kserve.parameters import InferParameters, parse_parameters
from service.transports.kserve.values import (
    BYTES,
    FP32,
    InferReply,
    InferRequest,
    InputTensor,
    OutputTensor,
    Parameter,
    byte_elements,
    float32_bytes,
    invalid,
)

VERSION: Final = "1"
"""Version of every model, since clients of Triton expect a whole number; the model's own version,
the beginning of its fingerprint, is accepted as well."""

INPUTS: Final = "inputs"
EVENTS: Final = "events"

_EVENT: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])

log = structlog.get_logger(__name__)


class Signature(NamedTuple):
    """What follows from a tensor's name and shape, and from the names of the outputs.

    Attributes:
        outputs: the outputs to return.
        steps: T.
        batch: length of the leading axis of the outputs; None if there is none.
    """

    outputs: Sequence[Output]
    steps: int
    batch: int | None


class ResolvedCall(NamedTuple):
    """A request, resolved against its model.

    Attributes:
        values: the rows in the binary format, or the events, each in JSON.
    """

    request: InferRequest
    wire: ModelWire
    parameters: InferParameters
    signature: Signature
    values: bytes | list[bytes]

    @property
    def is_final(self) -> bool:
        """Whether the chunk closes its stream."""
        return self.parameters.ends and self.wire.served.blocks is not None

    @property
    def is_long(self) -> bool:
        """Whether the values have to be read in blocks."""
        values = self.values
        size = len(values) if isinstance(values, bytes) else sum(map(len, values))
        return size >= LONG_BYTES

    def encode_body(self) -> tuple[bytes, Media]:
        """The chunk or the sequences as a body of the HTTP API."""
        encode, media, name = orjson.dumps, Media.JSON, EVENTS
        values: Sequence[Any] = self.values
        if isinstance(values, bytes):
            encode, media, name = ormsgpack.packb, Media.MSGPACK, INPUTS
        else:
            values = [orjson.Fragment(event) for event in values]
        if self.parameters.stream is not None:
            members = {"position": self.parameters.position, "epoch": self.parameters.epoch}
            present = {key: value for key, value in members.items() if value is not None}
            final = {"final": True} if self.is_final else {}
            return encode({name: values, **present, **final}), media
        parts = 1 if self.signature.batch is None else self.signature.batch
        size = len(values) // max(parts, 1)
        sequences = [{name: values[at * size : (at + 1) * size]} for at in range(parts)]
        return encode({"sequences": sequences}), media


class Inference:
    """Answers inference requests.

    Args:
        delete_at_end: whether a stream is deleted after the chunk with `sequence_end`.
    """

    def __init__(self, api: ApiContext, *, delete_at_end: bool = False):
        self.api = api
        self.delete_at_end = delete_at_end
        # cached, since clients repeat their shapes
        self._signature = lru_cache(maxsize=1024)(_signature)

    def served(self, model: str, version: str = "") -> ServedModel:
        """The served model of a name and version.

        Raises:
            ModelNotFound
        """
        served = self.api.pipeline.model(model)
        if version not in ("", VERSION, served.version):
            expected = [VERSION, served.version]
            raise ModelNotFound(
                f"expected version {VERSION} (or {served.version}) of model {model!r}, got "
                f"{version[:100]!r}",
                expected=expected,
                got=version[:100],
            )
        return served

    async def infer(self, request: InferRequest, deadline_s: float) -> InferReply:
        """Answer a request.

        Args:
            deadline_s: when the client stops waiting, on the monotonic clock; the parameter
                `timeout` may shorten it.

        Raises:
            CarryError
        """
        call = self.resolve(request)
        if call.parameters.timeout_s is not None:
            deadline_s = min(deadline_s, time.monotonic() + call.parameters.timeout_s)
        if call.parameters.stream is None:
            return await self._predict(call, deadline_s)
        chunk = await self._read_chunk(call, call.parameters.stream, deadline_s)
        reply = await self.api.pipeline.process(chunk, deadline_s)
        is_deleted = self.delete_at_end and call.parameters.ends and await self._delete(reply)
        return self.reply_to_chunk(call, reply, is_deleted=is_deleted)

    def resolve(self, request: InferRequest) -> ResolvedCall:
        """Validate all of a request but the values of its tensors.

        Raises:
            ModelNotFound, InvalidInput, InvalidName, ChunksUnsupported
        """
        served = self.served(request.model, request.version)
        wire = self.api.wire(served.name)
        parameters = parse_parameters(request.parameters)
        if len(request.inputs) != 1:
            names = f"exactly one tensor, {' or '.join(input_names(served))}"
            raise invalid("inputs", names, len(request.inputs))
        [tensor] = request.inputs
        name, datatype, shape, _ = tensor
        signature = self._signature(wire, name, datatype, tuple(shape), tuple(request.outputs))
        if parameters.stream is not None:
            _check_chunk(wire, signature)
        elif (signature.batch or 0) > self.api.limits.max_items:
            expected = f"at most {self.api.limits.max_items} sequences"
            raise invalid("inputs[0].shape", expected, signature.batch)
        self._check_length(name, signature, parameters.stream)
        return ResolvedCall(request, wire, parameters, signature, read_values(tensor))

    def _check_length(self, name: str, signature: Signature, stream: str | None) -> None:
        """Reject too many steps before their values are read, which may be millions.

        Raises:
            ChunkTooLong: the reader of a model may have a lower limit.
        """
        steps = signature.steps * (1 if signature.batch is None else signature.batch)
        limits = self.api.limits
        if stream is None and steps > limits.max_predict_steps:
            raise Limit(limits.max_predict_steps, "max_predict_steps").exceeded(name, steps)
        if stream is not None and steps > limits.max_chunk_steps:
            error = Limit(limits.max_chunk_steps, "max_chunk_steps").exceeded(name, steps)
            raise with_stream(stream, error)

    def chunk_signature(
        self,
        wire: ModelWire,
        version: str,
        tensor: tuple[str, str, tuple[int, ...]],
        outputs: tuple[str, ...],
    ) -> Signature:
        """The signature of requests for chunks with this tensor (name, datatype, shape).

        Raises:
            ModelNotFound, InvalidInput, ChunksUnsupported
        """
        self.served(wire.served.name, version)
        signature = self._signature(wire, *tensor, outputs)
        _check_chunk(wire, signature)
        return signature

    def read_chunk(self, call: ResolvedCall, stream: str) -> Chunk:
        """The chunk of a short request.

        Raises:
            InvalidInput, ChunkTooLong: with the fact `stream`.
        """
        reader = call.wire.reader
        if isinstance(call.values, bytes) and not call.is_final:
            steps = reader.fast.decode_rows(call.values)
            if steps is not None:
                key = StreamKey(call.wire.served.name, stream)
                return _with_start(call, reader.build_chunk(call.parameters, steps, key, None))
        return _with_start(call, reader.chunk(*call.encode_body(), stream, None))

    async def _read_chunk(self, call: ResolvedCall, stream: str, deadline_s: float) -> Chunk:
        if not call.is_long:
            return self.read_chunk(call, stream)
        body, media = call.encode_body()
        async with self.api.long_bodies.admit(body, deadline_s) as checkpoint:
            return _with_start(
                call, await call.wire.long.chunk(body, media, checkpoint, stream, None)
            )

    async def _predict(self, call: ResolvedCall, deadline_s: float) -> InferReply:
        sequences = await self._read_sequences(call, deadline_s)
        name = call.wire.served.name
        predictions = await self.api.pipeline.predict(name, sequences, deadline_s)
        return self._reply(call, {}, [each.outputs for each in predictions])

    async def _read_sequences(self, call: ResolvedCall, deadline_s: float) -> list[SequenceInput]:
        body, media = call.encode_body()
        if not call.is_long:
            return call.wire.reader.sequences(body, media)
        async with self.api.long_bodies.admit(body, deadline_s) as checkpoint:
            return await call.wire.long.sequences(body, media, checkpoint)

    async def _delete(self, reply: Reply) -> bool:
        """Delete the stream of a reply, unless it has changed since; returns whether it did."""
        precondition = Precondition((reply.head.etag,))
        try:
            await self.api.pipeline.streams.delete(reply.key, precondition)
        except CarryError as error:
            # the chunk was applied, and its outputs must not be lost
            log.warning("stream_not_deleted", model=reply.key.model, code=error.code)
            return False
        return True

    def reply_to_chunk(
        self, call: ResolvedCall, reply: Reply, *, is_deleted: bool = False
    ) -> InferReply:
        """The reply to a chunk."""
        head = reply.head
        parameters: dict[str, Parameter] = {
            "position": head.position,
            "epoch": head.epoch.hex(),
            "tag": head.tag.hex(),
            "replayed": reply.replayed,
        }
        if reply.created:
            parameters["created"] = True
        if reply.output_position is not None:
            parameters["output_position"] = reply.output_position
        if is_deleted:
            parameters["deleted"] = True
        return self._reply(call, parameters, [reply.outputs])

    def _reply(
        self, call: ResolvedCall, parameters: dict[str, Parameter], outputs: list[FloatRows]
    ) -> InferReply:
        """The reply with these packed outputs, [T, O] of each sequence."""
        request, served = call.request, call.wire.served
        rows = outputs[0]
        if call.signature.batch is not None:
            rows = np.stack(outputs) if len(outputs) > 1 else rows[np.newaxis]
        return InferReply(
            served.name,
            VERSION,
            request.id,
            parameters,
            [_output_tensor(served, output, rows) for output in call.signature.outputs],
        )


def input_names(served: ServedModel) -> list[str]:
    """The tensors that a model takes, of which a request has one."""
    return [INPUTS] if served.events is None else [EVENTS, INPUTS]


def output_shape(output: Output) -> tuple[int, ...]:
    """The shape of one step of an output; of one that is given once for a chunk, its shape, which
    has at least one axis."""
    return output.shape or ((1,) if output.per == "chunk" else ())


def _output_tensor(served: ServedModel, output: Output, rows: FloatRows) -> OutputTensor:
    """An output of packed rows [..., T, O]: [..., T, *shape], or once [..., *shape]."""
    cut = rows[..., served.outputs.slices[output.name]]
    if output.per == "chunk":
        cut = cut[..., -1, :]
    shape = (*cut.shape[:-1], *output_shape(output))
    return OutputTensor(output.name, np.ascontiguousarray(cut).reshape(shape))


def _selected_outputs(served: ServedModel, names: Sequence[str]) -> Sequence[Output]:
    """The outputs with these names, in this order; all of them without names."""
    outputs = served.outputs.outputs
    if not names:
        return outputs
    known = {output.name: output for output in outputs}
    for at, name in enumerate(names):
        if name not in known or name in names[:at]:
            expected = f"each once of {', '.join(known)}"
            raise invalid(f"outputs[{at}].name", expected, repr(name[:100]))
    return [known[name] for name in names]


def _with_start(call: ResolvedCall, chunk: Chunk) -> Chunk:
    return chunk._replace(starts_over=True) if call.parameters.starts_over else chunk


def _signature(
    wire: ModelWire, name: str, datatype: str, shape: tuple[int, ...], outputs: tuple[str, ...]
) -> Signature:
    """The signature of a request.

    Raises:
        InvalidInput: the model has no such tensor, or no such output.
    """
    selected = _selected_outputs(wire.served, outputs)
    _check_tensor(wire.served, name, datatype, shape)
    rank = 2 if name == INPUTS else 1
    return Signature(selected, shape[-rank], None if len(shape) == rank else shape[0])


def _check_chunk(wire: ModelWire, signature: Signature) -> None:
    """Reject a tensor of several sequences, and chunks for a model that needs whole sequences."""
    wire.reader.check_accepts_chunks()
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


def read_values(tensor: InputTensor) -> bytes | list[bytes]:
    """The values of a tensor whose name and datatype are checked, as in `ResolvedCall`.

    Raises:
        InvalidInput
    """
    is_rows = tensor.name == INPUTS
    return float32_bytes(tensor, "inputs[0]") if is_rows else _event_elements(tensor)


def _event_elements(tensor: InputTensor) -> list[bytes]:
    """The elements of a BYTES tensor, each an object in JSON.

    Raises:
        InvalidInput
    """
    events = byte_elements(tensor, "inputs[0]")
    for index, event in enumerate(events):
        try:
            _EVENT.decode(event)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            at = f"inputs[0].data[{index}]"
            raise invalid(at, "an event: one JSON object", str(error)) from error
    return events
