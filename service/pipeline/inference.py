"""Middle stages of a batch: encode the events, run the network, check that results are finite.

The jobs of a batch are encoded together and computed in as few runtime calls as possible. One
that cannot be encoded, or whose results are not finite, is resolved here, without effect on the
others. If any of them has a reset, all are computed in segments (`segments`). Nothing is stored.
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import structlog

from models.spec.state import State
from service.core.delivery import next_head, stream_facts
from service.core.errors import CarryError, InternalError, InvalidInput, NotFinite
from service.core.values import FloatRows
from service.engine.compute import Compute
from service.pipeline.chunk_job import ChunkJob, ComputedBatch, StageTimes
from service.pipeline.recorder import Recorder
from service.pipeline.segments import infer_segments
from service.pipeline.served_model import Segment, ServedModel
from service.store.codec import HEADER_BYTES, decode_states

log = structlog.get_logger(__name__)


class Inference:
    """Encodes and computes the chunks of one model."""

    def __init__(self, served: ServedModel, compute: Compute, recorder: Recorder):
        self._served = served
        self._compute = compute
        self._on_call = partial(recorder.record_runtime_call, served.name)
        initial, layout = served.initial, served.state
        self._initial = bytes(HEADER_BYTES) + initial.ints.tobytes() + initial.floats.tobytes()
        self._sizes = layout.int_size, layout.float_size
        self._runtime_state = served.runtime_state
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
        computed = ComputedBatch(jobs, heads, outputs, states)
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
