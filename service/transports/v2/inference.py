"""Inference by KServe's V2 protocol, for HTTP and gRPC alike: a request's value to a reply's value.

    inference = Inference(api, delete_at_end=False)
    call = inference.read(caller, request, deadline_s)      # raises CarryError
    reply = await inference.answer(caller, call)            # raises CarryError

A transport decodes its bytes to an `InferRequest`, and encodes the `InferReply` or the error; it
enforces its own limits on bytes, cancels the call if its client disconnects, and counts an error
with `api.recorder.record_error`. A long request is decoded and read when it is its turn
(`api.long_bodies`).

A request with a sequence id is a chunk of the stream of that name; without one it is a stateless
prediction. Tensors are `inputs`, FP32 of shape [T, F] or [B, T, F]: encoded rows; or, for a model
with an event schema, `events`, BYTES of shape [T] or [B, T]: each element an event in JSON. B is 1
for a chunk, and the number of sequences for a prediction; the outputs have the same leading axis.
A second tensor, `reset`, BOOL of shape [T] or [B, T], may mark the steps before which the state is
reset.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from models.spec.layout import Output
from service.access.caller import PREDICT, Caller, Verb
from service.codec.decoding import invalid
from service.codec.request_reader import with_stream
from service.core.errors import CarryError, ModelNotFound
from service.core.values import (
    NO_STREAM,
    Chunk,
    FloatRows,
    Precondition,
    Prediction,
    Reply,
    SequenceInput,
    StreamKey,
)
from service.pipeline.served_model import ServedModel
from service.telemetry.access_log import note_stream
from service.transports.v1.context import ApiContext, ModelCodec
from service.transports.v2.request import (
    RESET,
    STATE,
    InferParameters,
    InferRequest,
    Parameter,
    Signature,
    check_chunk,
    input_names,
    make_signature,
    output_shape,
    read_resets,
    read_steps,
)
from service.transports.v2.tensors import InputTensor, OutputTensor

VERSION: Final = "1"
"""Version of every model, since clients of Triton expect a whole number; the model's own version,
the beginning of its fingerprint, is accepted as well."""

log = structlog.get_logger(__name__)


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


class InferReply(NamedTuple):
    """A reply of the V2 protocol."""

    model: str
    version: str
    id: str
    parameters: Mapping[str, Parameter]
    outputs: Sequence[OutputTensor]


class Inference:
    """Answers inference requests.

    Args:
        delete_at_end: whether a stream is deleted after the chunk with `sequence_end`.
    """

    def __init__(self, api: ApiContext, *, delete_at_end: bool = False):
        self.api = api
        self._pipeline = api.pipeline
        self.delete_at_end = delete_at_end
        # cached, since clients repeat their shapes
        self._signature = lru_cache(maxsize=1024)(make_signature)

    def served(
        self,
        caller: Caller,
        verbs: Iterable[Verb],
        model: str,
        version: str,
        stream: str | None = None,
    ) -> ServedModel:
        """The served model of a name and version, for a caller who may do one of these with it.

        Raises:
            ModelNotFound, Forbidden
        """
        served = self._pipeline.model(caller, verbs, model, stream)
        if version and version != VERSION and version != served.version:
            raise ModelNotFound(
                f"expected version {VERSION} (or {served.version}) of model {served.name!r}, got "
                f"{version[:100]!r}",
                expected=[VERSION, served.version],
                got=version[:100],
            )
        return served

    def read(self, caller: Caller, request: InferRequest, deadline_s: float) -> InferCall:
        """Read a request and its values.

        Args:
            deadline_s: when the client stops waiting, on the monotonic clock; the parameter
                `timeout` may shorten it.

        Raises:
            CarryError
        """
        parameters, inputs = request.parameters, request.inputs
        stream, timeout_us = parameters.stream, parameters.timeout_us
        if timeout_us:
            deadline_s = min(deadline_s, time.monotonic() + timeout_us / 1e6)
        served = self.served(caller, PREDICT, request.model, request.version, stream)
        note_stream(served.name, stream)
        codec = self.api.codecs[served.name]
        if not 1 <= len(inputs) <= 2:
            names = " or ".join(input_names(served))
            expected = f"one tensor, {names}, optionally followed by {RESET}"
            raise invalid("inputs", expected, len(inputs))
        tensor = inputs[0]
        signature = self._signature(
            codec,
            tensor.name,
            tensor.datatype,
            tensor.shape,
            request.outputs,
            parameters.binary_by_default,
        )
        deletes = self.delete_at_end and parameters.ends and not parameters.dry_run
        if stream is not None:
            if deletes:
                self._pipeline.model(caller, (Verb.DELETE,), served.name, stream)
            if signature.has_state:
                self._pipeline.model(caller, (Verb.READ_STATE,), served.name, stream)
            check_chunk(signature)
        elif (signature.batch or 0) > self.api.limits.max_items:
            expected = f"at most {self.api.limits.max_items} sequences"
            raise invalid("inputs[0].shape", expected, signature.batch)
        limits = codec.reader.limits
        limit = limits.predict if stream is None else limits.chunk
        steps = signature.steps * (1 if signature.batch is None else signature.batch)
        if steps > limit.steps:
            # checked before the values are read, which may be millions
            error = limit.exceeded(tensor.name, steps)
            raise error if stream is None else with_stream(stream, error)
        resets = read_resets(inputs[1], signature) if len(inputs) > 1 else []
        work: Chunk | Sequence[SequenceInput]
        if stream is None:
            work = _read_sequences(signature, parameters, tensor, resets)
        else:
            work = _read_chunk(codec, parameters, stream, tensor, resets[0] if resets else None)
        return InferCall(signature, request.id, work, deadline_s, deletes)

    def read_rows(
        self,
        signature: Signature,
        identity: str,
        key: StreamKey,
        parameters: InferParameters,
        data: bytes,
        deadline_s: float,
        *,
        is_json: bool = False,
    ) -> InferCall | None:
        """Read a chunk of rows, as `read` does, of a signature that `is_of_rows`; None if there are
        more or less of them, or they are unusual.

        Args:
            data: the rows in the binary format, or a list in JSON.

        Raises:
            InvalidInput, ChunkTooLong
        """
        reader, steps = signature.codec.reader, None
        if is_json:
            has_batch = signature.batch is not None
            steps = reader.rows_in_json(data, signature.steps, has_batch=has_batch)
        elif len(data) == _rows_bytes(signature):
            steps = reader.steps.packed_rows(data, "", reader.limits.chunk)
        if steps is None:
            return None
        rate = parameters.false_alarms_per_day
        if rate is not None:
            steps = reader.steps.add_options(steps, "", None, rate, is_chunk=True)
        chunk = reader.build_chunk(
            parameters.position,
            parameters.epoch,
            steps,
            key,
            None,
            starts_over=parameters.starts_over,
        )
        return InferCall(signature, identity, chunk, deadline_s, False)

    async def answer(self, caller: Caller, call: InferCall) -> InferReply:
        """Answer a request that was read.

        Raises:
            CarryError
        """
        work, deadline_s = call.work, call.deadline_s
        if not isinstance(work, Chunk):
            name = call.signature.codec.served.name
            predictions = await self._pipeline.predict(caller, name, work, deadline_s)
            return _reply(call, {}, predictions)
        reply = await self._pipeline.process(caller, work, deadline_s)
        is_deleted = call.deletes and await self._delete(caller, reply)
        return reply_to_chunk(call, reply, is_deleted=is_deleted)

    async def _delete(self, caller: Caller, reply: Reply) -> bool:
        """Delete the stream of a reply, unless it has changed since; returns whether it did."""
        precondition = Precondition((reply.head.etag,))
        try:
            await self._pipeline.streams.delete(caller, reply.key, precondition)
        except CarryError as error:
            # the chunk was applied, and its outputs must not be lost
            log.warning("stream_not_deleted", model=reply.key.model, code=error.code)
            return False
        return True


def _read_chunk(
    codec: ModelCodec,
    parameters: InferParameters,
    stream: str,
    tensor: InputTensor,
    resets: Sequence[int] | None,
) -> Chunk:
    """The chunk of a request for a stream.

    Raises:
        ResetsUnsupported, InvalidInput, ChunkTooLong
    """
    reader, rate = codec.reader, parameters.false_alarms_per_day
    is_final = parameters.ends and codec.served.blocks is not None
    try:
        [steps] = read_steps(reader, tensor, None, reader.limits.chunk, 0 if is_final else 1)
        if rate is not None or resets or steps.resets:
            steps = reader.steps.add_options(steps, "", resets, rate, is_chunk=True)
    except CarryError as error:
        with_stream(stream, error)
        raise
    key, dry_run = reader.key(stream), parameters.dry_run
    position, epoch = parameters.position, parameters.epoch
    return reader.build_chunk(
        position,
        epoch,
        steps,
        key,
        None,
        final=is_final,
        starts_over=parameters.starts_over,
        dry_run=dry_run,
    )


def _read_sequences(
    signature: Signature,
    parameters: InferParameters,
    tensor: InputTensor,
    resets: Sequence[Sequence[int]],
) -> list[SequenceInput]:
    """The sequences to predict.

    Raises:
        InvalidInput, ChunkTooLong
    """
    reader, rate = signature.codec.reader, parameters.false_alarms_per_day
    count = 1 if signature.batch is None else signature.batch
    sequences = []
    for at, steps in enumerate(read_steps(reader, tensor, count, reader.limits.sequence)):
        own = resets[at] if resets else None
        steps = reader.steps.add_options(steps, f"sequences[{at}]", own, rate, is_chunk=False)
        sequences.append(SequenceInput(steps))
    reader.check_total(sequences)
    return sequences


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
    if is_deleted:
        parameters["deleted"] = True
    return _reply(call, parameters, [reply])


def _reply(
    call: InferCall, parameters: dict[str, Parameter], results: Sequence[Reply | Prediction]
) -> InferReply:
    """The reply with the results of each sequence, which have packed outputs [T, O]."""
    signature, served = call.signature, call.signature.codec.served
    has_batch = signature.batch is not None
    rows = _stack([result.outputs for result in results], has_batch)
    states: list[Mapping[str, NDArray[Any]]] = []
    if signature.has_state:
        states = [served.state.by_name(result.state) for result in results]
    tensors = []
    for name, is_binary, output, columns in signature.outputs:
        if output is None:
            part = name.removeprefix(STATE)
            values = np.ascontiguousarray(_stack([state[part] for state in states], has_batch))
        else:
            values = _output_values(output, rows[..., columns])
        tensors.append(OutputTensor(name, values, is_binary))
    return InferReply(served.name, VERSION, call.id, parameters, tensors)


def is_of_rows(call: InferCall, data_bytes: int | None) -> bool:
    """Whether a call has rows and nothing else, so that further ones of its signature can be read
    by `read_rows`.

    Args:
        data_bytes: of its tensors in the binary format; None if its rows are in JSON.
    """
    signature, chunk = call.signature, call.work
    return (
        isinstance(chunk, Chunk)
        and chunk.steps.rows is not None
        and not chunk.steps.resets
        and data_bytes in (None, _rows_bytes(signature))
        and signature.codec.served.blocks is None
        and not signature.has_state
    )


def _rows_bytes(signature: Signature) -> int:
    """The length of the rows of a chunk in the binary format."""
    return 4 * signature.steps * signature.codec.served.input_features


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
