"""The values that pass through the stages of a batch: jobs, columns after inference, times."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from models.spec.state import State
from service.core.values import Chunk, FloatRows, Reply, StreamHead, StreamState
from service.engine.fair_queue import Job
from service.pipeline.served_model import ServedModel
from service.store.codec import EncodedStream


class ChunkJob(Job[Chunk, Reply], eq=False):
    """The job of one chunk, its `payload`, with the stream that the first stage finds for it.

    Attributes:
        base: the stream that the chunk continues; None if it creates one.
        expected: the stream head that the commit expects, packed; empty if the stream must not
            exist.
        rewarmed: the stream as the version has computed it, if another one wrote the stored state.
    """

    base: EncodedStream | None = None
    expected: bytes = b""
    rewarmed: StreamState | None = None


class ComputedBatch(msgspec.Struct, frozen=True):
    """The chunks of a batch with their outputs and the streams after them, not yet committed.

    The garbage collector tracks it: the error of a failed commit refers to it by its traceback, and
    its jobs may refer to the error.

    Attributes:
        served: the version that computed them.
        heads: the stream heads after the chunks.
        outputs: of each float32 [T, O]; of a model with blocks, the outputs that were due.
        states: the states after the chunks, float32 [B, N] and int64 [B, M].
    """

    served: ServedModel
    jobs: Sequence[ChunkJob]
    heads: Sequence[StreamHead]
    outputs: Sequence[FloatRows]
    states: State

    def select(self, at: Sequence[int]) -> ComputedBatch:
        """The rows of the batch at these indexes."""
        return ComputedBatch(
            self.served,
            [self.jobs[index] for index in at],
            [self.heads[index] for index in at],
            [self.outputs[index] for index in at],
            State(self.states.floats[at], self.states.ints[at]),
        )


class StageTimes(msgspec.Struct, gc=False):
    """When a batch started, and how long its load and its inference took, in seconds.

    Attributes:
        infer_began_s, commit_began_s, commit_ended_s: 0 until then; of the first part of a commit,
            and of its last.
        chunks: how many were computed.
    """

    began_s: float
    load_s: float = 0.0
    infer_s: float = 0.0
    infer_began_s: float = 0.0
    commit_began_s: float = 0.0
    commit_ended_s: float = 0.0
    chunks: int = 0
