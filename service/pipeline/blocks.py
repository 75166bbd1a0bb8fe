"""Chunks of a model with blocks, from rows and waiting rows to outputs and waiting rows.

The events that are known are cut into windows (`models.spec.blocks`); the windows of a chunk are
computed one after another, in turns with other batches, those of different streams together. A
chunk that completes no block reaches no runtime: its rows wait, and its outputs are none.
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
    """What is known of one stream's next events.

    Attributes:
        state: the stream's before them.
        rows: float32 [T, F], T >= 0.
        ints: int64 [M], the state's int parts after them, those of the blocks aside.
        final: no event follows them.
    """

    state: State
    rows: FloatRows
    ints: NDArray[np.int64]
    final: bool


class BatchOutput(NamedTuple):
    """What a batch came to.

    Attributes:
        outputs: B arrays float32 [outputs that were due, O].
        states: B whole states.
        finite: as `InferenceResult.finite`; rows that wait are finite from their check on.
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
) -> BatchOutput:
    """Compute every block of the items that is due.

    Args:
        width: O, values per output row.
    """
    cuts = [
        cut_blocks(
            layout.blocks, _joined(layout.pending_rows(item.state), item.rows), final=item.final
        )
        for item in items
    ]
    networks = [layout.network_floats(item.state) for item in items]
    outputs = [np.zeros((0, width), np.float32)] * len(items)
    due = [index for index, found in enumerate(cuts) if found.windows]
    finite = True
    if due:
        inferred = await compute.infer_slices(
            runtime,
            [cuts[index].windows for index in due],
            np.stack([networks[index] for index in due]),
            on_call,
        )
        finite = inferred.finite
        for index, output, after in zip(due, inferred.outputs, inferred.states, strict=True):
            outputs[index], networks[index] = output, after
    states = [
        layout.pack(network, item.ints, found.waiting, closed=item.final)
        for item, network, found in zip(items, networks, cuts, strict=True)
    ]
    return BatchOutput(outputs, states, finite)


def _joined(waiting: FloatRows, rows: FloatRows) -> FloatRows:
    return np.concatenate([waiting, rows]) if len(waiting) else rows
