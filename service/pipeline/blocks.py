"""Inference for models with blocks, which compute a block once its whole window has arrived.

Waiting rows and new rows are split into windows (`models.spec.blocks`). The windows of a stream are
computed one after another, those of different streams together; between two calls other batches
run. A chunk that completes no window needs no runtime call: it has no outputs, and its rows wait in
the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.spec.blocks import BlockStateLayout, cut_blocks
from models.spec.state import State
from service.core.values import FloatRows
from service.engine.compute import Compute, OnCall
from service.engine.runtimes.base import Runtime


class BlockInput(NamedTuple):
    """The next events of one stream.

    Attributes:
        state: the stream's state before them.
        rows: float32 [T, F], T >= 0.
        ints: int64 [M], the int part of the state after them, without that of the blocks.
        final: whether no event follows them.
    """

    state: State
    rows: FloatRows
    ints: NDArray[np.int64]
    final: bool


class BatchOutput(NamedTuple):
    """The results of a batch.

    Attributes:
        outputs: B arrays float32 [number of outputs due, O].
        states: B whole states.
        finite: as `InferenceResult.finite`; waiting rows were validated when they arrived.
    """

    outputs: list[FloatRows]
    states: list[State]
    finite: bool


async def infer_blocks(
    compute: Compute,
    runtime: Runtime,
    layout: BlockStateLayout,
    items: Sequence[BlockInput],
    width: int,
    on_call: OnCall,
    *,
    is_slice: bool = False,
) -> BatchOutput:
    """Compute every block whose window is complete.

    Args:
        width: O, values per output row.
        is_slice: as in `Compute.infer`.
    """
    cuts = [
        cut_blocks(
            layout.blocks, _append(layout.pending_rows(item.state), item.rows), final=item.final
        )
        for item in items
    ]
    networks = [layout.network_floats(item.state) for item in items]
    outputs = [np.zeros((0, width), np.float32)] * len(items)
    due = [index for index, split in enumerate(cuts) if split.windows]
    finite = True
    if due:
        inferred = await compute.infer_slices(
            runtime,
            [cuts[index].windows for index in due],
            np.stack([networks[index] for index in due]),
            on_call,
            is_slice=is_slice,
        )
        finite = inferred.finite
        for index, output, after in zip(due, inferred.outputs, inferred.states, strict=True):
            outputs[index], networks[index] = output, after
    states = [
        layout.pack(network, item.ints, split.waiting, closed=item.final)
        for item, network, split in zip(items, networks, cuts, strict=True)
    ]
    return BatchOutput(outputs, states, finite)


def _append(waiting: FloatRows, rows: FloatRows) -> FloatRows:
    return np.concatenate([waiting, rows]) if len(waiting) else rows
