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
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import structlog

from service.access.caller import PREDICT, Caller, Verb
from service.codec.decoding import invalid
from service.codec.request_reader import with_stream
from service.core.errors import CarryError, ModelNotFound
from service.core.values import (
    Chunk,
    Precondition,
    Reply,
    SequenceInput,
    StreamKey,
)
from service.pipeline.served_model import ServedModel
from service.telemetry.access_log import note_stream
from service.transports.v1.context import ApiContext, ModelCodec
from service.transports.v2.parameters import InferParameters
from service.transports.v2.replies import (
    VERSION,
    InferReply,
    build_reply,
    reply_to_chunk,
)
from service.transports.v2.request import (
    RESET,
    InferCall,
    InferRequest,
    Signature,
    check_chunk,
    input_names,
    make_signature,
    read_resets,
    read_steps,
)
from service.transports.v2.tensors import InputTensor

log = structlog.get_logger(__name__)


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
        self.on_switch(self._signature.cache_clear)

    def on_switch(self, forget: Callable[[], object]) -> None:
        """Call `forget` after each switch: what is cached of signatures would keep the networks of
        retired versions."""
        self._pipeline.aliases.on_switch.append(lambda _: forget())

    def served(
        self,
        caller: Caller,
        verbs: Iterable[Verb],
        model: str,
        version: str,
        stream: str | None = None,
    ) -> ServedModel:
        """The served model of a name and version, for a caller who may do one of these with it:
        the champion, or the version that answers the stream, or any that answers streams.

        Raises:
            ModelNotFound, Forbidden
        """
        served = self._pipeline.model(caller, verbs, model, stream)
        if not version or version == VERSION:
            return served
        route = self._pipeline.versions[model].route
        answering = [route.champion] if stream is None else [route.answering(stream)]
        if stream is None and route.challenger is not None and route.share:
            answering.append(route.challenger)
        for each in answering:
            if each.version == version:
                return each
        raise _unknown_version(model, version, answering)

    def depends_on_stream(self, model: str, version: str) -> bool:
        """Whether only some streams are answered by the version that a request names."""
        return version != VERSION and self._pipeline.versions[model].route.share > 0

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
        if stream is None and request.version not in ("", VERSION, codec.served.version):
            # predictions are made by the champion
            raise _unknown_version(served.name, request.version, [codec.served])
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
            steps = reader.json_rows.decode_values(data, signature.steps, has_batch=has_batch)
            if steps is not None and reader.steps.has_codes:
                reader.steps.check_codes(steps)
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
            return build_reply(call, {}, predictions)
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


def _unknown_version(model: str, version: str, answering: Sequence[ServedModel]) -> ModelNotFound:
    expected = [VERSION, *(each.version for each in answering)]
    return ModelNotFound(
        f"expected version {VERSION} (or {' or '.join(expected[1:])}) of model {model!r}, got "
        f"{version[:100]!r}",
        expected=expected,
        got=version[:100],
    )


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
