"""Forecasts: a decoder predicts the next steps from a stream's stored state, which stays as it is.

A forecast is never batched with others, so that equal seeds, states and future covariates give
bitwise equal results under any load. Each step of the horizon is a runtime call of its own (several
if there are many sample paths); between two calls, chunks and other forecasts run.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from models.decoding.forecasts import Decoding, Forecast
from service.core.errors import NotFinite
from service.core.values import FloatRows
from service.engine.batcher import BatchRunner
from service.engine.compute import Compute, TimeSlicer
from service.engine.fair_queue import Job, RunningBatch
from service.engine.runtimes.base import Runtime
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel


class ForecastOrigin(NamedTuple):
    """The forecast origin and the parameters of one forecast.

    Attributes:
        floats: float32 [N], the float part of the stream's state.
        known: float32 [H, K], the encoded future covariates.
        samples: number of sample paths.
        seed: seed of the sample paths.
    """

    floats: FloatRows
    known: FloatRows
    samples: int
    seed: int


ForecastJob = Job[ForecastOrigin, Forecast]


class ForecastRunner(BatchRunner[ForecastOrigin, Forecast]):
    """Decodes forecasts of one model; its batcher calls it with the jobs of each batch."""

    def __init__(self, served: ServedModel, decoder: Runtime, compute: Compute, recorder: Recorder):
        self._spec = served.artifact.spec
        self._decoder = decoder
        self._compute = compute
        self._on_call = partial(recorder.record_runtime_call, served.name)

    async def __call__(self, jobs: list[ForecastJob], batch: RunningBatch) -> list[ForecastJob]:
        """Decode the forecasts one after another and resolve their jobs."""
        for job in jobs:
            result = await self._decode(job)
            if result is not None:
                job.resolve(result)
        return []

    async def _decode(self, job: ForecastJob) -> Forecast | NotFinite | None:
        """Decode one forecast; None if its caller has cancelled it or was answered already."""
        decoding = Decoding(self._spec, *job.payload)
        slicer = TimeSlicer(self._compute)
        while not decoding.is_done:
            if job.is_resolved or job.is_cancelled:
                return None
            parameters, states = await self._step(decoding.rows, decoding.states, slicer)
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
        self, rows: FloatRows, states: FloatRows, slicer: TimeSlicer
    ) -> tuple[FloatRows, FloatRows]:
        """Compute one step of all paths, in calls of at most the runtime's batch size."""
        max_batch = self._decoder.max_batch
        parameters: list[FloatRows] = []
        after: list[FloatRows] = []
        for first in range(0, len(rows), max_batch):
            part = slice(first, first + max_batch)
            result = await self._compute.infer(
                self._decoder,
                [row[np.newaxis] for row in rows[part]],
                states[part],
                self._on_call,
                is_slice=True,
            )
            parameters += result.outputs
            after.append(result.states)
            await slicer.yield_to_others()
        return np.concatenate(parameters), np.concatenate(after)
