"""Forecasts: a decoder looks ahead from a stream's stored state, which it does not change.

Each forecast is decoded by itself and in the same calls whoever else computes, so that the same
seed, state and known columns give the same numbers. Every step of its horizon is a call of its
own (or several, for many paths), between which chunks and other forecasts have their turns.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from models.decoding.forecasts import Decoding, Forecast
from service.core.errors import NotFinite
from service.core.values import FloatRows
from service.engine.compute import Compute, TimeSlicer
from service.engine.jobs import BatchControl, Job
from service.engine.runtimes.base import Runtime
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel


class ForecastOrigin(NamedTuple):
    """Where a forecast begins.

    Attributes:
        floats: float32 [N], the stream's state.
        known: float32 [H, K], what is known of the coming steps, encoded.
        samples: paths to draw.
        seed: of the draws.
    """

    floats: FloatRows
    known: FloatRows
    samples: int
    seed: int


ForecastJob = Job[ForecastOrigin, Forecast]


class ForecastRunner:
    """Decodes forecasts of one model, job by job; `__call__` is what its batcher is given."""

    def __init__(self, served: ServedModel, decoder: Runtime, compute: Compute, recorder: Recorder):
        self._spec = served.artifact.spec
        self._decoder = decoder
        self._compute = compute
        self._on_call = partial(recorder.record_runtime_call, served.name)

    async def __call__(self, jobs: list[ForecastJob], control: BatchControl) -> list[ForecastJob]:
        """Settle every job."""
        for job in jobs:
            found = await self._decoded(job)
            if found is not None:
                job.resolve(found)
        return []

    async def _decoded(self, job: ForecastJob) -> Forecast | NotFinite | None:
        """The forecast; None where nobody waits for it any more."""
        decoding = Decoding(self._spec, *job.payload)
        slicer = self._compute.time_slicer()
        while not decoding.done:
            if job.is_resolved or job.ticket.future.done():
                return None
            parameters, states = await self._step(decoding.rows, decoding.states, slicer)
            if not (np.isfinite(parameters).all() and np.isfinite(states).all()):
                return NotFinite(
                    "expected finite parameters and states of a decoder, got NaN or infinity"
                )
            decoding.take(parameters, states)
        forecast = decoding.forecast()
        if not all(np.isfinite(part).all() for part in (forecast.quantiles, forecast.paths)):
            return NotFinite("expected a forecast within float32, got one beyond")
        return forecast

    async def _step(
        self, rows: FloatRows, states: FloatRows, slicer: TimeSlicer
    ) -> tuple[FloatRows, FloatRows]:
        """One step of all paths, in as many calls as the runtime's batches make of them."""
        most = self._decoder.max_batch
        parameters: list[FloatRows] = []
        after: list[FloatRows] = []
        for first in range(0, len(rows), most):
            part = slice(first, first + most)
            found = await self._compute.infer(
                self._decoder,
                [row[np.newaxis] for row in rows[part]],
                states[part],
                self._on_call,
                is_slice=True,
            )
            parameters += found.outputs
            after.append(found.states)
            await slicer.yield_to_others()
        return np.concatenate(parameters), np.concatenate(after)
