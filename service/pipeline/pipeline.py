"""The use cases of the service: what a transport may ask for.

Knows no HTTP, no TensorFlow and no Redis; it sees a store and runtimes through protocols. The
way of a chunk itself is in `batch.py`, the rules of delivery in `delivery.py`, what is done with
streams as a whole in `streams.py`; here requests are routed to the right model's batcher. One
pipeline per process and event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from models.decoding.forecasts import Forecast
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
from service.core.values import (
    Check,
    Chunk,
    ForecastReply,
    ForecastRequest,
    Prediction,
    Reply,
    Steps,
    StreamKey,
)
from service.engine.batcher import Batcher
from service.engine.compute import Compute
from service.engine.jobs import Job, JobRequest, Results, Run
from service.engine.policy import BatchLimits
from service.engine.runtimes.base import Runtime
from service.engine.state_cache import StateCache
from service.engine.thread_priority import LoopPriority
from service.pipeline.chunk_batch import ChunkBatchRunner, incompatible
from service.pipeline.forecast import ForecastOrigin, ForecastRunner
from service.pipeline.predict import PredictRunner
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel
from service.pipeline.streams import Streams
from service.store.base import StateStore

P = TypeVar("P")
R = TypeVar("R")

OnModelChange = Literal["refuse", "reset"]
"""What becomes of a stream whose state another version of its model wrote."""


@dataclass(frozen=True, slots=True)
class PipelineLimits:
    """How much the pipeline takes on; see the settings of the same names."""

    max_batch_rows: int = 128
    max_batch_steps: int = 4096
    max_queue: int = 4096
    max_queue_wait_s: float = math.inf
    batches_in_flight: int = 2
    state_cache_bytes: int = 64 * 2**20
    conflict_attempts: int = 32
    drain_s: float = 30.0


class Pipeline:
    """Serves several models over one store.

    Args:
        now_ms: wall clock in epoch milliseconds, for the time of commits.
        on_model_change: whether a state that another version of its model wrote is refused, or
            its stream begun anew.

    Attributes:
        models: by name, what is served.
        streams: what is done with streams as a whole.

    A `deadline_s` is until when a caller waits, of the monotonic clock.
    """

    def __init__(
        self,
        models: Iterable[ServedModel],
        store: StateStore,
        recorder: Recorder,
        *,
        limits: PipelineLimits,
        now_ms: Callable[[], int],
        on_model_change: OnModelChange = "refuse",
    ):
        self.models: Mapping[str, ServedModel] = {model.name: model for model in models}
        self._store = store
        self._limits = limits
        self._now_ms = now_ms
        self._reset = on_model_change == "reset"
        self._cache = StateCache(limits.state_cache_bytes)
        self.streams = Streams(self.model, store, self._cache, now_ms=now_ms)
        self._compute = Compute()
        self._loop_priority = LoopPriority()
        self._warm = False
        self._draining = False
        self._warming: asyncio.Task[None] | None = None
        self._recorder = recorder
        self._chunks = {name: self._chunk_batcher(found) for name, found in self.models.items()}
        self._sequences = {
            name: self._sequence_batcher(found) for name, found in self.models.items()
        }
        self._forecasts = {
            name: self._forecast_batcher(found, found.decoder)
            for name, found in self.models.items()
            if found.decoder is not None
        }

    def _chunk_batcher(self, served: ServedModel) -> Batcher[Chunk, Reply]:
        run = ChunkBatchRunner(
            served,
            self._store,
            self._cache,
            self._compute,
            self._recorder,
            now_ms=self._now_ms,
            attempts=self._limits.conflict_attempts,
            max_detached=self._limits.max_queue // 2,
            reset=self._reset,
        )
        return self._batcher(
            served, run, partial(self._recorder.record_queue_depth, served.name), run.map_error
        )

    def _sequence_batcher(self, served: ServedModel) -> Batcher[Steps, Prediction]:
        run = PredictRunner(served, self._compute, self._recorder)
        return self._batcher(served, run, lambda _: None, lambda _, error: error)

    def _forecast_batcher(
        self, served: ServedModel, decoder: Runtime
    ) -> Batcher[ForecastOrigin, Forecast]:
        return Batcher(
            ForecastRunner(served, decoder, self._compute, self._recorder),
            BatchLimits(1, self._limits.max_batch_steps),
            max_queue=self._limits.max_queue,
            max_in_flight=self._limits.batches_in_flight,
            on_depth=lambda _: None,
            max_wait_s=self._limits.max_queue_wait_s,
            on_shedding=self._note_shedding,
            map_error=lambda _, error: error,
        )

    def _batcher(
        self,
        served: ServedModel,
        run: Run[P, R],
        on_depth: Callable[[int], None],
        map_error: Callable[[Job[P, R], CarryError], CarryError],
    ) -> Batcher[P, R]:
        rows = min(self._limits.max_batch_rows, served.runtime.max_batch)
        return Batcher(
            run,
            BatchLimits(rows, self._limits.max_batch_steps, served.runtime.max_steps),
            max_queue=self._limits.max_queue,
            max_in_flight=self._limits.batches_in_flight,
            on_depth=on_depth,
            max_wait_s=self._limits.max_queue_wait_s,
            on_shedding=self._note_shedding,
            map_error=map_error,
        )

    def _note_shedding(self, is_shedding: bool) -> None:
        self._loop_priority.note_shedding(is_shedding=is_shedding)

    async def start(self) -> None:
        """Warm the runtimes; once, after the store was started."""
        for served in self.models.values():
            await self._compute.run(served.runtime.warm)
            if served.decoder is not None:
                await self._compute.run(served.decoder.warm)
        self._warm = True
        self._warming = asyncio.get_running_loop().create_task(self._warm_rest())

    async def _warm_rest(self) -> None:
        """Compile what is left beside the first requests, shape by shape."""
        for served in self.models.values():
            while await asyncio.to_thread(served.runtime.warm_next):
                pass

    async def stop(self) -> None:
        """Finish every accepted chunk, then end; once, before the store is closed."""
        self._draining = True
        if self._warming is not None:
            self._warming.cancel()
        drain_s = self._limits.drain_s
        await asyncio.gather(
            *(batcher.drain(drain_s) for batcher in self._chunks.values()),
            *(batcher.drain(drain_s) for batcher in self._sequences.values()),
            *(batcher.drain(drain_s) for batcher in self._forecasts.values()),
        )
        self._compute.close()

    async def readiness(self) -> list[Check]:
        """What must hold before requests are sent here, each check by name."""
        warm = Check("runtime", self._warm, "warm" if self._warm else "still compiling")
        accepting = Check(
            "accepting", not self._draining, "stopping" if self._draining else "taking requests"
        )
        return [*await self._store.check(), warm, accepting]

    def model(self, name: str) -> ServedModel:
        """The served model of that name.

        Raises:
            ModelNotFound
        """
        found = self.models.get(name)
        if found is None:
            names = sorted(self.models)
            raise ModelNotFound(
                f"expected one of the models {names}, got {name!r}", expected=names, got=name
            )
        return found

    def check_admission(
        self, model: str, key: StreamKey | None, left_s: float
    ) -> Overloaded | None:
        """The error that admission control would answer a chunk with now; None if it would be
        admitted. Lets a transport reject a request without parsing it.

        Args:
            key: the chunk's stream; None for chunks of many streams.
            left_s: time until the deadline.
        """
        return self._chunks[model].check_admission(key, left_s)

    def enqueue(self, chunk: Chunk, deadline_s: float = math.inf) -> Results[Reply]:
        """As `process`, without waiting: a future of the one result.

        Raises:
            ModelNotFound
        """
        batcher = self._chunks[self.model(chunk.key.model).name]
        return batcher.enqueue([JobRequest(chunk, chunk.key, chunk.steps.length)], deadline_s)

    def cancel(self, chunk: Chunk, results: Results[Reply]) -> None:
        """The caller of a chunk that was begun is gone; it is dropped if it still waits."""
        self._chunks[chunk.key.model].cancel(results)

    async def process(self, chunk: Chunk, deadline_s: float = math.inf) -> Reply:
        """Apply one chunk and answer it; safe to retry where the chunk has a position.

        Raises:
            CarryError: refused or failed; see `service.core.errors`.
        """
        batcher = self._chunks[self.model(chunk.key.model).name]
        requests = [JobRequest(chunk, chunk.key, chunk.steps.length)]
        [result] = await batcher.submit(requests, deadline_s)
        if isinstance(result, CarryError):
            raise result
        return result

    async def process_many(
        self, items: Sequence[Chunk | CarryError], deadline_s: float = math.inf
    ) -> list[Reply | CarryError]:
        """Apply chunks of many streams of one model; each item has its own outcome.

        Items of one stream are applied in their order. After one that failed, later items of
        its stream are answered `previous_failed`; `already_applied` and `position_behind` let
        later items through if they carry a position, so that a whole request can be retried.

        Args:
            items: chunks, or the error of an item that could not be read (its fact `stream`
                names the stream, where that much was readable).
        """
        results: dict[int, Reply | CarryError] = {}
        blocking: dict[str, CarryError] = {}
        waiting: dict[str, deque[tuple[int, Chunk | CarryError]]] = {}
        for index, item in enumerate(items):
            # An item without a readable stream belongs to none, so it blocks none.
            waiting.setdefault(_stream_of(item) or f"item {index}", deque()).append((index, item))
        while waiting:
            # The first of each stream that is not held back, all of them together.
            taken: list[tuple[int, Chunk]] = []
            for stream, queue in list(waiting.items()):
                while queue:
                    index, item = queue.popleft()
                    if isinstance(item, Chunk):
                        held = _held_back(item, blocking.get(stream))
                        if held is None:
                            taken.append((index, item))
                            break
                        item = held
                    results[index] = blocking[stream] = item
                if not queue:
                    del waiting[stream]
            applied = await self._apply([chunk for _, chunk in taken], deadline_s)
            for (index, item), result in zip(taken, applied, strict=True):
                if isinstance(result, InvalidInput):
                    result = result.within(f"chunks[{index}]")
                results[index] = result
                if isinstance(result, CarryError):
                    blocking[item.key.stream] = result
        return [results[index] for index in range(len(items))]

    async def _apply(self, chunks: list[Chunk], deadline_s: float) -> list[Reply | CarryError]:
        """Chunks of different streams of one model."""
        if not chunks:
            return []
        batcher = self._chunks[self.model(chunks[0].key.model).name]
        return await batcher.submit(
            [JobRequest(c, c.key, c.steps.length) for c in chunks], deadline_s
        )

    async def predict(
        self, model: str, sequences: Sequence[Steps], deadline_s: float = math.inf
    ) -> list[Prediction]:
        """Run whole sequences from the zero state; nothing is stored.

        Raises:
            CarryError: the first failure among the sequences.
        """
        batcher = self._sequences[self.model(model).name]
        predictions: list[Prediction] = []
        requests = [JobRequest(s, None, s.length) for s in sequences]
        for index, result in enumerate(await batcher.submit(requests, deadline_s)):
            if isinstance(result, InvalidInput):
                raise result.within(f"sequences[{index}]")
            if isinstance(result, CarryError):
                raise result
            predictions.append(result)
        return predictions

    async def forecast(
        self, key: StreamKey, request: ForecastRequest, deadline_s: float = math.inf
    ) -> ForecastReply:
        """Look ahead from a stream's state, as the store has it; nothing is changed.

        Raises:
            ForecastUnsupported: the model has no decoder.
            InvalidInput: the horizon is longer than the decoder's, or something is not known.
            StreamNotFound, StateIncompatible, StateDamaged
            StateChanged: the stream is not in the state that the request's precondition names.
            PositionAhead, PositionBehind: the stream does not stand at the request's position.
            CarryError: refused or failed while it was decoded.
        """
        served = self.model(key.model)
        most = served.require_decoder().max_horizon
        if request.horizon > most:
            raise InvalidInput(
                f"horizon: expected at most {most} steps, the max_horizon of model {key.model!r}, "
                f"got {request.horizon}",
                at="horizon",
                expected=most,
                got=request.horizon,
            )
        if deadline_s <= time.monotonic():
            raise DeadlineExceeded("the time for the forecast was up before it was begun")
        found = await self.streams.read(key, deadline_s, request.precondition)
        if not served.is_compatible(found):
            raise incompatible(served, key.stream, found)
        check_position(key.stream, request.position, found.head)
        known = served.encode_covariates(request, found.state)
        origin = ForecastOrigin(found.state.floats, known.rows, request.samples, request.seed)
        wanted = [JobRequest(origin, None, request.horizon)]
        [result] = await self._forecasts[key.model].submit(wanted, deadline_s)
        if isinstance(result, CarryError):
            raise result
        return ForecastReply(key, found.head, result, known.times_ms)


def _held_back(chunk: Chunk, blocking: CarryError | None) -> PreviousFailed | None:
    """The answer to a chunk behind an item of its stream that failed; None: it may go on."""
    if blocking is None:
        return None
    if isinstance(blocking, AlreadyApplied | PositionBehind) and chunk.position is not None:
        return None
    first = blocking.facts.get("previous", blocking.code)
    return PreviousFailed(
        f"an earlier item of stream {chunk.key.stream!r} failed with {first}",
        stream=chunk.key.stream,
        previous=first,
    )


def _stream_of(item: Chunk | CarryError) -> str | None:
    if isinstance(item, Chunk):
        return item.key.stream
    stream = item.facts.get("stream")
    return stream if isinstance(stream, str) else None
