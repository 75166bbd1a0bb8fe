"""The pipeline in the scope of one access key: the only place where access is checked.

Transports get a pipeline for each request from `access_control.AccessControl`. Without access keys
it is the `Pipeline` itself; with them it is a `ScopedPipeline`, whose methods raise `Forbidden`
unless the key's scope covers their verb, model and stream, before anything is looked up. So a
rejection says nothing about streams, and a route cannot forget the check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Protocol

from msgspec.structs import replace
from structlog.contextvars import bound_contextvars

from models.spec.state import State
from service.access.limits import KeyLimiter
from service.access.principal import Principal, Verb
from service.core.errors import CarryError, ModelNotFound, Overloaded
from service.core.values import (
    Chunk,
    Feed,
    ForecastReply,
    ForecastRequest,
    Precondition,
    Prediction,
    Reply,
    SequenceInput,
    StreamKey,
    StreamPage,
    StreamState,
)
from service.engine.fair_queue import Job
from service.pipeline.pipeline import OnReply, Pipeline
from service.pipeline.quota import StreamQuota
from service.pipeline.served_model import ServedModel

PREDICT: Final = (Verb.PREDICT,)

Enqueued = Job[Chunk, Reply]
"""An enqueued chunk, which can be cancelled."""

DESCRIBE: Final = (Verb.PREDICT, Verb.LIST)
"""A stream's position and tag are in each of its replies, and part of a listing's use."""


class StreamsInterface(Protocol):
    """Stream administration; see `streams.Streams`. The methods may raise Forbidden."""

    async def read(
        self,
        key: StreamKey,
        deadline_s: float = math.inf,
        precondition: Precondition | None = None,
    ) -> StreamState:
        """Read a stream's head and record; its state's values are not to be shown."""

    async def read_state(
        self, key: StreamKey, precondition: Precondition | None = None
    ) -> StreamState:
        """Read a stream with its state's values."""

    async def page(self, model: str, prefix: str, cursor: str | None, limit: int) -> StreamPage:
        """List a page of streams."""

    async def delete(self, key: StreamKey, precondition: Precondition | None = None) -> None:
        """Delete a stream."""

    async def delete_prefix(
        self, model: str, prefix: str, cursor: str | None = None, limit: int | None = None
    ) -> tuple[int, str | None]:
        """Delete every stream whose name starts with `prefix`."""

    async def restore(
        self,
        key: StreamKey,
        *,
        feed: Feed,
        position: int,
        fingerprint: bytes,
        state: State,
        precondition: Precondition | None,
    ) -> StreamState:
        """Restore a stream."""

    async def fork(self, key: StreamKey, to: str, precondition: Precondition | None) -> StreamState:
        """Create stream `to` from the current state of `key`."""


class PipelineInterface(Protocol):
    """What transports call; see `pipeline.Pipeline`. The methods may raise Forbidden."""

    @property
    def key_id(self) -> str | None:
        """Id of the caller's access key; None if no key is checked."""

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """The served models that the caller may use, by name."""

    @property
    def streams(self) -> StreamsInterface:
        """Stream administration."""

    def require(self, *verbs: Verb, model: str | None = None, stream: str | None = None) -> None:
        """Check that the caller may do one of these, before more of a request is read.

        Raises:
            Forbidden
        """

    def model(self, name: str) -> ServedModel:
        """Return the served model of that name.

        Raises:
            ModelNotFound
        """

    def check_admission(
        self, model: str, key: StreamKey | None, left_s: float
    ) -> Overloaded | None:
        """Return the error that admission control would reject a chunk with now."""

    def enqueue(self, chunk: Chunk, deadline_s: float, on_result: OnReply) -> Enqueued:
        """Queue a chunk that `check_admission` admitted."""

    def cancel(self, job: Any) -> None:
        """Cancel an enqueued chunk that has no result yet; it will have none."""

    async def process(self, chunk: Chunk, deadline_s: float = math.inf) -> Reply:
        """Apply one chunk."""

    async def process_many(
        self, items: Sequence[Chunk | CarryError], deadline_s: float = math.inf
    ) -> list[Reply | CarryError]:
        """Apply chunks of many streams of one model; items outside the scope fail alone."""

    async def predict(
        self,
        model: str,
        sequences: Sequence[SequenceInput],
        deadline_s: float = math.inf,
        *,
        return_tokens: bool = False,
    ) -> list[Prediction]:
        """Predict sequences."""

    async def forecast(
        self, key: StreamKey, request: ForecastRequest, deadline_s: float = math.inf
    ) -> ForecastReply:
        """Forecast from a stream's state."""


