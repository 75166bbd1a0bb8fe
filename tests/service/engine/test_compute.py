"""Inference calls: time slicing, inline or in the thread, one at a time, terminated if too long."""

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
from tests.support.servers import becomes

SLICES = 20


class Summing:
    """A runtime whose state is the sum of its rows; calls take no time.

    Attributes:
        waits: steps of the calls that end once `released` is set, or they are terminated.
        spoils: the number of a call, from 1, with another output.
        rows: of each call.
        threads: of each call: whether it ran in the compute thread.
    """

    max_batch, max_steps = 8, 4

    def __init__(self, waits: int = 0, spoils: int = 0, output: float = np.inf) -> None:
        self.waits, self.spoils, self.output = waits, spoils, output
        self.rows: list[int] = []
        self.threads: list[bool] = []
        self.running, self.most_running = 0, 0
        self.began, self.released = threading.Event(), threading.Event()
        self.is_terminated = False

    def padded_shape(self, rows: int, steps: int) -> tuple[int, int]:
        return rows, steps

    def step(self, rows: Any, lengths: Any, states: Any) -> Any:
        self.threads.append(threading.current_thread().name.startswith("carry-compute"))
        self.rows.append(len(rows))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if rows.shape[1] == self.waits:
            self.began.set()
            self.released.wait()
        self.running -= 1
        if self.is_terminated:
            self.is_terminated = False
            self.released.clear()
            raise InferenceTimeout("ended")
        sums = states[:, None, :] + np.cumsum(rows, axis=1)
        after = sums[np.arange(len(rows)), np.asarray(lengths) - 1]
        if len(self.rows) == self.spoils:
            sums[0, 0] = self.output
        return sums, after

    def warm(self) -> None:
        self.step(*inputs(self.waits)[:1], [self.waits], np.zeros((1, 1)))

    def terminate_call(self) -> None:
        self.is_terminated = True
        self.released.set()


def inputs(steps: int, count: int = 1) -> tuple[Any, Any]:
    rows = [np.ones((steps, 1), np.float32) for _ in range(count)]
    return np.array(rows), np.zeros((count, 1), np.float32)


async def infer(compute: Compute, runtime: Any, steps: int, count: int = 1) -> Any:
    return await compute.infer(runtime, *inputs(steps, count), lambda *_: None)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Durations of the sleeps of the module under test; other modules sleep as usual."""
    durations: list[float] = []

    class Noting:
        async def sleep(self, seconds: float) -> None:
            durations.append(seconds)
            await asyncio.sleep(0)

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

    monkeypatch.setattr(module, "asyncio", Noting())
    return durations


@pytest.fixture
def compute() -> Any:
    compute = Compute()
    yield compute
    compute.close()


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 1, 3], [2, 3, 2]])
async def test_padding_is_cut_from_the_results(
    compute: Compute, monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    runtime = Summing()
    monkeypatch.setattr(runtime, "padded_shape", lambda rows, steps: (8, 4))
    rows = [np.full((length, 1), at + 1, np.float32) for at, length in enumerate(lengths)]
    states = np.zeros((len(rows), 1), np.float32)
    result = await compute.infer(runtime, rows, states, lambda *_: None)  # type: ignore[arg-type]
    sums = [np.cumsum(row, axis=0).tolist() for row in rows]
    assert [each.tolist() for each in result.outputs] == sums
    assert result.states.tolist() == [each[-1] for each in sums]


async def test_lone_long_chunk_never_pauses(compute: Compute, sleeps: list[float]) -> None:
    rows, states = inputs(4 * SLICES)
    result = await compute.infer(Summing(), rows, states, lambda *_: None)  # type: ignore[arg-type]
    assert result.finite
    assert result.outputs[0][:, 0].tolist() == list(range(1, 4 * SLICES + 1))
    assert result.states.tolist() == [[4 * SLICES]]
    assert not states.any(), "what it was given is not written to"
    assert sleeps == [0] * (SLICES - 1)


async def test_two_long_chunks_alternate_without_pauses(
    compute: Compute, sleeps: list[float]
) -> None:
    runtime = Summing()
    await infer(compute, runtime, 4)
    await asyncio.gather(
        infer(compute, runtime, 4 * SLICES), infer(compute, runtime, 4 * SLICES, count=2)
    )
    assert sleeps == [0] * 2 * (SLICES - 1)
    assert runtime.rows[1:9] == [1, 2] * 4


@pytest.mark.parametrize("are_slices", [False, True])
async def test_long_chunk_pauses_between_slices_if_others_compute(
    compute: Compute, sleeps: list[float], are_slices: bool
) -> None:
    """Also if the rows of the others come as slices, of one call."""
    runtime = Summing()
    # the first call of a size is timed in the thread; all others run on the loop
    await infer(compute, runtime, 4)
    await infer(compute, runtime, 2)
    runtime.rows.clear()
    long = asyncio.create_task(infer(compute, runtime, 4 * SLICES))
    rows, states = inputs(2, count=2)
    while not long.done():
        if are_slices:
            slices = [[row] for row in rows]
            await compute.infer_slices(runtime, slices, states, lambda *_: None)  # type: ignore[arg-type]
        else:
            await infer(compute, runtime, 2, count=2)
        await asyncio.sleep(0)
    assert (await long).states.tolist() == [[4 * SLICES]]
    assert runtime.rows.count(1) == SLICES
    pauses = [seconds for seconds in sleeps if seconds >= module.MIN_YIELD_S]
    assert len(pauses) >= SLICES - 3, "it pauses as soon as others compute too"


async def test_a_call_whose_caller_is_cancelled_runs_alone_to_its_end() -> None:
    compute, runtime = Compute(), Summing(waits=4)
    # the first call of a size is timed in the thread; this size runs on the loop from now on
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


@pytest.mark.parametrize("call", [1, 2, SLICES])
async def test_non_finite_outputs_are_detected_in_every_slice(compute: Compute, call: int) -> None:
    result = await infer(compute, Summing(spoils=call), 4 * SLICES)
    assert not result.finite
    assert not np.isfinite(result.outputs[0]).all()
    assert np.isfinite(result.states).all()


async def test_non_finite_states_are_detected(compute: Compute) -> None:
    rows, states = inputs(1)
    runtime: Any = Summing(spoils=1, output=0.0)
    states[0, 0] = np.inf
    assert not (await compute.infer(runtime, rows, states, lambda *_: None)).finite


async def test_finite_outputs_whose_squares_overflow_are_accepted_without_a_warning(
    compute: Compute,
) -> None:
    assert (await infer(compute, Summing(spoils=1, output=1e30), 1)).finite


async def test_a_call_in_the_thread_is_terminated_after_the_timeout(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of steps that were not measured never run on the event loop; others run on."""
    runtime: Any = Summing(waits=3)
    for _ in range(2):
        await infer(compute, runtime, 2)
    # from now on every call in the thread is one that does not end
    monkeypatch.setattr(compute, "_inference_timeout_s", 0.01)
    for _ in range(2):
        with pytest.raises(InferenceTimeout):
            await infer(compute, runtime, 3)
        assert (await infer(compute, runtime, 2)).states.tolist() == [[2]]
    assert runtime.threads == [True, False, True, False, True, False]
    with pytest.raises(InferenceTimeout):
        await compute.warm(runtime)


