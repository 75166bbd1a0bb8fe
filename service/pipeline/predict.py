"""Runners of sequences and forecasts, which store nothing.

Predict is inference on sequences, from the initial state or from one that the client holds.
Sequences are batched; they fail independently.

A forecast predicts the next steps by a decoder from a stream's stored state, which stays as it is.
It is never batched with others, so that equal seeds, states and future covariates give bitwise
equal results under any load. Each step of the horizon is a runtime call of its own (several if
there are many sample paths); between two calls, chunks and other forecasts run.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import structlog

from models.decoding.forecasts import Decoding, Forecast
from models.spec.state import State
from service.core.errors import CarryError, InternalError, NotFinite
from service.core.values import FloatRows, Prediction, Steps, StreamState
from service.engine.batcher import BatchRunner
from service.engine.compute import Compute, TimeSlicer
from service.engine.fair_queue import Job, RunningBatch
from service.engine.runtimes.base import Runtime
from service.pipeline.inference import infer_segments
from service.pipeline.model_versions import ModelVersions
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import Segment, ServedModel
from service.pipeline.state_tokens import StateTokens

LONG_STEPS: Final = 5_000
"""A sequence with more steps is encoded in a thread: it takes milliseconds, and there may be a
hundred thousand steps."""

log = structlog.get_logger(__name__)


class SequenceStart(NamedTuple):
    """A sequence, the version that computes it, and the state that it continues; None for the
    initial state."""

    served: ServedModel
    steps: Steps
    before: StreamState | None


async def start_sequence(
    tokens: StateTokens, versions: ModelVersions, index: int, steps: Steps, token: bytes | None
) -> SequenceStart:
    """Start a sequence from the verified state of its token, by the version that signed it; without
    a token from the initial state, by the champion.

    Args:
        index: of the sequence in its request, for errors.

    Raises:
        CarryError: the token is rejected, or `steps` cannot continue its state.
    """
    served = versions.route.champion
    if token is None:
        return SequenceStart(served, steps, None)
    at = f"sequences[{index}].state_token"
    served.check_carries_state(at)
    try:
        state = await tokens.verify(versions, token, steps)
    except CarryError as error:
        error.facts = {**error.facts, "at": at}
        raise
    writer = versions.writer(state.fingerprint)
    if versions.checks_codes:
        writer.check_codes(steps)
    return SequenceStart(writer, steps, state)


SequenceJob = Job[SequenceStart, Prediction]


class PredictRunner(BatchRunner[SequenceStart, Prediction]):
    """Runs batches of sequences of one model; its batcher calls it with the jobs of each batch."""

    def __init__(self, model: str, compute: Compute, recorder: Recorder):
        self._compute = compute
        self._on_call = partial(recorder.record_runtime_call, model)

    async def __call__(self, jobs: list[SequenceJob], batch: RunningBatch) -> list[SequenceJob]:
        """Run one batch and resolve its jobs, those of each version together."""
        encoded: dict[ServedModel, list[tuple[SequenceJob, list[Segment]]]] = {}
        for job in jobs:
            if (parts := await self._encode(job)) is not None:
                encoded.setdefault(job.payload.served, []).append((job, parts))
        for served, group in encoded.items():
            await self._infer(served, group)
        return []

    async def _infer(
        self, served: ServedModel, group: list[tuple[SequenceJob, list[Segment]]]
    ) -> None:
        """Compute the sequences of one version and resolve their jobs."""
        outputs, states, finite = await infer_segments(
            self._compute, served, [parts for _, parts in group], self._on_call
        )
        for (job, _), output, state in zip(group, outputs, map(State, *states), strict=True):
            if finite or (np.isfinite(output).all() and served.state.is_finite(state)):
                job.resolve(Prediction(output, state, served))
            else:
                job.resolve(
                    NotFinite(
                        "expected finite outputs and states of a predicted sequence, got NaN or "
                        "infinity"
                    )
                )

    async def _encode(self, job: SequenceJob) -> list[Segment] | None:
        """Encode a sequence; None if that failed, which resolves its job."""
        try:
            if job.payload.steps.length < LONG_STEPS:
                return self._encode_segments(job.payload)
            return await asyncio.to_thread(self._encode_segments, job.payload)
        except CarryError as error:
            job.resolve(error)
        except Exception as error:
            log.exception("encoding_failed", model=job.payload.served.name)
            job.resolve(InternalError(f"encoding failed: {type(error).__name__}"))
        return None

    def _encode_segments(self, start: SequenceStart) -> list[Segment]:
        served, steps, before = start
        state, position = (before.state, before.head.position) if before else (served.initial, 0)
        return served.encode_segments(steps, state, served.find_resets(steps, state, position))


class ForecastOrigin(NamedTuple):
    """The forecast origin and the parameters of one forecast.

    Attributes:
        served: the version that wrote the state; with a decoder.
        floats: float32 [N], the float part of the stream's state.
        known: float32 [H, K], the encoded future covariates.
        samples: number of sample paths.
        seed: seed of the sample paths.
    """

    served: ServedModel
    floats: FloatRows
    known: FloatRows
    samples: int
    seed: int


ForecastJob = Job[ForecastOrigin, Forecast]


class ForecastRunner(BatchRunner[ForecastOrigin, Forecast]):
    """Decodes forecasts of one model; its batcher calls it with the jobs of each batch."""

    def __init__(self, model: str, compute: Compute, recorder: Recorder):
        self._compute = compute
        self._on_call = partial(recorder.record_runtime_call, model)

    async def __call__(self, jobs: list[ForecastJob], batch: RunningBatch) -> list[ForecastJob]:
        """Decode the forecasts one after another and resolve their jobs."""
        for job in jobs:
            result = await self._decode(job)
            if result is not None:
                job.resolve(result)
        return []

    async def _decode(self, job: ForecastJob) -> Forecast | NotFinite | None:
        """Decode one forecast; None if its caller has cancelled it or was answered already."""
        served, floats, known, samples, seed = job.payload
        decoder = served.decoder
        if decoder is None:
            raise ValueError(f"expected a version of model {served.name!r} with a decoder")
        decoding = Decoding(served.spec, floats, known, samples, seed)
        slicer = TimeSlicer(self._compute)
        while not decoding.is_done:
            if job.is_resolved or job.is_cancelled:
                return None
            parameters, states = await self._step(decoder, decoding.rows, decoding.states, slicer)
            if not (np.isfinite(parameters).all() and np.isfinite(states).all()):
                return NotFinite(
                    "expected finite parameters and states of a decoder, got NaN or infinity"
                )
            decoding.advance(parameters, states)
        forecast = decoding.forecast()
        if not all(np.isfinite(part).all() for part in (forecast.quantiles, forecast.paths)):
            return NotFinite("expected a forecast within float32, got one beyond")
        return forecast

    async def _step(
        self, decoder: Runtime, rows: FloatRows, states: FloatRows, slicer: TimeSlicer
    ) -> tuple[FloatRows, FloatRows]:
        """Compute one step of all paths, in calls of at most the runtime's batch size."""
        max_batch = decoder.max_batch
        parameters: list[FloatRows] = []
        after: list[FloatRows] = []
        for first in range(0, len(rows), max_batch):
            part = slice(first, first + max_batch)
            result = await self._compute.infer(
                decoder,
                [row[np.newaxis] for row in rows[part]],
                states[part],
                self._on_call,
                is_slice=True,
            )
            parameters += result.outputs
            after.append(result.states)
            await slicer.yield_to_others()
        return np.concatenate(parameters), np.concatenate(after)