class ScopedPipeline:
    """The pipeline in the scope of an access key.

    Args:
        limiter: enforces the key's limits; None if it has none.
        quota: of the streams that it creates; None if it has none.

    Attributes:
        principal: the key's holder.
        key_id: of the key.
        models: the served models that the key may use, when this was created.
        streams: stream administration.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        principal: Principal,
        limiter: KeyLimiter | None = None,
        quota: StreamQuota | None = None,
    ):
        self.principal: Final = principal
        self.key_id: str | None = principal.key_id
        self._limiter = limiter
        self._owner = None if quota is None else principal.key_id
        self._pipeline = pipeline
        self.models: Mapping[str, ServedModel] = {
            name: served for name, served in pipeline.models.items() if principal.covers_model(name)
        }
        self.streams = ScopedStreams(pipeline, principal, limiter, quota)
        self._predicts = Verb.PREDICT in principal.verbs
        self._covers_model = principal.covers_model
        self._prefix = principal.prefix

    def require(self, *verbs: Verb, model: str | None = None, stream: str | None = None) -> None:
        self.principal.require(verbs, model, stream)

    def model(self, name: str) -> ServedModel:
        self.principal.require(self.principal.verbs, name, None)
        served = self._pipeline.models.get(name)
        if served is None:
            names = sorted(filter(self._covers_model, self._pipeline.models))
            raise ModelNotFound(
                f"expected one of the models {names}, got {name!r}", expected=names, got=name
            )
        return served

    def check_admission(
        self, model: str, key: StreamKey | None, left_s: float
    ) -> Overloaded | None:
        # `require` inlined: each chunk passes here, and one Python call less is measurable
        if not (self._predicts and self._covers_model(model)) or not (
            key is None or key.stream.startswith(self._prefix)
        ):
            raise self.principal.forbidden(PREDICT, model, None if key is None else key.stream)
        if self._limiter is not None and (rejection := self._limiter.rejection()) is not None:
            return rejection
        return self._pipeline.check_admission(model, key, left_s)

    def enqueue(self, chunk: Chunk, deadline_s: float, on_result: OnReply) -> Enqueued:
        model, stream = chunk.key.model, chunk.key.stream
        if not (self._predicts and self._covers_model(model) and stream.startswith(self._prefix)):
            raise self.principal.forbidden(PREDICT, model, stream)
        limiter = self._limiter
        if limiter is not None:
            limiter.begin(chunk.steps.length)
            on_result = _then(limiter.end, on_result)
        if self._owner is not None:
            chunk = replace(chunk, owner=self._owner)
        return self._pipeline.enqueue(chunk, deadline_s, on_result)

    def cancel(self, job: Enqueued) -> None:
        self._pipeline.cancel(job)
        if self._limiter is not None:
            self._limiter.end()

    async def process(self, chunk: Chunk, deadline_s: float = math.inf) -> Reply:
        self.principal.require(PREDICT, chunk.key.model, chunk.key.stream)
        with self._limited(chunk.steps.length):
            if self._owner is not None:
                chunk = replace(chunk, owner=self._owner)
            return await self._pipeline.process(chunk, deadline_s)

    async def process_many(
        self, items: Sequence[Chunk | CarryError], deadline_s: float = math.inf
    ) -> list[Reply | CarryError]:
        checked = self._check_items(items)
        with self._limited(sum(each.steps.length for each in checked if isinstance(each, Chunk))):
            if self._owner is not None:
                checked = [
                    replace(item, owner=self._owner) if isinstance(item, Chunk) else item
                    for item in checked
                ]
            return await self._pipeline.process_many(checked, deadline_s)

    def _check_items(self, items: Sequence[Chunk | CarryError]) -> list[Chunk | CarryError]:
        """The items, which are of one model, with errors in place of those outside the scope."""
        model = next((item.key.model for item in items if isinstance(item, Chunk)), None)
        covers = self._predicts and (model is None or self._covers_model(model) is not None)
        return [
            item
            if isinstance(item, CarryError) or (covers and item.key.stream.startswith(self._prefix))
            else self.principal.forbidden(PREDICT, model, item.key.stream)
            for item in items
        ]

    async def predict(
        self,
        model: str,
        sequences: Sequence[SequenceInput],
        deadline_s: float = math.inf,
        *,
        return_tokens: bool = False,
    ) -> list[Prediction]:
        self.principal.require(PREDICT, model, None)
        with self._limited(sum(each.steps.length for each in sequences)):
            return await self._pipeline.predict(
                model, sequences, deadline_s, return_tokens=return_tokens
            )

    async def forecast(
        self, key: StreamKey, request: ForecastRequest, deadline_s: float = math.inf
    ) -> ForecastReply:
        self.principal.require(PREDICT, key.model, key.stream)
        with self._limited(request.horizon):
            return await self._pipeline.forecast(key, request, deadline_s)

    def _limited(self, events: int) -> AbstractContextManager[None]:
        return nullcontext() if self._limiter is None else self._limiter.request(events)


class ScopedStreams:
    """Stream administration in the scope of an access key."""

    def __init__(
        self,
        pipeline: Pipeline,
        principal: Principal,
        limiter: KeyLimiter | None = None,
        quota: StreamQuota | None = None,
    ):
        self._quota = quota
        self._streams = pipeline.streams
        self._require = principal.require
        self._caller = {"key": principal.key_id}
        if principal.subject is not None:
            self._caller["subject"] = principal.subject
        self._limiter = limiter

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Count a call for the limits, and name the caller in the lines of the audit log."""
        limited = nullcontext() if self._limiter is None else self._limiter.request(0)
        with limited, bound_contextvars(**self._caller):
            yield

    async def read(
        self,
        key: StreamKey,
        deadline_s: float = math.inf,
        precondition: Precondition | None = None,
    ) -> StreamState:
        self._require(DESCRIBE, key.model, key.stream)
        with self._call():
            return await self._streams.read(key, deadline_s, precondition)

    async def read_state(
        self, key: StreamKey, precondition: Precondition | None = None
    ) -> StreamState:
        self._require((Verb.READ_STATE,), key.model, key.stream)
        with self._call():
            return await self._streams.read_state(key, precondition)

    async def page(self, model: str, prefix: str, cursor: str | None, limit: int) -> StreamPage:
        self._require((Verb.LIST,), model, prefix)
        with self._call():
            return await self._streams.page(model, prefix, cursor, limit)

    async def delete(self, key: StreamKey, precondition: Precondition | None = None) -> None:
        self._require((Verb.DELETE,), key.model, key.stream)
        with self._call():
            await self._streams.delete(key, precondition, self._quota)

    async def delete_prefix(
        self, model: str, prefix: str, cursor: str | None = None, limit: int | None = None
    ) -> tuple[int, str | None]:
        self._require((Verb.DELETE,), model, prefix)
        with self._call():
            return await self._streams.delete_prefix(model, prefix, cursor, limit, self._quota)

    async def restore(
        self,
        key: StreamKey,
        *,
        feed: Feed,
        position: int,
        fingerprint: bytes,
        state: State,
        precondition: Precondition | None,
    ) -> StreamState:
        self._require((Verb.WRITE_STATE,), key.model, key.stream)
        with self._call():
            return await self._streams.restore(
                key,
                feed=feed,
                position=position,
                fingerprint=fingerprint,
                state=state,
                precondition=precondition,
                quota=self._quota,
            )

    async def fork(self, key: StreamKey, to: str, precondition: Precondition | None) -> StreamState:
        self._require((Verb.FORK,), key.model, key.stream)
        self._require((Verb.FORK,), key.model, to)
        with self._call():
            return await self._streams.fork(key, to, precondition, self._quota)


def _then(first: Callable[[], None], on_result: OnReply) -> OnReply:
    def on_both(result: Reply | CarryError) -> None:
        first()
        on_result(result)

    return on_both
