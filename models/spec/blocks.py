"""Blocks: latency-controlled processing of unbounded streams by bidirectional networks.

Latency-controlled bidirectional networks: Zhang et al., "Highway long short-term memory RNNs for
distant speech recognition" (2016); Xue & Yan, "Improving latency-controlled BLSTM acoustic models
for online speech recognition" (2017). The stream is cut at absolute multiples of C events:

    block k    events kC .. kC + C-1, whose outputs are computed together
    window k   block k and up to R events of lookahead after it

A block is computed when its window is complete, or when the stream is closed. Every layer runs over
the window. Forward cells are stateful: their state after the block (not after the lookahead) is the
initial state of the next block. Backward cells start from zero at the window's right end. So the
outputs of a stream depend on its events only, neither on its chunks nor on their timing.

Events without outputs are pending: the state stores their rows, at most C+R-1. A stream whose last
event was announced is closed: no row is pending, and no event can follow.

Pure NumPy, no runtime. Invariant: at position P, an open stream has emitted `outputs_emitted_at(P)`
outputs, and all other events are pending.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from models.errors import StateError
from models.events.schema import Frozen
from models.spec.state import FloatArray, IntArray, State, StatePart, StateSpec

WAITING = "blocks.waiting"
COUNT = "blocks.count"
CLOSED = "blocks.closed"
"""State parts: float32 rows [C+R-1, F], of which the first `count` are pending (the others are
zero), and whether the stream is closed (0 or 1)."""


class BlockSpec(Frozen):
    """Size of the blocks and of their lookahead.

    Attributes:
        size: C, events per block.
        lookahead: R, events after a block that its outputs depend on.
    """

    size: Annotated[int, Field(ge=1, le=4096)]
    lookahead: Annotated[int, Field(ge=0, le=4096)]

    @model_validator(mode="after")
    def _require_context(self) -> BlockSpec:
        if self.window < 2:
            raise ValueError("expected blocks of two events or more, or a lookahead")
        return self

    @property
    def window(self) -> int:
        """C + R, the steps of one call of the network."""
        return self.size + self.lookahead

    def outputs_emitted_at(self, position: int) -> int:
        """Number of outputs that an open stream has emitted at a position."""
        return max(0, position - self.lookahead) // self.size * self.size


class BlockWindows(NamedTuple):
    """Windows to compute, and rows that stay pending.

    Attributes:
        windows: float32 [at most C+R, F], in order; shorter only at the end of a stream.
        waiting: float32 [less than C+R, F], the pending rows.
    """

    windows: list[FloatArray]
    waiting: FloatArray


def cut_blocks(blocks: BlockSpec, rows: FloatArray, *, final: bool) -> BlockWindows:
    """Cut rows [T, F] into windows.

    Args:
        rows: starting at the first event of a block.
        final: whether the stream ends with them.
    """
    size, window = blocks.size, blocks.window
    count = -(-len(rows) // size) if final else max(0, len(rows) - blocks.lookahead) // size
    windows = [rows[start : start + window] for start in range(0, count * size, size)]
    return BlockWindows(windows, rows[count * size :])


def block_parts(blocks: BlockSpec, features: int) -> list[StatePart]:
    """The state parts of the blocks, in addition to the network's, for rows of F features."""
    return [
        StatePart(WAITING, (blocks.window - 1, features), "float32"),
        StatePart(COUNT, (), "int64"),
        StatePart(CLOSED, (), "int64"),
    ]


class BlockStateLayout:
    """Reads and writes the block parts of a packed state.

    Args:
        layout: the complete state of the model; the network's float parts come first in it.
    """

    def __init__(self, blocks: BlockSpec, layout: StateSpec):
        self.blocks = blocks
        self._layout = layout
        self._rows = layout.slices[WAITING]
        self._count = layout.slices[COUNT].start
        self._closed = layout.slices[CLOSED].start
        self.network_size = self._rows.start
        """Number of packed floats that the network reads and writes."""

    def is_closed(self, state: State) -> bool:
        """Whether the stream has ended."""
        return bool(state.ints[self._closed])

    def pending_rows(self, state: State) -> FloatArray:
        """The pending rows, float32 [count, F]."""
        count = int(state.ints[self._count])
        rows = state.floats[self._rows].reshape(self.blocks.window - 1, -1)
        return rows[:count]

    def network_floats(self, state: State) -> FloatArray:
        """The packed floats of the network's parts."""
        return state.floats[: self.network_size]

    def pack(
        self, network: NDArray[np.float32], ints: IntArray, waiting: FloatArray, *, closed: bool
    ) -> State:
        """Pack a complete state.

        Args:
            network: float32, the packed floats of the network's parts.
            ints: int64 [M], from which the other int64 parts are copied.
            waiting: the pending rows, float32 [count, F].
        """
        floats = np.zeros(self._layout.float_size, np.float32)
        floats[: self.network_size] = network
        floats[self._rows.start : self._rows.start + waiting.size] = waiting.ravel()
        ints = ints.copy()
        ints[self._count], ints[self._closed] = len(waiting), closed
        return State(floats, ints)

    def check(self, state: State) -> None:
        """Validate the block parts of a state.

        Raises:
            StateError: naming the part.
        """
        count, closed = int(state.ints[self._count]), int(state.ints[self._closed])
        if closed not in (0, 1):
            raise StateError(f"part {CLOSED!r}: expected 0 or 1, got {closed}")
        maximum = 0 if closed else self.blocks.window - 1
        if not 0 <= count <= maximum:
            raise StateError(f"part {COUNT!r}: expected 0 to {maximum} pending rows, got {count}")

    def check_at(self, state: State, position: int) -> None:
        """Validate the block parts of a state at a position.

        Raises:
            StateError: naming the part; also if the number of pending rows does not match.
        """
        self.check(state)
        waiting = self.pending_rows(state)
        if not self.is_closed(state):
            expected = position - self.blocks.outputs_emitted_at(position)
            if len(waiting) != expected:
                raise StateError(
                    f"part {COUNT!r}: expected {expected} pending rows at position {position}, "
                    f"got {len(waiting)}"
                )
        if state.floats[self._rows.start + waiting.size : self._rows.stop].any():
            raise StateError(f"part {WAITING!r}: expected zeros after the pending rows")
