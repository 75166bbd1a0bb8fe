"""Runs the network on batches: padding, time slicing, and the choice of thread.

Rows of different lengths are padded to the runtime's shape; padding rows carry zeros and length 1,
and their results are dropped. Rows longer than the runtime's longest call are computed in slices,
each from the state that the slice before it returned, and other batches run between two slices. (A
chunk that its model sees as a whole is never longer: `ServedModel.check_length`.)

A call that is known to be short runs inline on the event loop, since handing it to a thread and
back costs as much as the call. Any other call runs in the one compute thread. Never both at once.

A timer terminates a call in the thread that takes too long, with `InferenceTimeout`. An inline call
needs no timer: its work depends on shapes alone, and earlier calls of its steps were short.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar
from weakref import WeakKeyDictionary

import msgspec
import numpy as np

from service.core.values import FloatRows
from service.engine.runtimes.base import FloatBatch, Lengths, Runtime

T = TypeVar("T")
OnCall = Callable[[int, int, int, float], None]
"""Called after each runtime call with rows, steps, padded steps and seconds."""

MAX_INLINE_S: Final = 0.002
"""Longest inline call, in seconds: how long the event loop may be blocked."""

MIN_YIELD_S: Final = 0.001
"""Shortest pause between two slices while other batches compute; the event loop's timers have a
resolution of a millisecond."""

SMOOTHING: Final = 0.2
"""Weight of the newest call in the moving average of call times."""


def ignore_call(rows: int, steps: int, padded_steps: int, seconds: float) -> None:
    """The `OnCall` that records nothing."""


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
    """

    def __init__(self, compute: Compute):
        self._compute = compute
        self._seen, self._began_s = compute.short_calls, time.monotonic()

    async def yield_to_others(self) -> None:
        """Pause between two calls, as long as the last slice took if others compute too."""
        # An inline call blocks the event loop, and a chunk needs several turns of the loop: without
        # a pause, it would wait for a slice of this computation in each of them.
        calls = self._compute.short_calls
        with_others, self._seen = calls > self._seen, calls
        pause_s = max(MIN_YIELD_S, time.monotonic() - self._began_s)
        await asyncio.sleep(pause_s if with_others else 0)
        self._began_s = time.monotonic()

    async def yield_if_long(self) -> None:
        """Pause if the event loop has been blocked for about as long as an inline call may."""
        if time.monotonic() - self._began_s > MAX_INLINE_S:
            await self.yield_to_others()


