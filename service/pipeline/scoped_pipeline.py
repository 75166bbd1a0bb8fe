"""The pipeline in the scope of one access key: the only place where access is checked.

Transports get a pipeline for each request from `access_control.AccessControl`. Without access keys
it is the `Pipeline` itself; with them it is a `ScopedPipeline`, whose methods raise `Forbidden`
unless the key's scope covers their verb, model and stream, before anything is looked up. So a
rejection says nothing about streams, and a route cannot forget the check.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Final, Protocol

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

Enqueued = Job[Chunk, Reply] | asyncio.Task[Reply | CarryError]
"""An enqueued chunk, which can be cancelled; a task while its stream has to be admitted first."""

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
        quota: of the streams that it feeds; None if it has none.

    Attributes:
        principal: the key's holder.
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
        self._limiter = limiter
        self._quota = quota
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
        quota, limiter = self._quota, self._limiter
        if limiter is not None:
            limiter.begin(chunk.steps.length)
            on_result = _then(limiter.end, on_result)
        if quota is None or chunk.dry_run or quota.admits(chunk.key):
            return self._pipeline.enqueue(chunk, deadline_s, on_result)

        def on_done(task: asyncio.Task[Reply | CarryError]) -> None:
            quota.leave(chunk.key)
            if not task.cancelled():
                on_result(task.result())
            elif limiter is not None:
                limiter.end()

        quota.enter(chunk.key)
        task = asyncio.get_running_loop().create_task(self._admit(quota, chunk, deadline_s))
        task.add_done_callback(on_done)
        return task

    def cancel(self, job: Enqueued) -> None:
        if isinstance(job, asyncio.Task):
            job.cancel()
        else:
            self._pipeline.cancel(job)
            if self._limiter is not None:
                self._limiter.end()

    async def _admit(
        self, quota: StreamQuota, chunk: Chunk, deadline_s: float
    ) -> Reply | CarryError:
        """Queue a chunk once its stream is admitted to the quota; returns its result."""
        result: asyncio.Future[Reply | CarryError] = asyncio.get_running_loop().create_future()

        def on_result(outcome: Reply | CarryError) -> None:
            if not result.done():
                result.set_result(outcome)

        try:
            async with quota.admission(chunk.key):
                left_s = deadline_s - time.monotonic()
                rejection = self._pipeline.check_admission(chunk.key.model, chunk.key, left_s)
                if rejection is not None:
                    # it is shared, and would keep the tracebacks of all calls that raise it
                    return type(rejection)(rejection.detail, **rejection.facts)
                job = self._pipeline.enqueue(chunk, deadline_s, on_result)
        except CarryError as error:
            return error
        try:
            return await result
        except asyncio.CancelledError:
            self._pipeline.cancel(job)
            raise

    async def process(self, chunk: Chunk, deadline_s: float = math.inf) -> Reply:
        self.principal.require(PREDICT, chunk.key.model, chunk.key.stream)
        with self._limited(chunk.steps.length):
            quota = self._quota
            if quota is None or chunk.dry_run or quota.admits(chunk.key):
                return await self._pipeline.process(chunk, deadline_s)
            self._pipeline.model(chunk.key.model)
            quota.enter(chunk.key)
            try:
                result = await self._admit(quota, chunk, deadline_s)
            finally:
                quota.leave(chunk.key)
            if isinstance(result, CarryError):
                raise result
            return result

    async def process_many(
        self, items: Sequence[Chunk | CarryError], deadline_s: float = math.inf
    ) -> list[Reply | CarryError]:
        checked = self._check_items(items)
        with self._limited(sum(each.steps.length for each in checked if isinstance(each, Chunk))):
            if self._quota is not None:
                written = [
                    (index, item.key)
                    for index, item in enumerate(checked)
                    if isinstance(item, Chunk) and not item.dry_run
                ]
                errors = await self._quota.admit_many([key for _, key in written])
                for (index, _), error in zip(written, errors, strict=True):
                    checked[index] = error or checked[index]
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
            await self._streams.delete(key, precondition)
            if self._quota is not None:
                # what is not released now is removed when the quota is reached
                with suppress(CarryError):
                    await self._quota.release([key])

    async def delete_prefix(
        self, model: str, prefix: str, cursor: str | None = None, limit: int | None = None
    ) -> tuple[int, str | None]:
        self._require((Verb.DELETE,), model, prefix)
        with self._call():
            try:
                return await self._streams.delete_prefix(model, prefix, cursor, limit)
            finally:
                if self._quota is not None:
                    self._quota.forget()

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
            if self._quota is not None:
                await self._quota.admit(key)
            return await self._streams.restore(
                key,
                feed=feed,
                position=position,
                fingerprint=fingerprint,
                state=state,
                precondition=precondition,
            )

    async def fork(self, key: StreamKey, to: str, precondition: Precondition | None) -> StreamState:
        self._require((Verb.FORK,), key.model, key.stream)
        self._require((Verb.FORK,), key.model, to)
        with self._call():
            if self._quota is not None:
                await self._quota.admit(StreamKey(key.model, to))
            return await self._streams.fork(key, to, precondition)


def _then(first: Callable[[], None], on_result: OnReply) -> OnReply:
    def on_both(result: Reply | CarryError) -> None:
        first()
        on_result(result)

    return on_both
