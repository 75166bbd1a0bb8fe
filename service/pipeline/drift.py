"""Samples how far a model's inputs and states are from those of its training.

A sampler takes one batch in an interval of time and compares the norms of its chunks' last events,
and of the states after them, with the ranges in the artifact (`models.artifact.ranges`). So the
cost does not grow with the load: for all other batches it is the comparison of two numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import numpy as np

from models.artifact.ranges import NormLayout, Ranges
from service.core.values import FloatRows
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel

SAMPLE_INTERVAL_S: Final = 0.25
"""At least between two sampled batches of a version."""


class DriftSampler:
    """Samples the batches of one version; from the event loop only.

    Attributes:
        due_s: when the next batch is to be sampled, by the monotonic clock.
    """

    def __init__(self, served: ServedModel, ranges: Ranges, recorder: Recorder) -> None:
        self._model, self._version = served.name, served.version
        self._layout = NormLayout(served.spec)
        self._ranges = ranges
        # a part that was always zero has no size to compare with
        self._scale = np.where(ranges.high > 0, ranges.high, 1.0)
        self._recorder = recorder
        self.due_s = 0.0

    def schedule(self, rows: Sequence[FloatRows], states: FloatRows, now_s: float) -> None:
        """Sample a batch in the next turn of the event loop, while the store commits it.

        Args:
            rows: of each chunk, float32 [T, F].
            states: the floats of the states after them, [B, N]; all finite.
            now_s: when the batch ran.
        """
        self.due_s = now_s + SAMPLE_INTERVAL_S
        asyncio.get_running_loop().call_soon(self.sample, rows, states)

    def sample(self, rows: Sequence[FloatRows], states: FloatRows) -> None:
        """Record the norms of a batch beside their ranges; arguments as for `schedule`."""
        filled = [at for at, each in enumerate(rows) if len(each)]
        if not filled:
            return
        last = np.stack([rows[at][-1] for at in filled])
        norms = self._layout.norms(last, states[filled])
        outside = (norms < self._ranges.low) | (norms > self._ranges.high)
        self._recorder.record_drift(
            self._model,
            self._version,
            len(filled),
            dict(zip(self._layout.names, outside.sum(axis=0).tolist(), strict=True)),
            dict(zip(self._layout.names, (norms / self._scale).mean(axis=0).tolist(), strict=True)),
        )


def make_drift_sampler(served: ServedModel, recorder: Recorder) -> DriftSampler | None:
    """Make the sampler of a version; None if its artifact has no ranges."""
    ranges = served.artifact.ranges
    return None if ranges is None else DriftSampler(served, ranges, recorder)