async def test_a_call_that_begins_after_the_timeout_is_terminated_too(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is late on a busy machine."""
    timeout_s = 0.01
    monkeypatch.setattr(compute, "_inference_timeout_s", timeout_s)
    runtime, is_free = Summing(waits=4), threading.Event()
    compute._executor.submit(is_free.wait)
    call = asyncio.create_task(infer(compute, runtime, 4))
    await becomes(compute._thread.locked, "the call")
    asyncio.get_running_loop().call_later(2 * timeout_s, is_free.set)
    _, running = await asyncio.wait({call}, timeout=60)
    assert not running
    with pytest.raises(InferenceTimeout):
        await call


async def test_close_terminates_the_running_call() -> None:
    compute, runtime = Compute(), Summing(waits=4)
    call = asyncio.create_task(infer(compute, runtime, 4))
    await asyncio.to_thread(runtime.began.wait)
    compute.close()
    with pytest.raises(InferenceTimeout):
        await call


@pytest.mark.parametrize(
    ("threads", "elapsed_s", "used_s", "in_thread"),
    [
        pytest.param(1, 0.05, 0.05, True, id="slow"),
        pytest.param(1, 0.05, 0.001, False, id="while the machine does something else"),
        # the CPU time of one of several threads would say little of the call
        pytest.param(2, 0.05, 0.001, True, id="slow in several threads"),
    ],
)
async def test_after_a_slow_call_a_few_of_its_size_run_in_the_thread(
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    elapsed_s: float,
    used_s: float,
    in_thread: bool,
) -> None:
    now = {"monotonic": 0.0, "thread_time": 0.0}
    clocks = {name: lambda name=name: now[name] for name in now}
    monkeypatch.setattr(module, "time", SimpleNamespace(**clocks))
    compute, runtime = Compute(threads=threads), Summing()
    step = runtime.step

    def slow(*arguments: Any) -> Any:
        if len(runtime.rows) == 2:
            now["monotonic"] += elapsed_s
            now["thread_time"] += used_s
        return step(*arguments)

    monkeypatch.setattr(runtime, "step", slow)
    for _ in range(13):
        await infer(compute, runtime, 2)
    assert runtime.threads[:6] == [True, False, False, *[in_thread] * 3]
    assert not runtime.threads[-1], "and back on the event loop, once they are fast again"
    compute.close()


async def test_no_runtime_is_taken_for_a_former_one(compute: Compute) -> None:
    """The first call is in the thread, where it can be terminated, also if the runtime is at the
    address of one that was closed."""
    for _ in range(100):
        runtime = Summing()
        await infer(compute, runtime, 3)
        assert runtime.threads == [True]
