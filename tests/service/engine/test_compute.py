"""Time slicing of long chunks: the same outputs, and other batches run between slices.

And calls that take too long: they are ended, and the event loop runs on.
"""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.core.errors import InferenceTimeout
from service.engine import compute as module
from service.engine.compute import Compute

SLICES = 20


class Summing:
    """A runtime whose state is the sum of its rows; calls take no time."""

    max_batch, max_steps = 8, 4

    def __init__(self) -> None:
        self.rows: list[int] = []

    def padded_shape(self, rows: int, steps: int) -> tuple[int, int]:
        return rows, steps

    def step(self, rows: Any, lengths: Any, states: Any) -> Any:
        self.rows.append(len(rows))
        sums = states[:, None, :] + np.cumsum(rows, axis=1)
        ends = np.asarray(lengths) - 1
        return sums, sums[np.arange(len(rows)), ends]

    def terminate_call(self) -> None:
        """Do nothing, as TensorFlow."""


def inputs(steps: int, count: int = 1) -> tuple[list[Any], Any]:
    rows = [np.ones((steps, 1), np.float32) for _ in range(count)]
    return rows, np.zeros((count, 1), np.float32)


async def infer(compute: Compute, runtime: Any, steps: int, count: int = 1) -> Any:
    return await compute.infer(runtime, *inputs(steps, count), lambda *_: None)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Durations of the sleeps of the module under test; other modules sleep as usual."""
    found: list[float] = []

    class Noting:
        async def sleep(self, seconds: float) -> None:
            found.append(seconds)
            await asyncio.sleep(0)

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

    monkeypatch.setattr(module, "asyncio", Noting())
    return found


async def test_lone_long_chunk_never_pauses(sleeps: list[float]) -> None:
    compute, runtime = Compute(), Summing()
    inferred = await infer(compute, runtime, 4 * SLICES)
    outputs, states, finite = inferred.outputs, inferred.states, inferred.finite
    compute.close()
    assert finite
    assert outputs[0][:, 0].tolist() == list(range(1, 4 * SLICES + 1))
    assert states.tolist() == [[4 * SLICES]]
    assert sleeps == [0] * (SLICES - 1)


async def test_two_long_chunks_alternate_without_pauses(sleeps: list[float]) -> None:
    compute, runtime = Compute(), Summing()
    await infer(compute, runtime, 4)
    await asyncio.gather(
        infer(compute, runtime, 4 * SLICES), infer(compute, runtime, 4 * SLICES, count=2)
    )
    compute.close()
    assert sleeps == [0] * 2 * (SLICES - 1)
    assert runtime.rows[1:9] == [1, 2] * 4


async def test_single_call_slices_count_as_other_work(sleeps: list[float]) -> None:
    """A batch whose rows have one slice each is one call, like a batch of short rows."""
    compute, runtime = Compute(), Summing()
    await infer(compute, runtime, 4)
    rows, states = inputs(4)
    long = asyncio.create_task(infer(compute, runtime, 4 * SLICES))
    while not long.done():
        await compute.infer_slices(runtime, [rows], states, lambda *_: None)
        await asyncio.sleep(0)
    compute.close()
    assert any(seconds >= module.MIN_YIELD_S for seconds in sleeps)


async def test_long_chunk_pauses_between_slices_if_others_compute(sleeps: list[float]) -> None:
    compute, runtime = Compute(), Summing()
    # The first call of a size is timed in the thread; all others run on the loop.
    await infer(compute, runtime, 4)
    await infer(compute, runtime, 2)
    runtime.rows.clear()
    long = asyncio.create_task(infer(compute, runtime, 4 * SLICES))
    while not long.done():
        await infer(compute, runtime, 2, count=2)
        await asyncio.sleep(0)
    compute.close()
    assert (await long).states.tolist() == [[4 * SLICES]]
    assert runtime.rows.count(1) == SLICES
    own = [seconds for seconds in sleeps if seconds >= module.MIN_YIELD_S]
    assert len(own) >= SLICES - 3, "it pauses as soon as others compute too"


class Blocking(Summing):
    """A runtime whose calls of `steps` steps end once `released` is set."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps
        self.running, self.most_running = 0, 0
        self.began, self.released = threading.Event(), threading.Event()

    def step(self, rows: Any, lengths: Any, states: Any) -> Any:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if rows.shape[1] == self._steps:
            self.began.set()
            self.released.wait()
        self.running -= 1
        return super().step(rows, lengths, states)


async def test_a_call_whose_caller_is_cancelled_runs_alone_to_its_end() -> None:
    compute, runtime = Compute(), Blocking(steps=4)
    # The first call of a size is timed in the thread; this size runs on the loop from now on.
    await infer(compute, runtime, 1)
    cancelled = asyncio.create_task(infer(compute, runtime, 4))
    await asyncio.to_thread(runtime.began.wait)
    cancelled.cancel()
    await asyncio.wait({cancelled})
    other = asyncio.create_task(infer(compute, runtime, 1))
    await asyncio.sleep(0)
    runtime.released.set()
    assert (await other).states.tolist() == [[1]]
    compute.close()
    assert runtime.most_running == 1


