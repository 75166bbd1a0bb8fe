"""The use cases of the service: process chunks, predict, forecast, administer streams.

Transports call this module. It routes requests to the batcher of their model and knows no HTTP, no
TensorFlow and no Redis: stores and runtimes are behind protocols. `chunk_batch` runs the batches of
chunks, `core.delivery` has the delivery rules, `streams` the administration of streams. One
pipeline per process and event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from msgspec.structs import replace

from models.decoding.forecasts import Forecast
from service.access.limits import KeyLimiters
from service.access.principal import Verb
from service.core.delivery import check_position
from service.core.errors import (
    AlreadyApplied,
    CarryError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    PositionBehind,
    PreviousFailed,
)
from service.core.tracing import Tracer
from service.core.values import (
    Check,
    Chunk,
    ForecastReply,
    ForecastRequest,
    Prediction,
    Reply,
    SequenceInput,
    Steps,
    StreamKey,
    StreamState,
)
from service.engine.batcher import Batcher
from service.engine.compute import Compute
from service.engine.fair_queue import BatchLimits, Job, JobSpec, Run
from service.engine.runtimes.base import Runtime
from service.engine.thread_priority import LoopPriority
from service.pipeline.audit import Audit, no_audit
from service.pipeline.chunk_batch import ChunkBatchRunner
from service.pipeline.chunk_job import ChunkJob
from service.pipeline.chunk_load import StateCache
from service.pipeline.forecast import ForecastOrigin, ForecastRunner
from service.pipeline.predict import PredictRunner, SequenceStart
from service.pipeline.quota import StreamQuotas
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel
from service.pipeline.settings import BatchingSettings
from service.pipeline.state_tokens import StateTokens, state_after
from service.pipeline.streams import Streams
from service.store.base import Store
from service.store.codec import HEADER_BYTES

P = TypeVar("P")
R = TypeVar("R")

CACHE_CHECK_S: Final = 60.0
"""Longest interval at which the age of cached states is checked."""

OnReply = Callable[[Reply | CarryError], None]
"""Called once with the result of a chunk."""


class Pipeline:
    """Serves several models over one store.

    Args:
        now_ms: wall clock in epoch milliseconds, for the time of commits.
        settings: of queues, batches and cached states.
        runtime_threads: threads of one call of the network.
        state_cache_s: how long the state of an idle stream is cached.
        drain_s: longest graceful shutdown.
        tracer: records the batches of traced requests; None records none.
        audit: records changes of streams other than by their chunks.

    Attributes:
        models: the served models by name.
        streams: stream administration.
        cache: the states of recent streams.
        quotas: the quotas of access keys.
        limiters: the rate limits of access keys.
        key_id: None, since no access key is checked.

    A `deadline_s` is the time until which a caller waits, on the monotonic clock.
    """

    key_id: str | None = None

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
    ):
        self.models: Mapping[str, ServedModel] = {model.name: model for model in models}
        self._store = store
        self._settings = settings
        self._state_cache_s = state_cache_s
        self._drain_s = drain_s
        self._now_ms = now_ms
        self.cache = StateCache(settings.state_cache_bytes)
        self.streams = Streams(self.model, store, self.cache, now_ms=now_ms, audit=audit)
        self.quotas = StreamQuotas(store.usage, self._state_bytes)
        self.limiters = KeyLimiters(store.rates)
        self._tokens = StateTokens(store.keys.token_key)
        self._compute = Compute(settings.inference_timeout_s, threads=runtime_threads)
        self._loop_priority = LoopPriority()
        self._warm = False
        self._stopping = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._recorder = recorder
        self._tracer = tracer
        self._chunks = {name: self._chunk_batcher(served) for name, served in self.models.items()}
        self._sequences = {
            name: self._sequence_batcher(served) for name, served in self.models.items()
        }
        self._forecasts = {
            name: self._forecast_batcher(served, served.decoder)
            for name, served in self.models.items()
            if served.decoder is not None
        }

    def _chunk_batcher(self, served: ServedModel) -> Batcher[Chunk, Reply]:
        run = ChunkBatchRunner(
            served,
            self._store,
            self.cache,
            self._compute,
            self._recorder,
            self.quotas,
            now_ms=self._now_ms,
            attempts=self._settings.conflict_attempts,
            max_detached=self._settings.max_queue // 2,
            resets_on_model_change=self._settings.on_model_change == "reset",
            tracer=self._tracer,
        )
        return self._batcher(
            run,
            self._batch_limits(served),
            map_error=run.map_error,
            job_type=ChunkJob,
        )

    def _sequence_batcher(self, served: ServedModel) -> Batcher[SequenceStart, Prediction]:
        run = PredictRunner(served, self._compute, self._recorder)
        return self._batcher(run, self._batch_limits(served))

    def _forecast_batcher(
        self, served: ServedModel, decoder: Runtime
    ) -> Batcher[ForecastOrigin, Forecast]:
        run = ForecastRunner(served, decoder, self._compute, self._recorder)
        return self._batcher(run, BatchLimits(1, self._settings.max_batch_steps))

    def _batch_limits(self, served: ServedModel) -> BatchLimits:
        rows, steps = self.max_batch_rows(served), self._settings.max_batch_steps
        return BatchLimits(rows, steps, served.runtime.max_steps)

    def _batcher(self, run: Run[P, R], limits: BatchLimits, **options: Any) -> Batcher[P, R]:
        return Batcher(
            run,
            limits,
            max_queue=self._settings.max_queue,
            max_in_flight=self._settings.batches_in_flight,
            max_wait_s=self._settings.max_queue_wait_s,
            on_shedding=self._note_shedding,
            **options,
        )

    def _note_shedding(self, is_shedding: bool) -> None:
        self._loop_priority.note_shedding(is_shedding=is_shedding)

    def _state_bytes(self, model: str) -> int:
        layout = self.model(model).state
        return HEADER_BYTES + 4 * layout.float_size + 8 * layout.int_size

    async def start(self) -> None:
        """Warm the runtimes up; once, after the store is started."""
        for served in self.models.values():
            await self._compute.warm(served.runtime)
            if served.decoder is not None:
                await self._compute.warm(served.decoder)
        self._warm = True
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._age_cache()), loop.create_task(self.limiters.run())]

    async def _age_cache(self) -> None:
        """Drop states of idle streams: another worker may have deleted them."""
        while True:
            await asyncio.sleep(min(CACHE_CHECK_S, self._state_cache_s / 10))
            self.cache.drop_older(self._now_ms() - round(1000 * self._state_cache_s))

    async def stop(self) -> None:
        """Shut down gracefully: drain the queues, then stop; once, before the store is closed."""
        self._stopping = "draining"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(
            *(batcher.drain(self._drain_s) for batcher in self._chunks.values()),
            *(batcher.drain(self._drain_s) for batcher in self._sequences.values()),
            *(batcher.drain(self._drain_s) for batcher in self._forecasts.values()),
        )
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
        return [await self._store.monitor.check(), warm, accepting]

    def announce_stop(self) -> None:
        """Fail the readiness check from now on, but accept requests: the lame-duck period."""
        self._stopping = "stopping soon"

    def require(self, *verbs: Verb, model: str | None = None, stream: str | None = None) -> None:
        """Allow everything: this is the pipeline of a service without keys (`scoped_pipeline`)."""

    def model(self, name: str) -> ServedModel:
        """Return the served model of that name.

        Raises:
            ModelNotFound
        """
        served = self.models.get(name)
        if served is None:
            names = sorted(self.models)
            raise ModelNotFound(
                f"expected one of the models {names}, got {name!r}", expected=names, got=name
            )
        return served

    def max_batch_rows(self, served: ServedModel) -> int:
        """Most streams in one call of a model's network."""
        return min(self._settings.max_batch_rows, served.runtime.max_batch)

    def check_admission(
        self, model: str, key: StreamKey | None, left_s: float
    ) -> Overloaded | None:
        """Return the error that admission control would reject a chunk with now; None if it would
        be admitted. Lets a transport reject a request before it parses the body.

        Args:
            key: the chunk's stream; None for chunks of many streams.
            left_s: time until the deadline.
        """
        return self._chunks[model].check_admission(key, left_s)

    def enqueue(self, chunk: Chunk, deadline_s: float, on_result: OnReply) -> Job[Chunk, Reply]:
        """Queue a chunk that `check_admission` admitted, with nothing queued in between.

        Args:
            on_result: called with what `process` returns or raises, unless it is cancelled before.
        """
        key, steps = chunk.key, chunk.steps.length
        return self._chunks[key.model].enqueue_admitted(chunk, key, steps, deadline_s, on_result)

    def cancel(self, job: Job[Chunk, Reply]) -> None:
        """Cancel an enqueued chunk whose client disconnected; it is dropped if still queued."""
        self._chunks[job.payload.key.model].cancel(job)

    async def process(self, chunk: Chunk, deadline_s: float = math.inf) -> Reply:
        """Apply one chunk and return its reply; safe to retry if the chunk has a position.

        Raises:
            CarryError: rejected or failed; see `service.core.errors`.
        """
        batcher = self._chunks[self.model(chunk.key.model).name]
        if self._tracer is not None and chunk.span is None:
            chunk = replace(chunk, span=self._tracer.current_span())
        specs = [JobSpec(chunk, chunk.key, chunk.steps.length)]
        [result] = await batcher.submit(specs, deadline_s)
        if isinstance(result, CarryError):
            raise result
        return result

    async def process_many(
        self, items: Sequence[Chunk | CarryError], deadline_s: float = math.inf
    ) -> list[Reply | CarryError]:
        """Apply chunks of many streams of one model; items fail independently.

        Items of one stream are applied in order. After one that failed, later items of the stream
        fail with `previous_failed`; after `already_applied` and `position_behind`, however, items
        with a position continue, so that a whole request can be retried.

        Args:
            items: chunks, or the errors of items that could not be parsed (the fact `stream` names
                the stream, if that could be parsed).
        """
        results: dict[int, Reply | CarryError] = {}
        blocking: dict[str | None, CarryError] = {}
        waiting = list(enumerate(items))
        while waiting:
            # apply the first item of each stream that is not blocked, all of them together
            runnable: dict[str | None, tuple[int, Chunk]] = {}
            behind: list[tuple[int, Chunk | CarryError]] = []
            for index, item in waiting:
                stream = item.key.stream if isinstance(item, Chunk) else _stream_of(item)
                if stream in runnable:
                    behind.append((index, item))
                    continue
                if not isinstance(item, Chunk):
                    results[index] = item
                    # an item without a stream name blocks no other item
                    if stream is not None:
                        blocking[stream] = item
                    continue
                failed = blocking.get(stream)
                blocked = None if failed is None else _blocked_by(item, failed)
                if blocked is None:
                    runnable[stream] = index, item
                    continue
                results[index] = blocked
                if not item.dry_run:
                    blocking[stream] = blocked
            applied = await self._apply([chunk for _, chunk in runnable.values()], deadline_s)
            for (index, item), result in zip(runnable.values(), applied, strict=True):
                if isinstance(result, CarryError):
                    if isinstance(result, InvalidInput):
                        result = result.within(f"chunks[{index}]")
                    if not item.dry_run:
                        blocking[item.key.stream] = result
                results[index] = result
            waiting = behind
        return [results[index] for index in range(len(items))]

    async def _apply(self, chunks: list[Chunk], deadline_s: float) -> list[Reply | CarryError]:
        """Apply chunks of different streams of one model."""
        if not chunks:
            return []
        batcher = self._chunks[self.model(chunks[0].key.model).name]
        if self._tracer is not None:
            span = self._tracer.current_span()
            chunks = [replace(chunk, span=span) for chunk in chunks]
        specs = [JobSpec(chunk, chunk.key, chunk.steps.length) for chunk in chunks]
        return await batcher.submit(specs, deadline_s)

    async def predict(
        self,
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
        served = self.model(model)
        batcher = self._sequences[served.name]
        if return_tokens:
            served.check_carries_state("?return_state_token")
        starts = [
            SequenceStart(steps, await self._state_before(served, index, steps, token))
            for index, (steps, token) in enumerate(sequences)
        ]
        predictions: list[Prediction] = []
        specs = [JobSpec(start, None, start.steps.length) for start in starts]
        for index, result in enumerate(await batcher.submit(specs, deadline_s)):
            if isinstance(result, InvalidInput):
                raise result.within(f"sequences[{index}]")
            if isinstance(result, CarryError):
                raise result
            if return_tokens:
                steps, before = starts[index]
                after = state_after(served, steps, before, result.state)
                result = result._replace(token=await self._tokens.sign(served, after))
            predictions.append(result)
        return predictions

    async def _state_before(
        self, served: ServedModel, index: int, steps: Steps, token: bytes | None
    ) -> StreamState | None:
        """The verified state of a sequence's token."""
        if token is None:
            return None
        at = f"sequences[{index}].state_token"
        served.check_carries_state(at)
        try:
            return await self._tokens.verify(served, token, steps)
        except CarryError as error:
            error.facts = {**error.facts, "at": at}
            raise

    async def forecast(
        self, key: StreamKey, request: ForecastRequest, deadline_s: float = math.inf
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
        served = self.model(key.model)
        max_horizon = served.require_decoder().max_horizon
        if request.horizon > max_horizon:
            raise InvalidInput(
                f"horizon: expected at most {max_horizon} steps, the max_horizon of model "
                f"{key.model!r}, got {request.horizon}",
                at="horizon",
                expected=max_horizon,
                got=request.horizon,
            )
        if deadline_s <= time.monotonic():
            raise DeadlineExceeded("the deadline expired before it started")
        stored = await self.streams.read(key, deadline_s, request.precondition)
        if not served.is_compatible(stored):
            raise served.incompatible(key.stream, stored)
        check_position(key.stream, request.position, stored.head)
        covariates = served.encode_covariates(request, stored.state)
        origin = ForecastOrigin(stored.state.floats, covariates.rows, request.samples, request.seed)
        specs = [JobSpec(origin, None, request.horizon)]
        [result] = await self._forecasts[key.model].submit(specs, deadline_s)
        if isinstance(result, CarryError):
            raise result
        return ForecastReply(key, stored.head, result, covariates.times_ms)


def _blocked_by(chunk: Chunk, failed: CarryError) -> PreviousFailed | None:
    """The error of a chunk behind a failed item of its stream; None if it may be applied."""
    if isinstance(failed, AlreadyApplied | PositionBehind) and chunk.position is not None:
        return None
    first = failed.facts.get("previous", failed.code)
    return PreviousFailed(
        f"an earlier item of stream {chunk.key.stream!r} failed with {first}",
        stream=chunk.key.stream,
        previous=first,
    )


def _stream_of(error: CarryError) -> str | None:
    """The stream of an item that could not be parsed; None if it is not known."""
    stream = error.facts.get("stream")
    return stream if isinstance(stream, str) else None
