"""Runs the network on batches: padding, time slicing, and the choice of thread.

Rows of different lengths are padded to the runtime's shape; padding rows carry zeros and length 1,
and their results are dropped. Rows longer than the runtime's longest call are computed in slices,
each from the state that the slice before it returned, and other batches run between two slices. (A
chunk that its model sees as a whole is never longer: `ServedModel.check_length`.)

A call that is known to be short runs inline on the event loop, since handing it to a thread and
back costs as much as the call. Any other call runs in the one compute thread. Never both at once.

A watchdog terminates calls that take too long (`Runtime.terminate_call`): a call on the event loop
after `INLINE_LIMIT_S`, which then runs again in the thread; a call in the thread after the
inference timeout, with `InferenceTimeout`.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import msgspec
import numpy as np

from service.core.errors import InferenceTimeout
from service.core.values import FloatRows
from service.engine.runtimes.base import FloatBatch, Lengths, Runtime

T = TypeVar("T")
Call = tuple[Runtime, Sequence[FloatRows], Sequence[int], FloatRows, int, int]
"""Runtime, rows, lengths, states, padded rows and padded steps of one call."""
OnCall = Callable[[int, int, int, float], None]
"""Called after each runtime call with rows, steps, padded steps and seconds."""

MAX_INLINE_S: Final = 0.002
"""Longest inline call, in seconds: how long the event loop may be blocked."""

INLINE_LIMIT_S: Final = 0.5
"""An inline call that takes this long, although calls of its size were short, is terminated. Longer
than the pauses of a busy machine."""

WATCH_S: Final = 0.1
"""How often the watchdog looks at the running call."""

MIN_YIELD_S: Final = 0.001
"""Shortest pause between two slices while other batches compute; the event loop's timers have a
resolution of a millisecond."""

_SMOOTHING: Final = 0.2
"""Weight of the newest call in the moving average of call times."""


class InferenceResult(msgspec.Struct, frozen=True, gc=False):
    """The results of a batch.

    Attributes:
        outputs: B arrays float32 [T_b, O].
        states: float32 [B, W] as for `Runtime.step`, after each row's last step.
        finite: whether all numbers of both are finite. If not, a number that is not finite may
            also be in the padding.
    """

    outputs: list[FloatRows]
    states: FloatRows
    finite: bool


class TimeSlicer:
    """Time slicing: lets other batches compute between the calls of a long computation.

    Long computations alternate by themselves. The pauses are for short computations, of one call,
    which would otherwise wait for a slice at each of their stages.

    Args:
        calls: returns the number of calls so far of short computations.
    """

    def __init__(self, calls: Callable[[], int]):
        self._calls = calls
        self._seen, self._began_s = calls(), time.monotonic()

    async def yield_to_others(self) -> None:
        """Pause between two calls, as long as the last slice took if others compute too."""
        # An inline call blocks the event loop, and a chunk needs several turns of the loop: without
        # a pause, it would wait for a slice of this computation in each of them.
        with_others, self._seen = self._calls() > self._seen, self._calls()
        pause_s = max(MIN_YIELD_S, time.monotonic() - self._began_s)
        await asyncio.sleep(pause_s if with_others else 0)
        self._began_s = time.monotonic()


class Compute:
    """Runs the runtime calls of a worker, one at a time.

    Args:
        inference_timeout_s: longest call in the thread.
    """

    def __init__(self, inference_timeout_s: float = math.inf) -> None:
        self._inference_timeout_s = inference_timeout_s
        self._running: tuple[Any, ...] | None = None
        """The arguments of the running call; the first one is its runtime."""
        self._watchdog = threading.Thread(target=self._watch, name="carry-watchdog", daemon=True)
        self._closed = threading.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="carry-compute")
        self._in_thread = 0
        self._seconds: dict[tuple[int, int], float] = {}
        self._calls = 0

    async def run(self, call: Callable[[], T]) -> T:
        """Run one call in the compute thread."""
        loop = asyncio.get_running_loop()
        if self._watchdog.ident is None:  # before any inline call: the first of a size runs here
            self._watchdog.start()
        future = self._executor.submit(call)
        self._in_thread += 1
        try:
            return await asyncio.wrap_future(future)
        finally:
            if future.done():
                self._note_call_ended()
            else:
                # the caller was cancelled, but its call continues in the thread
                future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._note_call_ended))

    def _note_call_ended(self) -> None:
        self._in_thread -= 1

    async def warm(self, runtime: Runtime) -> None:
        """Warm a runtime up in the compute thread."""
        await self.run(partial(self._warm, runtime))

    def _warm(self, runtime: Runtime) -> None:
        self._running = (runtime,)
        try:
            runtime.warm()
        finally:
            self._running = None

    def _watch(self) -> None:
        """Terminate the running call when it takes too long; runs in the watchdog's thread."""
        watched, since_s = self._running, time.monotonic()
        while not self._closed.wait(WATCH_S):
            now_s = time.monotonic()
            if self._running is not watched:
                watched, since_s = self._running, now_s
            limit_s = self._inference_timeout_s if self._in_thread else INLINE_LIMIT_S
            if watched is not None and now_s - since_s > limit_s:
                watched[0].terminate_call()
                since_s = now_s  # it may run again, in the thread

    def infer(
        self,
        runtime: Runtime,
        rows: Sequence[FloatRows],
        states: FloatRows,
        on_call: OnCall,
        *,
        is_slice: bool = False,
    ) -> Awaitable[InferenceResult]:
        """Run the network on a batch; await the result.

        Args:
            rows: B arrays, float32 [T_b, F], T_b >= 1, of different lengths.
            states: float32 [B, W]; not modified.
            is_slice: whether this is one slice of a long computation with a `TimeSlicer`.
        """
        longest = max(map(len, rows))
        if longest <= runtime.max_steps:
            self._calls += not is_slice
            return self._step(runtime, rows, states, on_call)
        most = runtime.max_steps
        slices = [[row[at : at + most] for at in range(0, len(row), most)] for row in rows]
        return self.infer_slices(runtime, slices, states, on_call, is_slice=is_slice)

    async def infer_slices(
        self,
        runtime: Runtime,
        slices: Sequence[Sequence[FloatRows]],
        states: FloatRows,
        on_call: OnCall,
        *,
        is_slice: bool = False,
    ) -> InferenceResult:
        """Run the network on the slices of each row, one after another.

        Args:
            slices: one or more of each row, float32 [t, F]; each continues from the state after
                the one before it.
            states: float32 [B, W]; not modified.
            is_slice: as in `infer`.
        """
        states = states.copy()
        parts: list[list[FloatRows]] = [[] for _ in slices]
        finite = True
        calls = max(map(len, slices))
        self._calls += calls == 1 and not is_slice
        slicer = self.time_slicer()
        for turn in range(calls):
            if turn:
                await slicer.yield_to_others()
            active = [index for index, parts_of in enumerate(slices) if len(parts_of) > turn]
            current = [slices[index][turn] for index in active]
            stepped = await self._step(runtime, current, states[active], on_call)
            states[active] = stepped.states
            finite = finite and stepped.finite
            for index, output in zip(active, stepped.outputs, strict=True):
                parts[index].append(output)
        return InferenceResult([np.concatenate(part) for part in parts], states, finite)

    async def _step(
        self, runtime: Runtime, rows: Sequence[FloatRows], states: FloatRows, on_call: OnCall
    ) -> InferenceResult:
        """Make one call of the runtime."""
        lengths = [len(row) for row in rows]
        steps = max(lengths)
        padded_rows, padded_steps = runtime.padded_shape(len(rows), steps)
        padded = padded_rows * padded_steps
        call = runtime, rows, lengths, states, padded_rows, padded_steps
        # calls of about the same size take about the same time
        size = (id(runtime), padded.bit_length())
        expected_s = self._seconds.get(size, MAX_INLINE_S)
        if expected_s < MAX_INLINE_S and not self._in_thread:
            try:
                inferred, seconds = self._call(call)
            except InferenceTimeout:
                self._seconds[size] = INLINE_LIMIT_S
                inferred, seconds = await self.run(partial(self._call, call))
        else:
            inferred, seconds = await self.run(partial(self._call, call))
        before_s = self._seconds.get(size, seconds)
        # not capped: after one slow call, the next ones of its size run in the thread
        self._seconds[size] = before_s + _SMOOTHING * (seconds - before_s)
        on_call(len(rows), sum(lengths), padded, seconds)
        return inferred

    def _call(self, call: Call) -> tuple[InferenceResult, float]:
        """Make one call of the runtime in this thread; returns its results and its duration."""
        began_s = time.monotonic()
        self._running = call
        try:
            runtime, rows, lengths, states, padded_rows, padded_steps = call
            batch, padded_lengths = _pad(rows, lengths, padded_rows, padded_steps)
            if padded_rows > len(rows):
                unpadded = states
                states = np.zeros((padded_rows, unpadded.shape[1]), np.float32)
                states[: len(unpadded)] = unpadded
            outputs, stepped = runtime.step(batch, padded_lengths, states)
        finally:
            self._running = None
        finite = _is_finite(outputs) and _is_finite(stepped)
        parts = [outputs[index, :length] for index, length in enumerate(lengths)]
        return InferenceResult(parts, stepped[: len(rows)], finite), time.monotonic() - began_s

    def time_slicer(self) -> TimeSlicer:
        """The slicer of a computation of many calls; take it when the computation starts."""
        return TimeSlicer(lambda: self._calls)

    def close(self) -> None:
        """Terminate the running call and stop the threads."""
        if (call := self._running) is not None:
            call[0].terminate_call()
        self._closed.set()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _is_finite(values: FloatRows | FloatBatch) -> bool:
    """Whether every number is finite."""
    # for a few hundred numbers cheaper than a dot product, or `all`, which NumPy wraps in Python
    return b"\0" not in np.isfinite(values).tobytes()


def _pad(
    rows: Sequence[FloatRows], lengths: Sequence[int], padded_rows: int, padded_steps: int
) -> tuple[FloatBatch, Lengths]:
    """Pad rows to one array [B, T, F], with zeros beyond each length, and lengths [B]."""
    features = rows[0].shape[1]
    if padded_rows == len(rows) and padded_steps == min(lengths):
        whole = rows[0] if len(rows) == 1 else np.concatenate(rows)
        return whole.reshape(padded_rows, padded_steps, features), np.array(lengths, np.int32)
    batch = np.zeros((padded_rows, padded_steps, features), np.float32)
    for row, length, place in zip(rows, lengths, batch, strict=False):
        place[:length] = row
    padded_lengths = np.ones(padded_rows, np.int32)
    padded_lengths[: len(lengths)] = lengths
    return batch, padded_lengths
