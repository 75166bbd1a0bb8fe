"""Predict: stateless inference on whole sequences, from the zero state.

Nothing is loaded and nothing is stored. Sequences are batched; they fail independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import structlog

from models.spec.state import State
from service.core.errors import CarryError, InternalError, NotFinite
from service.core.values import Prediction, Steps
from service.engine.compute import Compute
from service.engine.fair_queue import BatchControl, Job
from service.pipeline.blocks import BatchOutput, BlockInput, infer_blocks
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import Encoded, ServedModel

log = structlog.get_logger(__name__)

SequenceJob = Job[Steps, Prediction]


class PredictRunner:
    """Runs batches of sequences of one model; its batcher calls it with the jobs of each batch."""

    def __init__(self, served: ServedModel, compute: Compute, recorder: Recorder):
        self._served = served
        self._compute = compute
        self._on_call = partial(recorder.record_runtime_call, served.name)
        self._zero = served.state.zero()

    async def __call__(self, jobs: list[SequenceJob], control: BatchControl) -> list[SequenceJob]:
        """Run one batch and resolve its jobs."""
        encoded = [(job, rows) for job in jobs if (rows := self._encode(job)) is not None]
        if not encoded:
            return []
        outputs, states, finite = await self._infer([rows for _, rows in encoded])
        for (job, _), output, state in zip(encoded, outputs, states, strict=True):
            if finite or (np.isfinite(output).all() and np.isfinite(state.floats).all()):
                job.resolve(Prediction(output, state))
            else:
                job.resolve(
                    NotFinite(
                        "expected finite outputs and states of a predicted sequence, got NaN or "
                        "infinity"
                    )
                )
        return []

    async def _infer(self, encoded: Sequence[Encoded]) -> BatchOutput:
        """Run the network on whole sequences."""
        served = self._served
        if served.blocks is not None:
            inputs = [BlockInput(self._zero, rows, ints, final=True) for rows, ints in encoded]
            return await infer_blocks(
                self._compute,
                served.runtime,
                served.blocks,
                inputs,
                served.outputs.size,
                self._on_call,
            )
        outputs, after, finite = await self._compute.infer(
            served.runtime,
            [rows for rows, _ in encoded],
            np.tile(self._zero.floats, (len(encoded), 1)),
            self._on_call,
        )
        states = [State(row.copy(), ints) for row, (_, ints) in zip(after, encoded, strict=True)]
        return BatchOutput(outputs, states, finite)

    def _encode(self, job: SequenceJob) -> Encoded | None:
        """Encode a sequence; None if that failed, which resolves its job."""
        try:
            return self._served.encode(job.payload, self._zero)
        except CarryError as error:
            job.resolve(error)
        except Exception as error:
            log.exception("encoding_failed", model=self._served.name)
            job.resolve(InternalError(f"encoding failed: {type(error).__name__}"))
        return None
