"""Inference for chunks and sequences with resets, cut into segments.

A segment starts from the initial state, the first one of a chunk usually from the stream's: so the
segments of a chunk do not depend on each other, and all segments of a batch are computed side by
side, like chunks of different streams. The outputs of a chunk are those of its segments one after
another, and its state is that after the last one. A model that sees a chunk as a whole sees each
segment as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from models.spec.state import State
from service.core.values import FloatRows
from service.engine.compute import Compute, OnCall, TimeSlicer
from service.pipeline.blocks import BatchOutput, BlockInput, infer_blocks
from service.pipeline.served_model import Segment, ServedModel

MAX_PADDED_STEPS: Final = 4096
"""Most padded steps of one call, unless a single segment is longer."""


async def infer_segments(
    compute: Compute,
    served: ServedModel,
    parts: Sequence[Sequence[Segment]],
    on_call: OnCall,
) -> BatchOutput:
    """Compute the segments of each chunk or sequence.

    A model with blocks computes each segment to its end, as a whole sequence.

    Args:
        parts: one or more segments of each.

    Returns:
        The outputs of each, its segments' one after another, and the state after its last segment.
    """
    segments = [segment for part in parts for segment in part]
    outputs: dict[int, FloatRows] = {}
    states: dict[int, State] = {}
    finite = True
    slicer = TimeSlicer(compute)
    groups = list(_groups(segments, served.runtime.max_batch))
    for number, group in enumerate(groups):
        if number:
            await slicer.yield_to_others()
        computed = await _infer(
            compute, served, [segments[at] for at in group], on_call, is_slice=len(groups) > 1
        )
        finite = finite and computed.finite
        outputs.update(zip(group, computed.outputs, strict=True))
        states.update(zip(group, computed.states, strict=True))
    joined: list[FloatRows] = []
    last: list[State] = []
    stop = 0
    for part in parts:
        start, stop = stop, stop + len(part)
        joined.append(
            outputs[start]
            if len(part) == 1
            else np.concatenate([outputs[at] for at in range(start, stop)])
        )
        last.append(states[stop - 1])
    return BatchOutput(joined, last, finite)


async def _infer(
    compute: Compute,
    served: ServedModel,
    segments: Sequence[Segment],
    on_call: OnCall,
    *,
    is_slice: bool,
) -> BatchOutput:
    if served.blocks is not None:
        inputs = [BlockInput(*segment, final=True) for segment in segments]
        width = served.outputs.size
        return await infer_blocks(
            compute, served.runtime, served.blocks, inputs, width, on_call, is_slice=is_slice
        )
    layout = served.runtime_state
    inferred = await compute.infer(
        served.runtime,
        [segment.rows for segment in segments],
        np.stack([layout.pack(segment.state) for segment in segments]),
        on_call,
        is_slice=is_slice,
    )
    after = zip(inferred.states, segments, strict=True)
    states = [layout.unpack(row, each.ints) for row, each in after]
    return BatchOutput(inferred.outputs, states, inferred.finite)


def _groups(segments: Sequence[Segment], max_rows: int) -> Iterator[list[int]]:
    """Indexes of segments for one call each, those of about the same length together."""
    group: list[int] = []
    for at in sorted(range(len(segments)), key=lambda at: -len(segments[at].rows)):
        longest = len(segments[group[0]].rows) if group else 0
        if len(group) == max_rows or (len(group) + 1) * longest > MAX_PADDED_STEPS:
            yield group
            group = []
        group.append(at)
    if group:
        yield group
