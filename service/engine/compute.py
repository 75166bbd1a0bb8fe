"""The one compute thread of a worker, and how a batch is laid out for it.

Rows of different lengths are padded to the runtime's shape; what is longer than the runtime's
longest call goes in slices from the state of the slice before. Between slices other batches
take their turn, since each call queues for the thread again. Padding rows carry zeros and
length 1, and their results are dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from service.domain import FloatRows
from service.engine.protocol import Runtime

T = TypeVar("T")
OnCall = Callable[[int, int, int, float], None]
"""Told of each runtime call: rows, real steps, padded steps, seconds."""


class ComputeThread:
    """Runs runtime calls one after another off the event loop."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="carry-compute")

    async def run(self, call: Callable[[], T]) -> T:
        """Run one call in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def infer(
        self,
        runtime: Runtime,
        rows: Sequence[FloatRows],
        states: FloatRows,
        on_call: OnCall,
    ) -> tuple[list[FloatRows], FloatRows]:
        """Step a batch through its rows.

        Args:
            rows: B arrays, float32 [T_b, F], T_b >= 1 and different.
            states: float32 [B, N].

        Returns:
            B arrays float32 [T_b, O], and the states after the last row, float32 [B, N].
        """
        states = states.copy()
        parts: list[list[FloatRows]] = [[] for _ in rows]
        longest = max(len(row) for row in rows)
        for start in range(0, longest, runtime.max_steps):
            members = [index for index, row in enumerate(rows) if len(row) > start]
            slices = [rows[index][start : start + runtime.max_steps] for index in members]
            outputs, stepped, seconds = await self.run(
                lambda slices=slices, members=members: _call(  # type: ignore[misc]
                    runtime, slices, states[members]
                )
            )
            states[members] = stepped[: len(members)]
            real = 0
            for member, piece, output in zip(members, slices, outputs, strict=False):
                parts[member].append(output[: len(piece)])
                real += len(piece)
            on_call(len(members), real, outputs.shape[0] * outputs.shape[1], seconds)
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts], states

    def close(self) -> None:
        """Finish the running call and end the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _call(
    runtime: Runtime, slices: Sequence[FloatRows], states: FloatRows
) -> tuple[FloatRows, FloatRows, float]:
    began_s = time.monotonic()
    steps = max(len(piece) for piece in slices)
    padded_rows, padded_steps = runtime.padded_shape(len(slices), steps)
    features = slices[0].shape[1]
    batch = np.zeros((padded_rows, padded_steps, features), np.float32)
    lengths = np.ones(padded_rows, np.int32)
    for index, piece in enumerate(slices):
        batch[index, : len(piece)] = piece
        lengths[index] = len(piece)
    padded_states = np.zeros((padded_rows, states.shape[1]), np.float32)
    padded_states[: len(slices)] = states
    outputs, stepped = runtime.step(batch, lengths, padded_states)
    return outputs, stepped, time.monotonic() - began_s
