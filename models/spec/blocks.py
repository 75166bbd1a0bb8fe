"""Blocks: how a bidirectional network follows a stream that has no end in sight.

Latency-controlled bidirectional networks: Zhang et al., "Highway long short-term memory RNNs for
distant speech recognition" (2016); Xue & Yan, "Improving latency-controlled BLSTM acoustic models
for online speech recognition" (2017). The stream is cut at absolute multiples of C events:

    block k    events kC .. kC + C-1, whose outputs are computed together
    window k   block k and the R events after it, as far as the stream goes

A block is computed when its window is whole, or the stream is at its end. Every layer runs over the
window. Forward cells are carried: their state after the block (not after the lookahead) is the
next block's. Backward cells begin from zero at the window's right end. So what a stream is answered
depends on its events alone, and neither on its chunks nor on when they came.

Events that are not computed yet wait in the state as rows, at most C+R-1 of them. A stream that
was told its end is closed: nothing waits any more and nothing can follow.

Pure NumPy, no runtime. Invariant: at position P a stream that is not closed has given
`outputs_emitted_at(P)` outputs, and the other events wait.
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
"""The parts of the state: float32 rows [C+R-1, F], of which the first `count` wait (the others are
zero), and whether the stream is closed (0 or 1)."""


class BlockSpec(Frozen):
    """Where a stream is cut.

    Attributes:
        size: C, events per block.
        lookahead: R, events after a block that its outputs have seen.
    """

    size: Annotated[int, Field(ge=1, le=4096)]
    lookahead: Annotated[int, Field(ge=0, le=4096)]

    @model_validator(mode="after")
    def _sees_something(self) -> BlockSpec:
        if self.window < 2:
            raise ValueError("expected blocks of two events or more, or a lookahead")
        return self

    @property
    def window(self) -> int:
        """C + R, the steps of one call."""
        return self.size + self.lookahead

    def outputs_emitted_at(self, position: int) -> int:
        """How many outputs a stream has given that consumed `position` events and is open."""
        return max(0, position - self.lookahead) // self.size * self.size


class BlockWindows(NamedTuple):
    """What the events that are known come to.

    Attributes:
        windows: float32 [at most C+R, F], whole but at a stream's end, in order.
        waiting: float32 [less than C+R, F], what is not computed yet.
    """

    windows: list[FloatArray]
    waiting: FloatArray


def cut_blocks(blocks: BlockSpec, rows: FloatArray, *, final: bool) -> BlockWindows:
    """Cut rows [T, F] that begin at a block; with `final` nothing follows them."""
    size, window = blocks.size, blocks.window
    count = -(-len(rows) // size) if final else max(0, len(rows) - blocks.lookahead) // size
    windows = [rows[start : start + window] for start in range(0, count * size, size)]
    return BlockWindows(windows, rows[count * size :])


def block_parts(blocks: BlockSpec, features: int) -> list[StatePart]:
    """The parts that a stream of F features per row has beside the network's."""
    return [
        StatePart(WAITING, (blocks.window - 1, features), "float32"),
        StatePart(COUNT, (), "int64"),
        StatePart(CLOSED, (), "int64"),
    ]


class BlockStateLayout:
    """Reads and writes those parts of a packed state.

    Args:
        layout: the model's whole state; the network's own float parts come first in it.
    """

    def __init__(self, blocks: BlockSpec, layout: StateSpec):
        self.blocks = blocks
        self._layout = layout
        self._rows = layout.slices[WAITING]
        self._count = layout.slices[COUNT].start
        self._closed = layout.slices[CLOSED].start
        self.network_size = self._rows.start
        """Values of the packed row that the network reads and writes."""

    def is_closed(self, state: State) -> bool:
        """Whether the stream is at its end."""
        return bool(state.ints[self._closed])

    def pending_rows(self, state: State) -> FloatArray:
        """The rows that wait, float32 [count, F]."""
        count = int(state.ints[self._count])
        rows = state.floats[self._rows].reshape(self.blocks.window - 1, -1)
        return rows[:count]

    def network_floats(self, state: State) -> FloatArray:
        """The network's own parts, packed."""
        return state.floats[: self.network_size]

    def pack(
        self, network: NDArray[np.float32], ints: IntArray, waiting: FloatArray, *, closed: bool
    ) -> State:
        """The whole state.

        Args:
            network: float32, the network's own parts.
            ints: int64 [M], of which the parts of other kinds are taken.
            waiting: float32 [count, F].
        """
        floats = np.zeros(self._layout.float_size, np.float32)
        floats[: self.network_size] = network
        floats[self._rows.start : self._rows.start + waiting.size] = waiting.ravel()
        ints = ints.copy()
        ints[self._count], ints[self._closed] = len(waiting), closed
        return State(floats, ints)

    def check(self, state: State) -> None:
        """Refuse what no stream can hold.

        Raises:
            StateError: naming the part.
        """
        count, closed = int(state.ints[self._count]), int(state.ints[self._closed])
        if closed not in (0, 1):
            raise StateError(f"part {CLOSED!r}: expected 0 or 1, got {closed}")
        most = 0 if closed else self.blocks.window - 1
        if not 0 <= count <= most:
            raise StateError(f"part {COUNT!r}: expected 0 to {most} rows that wait, got {count}")

    def check_at(self, state: State, position: int) -> None:
        """As `check`, for a stream that is to begin at a position.

        Raises:
            StateError: naming the part; also where other rows wait than at that position.
        """
        self.check(state)
        waiting = self.pending_rows(state)
        if not self.is_closed(state):
            expected = position - self.blocks.outputs_emitted_at(position)
            if len(waiting) != expected:
                raise StateError(
                    f"part {COUNT!r}: expected {expected} rows that wait at position {position}, "
                    f"got {len(waiting)}"
                )
        if state.floats[self._rows.start + waiting.size : self._rows.stop].any():
            raise StateError(f"part {WAITING!r}: expected zeros beyond the rows that wait")
