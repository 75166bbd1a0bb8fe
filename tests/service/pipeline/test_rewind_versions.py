"""Rewinds of streams that several versions of their model have answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.access.caller import ANYONE
from service.core.errors import PositionUnavailable
from service.core.values import Feed, StreamKey, Warmth
from service.pipeline import rewarm, rewind
from service.pipeline.history_run import advance_many
from service.pipeline.model_versions import Route
from service.pipeline.pipeline import Pipeline
from service.pipeline.rewind import available_positions
from service.pipeline.served_model import ServedModel
from service.store.codec import encode_state
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.pipelines import make_artifact, oracle_outputs, rows_of, send, worker

HISTORY = HistorySpec(events=8, snapshots=4)
KEY = StreamKey("probe", "s")
ROWS = rows_of(np.random.default_rng(7), 40)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """Two versions of the probe model."""
    folder: Path = tmp_path_factory.mktemp("versions")
    return make_artifact(folder, 1), make_artifact(folder, 2)


@pytest.fixture
async def pipeline(store_url: str, artifacts: tuple[Artifact, Artifact]) -> AsyncIterator[Pipeline]:
    """A service of the first version, which has loaded the second one."""
    old, new = artifacts
    async with worker(store_url, old, history=HISTORY) as running:
        running.versions["probe"].add(ServedModel(new, NumpyRuntime(new), None, HISTORY))
        yield running


def promote(pipeline: Pipeline) -> None:
    """Let the other version answer."""
    versions = pipeline.versions["probe"]
    champion = versions.route.champion
    [other] = [each for each in versions.loaded.values() if each is not champion]
    versions.route = Route(other, champion)


async def send_all(pipeline: Pipeline, *counts: int, position: int = 0) -> None:
    for count in counts:
        await send(pipeline, "s", ROWS[position : position + count], position)
        position += count


async def test_a_stream_is_rewound_to_before_the_version_changed(
    pipeline: Pipeline, artifacts: tuple[Artifact, Artifact]
) -> None:
    old = artifacts[0]
    await send_all(pipeline, 6, 6, 6)
    promote(pipeline)
    await send_all(pipeline, 2, position=18)
    rewound = await pipeline.streams.rewind(ANYONE, KEY, 12, None)
    assert (rewound.fingerprint, rewound.since) == (old.fingerprint, None)
    promote(pipeline)
    reply = await send(pipeline, "s", ROWS[12:16], 12)
    assert reply.warm is None
    np.testing.assert_allclose(
        reply.outputs, oracle_outputs(old, ROWS[:16])[12:], rtol=1e-5, atol=1e-5
    )


async def test_a_version_rewarms_a_rewound_stream_from_its_start(
    pipeline: Pipeline, artifacts: tuple[Artifact, Artifact]
) -> None:
    await send_all(pipeline, 3, 3)
    promote(pipeline)
    rewound = await pipeline.streams.rewind(ANYONE, KEY, 4, None)
    assert rewound.fingerprint == artifacts[1].fingerprint, "the one that answers"
    reply = await send(pipeline, "s", ROWS[4:7], 4)
    assert reply.warm is None
    np.testing.assert_allclose(
        reply.outputs, oracle_outputs(artifacts[1], ROWS[:7])[4:], rtol=1e-5, atol=1e-5
    )


async def test_a_rewound_state_stays_as_inexact_as_it_was(
    pipeline: Pipeline, artifacts: tuple[Artifact, Artifact]
) -> None:
    """The second version has not seen what the first one had before the stream was restored."""
    await pipeline.streams.restore(
        ANYONE,
        KEY,
        feed=Feed.INPUTS,
        position=10,
        fingerprint=artifacts[0].fingerprint,
        state=artifacts[0].state.initial(),
        precondition=None,
    )
    await send_all(pipeline, 1, position=10)
    promote(pipeline)
    for position in range(11, 15):
        reply = await send(pipeline, "s", ROWS[position : position + 1], position)
        assert reply.warm == Warmth(position - 10, 8)
    for position in (14, 13):
        rewound = await pipeline.streams.rewind(ANYONE, KEY, position, None)
        assert rewound.since == 10
    assert (await send(pipeline, "s", ROWS[13:14], 13)).warm == Warmth(3, 8)


async def test_states_that_a_shadow_computed_before_a_rewind_are_rejected_and_dropped(
    pipeline: Pipeline, artifacts: tuple[Artifact, Artifact]
) -> None:
    await send_all(pipeline, 4, 4)
    new, histories = artifacts[1], pipeline._store.histories
    current = await pipeline.streams.read(ANYONE, KEY)
    shadow = encode_state(
        current._replace(fingerprint=new.fingerprint, state=new.state.initial(), last=None)
    )
    assert await histories.commit_versions([KEY], [shadow]) == [True]
    assert (await histories.read(KEY, new.fingerprint)).version_state == shadow
    await pipeline.streams.rewind(ANYONE, KEY, 8, None)
    assert (await histories.read(KEY, new.fingerprint)).version_state is None
    assert await histories.commit_versions([KEY], [shadow]) == [False]


async def test_a_version_that_is_not_loaded_offers_nothing(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    old, new = artifacts
    async with worker(store_url, old, history=HISTORY) as pipeline:
        await send_all(pipeline, 6, 6, 6)
    async with worker(store_url, new, history=HISTORY) as pipeline:
        assert available_positions(await pipeline.streams.histories(ANYONE, KEY)) == []
        with pytest.raises(PositionUnavailable):
            await pipeline.streams.rewind(ANYONE, KEY, 18, None)


async def test_a_rewind_to_the_head_of_another_version_restores_the_own_state(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    """A fork has the state of the version that forked, and snapshots of the one before."""
    old, new = artifacts
    fork = StreamKey("probe", "fork")
    async with worker(store_url, old, history=HISTORY) as before:
        await send_all(before, 6, 6)
    async with worker(store_url, new, history=HISTORY) as after:
        forked = await after.streams.fork(ANYONE, KEY, "fork", None)
        assert forked.fingerprint == new.fingerprint
    async with worker(store_url, old, history=HISTORY) as before:
        rewound = await before.streams.rewind(ANYONE, fork, 12, None)
        assert rewound.fingerprint == old.fingerprint
        reply = await send(before, "fork", ROWS[12:16], 12)
    np.testing.assert_allclose(
        reply.outputs, oracle_outputs(old, ROWS[:16])[12:], rtol=1e-5, atol=1e-5
    )


async def test_states_are_computed_from_histories_one_at_a_time(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may read or rewind streams cannot keep the process from its chunks by many requests
    at once: each takes a slice of time for every turn of the chunks."""
    running = most = 0

    async def count(*arguments: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await advance_many(*arguments)
        finally:
            running -= 1

    for module in (rewarm, rewind):
        monkeypatch.setattr(module, "advance_many", count)
    await send_all(pipeline, *[1] * 8)
    champion, *others = pipeline.versions["probe"].loaded.values()
    reads = [
        pipeline.streams.read_state(ANYONE, KEY, None, version)
        for version in others * 8
        if version is not champion
    ]
    for name in ("a", "b", "c", "d"):
        await pipeline.streams.fork(ANYONE, KEY, name, None)
    rewinds = [pipeline.streams.rewind(ANYONE, StreamKey("probe", n), 5, None) for n in "abcd"]
    states = await asyncio.gather(*reads, *rewinds)
    assert [each.head.position for each in states] == [8] * 8 + [5] * 4
    assert most == 1
