"""Streams whose state another model version wrote: rejected, or reset."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE
from service.core.errors import (
    EpochMismatch,
    PositionAhead,
    StateChanged,
    StateIncompatible,
    StreamNotFound,
)
from service.core.values import Precondition, StreamKey
from tests.support.pipelines import chunk_of, make_artifact, oracle_outputs, rows_of, send, worker

KEY = StreamKey("probe", "s")


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    folder: Path = tmp_path_factory.mktemp("versions")
    return make_artifact(folder, seed=1), make_artifact(folder, seed=2)


async def test_stream_of_another_version_is_rejected_and_unchanged(
    store_url: str, versions: tuple[Artifact, Artifact]
) -> None:
    old, new = versions
    rows = rows_of(np.random.default_rng(15), 8)
    async with worker(store_url, old) as before, worker(store_url, new) as after:
        await send(before, "s", rows[:4], 0)
        with pytest.raises(StateIncompatible) as caught:
            await send(after, "s", rows[4:], 4)
        assert caught.value.facts["position"] == 4
        with pytest.raises(EpochMismatch):
            await send(after, "s", rows[4:], 4, epoch=bytes(8))
        await send(before, "s", rows[4:], 4)


async def test_reset_stream_starts_over_at_position_0_only(
    store_url: str, versions: tuple[Artifact, Artifact]
) -> None:
    old, new = versions
    rows = rows_of(np.random.default_rng(50), 12)
    async with (
        worker(store_url, old) as before,
        worker(store_url, new, on_model_change="reset") as after,
    ):
        first = await send(before, "s", rows[:4], 0)
        with pytest.raises(PositionAhead) as caught:
            await send(after, "s", rows[4:8], 4)
        assert caught.value.facts["expected"] == 0
        with pytest.raises(EpochMismatch):
            await send(after, "s", rows[:4], 0, epoch=first.head.epoch)
        chunk = replace(chunk_of("s", rows[:4], 0), precondition=Precondition((first.head.etag,)))
        with pytest.raises(StateChanged):
            await after.process(ANYONE, chunk)
        # The very chunk that was the old version's last one is no replay.
        assert (await before.streams.read(ANYONE, KEY)).head == first.head
        reset = await send(after, "s", rows[:4], 0)
        assert (reset.replayed, reset.created) == (False, True)
        assert reset.head.epoch != first.head.epoch
        rest = await send(after, "s", rows[4:], 4)
        np.testing.assert_allclose(
            np.concatenate([reset.outputs, rest.outputs]),
            oracle_outputs(new, rows),
            rtol=1e-5,
            atol=1e-5,
        )
        again = await send(after, "s", rows[4:], 4)
        assert again.replayed
        # The other way it is rejected: that service does not reset.
        with pytest.raises(StateIncompatible):
            await send(before, "s", rows[:4])


async def test_concurrent_resets_reset_the_stream_once(
    store_url: str, versions: tuple[Artifact, Artifact]
) -> None:
    """Sixteen appends at two workers: all in one epoch, and each applied."""
    old, new = versions
    random = np.random.default_rng(51)
    async with worker(store_url, old) as before:
        await send(before, "s", rows_of(random, 3), 0)
    async with (
        worker(store_url, new, on_model_change="reset") as one,
        worker(store_url, new, on_model_change="reset") as two,
    ):
        replies = await asyncio.gather(
            *(send(each, "s", rows_of(random, 2)) for each in (one, two) * 8)
        )
        assert sorted(reply.head.position for reply in replies) == list(range(2, 34, 2))
        assert len({reply.head.epoch for reply in replies}) == 1
        assert [reply.created for reply in replies].count(True) == 1


async def test_stream_of_another_version_is_not_forked(
    store_url: str, versions: tuple[Artifact, Artifact]
) -> None:
    old, new = versions
    rows = rows_of(np.random.default_rng(54), 4)
    copy = StreamKey("probe", "copy")
    async with worker(store_url, old) as before, worker(store_url, new) as after:
        await send(before, "s", rows, 0)
        with pytest.raises(StateIncompatible) as caught:
            await after.streams.fork(ANYONE, KEY, "copy", None)
        assert caught.value.facts["stream"] == "s"
        with pytest.raises(StreamNotFound):
            await after.streams.read(ANYONE, copy)
        assert (await before.streams.fork(ANYONE, KEY, "copy", None)).head.position == 4
