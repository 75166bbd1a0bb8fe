"""Where a worker computes, and how a batch is laid out for its runtime.

Rows of different lengths are padded to the runtime's shape; what is longer than the runtime's
longest call goes in slices from the state of the slice before (a chunk that its model sees as a
whole is never longer: `ServedModel.check_length`). Between slices other batches take their turn.
Padding rows carry zeros and length 1, and their results are dropped.

A call that is known to be short runs on the event loop itself: handing it to a thread and back
costs as much as the call. Anything else runs in the one compute thread. Never both at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, NamedTuple, TypeVar

import numpy as np

from service.core.values import FloatRows
from service.engine.runtimes.base import FloatBatch, Lengths, Runtime

T = TypeVar("T")
OnCall = Callable[[int, int, int, float], None]
"""Told of each runtime call: rows, real steps, padded steps, seconds."""

MAX_INLINE_S: Final = 0.002
"""Longest call on the event loop, in seconds; how long it may keep everything else waiting."""

MIN_YIELD_S: Final = 0.001
"""Least rest of a long chunk between two slices where others compute too; the loop's timers count
in milliseconds."""

_SMOOTHING: Final = 0.2


class InferenceResult(NamedTuple):
    """What a batch came to.

    Attributes:
        outputs: B arrays float32 [T_b, O].
        states: float32 [B, N], after each row's last step.
        finite: every number of both is finite. False says that some number is not, which may
            lie in the padding.
    """

    outputs: list[FloatRows]
    states: FloatRows
    finite: bool


class TimeSlicer:
    """Lets others compute between the calls of a long piece of work.

    Two long pieces take turns by themselves; rests are for those who need one call and have to come
    by it.

    Args:
        calls: how many calls there have been outside of long pieces.
    """

    def __init__(self, calls: Callable[[], int]):
        self._calls = calls
        self._seen, self._began_s = calls(), time.monotonic()

    async def yield_to_others(self) -> None:
        """Between two calls of the work."""
        # A call on the loop did not let others have it, and a chunk of theirs has several turns of
        # the loop to take: where there are others, it would meet a call of this work in each.
        with_others, self._seen = self._calls() > self._seen, self._calls()
        rest_s = max(MIN_YIELD_S, time.monotonic() - self._began_s)
        await asyncio.sleep(rest_s if with_others else 0)
        self._began_s = time.monotonic()


class Compute:
    """Runs runtime calls one after another."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="carry-compute")
        self._in_thread = 0
        self._seconds: dict[tuple[int, int], float] = {}
        self._calls = 0

    async def run(self, call: Callable[[], T]) -> T:
        """Run one call in the thread."""
        self._in_thread += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        finally:
            self._in_thread -= 1

    async def infer(
        self,
        runtime: Runtime,
        rows: Sequence[FloatRows],
        states: FloatRows,
        on_call: OnCall,
        *,
        is_slice: bool = False,
    ) -> InferenceResult:
        """Step a batch through its rows.

        Args:
            rows: B arrays, float32 [T_b, F], T_b >= 1 and different.
            states: float32 [B, N]; not changed.
            is_slice: it is one call of a long piece of work, whose `TimeSlicer` the caller has.
        """
        longest = max(map(len, rows))
        if longest <= runtime.max_steps:
            self._calls += not is_slice
            return await self._step(runtime, rows, states, on_call)
        most = runtime.max_steps
        slices = [[row[at : at + most] for at in range(0, len(row), most)] for row in rows]
        return await self.infer_slices(runtime, slices, states, on_call)

    async def infer_slices(
        self,
        runtime: Runtime,
        slices: Sequence[Sequence[FloatRows]],
        states: FloatRows,
        on_call: OnCall,
    ) -> InferenceResult:
        """Step a batch through the slices of each row, one after another.

        Args:
            slices: of each row one or more, float32 [t, F]; each goes on from the state that
                the one before it left.
            states: float32 [B, N]; not changed.
        """
        states = states.copy()
        parts: list[list[FloatRows]] = [[] for _ in slices]
        finite = True
        calls = max(map(len, slices))
        self._calls += calls == 1
        slicer = self.time_slicer()
        for turn in range(calls):
            if turn:
                await slicer.yield_to_others()
            members = [index for index, found in enumerate(slices) if len(found) > turn]
            present = [slices[index][turn] for index in members]
            stepped = await self._step(runtime, present, states[members], on_call)
            states[members] = stepped.states
            finite = finite and stepped.finite
            for member, output in zip(members, stepped.outputs, strict=True):
                parts[member].append(output)
        return InferenceResult([np.concatenate(part) for part in parts], states, finite)

    async def _step(
        self, runtime: Runtime, rows: Sequence[FloatRows], states: FloatRows, on_call: OnCall
    ) -> InferenceResult:
        """One call of the runtime."""
        lengths = [len(row) for row in rows]
        steps = max(lengths)
        padded_rows, padded_steps = runtime.padded_shape(len(rows), steps)
        padded = padded_rows * padded_steps
        call = partial(_call, runtime, rows, lengths, states, padded_rows, padded_steps)
        # Calls of about the same size take about the same time.
        size = (id(runtime), padded.bit_length())
        expected_s = self._seconds.get(size, MAX_INLINE_S)
        if expected_s < MAX_INLINE_S and not self._in_thread:
            inferred, seconds = call()
        else:
            inferred, seconds = await self.run(call)
        before_s = self._seconds.get(size, seconds)
        # One call during which the machine did something else says little.
        self._seconds[size] = before_s + _SMOOTHING * (min(seconds, 2 * before_s) - before_s)
        on_call(len(rows), sum(lengths), padded, seconds)
        return inferred

    def time_slicer(self) -> TimeSlicer:
        """For a piece of work of many calls, as it begins."""
        return TimeSlicer(lambda: self._calls)

    def close(self) -> None:
        """Finish the running call and end the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _call(
    runtime: Runtime,
    rows: Sequence[FloatRows],
    lengths: Sequence[int],
    states: FloatRows,
    padded_rows: int,
    padded_steps: int,
) -> tuple[InferenceResult, float]:
    began_s = time.monotonic()
    batch, padded_lengths = _laid_out(rows, lengths, padded_rows, padded_steps)
    if padded_rows > len(rows):
        given = states
        states = np.zeros((padded_rows, given.shape[1]), np.float32)
        states[: len(given)] = given
    outputs, stepped = runtime.step(batch, padded_lengths, states)
    finite = bool(np.isfinite(outputs).all() and np.isfinite(stepped).all())
    parts = [outputs[index, :length] for index, length in enumerate(lengths)]
    return InferenceResult(parts, stepped[: len(rows)], finite), time.monotonic() - began_s


def _laid_out(
    rows: Sequence[FloatRows], lengths: Sequence[int], padded_rows: int, padded_steps: int
) -> tuple[FloatBatch, Lengths]:
    """The rows as one array [B, T, F], zeros beyond each length, and the lengths [B]."""
    features = rows[0].shape[1]
    if padded_rows == len(rows) and padded_steps == min(lengths):
        batch = np.concatenate(rows).reshape(padded_rows, padded_steps, features)
    else:
        batch = np.zeros((padded_rows, padded_steps, features), np.float32)
        for row, length, place in zip(rows, lengths, batch, strict=False):
            place[:length] = row
    padded_lengths = np.ones(padded_rows, np.int32)
    padded_lengths[: len(lengths)] = lengths
    return batch, padded_lengths
