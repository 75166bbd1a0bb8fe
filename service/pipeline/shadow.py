"""The shadow: computes the chunks that one version of a model answered with the other version.

It runs beside the champion, never before it: chunks are offered once they are answered, wait in a
bounded queue, and are computed while no chunk of the process waits for a batch and the budget of
time allows (`shadow_budget`). What finds no room is dropped. A stream whose chunk was dropped
catches up with its history before the next one; without a history that reaches back its state
starts again and is marked as inexact. Whatever the challenger does, raise, return NaN, take long,
fails nothing but its own chunks.

States are stored as version states beside the stream (`Histories.commit_versions`), so that a
promotion or a rollback finds them at the stream's head, and the outputs of both versions are
compared (`comparison`). While the challenger answers a share of the streams, the champion is the
shadow of these.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

import structlog

from service.core.delivery import last_chunk
from service.core.errors import CarryError
from service.core.values import Reply, StreamKey
from service.engine.compute import Compute, ignore_call
from service.pipeline.chunk_job import ChunkJob, ComputedBatch, StageTimes
from service.pipeline.comparison import SIDES, Comparator, ComparedChunk, Comparison
from service.pipeline.inference import Inference
from service.pipeline.model_versions import ModelVersions
from service.pipeline.recorder import Recorder, ShadowBatch
from service.pipeline.served_model import ServedModel
from service.pipeline.settings import BatchingSettings
from service.pipeline.shadow_budget import BusyClock, ShadowBudget
from service.pipeline.shadow_states import OfferedChunk, ShadowStates, ShadowStream
from service.store.base import Store, decode_stream
from service.store.codec import encode_states, mark_inexact, pack_head

T = TypeVar("T")

MAX_CHUNKS: Final = 2048
MAX_STEPS: Final = 65_536
"""Most chunks and events that wait; further chunks are dropped."""

BATCH_ROWS: Final = 32
BATCH_STEPS: Final = 1024
"""Most chunks and padded steps of one call, which the event loop may have to wait for."""

LINGER_S: Final = 0.02
"""How long chunks wait for others, since nobody waits for them and full batches cost less."""

RETRY_S: Final = 0.01
"""How often a waiting queue asks whether the challenger may compute."""

log = structlog.get_logger(__name__)


class _Pair(NamedTuple):
    """Two versions, and what computes and compares them.

    Attributes:
        stages: the states of each version, and its inference.
    """

    champion: ServedModel
    challenger: ServedModel
    clock: BusyClock
    budget: ShadowBudget
    comparator: Comparator
    stages: Mapping[ServedModel, tuple[ShadowStates, Inference]]


class Shadow:
    """The shadow of one model in one process; use from one event loop.

    Args:
        is_busy: whether chunks wait for a batch.
    """

    def __init__(
        self,
        versions: ModelVersions,
        store: Store,
        recorder: Recorder,
        *,
        settings: BatchingSettings,
        now_ms: Callable[[], int],
        is_busy: Callable[[], bool],
    ):
        self._versions = versions
        self._store = store
        self._recorder = recorder
        self._settings = settings
        self._now_ms = now_ms
        self._is_busy = is_busy
        self._pair: _Pair | None = None
        # of its own, so that no call of the champion waits for a slow challenger
        self._compute = Compute(settings.inference_timeout_s)
        self._queue: OrderedDict[StreamKey, deque[OfferedChunk]] = OrderedDict()
        self._chunks = self._steps = 0
        self._task: asyncio.Task[None] | None = None

    def offer(self, computed: ComputedBatch, at: Sequence[int], infer_s: float) -> None:
        """Offer the committed chunks of a batch, by index; never blocks, never raises.

        Args:
            infer_s: how long the version that answered computed them.
        """
        try:
            self._offer(computed, at, infer_s)
        except Exception as error:
            log.error("shadow_failed", model=self._versions.name, exc_info=error)

    def _offer(self, computed: ComputedBatch, at: Sequence[int], infer_s: float) -> None:
        pair = self._current_pair()
        if pair is None:
            return
        pair.budget.earn(infer_s)
        now_s, steps, dropped = time.monotonic(), 0, 0
        for index in at:
            job = computed.jobs[index]
            length = job.payload.steps.length
            steps += length
            if self._chunks >= MAX_CHUNKS or self._steps + length > MAX_STEPS:
                dropped += 1
                continue
            offered = OfferedChunk(
                job.payload,
                job.base.head if job.base else None,
                computed.heads[index],
                computed.outputs[index],
                computed.served,
                now_s,
            )
            self._queue.setdefault(job.payload.key, deque()).append(offered)
            self._chunks += 1
            self._steps += length
        side = SIDES[computed.served is pair.challenger]
        self._record(pair, {"dropped": dropped}, events={side: steps}, seconds={side: infer_s})
        if self._task is None and self._queue:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop; the chunks that wait are dropped."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._drop_pair()
        self._compute.close()

    def _drop_pair(self) -> None:
        if self._pair is not None:
            self._pair.clock.close()
        self._pair = None
        self._queue.clear()
        self._chunks = self._steps = 0

    def follow_route(self) -> None:
        """Switch to the versions of the current route, and forget others."""
        self._current_pair()

    def drop_older(self, committed_ms: int) -> None:
        """Drop the states in memory of streams without a chunk since then."""
        for states, _ in self._pair.stages.values() if self._pair else ():
            states.drop_older(committed_ms)

    def _current_pair(self) -> _Pair | None:
        """The two versions of the route; what was computed for others is dropped."""
        (champion, challenger, _), pair = self._versions.route, self._pair
        if pair is not None and (pair.champion, pair.challenger) == (champion, challenger):
            return pair
        if challenger is None:
            self._drop_pair()
            return None
        comparator = Comparator(champion, challenger)
        if pair is not None and (pair.challenger, pair.champion) == (champion, challenger):
            # promoted or rolled back: what waits brings the states of both versions to the head
            self._pair = pair._replace(
                champion=champion, challenger=challenger, comparator=comparator
            )
            return self._pair
        self._drop_pair()
        max_bytes = self._settings.state_cache_bytes // 4
        clock, share = BusyClock(), self._settings.shadow_budget
        budget = ShadowBudget(share, time.monotonic(), clock.read_s())
        stages = {
            served: (
                ShadowStates(served, self._store.histories, self._compute, max_bytes, budget),
                # the metrics of runtime calls are those of the chunks that are answered
                Inference(served, self._compute, self._recorder, ignore_call),
            )
            for served in (champion, challenger)
        }
        self._pair = _Pair(champion, challenger, clock, budget, comparator, stages)
        return self._pair

    async def _run(self) -> None:
        """Compute what waits, whenever there is time."""
        try:
            while (pair := self._current_pair()) is not None and self._queue:
                pair.budget.note_clocks(time.monotonic(), pair.clock.read_s())
                if self._is_due() and pair.budget.has_time and not self._is_busy():
                    await self._compute_next(pair)
                else:
                    await asyncio.sleep(RETRY_S)
        finally:
            self._task = None

    def _is_due(self) -> bool:
        """Whether enough streams wait, or one has waited long enough."""
        if len(self._queue) >= BATCH_ROWS:
            return True
        oldest = next(iter(self._queue.values()))[0]
        return time.monotonic() - oldest.answered_s >= LINGER_S

    def _take(self) -> list[OfferedChunk]:
        """Take the oldest chunk of each of the streams that wait longest."""
        taken: list[OfferedChunk] = []
        longest = 0
        for key in [*self._queue][:BATCH_ROWS]:
            waiting = self._queue[key]
            longest = max(longest, waiting[0].chunk.steps.length)
            if taken and longest * (len(taken) + 1) > BATCH_STEPS:
                break
            taken.append(waiting.popleft())
            self._queue.move_to_end(key)
            if not waiting:
                del self._queue[key]
        self._chunks -= len(taken)
        self._steps -= sum([each.chunk.steps.length for each in taken])
        return taken

    async def _compute_next(self, pair: _Pair) -> None:
        """Compute the first chunks of some streams, those that one version answered together."""
        offered = self._take()
        for answered_by in dict.fromkeys([each.served for each in offered]):
            group = [each for each in offered if each.served is answered_by]
            began_s = time.monotonic()
            try:
                await self._compute_group(pair, answered_by, group)
            except Exception as error:
                pair.budget.spend(time.monotonic() - began_s)
                self._record(pair, {"failed": len(group)})
                log.error("shadow_failed", model=self._versions.name, exc_info=error)
        await asyncio.sleep(0)

    async def _compute_group(
        self, pair: _Pair, answered_by: ServedModel, offered: Sequence[OfferedChunk]
    ) -> None:
        """Compute chunks that one version answered with the other one; compare and store."""
        is_challenger = answered_by is not pair.challenger
        served = pair.challenger if is_challenger else pair.champion
        states, infer = pair.stages[served]
        bases, caught_up = await states.find(offered)
        jobs = {_job(each, base): each for each, base in bases.items()}
        times = StageTimes(time.monotonic())
        computed = await infer([*jobs], times)
        began_s = time.monotonic()
        done = [] if computed is None else [jobs[job] for job in computed.jobs]
        outcomes = {"failed": len(jobs) - len(done), "dropped": len(offered) - len(jobs)}
        current = self._current_pair()
        if computed is None or current is None or current.stages is not pair.stages:
            self._record(pair, outcomes, caught_up=caught_up)
            return
        streams: dict[StreamKey, ShadowStream] = {}
        compared: list[ComparedChunk] = []
        values = self._encode(served, done, computed)
        for each, outputs, value in zip(done, computed.outputs, values, strict=True):
            chunk, base = each.chunk, bases[each]
            last = None if base is None else base.outputs
            since = _since(served, each, base)
            if since is not None:
                value = mark_inexact(value, since)
            else:
                before = last and _by_side(is_challenger, *last)
                sides = _by_side(is_challenger, each.outputs, outputs)
                resets = _find_resets(served, each, base)
                compared.append(ComparedChunk(sides, before, chunk.steps.columns, resets))
            if len(outputs):
                last = each.outputs[-1].copy(), outputs[-1].copy()
            streams[chunk.key] = ShadowStream(each.head, chunk.steps.feed, value, since, last)
        comparison = pair.comparator.compare(compared) if compared else None
        pair.budget.spend(times.infer_s + time.monotonic() - began_s)
        await states.store(streams)
        side = SIDES[is_challenger]
        now_s = time.monotonic()
        self._record(
            pair,
            {**outcomes, "computed": len(done)},
            events={side: sum([each.chunk.steps.length for each in done])},
            seconds={side: times.infer_s},
            caught_up=caught_up,
            lags_s=[now_s - each.answered_s for each in done],
            comparison=comparison,
        )

    def _encode(
        self, served: ServedModel, done: Sequence[OfferedChunk], computed: ComputedBatch
    ) -> list[bytes]:
        """The states after chunks, at the heads that the other version committed."""
        return encode_states(
            [each.chunk.steps.feed for each in done],
            [pack_head(each.head) for each in done],
            [last_chunk(each.chunk, each.base) for each in done],
            computed.states,
            fingerprint=served.fingerprint,
            updated_ms=self._now_ms(),
        )

    def _record(
        self,
        pair: _Pair,
        outcomes: Mapping[str, int],
        *,
        events: Mapping[str, int] = MappingProxyType({}),
        seconds: Mapping[str, float] = MappingProxyType({}),
        caught_up: int = 0,
        lags_s: Sequence[float] = (),
        comparison: Comparison | None = None,
    ) -> None:
        batch = ShadowBatch(outcomes, events, seconds, caught_up, lags_s, comparison)
        self._recorder.record_shadow(self._versions.name, pair.challenger.version, batch)


def _job(offered: OfferedChunk, base: ShadowStream | None) -> ChunkJob:
    """A job whose result nobody waits for."""
    chunk, now_s = offered.chunk, offered.answered_s
    job = ChunkJob(chunk, chunk.key, chunk.steps.length, now_s, math.inf, _ignore_result)
    job.base = base
    return job


def _ignore_result(_: Reply | CarryError) -> None:
    """Nothing: a failed job is missing among the computed ones."""


def _by_side(is_challenger: bool, answered: T, own: T) -> tuple[T, T]:
    """What belongs to the champion and to the challenger, if that computed its `own`."""
    return (answered, own) if is_challenger else (own, answered)


def _since(served: ServedModel, offered: OfferedChunk, base: ShadowStream | None) -> int | None:
    """The position since which the state after a chunk is computed; None if it is exact."""
    if base is None:
        return None
    was_reset = served.is_reset(offered.chunk.steps, base.head.position)
    return served.find_since(base.since, offered.head.position, was_reset=was_reset)


def _find_resets(
    served: ServedModel, offered: OfferedChunk, base: ShadowStream | None
) -> Sequence[int]:
    """The events of a chunk before which the state was reset."""
    steps = offered.chunk.steps
    if not served.spec.resets.is_active:
        return steps.resets
    state = served.initial if base is None else decode_stream(base.value).state
    return served.find_resets(steps, state, 0 if base is None else base.head.position)
