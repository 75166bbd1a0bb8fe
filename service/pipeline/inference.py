"""Middle stages of a batch: encode the events, run the network, check that results are finite.

The jobs of a batch are encoded together and computed in as few runtime calls as possible. One
that cannot be encoded, or whose results are not finite, is resolved here, without effect on the
others. Nothing is stored.

If any of them has a reset, all are computed in segments, as predicted sequences are. A segment
starts from the initial state, the first one of a chunk usually from the stream's: so the segments
of a chunk do not depend on each other, and all segments of a batch are computed side by side, like
chunks of different streams. The outputs of a chunk are those of its segments one after another, and
its state is that after the last one. A model that sees a chunk as a whole sees each segment as a
whole.

A model with blocks computes a block once its whole window has arrived. Waiting rows and new rows
are split into windows (`models.spec.blocks`). The windows of a stream are computed one after
another, those of different streams together; between two calls other batches run. A chunk that
completes no window needs no runtime call: it has no outputs, and its rows wait in the state.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import structlog

from models.spec.blocks import BlockStateLayout, cut_blocks
from models.spec.state import State
from service.core.delivery import next_head, stream_facts
from service.core.errors import CarryError, InternalError, InvalidInput, NotFinite
from service.core.values import FloatRows
from service.engine.compute import Compute, OnCall, TimeSlicer
from service.pipeline.chunk_job import ChunkJob, ComputedBatch, StageTimes
from service.pipeline.drift import make_drift_sampler
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import Segment, ServedModel
from service.store.codec import decode_states
from service.store.layout import HEADER_BYTES

MAX_PADDED_STEPS: Final = 4096
"""Most padded steps of one call, unless a single segment is longer."""

log = structlog.get_logger(__name__)


class Inference:
    """Encodes and computes the chunks of one model.

    Args:
        on_call: called with each runtime call, instead of the recorder.
    """

    def __init__(
        self,
        served: ServedModel,
        compute: Compute,
        recorder: Recorder,
        on_call: OnCall | None = None,
    ):
        self._served = served
        self._compute = compute
        self._on_call = on_call or partial(recorder.record_runtime_call, served.name)
        initial, layout = served.initial, served.state
        self._initial = bytes(HEADER_BYTES) + initial.ints.tobytes() + initial.floats.tobytes()
        self._sizes = layout.int_size, layout.float_size
        self._runtime_state = served.runtime_state
        self._drift = make_drift_sampler(served, recorder)
        self._has_blocks = served.blocks is not None
        self._has_alarms = served.artifact.spec.detection is not None
        self._resets_automatically = served.artifact.spec.resets.is_active
        self._rows_skip_encoder = (
            served.chunk_limit is None and served.blocks is None and not self._resets_automatically
        )

    async def __call__(self, jobs: list[ChunkJob], times: StageTimes) -> ComputedBatch | None:
        """Compute the jobs; returns those that succeeded, with their streams after the chunk."""
        if not jobs:
            return None
        values = [job.base.value if job.base is not None else self._initial for job in jobs]
        before = decode_states(values, *self._sizes)
        if self._has_alarms:
            before = self._served.states_before([job.payload.steps for job in jobs], before)
        steps = [job.payload.steps for job in jobs]
        rows = [each.rows for each in steps if each.rows is not None and not each.resets]
        is_cut = False
        parts: list[list[Segment]] = []
        if not self._rows_skip_encoder or len(rows) < len(jobs):
            encoded, is_cut = self._encode(jobs, list(map(State, *before)))
            if not encoded:
                return None
            jobs, parts = [jobs[at] for at in encoded], list(encoded.values())
            rows = [part[-1].rows for part in parts]
            ints = np.stack([part[-1].ints for part in parts])
            before = State(before.floats[list(encoded)], ints)
        times.infer_began_s = time.monotonic()
        if is_cut or self._has_blocks:
            outputs, after, finite = await infer_segments(
                self._compute, self._served, parts, self._on_call
            )
        else:
            # where events were encoded, the int parts of `before` are those after the chunks
            packed = self._runtime_state.pack(before)
            inferred = await self._compute.infer(self._served.runtime, rows, packed, self._on_call)
            outputs, finite = inferred.outputs, inferred.finite
            after = self._runtime_state.unpack(inferred.states, before.ints)
        times.infer_s = time.monotonic() - times.infer_began_s
        if finite and self._drift is not None and times.infer_began_s >= self._drift.due_s:
            self._drift.schedule(rows, after.floats, times.infer_began_s)
        return self._finite(jobs, outputs, after, finite)

    def _encode(
        self, jobs: list[ChunkJob], states: list[State]
    ) -> tuple[dict[int, list[Segment]], bool]:
        """Encode the jobs' events, given their states; an error fails its own job only.

        Returns:
            The encoded segments by the index of the job, and whether one of them has a reset.
        """
        served = self._served
        has_resets = self._resets_automatically or any(job.payload.steps.resets for job in jobs)
        encoded: dict[int, list[Segment]] = {}
        is_cut = False
        whole: list[int] = []
        for at, job in enumerate(jobs):
            steps, position = job.payload.steps, job.base.head.position if job.base else 0
            try:
                resets = served.find_resets(steps, states[at], position) if has_resets else ()
                if resets:
                    encoded[at] = served.encode_segments(steps, states[at], resets)
                    is_cut = True
                else:
                    whole.append(at)
            except Exception as error:
                job.resolve(self._encoding_error(job, error))
        pairs = [(jobs[at].payload.steps, states[at]) for at in whole]
        for at, result in zip(whole, served.encode_many(pairs), strict=True):
            if isinstance(result, Exception):
                jobs[at].resolve(self._encoding_error(jobs[at], result))
            else:
                encoded[at] = [Segment(states[at], *result, jobs[at].payload.final)]
        return encoded, is_cut

    def _encoding_error(self, job: ChunkJob, error: Exception) -> CarryError:
        if isinstance(error, InvalidInput):
            return InvalidInput(error.detail, **error.facts, stream=job.payload.key.stream)
        if isinstance(error, CarryError):
            return error
        log.error("encoding_failed", model=self._served.name, exc_info=error)
        return InternalError(f"encoding failed: {type(error).__name__}")

    def _finite(
        self, jobs: list[ChunkJob], outputs: list[FloatRows], states: State, finite: bool
    ) -> ComputedBatch | None:
        """The jobs with finite results, and their streams after the chunks; fails the others."""
        heads = [next_head(job.payload, job.base.head if job.base else None) for job in jobs]
        computed = ComputedBatch(self._served, jobs, heads, outputs, states)
        if finite:
            return computed
        is_finite = [
            bool(np.isfinite(output).all()) and self._served.state.is_finite(State(*state))
            for output, *state in zip(outputs, *states, strict=True)
        ]
        for job, item_is_finite in zip(jobs, is_finite, strict=True):
            if not item_is_finite:
                job.resolve(_not_finite(job))
        return computed.select(np.flatnonzero(is_finite).tolist())


def _not_finite(job: ChunkJob) -> NotFinite:
    stream, head = job.payload.key.stream, job.base.head if job.base else None
    return NotFinite(
        f"expected finite outputs and states of stream {stream!r}, got NaN or infinity",
        **stream_facts(stream, head),
    )


class BatchOutput(NamedTuple):
    """The results of a batch.

    Attributes:
        outputs: B arrays float32 [T, O]; of a model with blocks, the outputs that are due.
        states: B whole states, float32 [B, N] and int64 [B, M].
        finite: as `InferenceResult.finite`; waiting rows were validated when they arrived.
    """

    outputs: list[FloatRows]
    states: State
    finite: bool


async def infer_segments(
    compute: Compute,
    served: ServedModel,
    parts: Sequence[Sequence[Segment]],
    on_call: OnCall,
) -> BatchOutput:
    """Compute the segments of each chunk or sequence.

    Args:
        parts: one or more segments of each.

    Returns:
        The outputs of each, its segments' one after another, and the state after its last segment.
    """
    segments = [segment for part in parts for segment in part]
    outputs: dict[int, FloatRows] = {}
    states: dict[int, State] = {}
    finite = True
    slicer = TimeSlicer(compute)
    groups = list(_groups(segments, served.runtime.max_batch))
    for number, group in enumerate(groups):
        if number:
            await slicer.yield_to_others()
        computed = await infer_batch(
            compute, served, [segments[at] for at in group], on_call, is_slice=len(groups) > 1
        )
        finite = finite and computed.finite
        outputs.update(zip(group, computed.outputs, strict=True))
        states.update(zip(group, map(State, *computed.states), strict=True))
    joined: list[FloatRows] = []
    last: list[State] = []
    stop = 0
    for part in parts:
        start, stop = stop, stop + len(part)
        joined.append(
            outputs[start]
            if len(part) == 1
            else np.concatenate([outputs[at] for at in range(start, stop)])
        )
        last.append(states[stop - 1])
    return BatchOutput(joined, _stack(last), finite)


async def infer_batch(
    compute: Compute,
    served: ServedModel,
    segments: Sequence[Segment],
    on_call: OnCall,
    *,
    is_slice: bool = False,
) -> BatchOutput:
    """Compute segments together; `is_slice` as in `Compute.infer`."""
    if served.blocks is not None:
        return await _infer_blocks(compute, served, served.blocks, segments, on_call, is_slice)
    layout = served.runtime_state
    inferred = await compute.infer(
        served.runtime,
        [segment.rows for segment in segments],
        np.stack([layout.pack(segment.state) for segment in segments]),
        on_call,
        is_slice=is_slice,
    )
    ints = np.stack([segment.ints for segment in segments])
    return BatchOutput(inferred.outputs, layout.unpack(inferred.states, ints), inferred.finite)


async def _infer_blocks(
    compute: Compute,
    served: ServedModel,
    layout: BlockStateLayout,
    segments: Sequence[Segment],
    on_call: OnCall,
    is_slice: bool,
) -> BatchOutput:
    """Compute every block whose window is complete."""
    cuts = [
        cut_blocks(
            layout.blocks, _append(layout.pending_rows(each.state), each.rows), final=each.final
        )
        for each in segments
    ]
    networks = [layout.network_floats(each.state) for each in segments]
    outputs = [np.zeros((0, served.outputs.size), np.float32)] * len(segments)
    due = [index for index, split in enumerate(cuts) if split.windows]
    finite = True
    if due:
        inferred = await compute.infer_slices(
            served.runtime,
            [cuts[index].windows for index in due],
            np.stack([networks[index] for index in due]),
            on_call,
            is_slice=is_slice,
        )
        finite = inferred.finite
        for index, output, after in zip(due, inferred.outputs, inferred.states, strict=True):
            outputs[index], networks[index] = output, after
    states = [
        layout.pack(network, each.ints, split.waiting, closed=each.final)
        for each, network, split in zip(segments, networks, cuts, strict=True)
    ]
    return BatchOutput(outputs, _stack(states), finite)


def _stack(states: Sequence[State]) -> State:
    floats, ints = zip(*states, strict=True)
    return State(np.stack(floats), np.stack(ints))


def _groups(segments: Sequence[Segment], max_rows: int) -> Iterator[list[int]]:
    """Indexes of segments for one call each, those of about the same length together."""
    group: list[int] = []
    for at in sorted(range(len(segments)), key=lambda at: -len(segments[at].rows)):
        longest = len(segments[group[0]].rows) if group else 0
        if len(group) == max_rows or (len(group) + 1) * longest > MAX_PADDED_STEPS:
            yield group
            group = []
        group.append(at)
    if group:
        yield group


def _append(waiting: FloatRows, rows: FloatRows) -> FloatRows:
    return np.concatenate([waiting, rows]) if len(waiting) else rows
