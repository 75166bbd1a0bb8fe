"""The use cases of the service: process chunks, predict, forecast, administer streams.

Transports call this module. It routes requests to the batcher of their model and knows no HTTP, no
TensorFlow and no Redis: stores and runtimes are behind protocols. `chunk_batch` runs the batches of
chunks, `core.delivery` has the delivery rules, `streams` the administration of streams. One
pipeline per process and event loop.

Access is checked here and nowhere else: each use case takes the caller, and checks first that the
caller's scope covers the verb, the model and the stream, and then the caller's limits. So a
rejection says nothing about streams, and a transport cannot forget the check.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, TypeVar

from msgspec.structs import replace

from models.decoding.forecasts import Forecast
from service.access.caller import PREDICT, Caller, Verb
from service.core.delivery import check_position
from service.core.errors import CarryError, DeadlineExceeded, InvalidInput, Overloaded
from service.core.tracing import Tracer
from service.core.values import (
    Check,
    Chunk,
    ForecastReply,
    ForecastRequest,
    Prediction,
    Reply,
    SequenceInput,
    StreamKey,
)
from service.engine.batcher import Batcher, BatchRunner
from service.engine.compute import Compute
from service.engine.fair_queue import BatchLimits, Job, JobSpec
from service.engine.policy import shared_error
from service.engine.thread_priority import LoopPriority
from service.pipeline.alarms import Alarms
from service.pipeline.chunk_batch import ChunkBatchRunner
from service.pipeline.chunk_order import apply_in_order
from service.pipeline.model_aliases import ModelAliases, VersionLoader
from service.pipeline.model_versions import ModelVersions, model_not_found
from service.pipeline.predict import (
    ForecastOrigin,
    ForecastRunner,
    PredictRunner,
    SequenceStart,
    start_sequence,
)
from service.pipeline.recorder import Audit, Recorder, no_audit
from service.pipeline.rewarm import Rewarming
from service.pipeline.served_model import ServedModel
from service.pipeline.settings import BatchingSettings
from service.pipeline.shadow import Shadow
from service.pipeline.state_cache import StateCache
from service.pipeline.state_tokens import StateTokens, state_after
from service.pipeline.streams import StreamAdministration
from service.pipeline.topics import TopicViews
from service.store.base import Store

P = TypeVar("P")
R = TypeVar("R")

CACHE_CHECK_S: Final = 60.0
"""Longest interval at which the age of cached states is checked."""

OnReply = Callable[[Reply | CarryError], None]
"""Called once with the result of a chunk."""

EnqueuedChunk = Job[Chunk, Reply]
"""A chunk that can be cancelled."""


class Pipeline:
    """Serves several models over one store.

    Args:
        now_ms: wall clock in epoch milliseconds, for the time of commits.
        settings: of queues, batches and cached states.
        runtime_threads: threads of one call of the network.
        state_cache_s: how long the state of an idle stream is cached.
        drain_s: longest graceful shutdown.
        tracer: records the batches of traced requests; None records none.
        audit: records changes of streams other than by their chunks, and of aliases.
        load_version: loads further versions of the models; None if none are loaded.

    Attributes:
        versions: the versions of the served models by name.
        streams: stream administration.
        alarms: open alarms.
        topics: the topics of consumers.
        aliases: loads further versions, and says which of them answer.
        cache: the states of recent streams.

    A `deadline_s` is the time until which a caller waits, on the monotonic clock. Each use case may
    raise Forbidden and LimitExceeded.
    """

    def __init__(
        self,
        models: Iterable[ServedModel],
        store: Store,
        recorder: Recorder,
        *,
        settings: BatchingSettings,
        now_ms: Callable[[], int],
        runtime_threads: int = 1,
        state_cache_s: float = 600.0,
        drain_s: float = 30.0,
        tracer: Tracer | None = None,
        audit: Audit = no_audit,
        load_version: VersionLoader | None = None,
    ):
        self.versions = {model.name: ModelVersions(model) for model in models}
        self._store = store
        self._settings = settings
        self._state_cache_s = state_cache_s
        self._drain_s = drain_s
        self._now_ms = now_ms
        self.cache = StateCache(settings.state_cache_bytes)
        self._compute = Compute(settings.inference_timeout_s, threads=runtime_threads)
        self._rewarming = Rewarming(
            store,
            self._compute,
            recorder,
            policy=settings.on_model_change,
            max_waiting=settings.max_queue,
        )
        self.streams = StreamAdministration(
            self._versions,
            store,
            self.cache,
            self._rewarming,
            self._compute,
            now_ms=now_ms,
            audit=audit,
        )
        self.alarms = Alarms(self.streams, self._versions, store, now_ms=now_ms)
        self.topics = TopicViews(store.topics)
        self.aliases = ModelAliases(
            self.versions, store.models, load_version, policy=settings.on_model_change, audit=audit
        )
        self._tokens = StateTokens(store.keys.token_key)
        self._loop_priority = LoopPriority()
        self._warm = False
        self._stopping = ""
        self._aging: asyncio.Task[None] | None = None
        self._tracer = tracer
        self._shadows: dict[str, Shadow] = {}
        self._chunks: dict[str, Batcher[Chunk, Reply]] = {}
        self._sequences: dict[str, Batcher[SequenceStart, Prediction]] = {}
        self._forecasts: dict[str, Batcher[ForecastOrigin, Forecast]] = {}
        for name, versions in self.versions.items():
            served = versions.route.champion
            rows, steps = self.max_batch_rows(served), settings.max_batch_steps
            limits = BatchLimits(rows, steps, served.runtime.max_steps)
            shadow = self._shadows[name] = Shadow(
                versions,
                store,
                recorder,
                settings=settings,
                now_ms=now_ms,
                is_busy=lambda: any(self.queue_depths().values()),
            )
            run = ChunkBatchRunner(
                versions,
                store,
                self.cache,
                self._compute,
                recorder,
                self._rewarming,
                settings=settings,
                now_ms=now_ms,
                shadow=shadow,
                tracer=tracer,
            )
            self.aliases.on_switch.append(run.forget_retired)
            predict = PredictRunner(name, self._compute, recorder)
            self._chunks[name] = self._batcher(run, limits)
            self._sequences[name] = self._batcher(predict, limits)
            # the recorded champion may have a decoder where the last version in its folder has none
            forecast = ForecastRunner(name, self._compute, recorder)
            self._forecasts[name] = self._batcher(forecast, BatchLimits(1, steps))

    def _batcher(self, runner: BatchRunner[P, R], limits: BatchLimits) -> Batcher[P, R]:
        return Batcher(
            runner,
            limits,
            max_queue=self._settings.max_queue,
            max_in_flight=self._settings.batches_in_flight,
            max_wait_s=self._settings.max_queue_wait_s,
            on_shedding=self._loop_priority.note_shedding,
        )

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """The champions of the served models by name."""
        return {name: versions.route.champion for name, versions in self.versions.items()}

    async def start(self) -> None:
        """Load the versions that answer and warm all up; once, after the store is started.

        Raises:
            VersionRejected, StoreUnavailable, StoreRefused: see `ModelAliases.start`.
        """
        await self.aliases.start()
        # a challenger too, if the process was started with it: it may answer at any time
        loaded = [served for each in self.versions.values() for served in each.loaded.values()]
        for served in loaded:
            if served.is_warm:
                continue
            await self._compute.warm(served.runtime)
            if served.decoder is not None:
                await self._compute.warm(served.decoder)
            served.is_warm = True
        self._warm = True
        self.aliases.on_switch.append(lambda versions: self._shadows[versions.name].follow_route())
        self._aging = asyncio.get_running_loop().create_task(self._age_cache())

    async def _age_cache(self) -> None:
        """Drop states of idle streams: another worker may have deleted them."""
        while True:
            await asyncio.sleep(min(CACHE_CHECK_S, self._state_cache_s / 10))
            committed_ms = self._now_ms() - round(1000 * self._state_cache_s)
            self.cache.drop_older(committed_ms)
            for shadow in self._shadows.values():
                shadow.drop_older(committed_ms)

    async def stop(self) -> None:
        """Shut down gracefully: drain the queues, then stop; once, before the store is closed."""
        self._stopping = "draining"
        if self._aging is not None:
            self._aging.cancel()
        batchers = (self._chunks, self._sequences, self._forecasts)
        await asyncio.gather(
            *(each.drain(self._drain_s) for group in batchers for each in group.values())
        )
        await self.aliases.close()
        await asyncio.gather(*(shadow.close() for shadow in self._shadows.values()))
        self._compute.close()

    def queue_depths(self) -> dict[str, int]:
        """Number of chunks that wait for a batch, by model."""
        return {name: batcher.waiting for name, batcher in self._chunks.items()}

    def count_chunks(self) -> int:
        """Count the chunks that wait for a batch or are in one."""
        return sum(batcher.count_jobs() for batcher in self._chunks.values())

    async def readiness(self) -> list[Check]:
        """Run the readiness checks."""
        warm = Check("runtime", self._warm, "warm" if self._warm else "still compiling")
        accepting = Check("accepting", not self._stopping, self._stopping or "accepting requests")
        versions = self.aliases.check()
        checks = [await self._store.monitor.check(), warm, accepting]
        return checks if versions is None else [*checks, versions]

    def announce_stop(self) -> None:
        """Fail the readiness check from now on, but accept requests: the lame-duck period."""
        self._stopping = "stopping soon"

    def model(
        self, caller: Caller, verbs: Iterable[Verb], name: str, stream: str | None = None
    ) -> ServedModel:
        """Return a served model to a caller who may do one of these with it, or with its stream;
        transports ask for it before they read the rest of a request.

        Raises:
            ModelNotFound
        """
        caller.check(verbs, name, stream)
        versions = self.versions.get(name)
        if versions is None:
            raise model_not_found(name, filter(caller.covers_model, self.versions))
        return versions.route.champion

    def describe(self, caller: Caller) -> dict[str, ServedModel]:
        """Return the served models that the caller may use, by name, in order."""
        caller.check((Verb.MODELS,))
        names = sorted(filter(caller.covers_model, self.versions))
        return {name: self.versions[name].route.champion for name in names}

    def _versions(self, name: str) -> ModelVersions:
        versions = self.versions.get(name)
        if versions is None:
            raise model_not_found(name, self.versions)
        return versions

    def max_batch_rows(self, served: ServedModel) -> int:
        """Most streams in one call of a model's network."""
        return min(self._settings.max_batch_rows, served.runtime.max_batch)

    def check_admission(
        self, caller: Caller, model: str, key: StreamKey | None, left_s: float
    ) -> Overloaded | None:
        """Return the error that admission control would reject a chunk with now; None if it would
        be admitted. Lets a transport reject a request before it parses the body. The error is
        shared between calls, so it must not be raised.

        Args:
            key: the chunk's stream; None for chunks of many streams.
            left_s: time until the deadline.
        """
        # `Caller.check` inlined: each chunk passes here, and a Python call less is measurable
        if caller.key_id is not None and not (
            Verb.PREDICT in caller.verbs
            and caller.covers_model(model)
            and (key is None or key.stream.startswith(caller.prefix))
        ):
            raise caller.forbidden(PREDICT, model, None if key is None else key.stream)
        limiter = caller.limiter
        if limiter is not None and (rejection := limiter.rejection()) is not None:
            return rejection
        reason = self._chunks[model].admission.check_admission(key, left_s)
        return None if reason is None else shared_error(reason)

    def enqueue(
        self, caller: Caller, chunk: Chunk, deadline_s: float, on_result: OnReply
    ) -> EnqueuedChunk:
        """Queue a chunk that `check_admission` admitted, with nothing queued in between.

        Args:
            on_result: called with what `process` returns or raises, unless it is cancelled before.
        """
        limiter = caller.limiter
        if limiter is not None:
            limiter.begin(chunk.steps.length)
            on_result = _call_both(limiter.end, on_result)
        if caller.quota is not None:
            chunk = replace(chunk, quota=caller.quota)
        key, steps = chunk.key, chunk.steps.length
        return self._chunks[key.model].enqueue_admitted(chunk, key, steps, deadline_s, on_result)

    def cancel(self, caller: Caller, job: EnqueuedChunk) -> None:
        """Cancel an enqueued chunk whose client disconnected; it is dropped if still queued."""
        self._chunks[job.payload.key.model].cancel(job)
        if caller.limiter is not None:
            caller.limiter.end()

    async def process(self, caller: Caller, chunk: Chunk, deadline_s: float = math.inf) -> Reply:
        """Apply one chunk and return its reply; safe to retry if the chunk has a position.

        Raises:
            CarryError: rejected or failed; see `service.core.errors`.
        """
        model, limiter = chunk.key.model, caller.limiter
        caller.check(PREDICT, model, chunk.key.stream)
        if limiter is not None:
            limiter.start(chunk.steps.length)
        try:
            [result] = await self._submit(caller, model, deadline_s, [chunk])
        finally:
            if limiter is not None:
                limiter.end()
        if isinstance(result, CarryError):
            raise result
        return result

    async def process_many(
        self, caller: Caller, items: Sequence[Chunk | CarryError], deadline_s: float = math.inf
    ) -> list[Reply | CarryError]:
        """Apply chunks of many streams of one model; items fail independently.

        Items of one stream are applied in order. After one that failed, later items of the stream
        fail with `previous_failed`; after `already_applied` and `position_behind`, however, items
        with a position continue, so that a whole request can be retried.

        Args:
            items: chunks, or the errors of items that could not be parsed (the fact `stream` names
                the stream, if that could be parsed).
        """
        chunks = [item for item in items if isinstance(item, Chunk)]
        if not chunks:
            return [item for item in items if isinstance(item, CarryError)]
        model = chunks[0].key.model
        covered = chunks
        if caller.prefix:
            covered = [chunk for chunk in chunks if chunk.key.stream.startswith(caller.prefix)]
        if len(covered) < len(chunks):
            items = [
                caller.forbidden(PREDICT, model, item.key.stream)
                if isinstance(item, Chunk) and not item.key.stream.startswith(caller.prefix)
                else item
                for item in items
            ]
        with caller.admit(PREDICT, model, None, sum([chunk.steps.length for chunk in covered])):
            submit = partial(self._submit, caller, model, deadline_s)
            return await apply_in_order(items, submit)

    async def _submit(
        self, caller: Caller, model: str, deadline_s: float, chunks: list[Chunk]
    ) -> list[Reply | CarryError]:
        """Apply chunks of different streams of one model."""
        batcher = self._chunks[self._versions(model).name]
        if caller.quota is not None:
            chunks = [replace(chunk, quota=caller.quota) for chunk in chunks]
        if self._tracer is not None:
            span = self._tracer.current_span()
            chunks = [replace(chunk, span=chunk.span or span) for chunk in chunks]
        specs = [JobSpec(chunk, chunk.key, chunk.steps.length) for chunk in chunks]
        return await batcher.submit(specs, deadline_s)

    async def predict(
        self,
        caller: Caller,
        model: str,
        sequences: Sequence[SequenceInput],
        deadline_s: float = math.inf,
        *,
        return_tokens: bool = False,
    ) -> list[Prediction]:
        """Predict sequences from the initial state, or from those of their tokens; nothing is
        stored.

        Args:
            return_tokens: whether to return the states after them as tokens.

        Raises:
            CarryError: the first failure among the sequences.
        """
        with caller.admit(PREDICT, model, None, sum(each.steps.length for each in sequences)):
            versions = self._versions(model)
            served = versions.route.champion
            if return_tokens:
                served.check_carries_state("?return_state_token")
            starts = [
                await start_sequence(self._tokens, versions, index, steps, token)
                for index, (steps, token) in enumerate(sequences)
            ]
            predictions: list[Prediction] = []
            specs = [JobSpec(start, None, start.steps.length) for start in starts]
            results = await self._sequences[model].submit(specs, deadline_s)
            for index, result in enumerate(results):
                if isinstance(result, InvalidInput):
                    raise result.within(f"sequences[{index}]")
                if isinstance(result, CarryError):
                    raise result
                if return_tokens:
                    computing, steps, before = starts[index]
                    after = state_after(computing, steps, before, result.state)
                    result = result._replace(token=await self._tokens.sign(computing, after))
                predictions.append(result)
            return predictions

    async def forecast(
        self,
        caller: Caller,
        key: StreamKey,
        request: ForecastRequest,
        deadline_s: float = math.inf,
    ) -> ForecastReply:
        """Forecast from a stream's state in the store, which stays as it is.

        Raises:
            ForecastUnsupported: the model has no decoder.
            InvalidInput: the horizon is too long, or a future covariate is missing.
            StreamNotFound, StateIncompatible, StateDamaged
            StateChanged: the precondition names another state.
            PositionAhead, PositionBehind: the stream is at another position.
            CarryError: rejected or failed while it was decoded.
        """
        with caller.admit(PREDICT, key.model, key.stream, request.horizon):
            return await self._forecast(key, request, deadline_s)

    async def _forecast(
        self, key: StreamKey, request: ForecastRequest, deadline_s: float
    ) -> ForecastReply:
        versions = self._versions(key.model)
        versions.route.champion.check_horizon(request.horizon)
        if deadline_s <= time.monotonic():
            raise DeadlineExceeded("the deadline expired before it started")
        stored = await self.streams.load_compatible(key, deadline_s, request.precondition)
        served = versions.writer(stored.fingerprint)
        check_position(key.stream, request.position, stored.head)
        covariates = served.encode_covariates(request, stored.state)
        origin = ForecastOrigin(
            served, stored.state.floats, covariates.rows, request.samples, request.seed
        )
        specs = [JobSpec(origin, None, request.horizon)]
        [result] = await self._forecasts[key.model].submit(specs, deadline_s)
        if isinstance(result, CarryError):
            raise result
        warm = served.warmth(stored.since, stored.head.position)
        return ForecastReply(key, stored.head, result, covariates.times_ms, served, warm)


def _call_both(first: Callable[[], None], on_result: OnReply) -> OnReply:
    def on_both(result: Reply | CarryError) -> None:
        first()
        on_result(result)

    return on_both
