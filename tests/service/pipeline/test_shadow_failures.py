"""Challengers that raise, return NaN, are slow or promoted while they are behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.core.errors import InferenceTimeout
from service.engine.runtimes.base import FloatBatch, Lengths
from service.pipeline.shadow_budget import ShadowBudget
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.pipelines import (
    make_artifact,
    oracle_outputs,
    rows_of,
)
from tests.support.servers import becomes
from tests.support.shadows import (
    Rows,
    Unruly,
    assert_state,
    shadowed,
    unruly,
)


class Timed(NumpyRuntime):
    """A runtime that knows how long its calls took, and may fail at their end."""

    seconds = 0.0
    fails = False

    def step(self, rows: FloatBatch, lengths: Lengths, states: Rows) -> tuple[FloatBatch, Rows]:
        began_s = time.monotonic()
        try:
            result = super().step(rows, lengths, states)
            if self.fails:
                raise ValueError("planted")
            return result
        finally:
            self.seconds += time.monotonic() - began_s


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """Champion and challenger."""
    folder: Path = tmp_path_factory.mktemp("shadow")
    return make_artifact(folder, seed=1), make_artifact(folder, seed=2)


@pytest.mark.parametrize("failure", ["raises", "times out", "gives NaN"])
async def test_failing_challenger_fails_nothing_and_catches_up(
    store_url: str, artifacts: tuple[Artifact, Artifact], failure: str
) -> None:
    rows = rows_of(np.random.default_rng(8), 20)

    def fail() -> None:
        if failure == "raises":
            raise ValueError("unruly")
        raise InferenceTimeout("unruly")

    async with shadowed(store_url, artifacts, runtime=Unruly) as service:
        await service.send("s", rows[:6], 0)
        await service.settled()
        if failure == "gives NaN":
            unruly(service).factor = np.nan
        else:
            unruly(service).before = fail
        outputs = await service.send("s", rows[6:9], 6)
        expected = oracle_outputs(artifacts[0], rows)[6:9]
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
        assert await service.settled() == {"computed": 1, "dropped": 0, "failed": 1}
        assert_state(await service.state("s", service.challenger), artifacts[1], rows[:6])
        unruly(service).factor, unruly(service).before = 1.0, lambda: None
        await service.send("s", rows[9:], 9)
        assert await service.settled() == {"computed": 2, "dropped": 0, "failed": 1}
        assert_state(await service.state("s", service.challenger), artifacts[1], rows)


async def test_challenger_pays_for_failed_calls_and_for_catching_up(
    store_url: str, artifacts: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(np.random.default_rng(16), 31)
    spent_s = 0.0
    spend = ShadowBudget.spend

    def note(budget: ShadowBudget, seconds: float) -> None:
        nonlocal spent_s
        spent_s += seconds
        spend(budget, seconds)

    monkeypatch.setattr(ShadowBudget, "spend", note)
    async with shadowed(store_url, artifacts, runtime=Timed) as service:
        runtime = service.challenger.runtime
        assert isinstance(runtime, Timed)
        await service.send("s", rows[:1], 0)
        await service.settled()
        runtime.fails = True
        await service.send("s", rows[1:30], 1)
        assert (await service.settled())["failed"] == 1
        assert spent_s >= runtime.seconds > 0
        runtime.fails = False
        spent_s, runtime.seconds = 0.0, 0.0
        await service.send("s", rows[30:], 30)
        assert (await service.settled())["computed"] == 2
        assert sum(each.caught_up for each in service.counts.shadows) == 29
        assert spent_s >= runtime.seconds > 0


async def test_slow_challenger_holds_up_no_chunk_and_may_be_retired_meanwhile(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    rows = rows_of(np.random.default_rng(9), 20)
    began, may_end = threading.Event(), threading.Event()

    def block() -> None:
        began.set()
        assert may_end.wait(60)

    async with shadowed(store_url, artifacts, runtime=Unruly) as service:
        try:
            unruly(service).before = block
            await service.send("s", rows[:4], 0)
            await becomes(began.is_set, "the challenger's call")
            for at in range(4, 16, 4):
                await service.send("s", rows[at : at + 4], at)
            assert sum(service.done().values()) == 0
            service.route(service.champion, None)
            await service.send("s", rows[16:], 16)
        finally:
            may_end.set()
    assert service.done()["computed"] == 0
    async with shadowed(store_url, artifacts) as again:
        assert await again.state("s", again.challenger) is None


async def test_chunks_that_wait_across_a_promotion_bring_the_states_to_the_head(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    """The challenger is behind when it is promoted; what it has yet to compute is not lost."""
    rows = rows_of(np.random.default_rng(10), 16)
    began, may_end = threading.Event(), threading.Event()

    def block() -> None:
        began.set()
        assert may_end.wait(60)

    async with shadowed(store_url, artifacts, runtime=Unruly) as service:
        try:
            unruly(service).before = block
            await service.send("s", rows[:4], 0)
            await becomes(began.is_set, "the challenger's call")
            await service.send("s", rows[4:8], 4)
            service.route(service.challenger, service.champion)
        finally:
            unruly(service).before = lambda: None
            may_end.set()
        assert await service.settled() == {"computed": 2, "dropped": 0, "failed": 0}
        assert_state(await service.state("s", service.challenger), artifacts[1], rows[:8])
        outputs = await service.send("s", rows[8:], 8)
        expected = oracle_outputs(artifacts[1], rows)[8:]
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
