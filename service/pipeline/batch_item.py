"""One chunk of a batch with everything that the stages add to it, and the times of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.core.values import Chunk, FloatRows, Reply, StreamHead, StreamKey, StreamState
from service.engine.fair_queue import Job
from service.pipeline.served_model import Segment

ChunkJob = Job[Chunk, Reply]


@dataclass(slots=True, eq=False)
class BatchItem:
    """One chunk on its way through a batch.

    Attributes:
        base: the stream that the chunk continues; None if it creates one.
        expected: the stream head that the commit expects; None if the stream must not exist.
        rows: float32 [T, F], the encoded events.
        ints: int64 [M], the encoder's state after the chunk.
        segments: the encoded parts of a chunk with resets, in place of `rows` and `ints`.
        outputs: float32 [T, O]; of a model with blocks, the outputs that were due.
    """

    job: ChunkJob
    chunk: Chunk
    key: StreamKey
    base: StreamState | None = None
    expected: StreamHead | None = None
    segments: Sequence[Segment] = ()
    rows: FloatRows = field(init=False)
    ints: NDArray[np.int64] = field(init=False)
    outputs: FloatRows = field(init=False)


Computed = tuple[BatchItem, StreamState]
"""An item whose outputs are computed, and its stream after the chunk, not yet committed."""


@dataclass(slots=True)
class StageTimes:
    """When a batch started, and how long its load and its inference took, in seconds.

    Attributes:
        infer_began_s, commit_began_s, commit_ended_s: 0 until then; of the first part of a commit,
            and of its last.
    """

    began_s: float
    load_s: float = 0.0
    infer_s: float = 0.0
    infer_began_s: float = 0.0
    commit_began_s: float = 0.0
    commit_ended_s: float = 0.0
