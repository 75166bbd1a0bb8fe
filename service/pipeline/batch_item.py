"""What a batch knows of each of its chunks on their way, and of the time it took."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.core.values import Chunk, FloatRows, Reply, StreamHead, StreamKey, StreamState, Timing
from service.engine.jobs import Job

ChunkJob = Job[Chunk, Reply]


@dataclass(slots=True, eq=False)
class BatchItem:
    """A chunk on its way through the batch.

    Attributes:
        base: the stream it continues; None where it begins one.
        expected: the head the stream must have at the commit; None where it must not exist.
        rows: float32 [T, F]; ints: int64 [M], the clock after the chunk.
        outputs: float32 [T, O]; of a model with blocks, those that were due.
    """

    job: ChunkJob
    chunk: Chunk
    key: StreamKey
    base: StreamState | None = None
    expected: StreamHead | None = None
    rows: FloatRows = field(init=False)
    ints: NDArray[np.int64] = field(init=False)
    outputs: FloatRows = field(init=False)


@dataclass(slots=True)
class StageTimes:
    """When the batch began, and how long its stages took, in seconds."""

    began_s: float
    load_s: float = 0.0
    infer_s: float = 0.0
    commit_s: float = 0.0

    def of(self, item: BatchItem) -> Timing:
        queue_s = self.began_s - item.job.submitted_s
        return Timing(queue_s, self.load_s, self.infer_s, self.commit_s)