class Overflowing(Summing):
    """A runtime with one other output in one call, by default one that is not finite."""

    def __init__(self, call: int, output: float = np.inf) -> None:
        super().__init__()
        self._call, self._output = call, output

    def step(self, rows: Any, lengths: Any, states: Any) -> Any:
        outputs, after = super().step(rows, lengths, states)
        if len(self.rows) == self._call:
            outputs[0, 0] = self._output
        return outputs, after


@pytest.mark.parametrize("call", [1, 2, SLICES])
async def test_non_finite_outputs_are_detected_in_every_slice(call: int) -> None:
    compute = Compute()
    inferred = await infer(compute, Overflowing(call), 4 * SLICES)
    outputs, states, finite = inferred.outputs, inferred.states, inferred.finite
    compute.close()
    assert not finite
    assert not np.isfinite(outputs[0]).all()
    assert np.isfinite(states).all()


async def test_finite_outputs_whose_squares_overflow_are_accepted_without_a_warning() -> None:
    compute = Compute()
    inferred = await infer(compute, Overflowing(1, 1e30), 1)
    compute.close()
    assert inferred.finite


class Hanging(Summing):
    """A runtime whose calls of `steps` steps end only when they are terminated."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps
        self.threads: list[str] = []
        self.began, self._ended = threading.Event(), threading.Event()

    def step(self, rows: Any, lengths: Any, states: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        if rows.shape[1] == self._steps:
            self.began.set()
            self._ended.wait()
            self._ended.clear()
            raise InferenceTimeout("ended")
        return super().step(rows, lengths, states)

    def warm(self) -> None:
        self.step(np.zeros((1, self._steps, 1)), None, None)

    def terminate_call(self) -> None:
        self._ended.set()


async def test_a_call_in_the_thread_is_terminated_after_the_timeout() -> None:
    compute, runtime = Compute(0.05), Hanging(steps=4)
    for _ in range(2):
        with pytest.raises(InferenceTimeout):
            await infer(compute, runtime, 4)
        assert (await infer(compute, runtime, 3)).states.tolist() == [[3]], "others run on"
    compute.close()


async def test_steps_that_were_not_measured_never_run_on_the_event_loop() -> None:
    compute, runtime = Compute(0.05), Hanging(steps=3)
    for _ in range(2):
        await infer(compute, runtime, 2)
    for _ in range(2):
        with pytest.raises(InferenceTimeout):
            await infer(compute, runtime, 3)
    await infer(compute, runtime, 2)
    names = [name.startswith("carry-compute") for name in runtime.threads]
    assert names == [True, False, True, True, False]
    compute.close()


async def test_a_warm_up_is_terminated_after_the_timeout() -> None:
    compute = Compute(0.05)
    with pytest.raises(InferenceTimeout):
        await compute.warm(Hanging(steps=4))  # type: ignore[arg-type]
    compute.close()


async def test_close_terminates_the_running_call() -> None:
    compute, runtime = Compute(), Hanging(steps=4)
    call = asyncio.create_task(infer(compute, runtime, 4))
    await asyncio.to_thread(runtime.began.wait)
    compute.close()
    with pytest.raises(InferenceTimeout):
        await call


class Pausing(Hanging):
    """A runtime whose next call takes as long as its test says, in all and of CPU time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(steps=0)
        self.takes_s = 0.0, 0.0
        self._now_s = self._used_s = 0.0
        clocks = {"monotonic": lambda: self._now_s, "thread_time": lambda: self._used_s}
        monkeypatch.setattr(module, "time", SimpleNamespace(**clocks))

    def step(self, rows: Any, lengths: Any, states: Any) -> Any:
        elapsed_s, used_s = self.takes_s
        self._now_s += elapsed_s
        self._used_s += used_s
        return super().step(rows, lengths, states)


@pytest.mark.parametrize(("threads", "used_s"), [(1, 0.05), (2, 0.0)])
async def test_after_one_slow_call_a_few_of_its_size_run_in_the_thread(
    monkeypatch: pytest.MonkeyPatch, threads: int, used_s: float
) -> None:
    """The CPU time of one of several threads would say little of the call."""
    runtime = Pausing(monkeypatch)
    compute = Compute(threads=threads)
    fast = 0.0, 0.0
    for runtime.takes_s in (fast, fast, (0.05, used_s), *[fast] * 10):
        await infer(compute, runtime, 2)
    names = [name.startswith("carry-compute") for name in runtime.threads]
    assert names[:4] == [True, False, False, True]
    assert not names[-1], "and back on the event loop, once they are fast again"
    compute.close()


async def test_calls_stay_on_the_event_loop_while_the_machine_does_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Pausing(monkeypatch)
    compute = Compute()
    for runtime.takes_s in [(0.05, 0.001)] * 10:
        await infer(compute, runtime, 2)
    assert [name.startswith("carry-compute") for name in runtime.threads] == [True, *[False] * 9]
    compute.close()
