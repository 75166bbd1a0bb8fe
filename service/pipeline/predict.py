"""Predict: inference on sequences, from the initial state or from one that the client holds.

Nothing is loaded and nothing is stored. Sequences are batched; they fail independently.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import structlog

from models.spec.state import State
from service.core.errors import CarryError, InternalError, NotFinite
from service.core.values import Prediction, Steps, StreamState
from service.engine.batcher import BatchRunner
from service.engine.compute import Compute
from service.engine.fair_queue import Job, RunningBatch
from service.pipeline.recorder import Recorder
from service.pipeline.segments import infer_segments
from service.pipeline.served_model import Segment, ServedModel

LONG_STEPS: Final = 5_000
"""A sequence with more steps is encoded in a thread: it takes milliseconds, and there may be a
hundred thousand steps."""

log = structlog.get_logger(__name__)


class SequenceStart(NamedTuple):
    """A sequence and the state that it continues; None for the initial state."""

    steps: Steps
    before: StreamState | None


SequenceJob = Job[SequenceStart, Prediction]


class PredictRunner(BatchRunner[SequenceStart, Prediction]):
    """Runs batches of sequences of one model; its batcher calls it with the jobs of each batch."""

    def __init__(self, served: ServedModel, compute: Compute, recorder: Recorder):
        self._served = served
        self._compute = compute
        self._on_call = partial(recorder.record_runtime_call, served.name)

    async def __call__(self, jobs: list[SequenceJob], batch: RunningBatch) -> list[SequenceJob]:
        """Run one batch and resolve its jobs."""
        encoded = [(job, parts) for job in jobs if (parts := await self._encode(job)) is not None]
        if not encoded:
            return []
        outputs, states, finite = await infer_segments(
            self._compute, self._served, [parts for _, parts in encoded], self._on_call
        )
        for (job, _), output, state in zip(encoded, outputs, map(State, *states), strict=True):
            if finite or (np.isfinite(output).all() and self._served.state.is_finite(state)):
                job.resolve(Prediction(output, state))
            else:
                job.resolve(
                    NotFinite(
                        "expected finite outputs and states of a predicted sequence, got NaN or "
                        "infinity"
                    )
                )
        return []

    async def _encode(self, job: SequenceJob) -> list[Segment] | None:
        """Encode a sequence; None if that failed, which resolves its job."""
        try:
            if job.payload.steps.length < LONG_STEPS:
                return self._encode_segments(job.payload)
            return await asyncio.to_thread(self._encode_segments, job.payload)
        except CarryError as error:
            job.resolve(error)
        except Exception as error:
            log.exception("encoding_failed", model=self._served.name)
            job.resolve(InternalError(f"encoding failed: {type(error).__name__}"))
        return None

    def _encode_segments(self, start: SequenceStart) -> list[Segment]:
        served, (steps, before) = self._served, start
        state, position = (before.state, before.head.position) if before else (served.initial, 0)
        return served.encode_segments(steps, state, served.find_resets(steps, state, position))
