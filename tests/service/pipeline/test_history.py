"""Histories that the pipeline keeps: events as they came, and snapshots of the state."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.access.caller import ANYONE
from service.core.values import Reply, StreamKey
from service.pipeline.pipeline import Pipeline
from service.store.base import decode_stream
from service.store.history import StoredHistory
from service.store.history_codec import HistoryCodec, HistoryEntry
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.oracle import oracle_step
from tests.support.pipelines import chunk_of, rows_of, send, worker

HISTORY = HistorySpec(events=20, snapshots=4)


def new_store(url: str) -> RedisStore:
    return RedisStore(StoreSettings(url, store_wait_s=60))


async def read(
    store: RedisStore, artifact: Artifact, stream: str, position: int | None = None
) -> tuple[StoredHistory, list[HistoryEntry]]:
    """The history of a stream, and its entries decoded."""
    found = await store.histories.read(StreamKey("probe", stream), artifact.fingerprint, position)
    codec = HistoryCodec(None, artifact.spec.input_features)
    return found, [codec.decode(each) for each in found.entries]


def rows_in(entries: Sequence[HistoryEntry]) -> np.ndarray:
    return np.concatenate([each.steps.rows for each in entries if each.steps.rows is not None])


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
async def test_two_workers_keep_the_last_events_and_states_that_the_oracle_had(
    store_url: str, artifact: Artifact, cache_bytes: int
) -> None:
    random, store = np.random.default_rng(4), new_store(store_url)
    streams = {f"s{i}": rows_of(random, 70) for i in range(6)}

    async def feed(workers: Sequence[Pipeline], name: str) -> Reply:
        position, turn, sizes = 0, 0, np.random.default_rng(len(name))
        while position < 70:
            stop = min(70, position + int(sizes.integers(1, 30)))
            chunk = streams[name][position:stop]
            position, turn = stop, turn + 1
            reply = await send(workers[turn % 2], name, chunk, position - len(chunk))
        return reply

    async with (
        worker(store_url, artifact, store=store, history=HISTORY, cache_bytes=cache_bytes) as one,
        worker(store_url, artifact, history=HISTORY, cache_bytes=cache_bytes) as two,
    ):
        await asyncio.gather(*(feed([one, two], name) for name in streams))
        for name, rows in streams.items():
            found, entries = await read(store, artifact, name, 70)
            assert found.is_valid
            kept = rows_in(entries)
            assert len(kept) >= HISTORY.events
            np.testing.assert_array_equal(kept, rows[-len(kept) :])
            for position in found.positions:
                value = (await read(store, artifact, name, position))[0].snapshot
                assert value is not None
                stream = decode_stream(value)
                assert stream.head.position == position
                zero = artifact.state.zero().floats
                after = oracle_step(artifact.spec, artifact.weights, rows[:position], zero)[1]
                np.testing.assert_allclose(stream.state.floats, after, rtol=1e-5, atol=1e-5)


async def test_resets_are_kept_with_the_events(store_url: str, artifact: Artifact) -> None:
    store = new_store(store_url)
    chunk = chunk_of("a", rows_of(np.random.default_rng(1), 30), 0)
    async with worker(store_url, artifact, store=store, history=HISTORY) as pipeline:
        steps = replace(chunk.steps, resets=(2, 12, 29))
        await pipeline.process(ANYONE, replace(chunk, steps=steps))
        _, (entry,) = await read(store, artifact, "a")
        assert (entry.start, entry.stop, entry.steps.resets) == (10, 30, (2, 19))


async def test_only_applied_chunks_are_kept(store_url: str, artifact: Artifact) -> None:
    """Neither dry runs nor retries; a stream that starts over starts its history."""
    random, store = np.random.default_rng(1), new_store(store_url)
    async with worker(store_url, artifact, store=store, history=HISTORY) as pipeline:
        chunk = chunk_of("a", rows_of(random, 3), 0)
        following = chunk_of("a", rows_of(random, 2), 3)
        for each in (chunk, chunk, replace(following, dry_run=True), following):
            await pipeline.process(ANYONE, each)
        _, entries = await read(store, artifact, "a")
        assert [(each.start, each.stop, each.starts) for each in entries] == [
            (0, 3, True),
            (3, 5, False),
        ]
        await pipeline.process(ANYONE, replace(chunk_of("a", rows_of(random, 1)), starts_over=True))
        _, entries = await read(store, artifact, "a")
        assert [(each.start, each.stop, each.starts) for each in entries] == [(0, 1, True)]


async def test_a_final_chunk_is_marked(store_url: str, artifact: Artifact) -> None:
    random, store = np.random.default_rng(1), new_store(store_url)
    async with worker(store_url, artifact, store=store, history=HISTORY) as pipeline:
        await send(pipeline, "a", rows_of(random, 3), 0)
        await pipeline.process(ANYONE, replace(chunk_of("a", rows_of(random, 3), 3), final=True))
        _, entries = await read(store, artifact, "a")
        assert [each.final for each in entries] == [False, True]


async def test_a_fork_of_a_stream_that_moves_on_is_read_again(
    store_url: str, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, store, copied = np.random.default_rng(1), new_store(store_url), []
    copy = store.histories.copy
    async with worker(store_url, artifact, store=store, history=HISTORY) as pipeline:
        await send(pipeline, "a", rows_of(random, 3), 0)

        async def copy_late(*arguments: Any) -> Any:
            if not copied:
                await send(pipeline, "a", rows_of(random, 3), 3)
            copied.append(await copy(*arguments))
            return copied[-1]

        monkeypatch.setattr(store.histories, "copy", copy_late)
        fork = await pipeline.streams.fork(ANYONE, StreamKey("probe", "a"), "b", None)
        assert (fork.head.position, len(copied)) == (6, 2)
        found, entries = await read(store, artifact, "b")
        assert found.is_valid
        assert entries[-1].stop == 6


async def test_a_worker_without_history_ends_it(store_url: str, artifact: Artifact) -> None:
    random, store = np.random.default_rng(1), new_store(store_url)
    async with (
        worker(store_url, artifact, store=store, history=HISTORY) as keeps,
        worker(store_url, artifact) as keeps_not,
    ):
        for position, pipeline in enumerate((keeps, keeps, keeps_not)):
            await send(pipeline, "a", rows_of(random, 1), position)
        assert not (await read(store, artifact, "a"))[0].is_valid
        await send(keeps, "a", rows_of(random, 1), 3)
        found, entries = await read(store, artifact, "a", 3)
        assert [(each.start, each.starts) for each in entries] == [(3, False)]
        assert found.snapshot is not None
        assert decode_stream(found.snapshot).head.position == 3


async def test_a_fork_and_a_restored_stream_have_histories(
    store_url: str, artifact: Artifact
) -> None:
    random, store = np.random.default_rng(1), new_store(store_url)
    async with worker(store_url, artifact, store=store, history=HISTORY) as pipeline:
        for position in range(0, 30, 3):
            await send(pipeline, "a", rows_of(random, 3), position)
        source, _ = await read(store, artifact, "a", 30)
        await pipeline.streams.fork(ANYONE, StreamKey("probe", "a"), "b", None)
        found, _ = await read(store, artifact, "b", 30)
        assert found.is_valid
        assert (found.entries, found.positions) == (source.entries, source.positions)
        assert found.snapshot == source.snapshot
        await send(pipeline, "b", rows_of(random, 2), 30)
        _, entries = await read(store, artifact, "b")
        assert [(each.start, each.stop) for each in entries[-2:]] == [(27, 30), (30, 32)]
        state = await pipeline.streams.read_state(ANYONE, StreamKey("probe", "a"))
        await pipeline.streams.restore(
            ANYONE,
            StreamKey("probe", "c"),
            feed=state.feed,
            position=7,
            fingerprint=state.fingerprint,
            state=state.state,
            precondition=None,
        )
        found, entries = await read(store, artifact, "c", 7)
        assert (entries, found.positions) == ([], [7])
        assert found.snapshot == found.record
