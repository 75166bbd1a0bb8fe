"""Inference for chunks and sequences that resets cut into segments, and for models with blocks.

A segment starts from the initial state, the first one of a chunk usually from the stream's: so the
segments of a chunk do not depend on each other, and all segments of a batch are computed side by
side, like chunks of different streams. The outputs of a chunk are those of its segments one after
another, and its state is that after the last one. A model that sees a chunk as a whole sees each
segment as a whole.

A model with blocks computes a block once its whole window has arrived. Waiting rows and new rows
are split into windows (`models.spec.blocks`). The windows of a stream are computed one after
another, those of different streams together; between two calls other batches run. A chunk that
completes no window needs no runtime call: it has no outputs, and its rows wait in the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from models.spec.blocks import BlockStateLayout, cut_blocks
from models.spec.state import State
from service.core.values import FloatRows
from service.engine.compute import Compute, OnCall, TimeSlicer
from service.pipeline.served_model import Segment, ServedModel

MAX_PADDED_STEPS: Final = 4096
"""Most padded steps of one call, unless a single segment is longer."""


class BatchOutput(NamedTuple):
    """The results of a batch.

    Attributes:
        outputs: B arrays float32 [T, O]; of a model with blocks, the outputs that are due.
        states: B whole states, float32 [B, N] and int64 [B, M].
        finite: as `InferenceResult.finite`; waiting rows were validated when they arrived.
    """

    outputs: list[FloatRows]
    states: State
    finite: bool


async def infer_segments(
    compute: Compute,
    served: ServedModel,
    parts: Sequence[Sequence[Segment]],
    on_call: OnCall,
) -> BatchOutput:
    """Compute the segments of each chunk or sequence.

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
        computed = await infer_batch(
            compute, served, [segments[at] for at in group], on_call, is_slice=len(groups) > 1
        )
        finite = finite and computed.finite
        outputs.update(zip(group, computed.outputs, strict=True))
        states.update(zip(group, map(State, *computed.states), strict=True))
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
    return BatchOutput(joined, _stack(last), finite)


async def infer_batch(
    compute: Compute,
    served: ServedModel,
    segments: Sequence[Segment],
    on_call: OnCall,
    *,
    is_slice: bool = False,
) -> BatchOutput:
    """Compute segments together; `is_slice` as in `Compute.infer`."""
    if served.blocks is not None:
        return await _infer_blocks(compute, served, served.blocks, segments, on_call, is_slice)
    layout = served.runtime_state
    inferred = await compute.infer(
        served.runtime,
        [segment.rows for segment in segments],
        np.stack([layout.pack(segment.state) for segment in segments]),
        on_call,
        is_slice=is_slice,
    )
    ints = np.stack([segment.ints for segment in segments])
    return BatchOutput(inferred.outputs, layout.unpack(inferred.states, ints), inferred.finite)


async def _infer_blocks(
    compute: Compute,
    served: ServedModel,
    layout: BlockStateLayout,
    segments: Sequence[Segment],
    on_call: OnCall,
    is_slice: bool,
) -> BatchOutput:
    """Compute every block whose window is complete."""
    cuts = [
        cut_blocks(
            layout.blocks, _append(layout.pending_rows(each.state), each.rows), final=each.final
        )
        for each in segments
    ]
    networks = [layout.network_floats(each.state) for each in segments]
    outputs = [np.zeros((0, served.outputs.size), np.float32)] * len(segments)
    due = [index for index, split in enumerate(cuts) if split.windows]
    finite = True
    if due:
        inferred = await compute.infer_slices(
            served.runtime,
            [cuts[index].windows for index in due],
            np.stack([networks[index] for index in due]),
            on_call,
            is_slice=is_slice,
        )
        finite = inferred.finite
        for index, output, after in zip(due, inferred.outputs, inferred.states, strict=True):
            outputs[index], networks[index] = output, after
    states = [
        layout.pack(network, each.ints, split.waiting, closed=each.final)
        for each, network, split in zip(segments, networks, cuts, strict=True)
    ]
    return BatchOutput(outputs, _stack(states), finite)


def _stack(states: Sequence[State]) -> State:
    floats, ints = zip(*states, strict=True)
    return State(np.stack(floats), np.stack(ints))


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


def _append(waiting: FloatRows, rows: FloatRows) -> FloatRows:
    return np.concatenate([waiting, rows]) if len(waiting) else rows