class Compute:
    """Runs the runtime calls of a worker, one at a time.

    Args:
        inference_timeout_s: longest call in the thread.
        threads: threads inside one call, as for `open_runtimes`.

    Attributes:
        short_calls: number of calls of short computations so far, for `TimeSlicer`.
    """

    def __init__(self, inference_timeout_s: float = 3600.0, *, threads: int = 1) -> None:
        self._inference_timeout_s = inference_timeout_s
        # The CPU time of a call leaves out what else the machine does meanwhile, the event loop
        # while the call is in the thread included. A thread has no clock for the others' work.
        self._clock = time.thread_time if threads == 1 else time.monotonic
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="carry-compute")
        self._thread = asyncio.Lock()
        """Locked while a call is in the thread."""
        self._running: Runtime | None = None
        """The runtime of the call in the thread."""
        # weak, since another runtime may get the address of one that is unloaded
        self._expected_s: WeakKeyDictionary[Runtime, dict[tuple[int, int], float]]
        self._expected_s = WeakKeyDictionary()
        self.short_calls = 0

    async def _run_in_thread(self, runtime: Runtime, call: Callable[[], T]) -> T:
        """Run one call of a runtime in the compute thread."""
        timer: asyncio.TimerHandle

        def run() -> T:
            self._running = runtime
            try:
                return call()
            finally:
                self._running = None

        def time_out() -> None:
            nonlocal timer
            self._terminate_call()
            # once more: the thread may begin the call only now
            timer = loop.call_later(self._inference_timeout_s, time_out)

        def end() -> None:
            timer.cancel()
            self._thread.release()

        await self._thread.acquire()
        loop = asyncio.get_running_loop()
        future = self._executor.submit(run)
        timer = loop.call_later(self._inference_timeout_s, time_out)
        try:
            return await asyncio.wrap_future(future)
        finally:
            if future.done():
                end()
            else:
                # the caller was cancelled, but its call continues in the thread
                future.add_done_callback(lambda _: loop.call_soon_threadsafe(end))

    def _terminate_call(self) -> None:
        """Terminate the call in the thread, if it has not ended meanwhile."""
        if (runtime := self._running) is not None:
            runtime.terminate_call()

    async def warm(self, runtime: Runtime) -> None:
        """Warm a runtime up in the compute thread."""
        await self._run_in_thread(runtime, runtime.warm)

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
        if len(rows) > runtime.max_batch:
            return self._infer_groups(runtime, rows, states, on_call, is_slice)
        max_steps = runtime.max_steps
        if max(map(len, rows)) <= max_steps:
            self.short_calls += not is_slice
            return self._step(runtime, rows, states, on_call)
        slices = [
            [row[at : at + max_steps] for at in range(0, len(row), max_steps)] for row in rows
        ]
        return self.infer_slices(runtime, slices, states, on_call, is_slice=is_slice)

    async def _infer_groups(
        self,
        runtime: Runtime,
        rows: Sequence[FloatRows],
        states: FloatRows,
        on_call: OnCall,
        is_slice: bool,
    ) -> InferenceResult:
        """Run more rows than the runtime takes: batches are made for the champion's, and the
        runtime of another version may take fewer."""
        most = runtime.max_batch
        groups = [
            await self.infer(
                runtime, rows[at : at + most], states[at : at + most], on_call, is_slice=is_slice
            )
            for at in range(0, len(rows), most)
        ]
        return InferenceResult(
            [output for group in groups for output in group.outputs],
            np.concatenate([group.states for group in groups]),
            all(group.finite for group in groups),
        )

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
        self.short_calls += calls == 1 and not is_slice
        slicer = TimeSlicer(self)
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
        padded_rows, padded_steps = shape = runtime.padded_shape(len(rows), max(lengths))
        call = partial(_call, self._clock, runtime, rows, lengths, states, shape)
        # calls of the same steps, and of about as many rows, take about the same time
        size = padded_rows.bit_length(), padded_steps
        expected = self._expected_s.get(runtime)
        if expected is None:
            expected = self._expected_s[runtime] = {}
        if expected.get(size, MAX_INLINE_S) < MAX_INLINE_S and not self._thread.locked():
            result, elapsed_s, clock_s = call()
        else:
            result, elapsed_s, clock_s = await self._run_in_thread(runtime, call)
        before_s = expected.get(size, clock_s)
        expected[size] = before_s + SMOOTHING * (clock_s - before_s)
        on_call(len(rows), sum(lengths), padded_rows * padded_steps, elapsed_s)
        return result

    def close(self) -> None:
        """Terminate the running call and stop the thread."""
        self._terminate_call()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _call(
    clock: Callable[[], float],
    runtime: Runtime,
    rows: Sequence[FloatRows],
    lengths: Sequence[int],
    states: FloatRows,
    shape: tuple[int, int],
) -> tuple[InferenceResult, float, float]:
    """Call a runtime with rows that are padded to a shape, and drop the results of the padding.

    Returns:
        The results, and how long the call took: elapsed, and by the clock of `Compute`.
    """
    began_s, clock_began_s = time.monotonic(), clock()
    batch, padded_lengths = _pad(rows, lengths, *shape)
    if padding := len(batch) - len(rows):
        states = np.concatenate([states, np.zeros((padding, states.shape[1]), np.float32)])
    outputs, stepped = runtime.step(batch, padded_lengths, states)
    # for a few hundred numbers cheaper than a dot product, or `all`, which NumPy wraps in Python
    is_finite = b"\0" not in np.isfinite(outputs).tobytes() + np.isfinite(stepped).tobytes()
    if min(lengths) == outputs.shape[1]:
        parts = list(outputs[: len(rows)])
    else:
        parts = [outputs[index, :length] for index, length in enumerate(lengths)]
    result = InferenceResult(parts, stepped[: len(rows)], is_finite)
    return result, time.monotonic() - began_s, clock() - clock_began_s


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
