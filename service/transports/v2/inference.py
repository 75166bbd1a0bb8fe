"""Inference by KServe's V2 protocol, for HTTP and gRPC alike: a request's value to a reply's value.

    inference = Inference(api, delete_at_end=False)
    reply = await inference.infer(caller, request, deadline_s)        # raises CarryError

A transport decodes its bytes to an `InferRequest`, calls `infer`, and encodes the `InferReply` or
the error; it enforces its own limits on bytes, cancels the call if its client disconnects, and
counts an error with `api.recorder.record_error`. `infer` reads the values at once; a long request
is decoded and read when it is its turn:

    ready = await inference.api.long_bodies.read(
        len(body), deadline_s, lambda: inference.read(caller, decode(body), deadline_s)
    )
    reply = await inference.answer(caller, ready)

Between `resolve` and `reply_to_chunk` a transport may also hand the chunk to the pipeline itself,
as the HTTP fast path does:

    call = inference.resolve(caller, request)                           # short requests only
    reply = await api.pipeline.process(caller, call.read_chunk(stream), deadline_s)
    encoded = inference.reply_to_chunk(call, reply)

A request with a sequence id is a chunk of the stream of that name; without one it is a stateless
prediction. Tensors are `inputs`, FP32 of shape [T, F] or [B, T, F]: encoded rows; or, for a model
with an event schema, `events`, BYTES of shape [T] or [B, T]: each element an event in JSON. B is 1
for a chunk, and the number of sequences for a prediction; the outputs have the same leading axis.
A second tensor, `reset`, BOOL of shape [T] or [B, T], may mark the steps before which the state is
reset. The model's reader, which reads the bodies of the HTTP API too, makes chunks of them, so that
limits, errors and digests are the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from models.spec.layout import Output
from service.access.caller import PREDICT, Caller, Verb
from service.codec.decoding import invalid
from service.codec.limits import Limit
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
)
from service.pipeline.served_model import ServedModel
from service.telemetry.access_log import note_stream
from service.transports.v1.context import ApiContext, ModelCodec
from service.transports.v2.calls import (
    RESET,
    STATE,
    ResolvedCall,
    Signature,
    check_chunk,
    input_names,
    make_signature,
    output_shape,
    read_resets,
)
from service.transports.v2.parameters import InferParameters, parse_parameters
from service.transports.v2.values import (
    InferReply,
    InferRequest,
    OutputTensor,
    Parameter,
)

VERSION: Final = "1"
"""Version of every model, since clients of Triton expect a whole number; the model's own version,
the beginning of its fingerprint, is accepted as well."""

log = structlog.get_logger(__name__)


class ReadRequest(NamedTuple):
    """A request whose values were read.

    Attributes:
        call: without the request's tensors and their values.
        work: the chunk, or the sequences to predict.
        deadline_s: when the client stops waiting, on the monotonic clock.
    """

    call: ResolvedCall
    work: Chunk | list[SequenceInput]
    deadline_s: float


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
        return self.check_version(self._pipeline.model(caller, verbs, model, stream), version)

    def check_version(self, served: ServedModel, version: str) -> ServedModel:
        """The model itself, if it has this version.

        Raises:
            ModelNotFound
        """
        if version not in ("", VERSION, served.version):
            expected = [VERSION, served.version]
            raise ModelNotFound(
                f"expected version {VERSION} (or {served.version}) of model {served.name!r}, got "
                f"{version[:100]!r}",
                expected=expected,
                got=version[:100],
            )
        return served

    async def infer(self, caller: Caller, request: InferRequest, deadline_s: float) -> InferReply:
        """Answer a request.

        Args:
            deadline_s: when the client stops waiting, on the monotonic clock; the parameter
                `timeout` may shorten it.

        Raises:
            CarryError
        """
        return await self.answer(caller, self.read(caller, request, deadline_s))

    def read(self, caller: Caller, request: InferRequest, deadline_s: float) -> ReadRequest:
        """Read a request and its values; the arguments are as for `infer`.

        Raises:
            CarryError
        """
        call = self.resolve(caller, request)
        deadline_s = _deadline_s(call, deadline_s)
        work = call.read()
        request = request._replace(inputs=())
        values = call.values._replace(data=b"")
        return ReadRequest(call._replace(request=request, values=values), work, deadline_s)

    async def answer(self, caller: Caller, ready: ReadRequest) -> InferReply:
        """Answer a request that was read.

        Raises:
            CarryError
        """
        call, work, deadline_s = ready
        if isinstance(work, list):
            name = call.codec.served.name
            predictions = await self._pipeline.predict(caller, name, work, deadline_s)
            return self._reply(call, {}, predictions)
        reply = await self._pipeline.process(caller, work, deadline_s)
        is_deleted = self._deletes(call.parameters) and await self._delete(caller, reply)
        return self.reply_to_chunk(call, reply, is_deleted=is_deleted)

    def _deletes(self, parameters: InferParameters) -> bool:
        """Whether the stream is deleted after the chunk."""
        return self.delete_at_end and parameters.ends and not parameters.dry_run

    def _require_access(
        self,
        caller: Caller,
        served: ServedModel,
        parameters: InferParameters,
        signature: Signature,
    ) -> None:
        """Check access for deletion and for state in the reply, beyond `predict`.

        Raises:
            Forbidden
        """
        model, stream = served.name, parameters.stream
        if stream is not None and self._deletes(parameters):
            self._pipeline.model(caller, (Verb.DELETE,), model, stream)
        if stream is not None and signature.has_state:
            self._pipeline.model(caller, (Verb.READ_STATE,), model, stream)

    def resolve(self, caller: Caller, request: InferRequest) -> ResolvedCall:
        """Validate all of a request but the values of its tensors, whose number is checked.

        Raises:
            ModelNotFound, InvalidInput, InvalidName, ChunksUnsupported, Forbidden
        """
        parameters = parse_parameters(request.parameters)
        model, version, stream = request.model, request.version, parameters.stream
        served = self.served(caller, PREDICT, model, version, stream)
        note_stream(served.name, parameters.stream)
        codec = self.api.codecs[served.name]
        if not 1 <= len(request.inputs) <= 2:
            names = " or ".join(input_names(served))
            expected = f"one tensor, {names}, optionally followed by {RESET}"
            raise invalid("inputs", expected, len(request.inputs))
        tensor, *others = request.inputs
        name, datatype, shape, _ = tensor
        signature = self._signature(codec, name, datatype, tuple(shape), tuple(request.outputs))
        self._require_access(caller, served, parameters, signature)
        if parameters.stream is not None:
            check_chunk(codec, signature)
        elif (signature.batch or 0) > self.api.limits.max_items:
            expected = f"at most {self.api.limits.max_items} sequences"
            raise invalid("inputs[0].shape", expected, signature.batch)
        self._check_length(name, signature, parameters.stream)
        resets = read_resets(others, signature)
        return ResolvedCall(request, codec, parameters, signature, tensor, resets)

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
        codec: ModelCodec,
        version: str,
        tensor: tuple[str, str, tuple[int, ...]],
        outputs: tuple[str, ...],
    ) -> Signature:
        """The signature of requests for chunks with this tensor (name, datatype, shape).

        Raises:
            ModelNotFound, InvalidInput, ChunksUnsupported
        """
        self.check_version(codec.served, version)
        signature = self._signature(codec, *tensor, outputs)
        check_chunk(codec, signature)
        return signature

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
        return self._reply(call, parameters, [reply])

    def _reply(
        self,
        call: ResolvedCall,
        parameters: dict[str, Parameter],
        results: Sequence[Reply | Prediction],
    ) -> InferReply:
        """The reply with the results of each sequence, which have packed outputs [T, O]."""
        request, served, outputs = call.request, call.codec.served, call.signature.outputs
        has_batch = call.signature.batch is not None
        rows = _stack([result.outputs for result in results], has_batch)
        states: list[Mapping[str, NDArray[Any]]] = []
        if call.signature.has_state:
            states = [served.state.by_name(result.state) for result in results]
        tensors = []
        for name, output, columns in outputs:
            if output is None:
                part = name.removeprefix(STATE)
                values = _stack([state[part] for state in states], has_batch)
                tensors.append(OutputTensor(name, np.ascontiguousarray(values)))
            else:
                tensors.append(OutputTensor(name, _output_values(output, rows[..., columns])))
        return InferReply(served.name, VERSION, request.id, parameters, tensors)


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


def _deadline_s(call: ResolvedCall, deadline_s: float) -> float:
    """The deadline of a request that was just received, which its parameter may shorten."""
    timeout_s = call.parameters.timeout_s
    return deadline_s if timeout_s is None else min(deadline_s, time.monotonic() + timeout_s)
