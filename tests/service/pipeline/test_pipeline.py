"""The pipeline on a real store: exact outputs under any chunking and batching, exactly-once."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.spec.model import ModelSpec
from models.spec.state import State
from service.access.caller import ANYONE
from service.core.errors import (
    CarryError,
    InternalError,
    PositionAhead,
    StoreRefused,
    StreamNotFound,
)
from service.core.values import Reply, Steps, StreamKey
from service.engine.policy import MIN_SPLIT_REQUESTS
from service.pipeline import predict
from service.pipeline.pipeline import Pipeline
from service.pipeline.served_model import ServedModel
from service.store.base import CommitColumns, CommitResult, Conflicted
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.pipelines import (
    Counts,
    oracle_outputs,
    rows_of,
    send,
    sequence_of,
    worker,
)
from tests.support.streams import rows as commit_rows


def cut(
    random: np.random.Generator, rows: NDArray[np.float32], longest: int
) -> list[NDArray[np.float32]]:
    pieces = []
    while len(rows):
        size = int(random.integers(1, longest + 1))
        pieces.append(rows[:size])
        rows = rows[size:]
    return pieces


async def feed(
    pipelines: list[Pipeline], stream: str, pieces: list[NDArray[np.float32]]
) -> list[Reply]:
    """Send a stream's pieces one after another, two at a time through each worker."""
    replies, position = [], 0
    for index, piece in enumerate(pieces):
        pipeline = pipelines[index // 2 % len(pipelines)]
        replies.append(await send(pipeline, stream, piece, position))
        position += len(piece)
    return replies


def assert_close(got: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
async def test_chunking_batching_and_workers_do_not_change_outputs(
    store_url: str, artifact: Artifact, cache_bytes: int
) -> None:
    random = np.random.default_rng(3)
    counts = Counts()
    streams = {f"s{i}": rows_of(random, int(random.integers(20, 60))) for i in range(12)}
    async with (
        worker(store_url, artifact, counts, cache_bytes=cache_bytes) as one,
        worker(store_url, artifact, counts, cache_bytes=cache_bytes) as two,
    ):
        replies = await asyncio.gather(
            *(feed([one, two], name, cut(random, rows, 24)) for name, rows in streams.items())
        )
    assert counts.largest_batch > 1
    assert (counts.seen["hits"] > 0) == (cache_bytes > 0)
    for (name, rows), parts in zip(streams.items(), replies, strict=True):
        assert_close(
            np.concatenate([part.outputs for part in parts]), oracle_outputs(artifact, rows)
        )
        assert parts[-1].head.position == len(rows), name


async def test_duplicates_at_two_workers_are_applied_once(
    store_url: str, artifact: Artifact
) -> None:
    random = np.random.default_rng(7)
    counts = Counts()
    names = [f"twice{i}" for i in range(10)]
    async with (
        worker(store_url, artifact, counts) as one,
        worker(store_url, artifact, counts) as two,
    ):
        position = 0
        for _ in range(5):
            piece = rows_of(random, 4)
            answers = await asyncio.gather(
                *(
                    send(pipeline, name, piece, position)
                    for name in names
                    for pipeline in (one, two, one)
                )
            )
            position += 4
            for index in range(0, len(answers), 3):
                three = answers[index : index + 3]
                assert sorted(reply.replayed for reply in three) == [False, True, True]
                assert len({reply.head for reply in three}) == 1
                for reply in three:
                    np.testing.assert_array_equal(reply.outputs, three[0].outputs)
    assert counts.seen["chunks"] == 50
    assert counts.seen["replays"] == 100


async def test_sixteen_concurrent_appends_are_all_applied(
    store_url: str, artifact: Artifact
) -> None:
    random = np.random.default_rng(8)
    same, counts = rows_of(random, 3), Counts()
    async with (
        worker(store_url, artifact, counts) as one,
        worker(store_url, artifact, counts) as two,
    ):
        replies = await asyncio.gather(
            *(send(pipeline, "race", same) for pipeline in [one, two] * 8)
        )
    replies.sort(key=lambda reply: reply.head.position)
    assert [reply.head.position for reply in replies] == list(range(3, 51, 3))
    assert len({reply.head.tag for reply in replies}) == 16
    assert counts.seen["conflicts"] > 0
    assert_close(
        np.concatenate([r.outputs for r in replies]),
        oracle_outputs(artifact, np.tile(same, (16, 1))),
    )


async def test_queued_chunks_of_a_stream_are_computed_speculatively(
    store_url: str, artifact: Artifact
) -> None:
    """Its chunks neither load the stream again nor wait for each other's commits."""
    random = np.random.default_rng(31)
    rows, counts = rows_of(random, 48), Counts()
    async with worker(store_url, artifact, counts) as one:
        replies = await asyncio.gather(
            *(send(one, "hot", rows[at : at + 3], at) for at in range(0, 48, 3))
        )
    assert [reply.head.position for reply in replies] == list(range(3, 51, 3))
    assert (counts.seen["misses"], counts.seen["conflicts"]) == (1, 0)
    assert_close(
        np.concatenate([reply.outputs for reply in replies]), oracle_outputs(artifact, rows)
    )


class FailingStore(RedisStore):
    """Fails, or loses, the first commit of a stream at a position; for the fault alone."""

    def __init__(self, settings: StoreSettings, position: int, error: CarryError | None):
        super().__init__(settings)
        self.position = position
        self.error = error
        self.next_commit = asyncio.Event()

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        fails = [commit.new.head.position == self.position for commit in commit_rows(commits)]
        if any(fails):
            self.position = -1
            # answered in its turn: before the stream's next commit, which is on its way
            await asyncio.wait_for(self.next_commit.wait(), 60)
        elif self.position == -1:
            self.next_commit.set()
        going = commits.select([at for at, failed in enumerate(fails) if not failed])
        done = iter(await super().commit(going, deadline_s))
        return [
            (self.error or Conflicted(commit.expected)) if failed else next(done)
            for commit, failed in zip(commit_rows(commits), fails, strict=True)
        ]


@pytest.mark.parametrize("error", [StoreRefused("no room"), None], ids=["failed", "conflict"])
async def test_chunks_after_a_commit_that_was_not_written_are_re_evaluated(
    store_url: str, artifact: Artifact, error: CarryError | None
) -> None:
    rows, counts = rows_of(np.random.default_rng(32), 12), Counts()
    store = FailingStore(StoreSettings(store_url, store_wait_s=60), 8, error)
    async with worker(store_url, artifact, counts, store=store) as one:
        replies: list[Any] = await asyncio.gather(
            *(send(one, "chain", rows[at : at + 4], at) for at in (0, 4, 8)),
            return_exceptions=True,
        )
        if error is not None:
            assert isinstance(replies[1], StoreRefused)
            assert isinstance(replies[2], PositionAhead)
            assert replies[2].facts["expected"] == 4
            replies[1:] = [await send(one, "chain", rows[at : at + 4], at) for at in (4, 8)]
    assert counts.seen["conflicts"] >= (1 if error else 2)
    assert [reply.head.position for reply in replies] == [4, 8, 12]
    outputs = [reply.outputs for reply in replies]
    assert_close(np.concatenate(outputs), oracle_outputs(artifact, rows))


class Unbatched(NumpyRuntime):
    """Calls of any number of rows.

    Attributes:
        rows: to which the rows of a call are padded, at least.
    """

    max_batch, rows = 128, 0

    def padded_shape(self, rows: int, steps: int) -> tuple[int, int]:
        return max(rows, self.rows), steps


HALF = MIN_SPLIT_REQUESTS // 2


@pytest.mark.parametrize(
    ("padded", "short_s", "calls"),
    [(0, math.inf, [HALF, HALF]), (32, math.inf, [32]), (0, 0.0, [MIN_SPLIT_REQUESTS])],
    ids=["any rows", "padded rows", "long calls"],
)
async def test_many_chunks_are_computed_in_two_calls_if_calls_are_short_and_not_padded(
    store_url: str,
    artifact: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    padded: int,
    short_s: float,
    calls: list[int],
) -> None:
    monkeypatch.setattr("service.pipeline.chunk_batch.MAX_INLINE_S", short_s)
    rows = rows_of(np.random.default_rng(31), 4)
    expected = oracle_outputs(artifact, rows)
    runtime = Unbatched(artifact)
    runtime.rows = padded
    async with worker(store_url, artifact, runtime=runtime) as pipeline:
        await send(pipeline, "first", rows, 0)
        runtime.shapes.clear()
        streams = [str(number) for number in range(MIN_SPLIT_REQUESTS)]
        replies = await asyncio.gather(*[send(pipeline, each, rows, 0) for each in streams])
    assert [shape[0] for shape in runtime.shapes] == calls
    for reply in replies:
        np.testing.assert_allclose(reply.outputs, expected, rtol=1e-5, atol=1e-5)


async def test_a_chunk_that_cannot_be_encoded_fails_alone(
    store_url: str, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, encode_many = np.random.default_rng(23), ServedModel.encode_many

    def encode_or_fail(served: ServedModel, items: Sequence[tuple[Steps, State]]) -> object:
        found = encode_many(served, items)
        return [
            ZeroDivisionError("an unforeseen failure") if steps.length == 3 else each
            for (steps, _), each in zip(items, found, strict=True)
        ]

    monkeypatch.setattr(ServedModel, "encode_many", encode_or_fail)
    # rows of a model without a limit need no encoding, so none can fail
    monkeypatch.setattr(ModelSpec, "chunk_limit", 100)
    counts = Counts()
    async with worker(store_url, artifact, counts) as one:
        outcomes = await asyncio.gather(
            *(send(one, f"n{i}", rows_of(random, 2 + i), 0) for i in range(4)),
            return_exceptions=True,
        )
    assert [type(outcome) for outcome in outcomes] == [Reply, InternalError, Reply, Reply]
    assert counts.largest_batch == 3


async def test_stale_cached_state_is_never_used(store_url: str, artifact: Artifact) -> None:
    random = np.random.default_rng(11)
    rows, counts = rows_of(random, 30), Counts()
    async with worker(store_url, artifact, counts) as one, worker(store_url, artifact) as two:
        parts = [await send(one, "stale", rows[:10])]
        parts.append(await send(two, "stale", rows[10:20]))
        parts.append(await send(one, "stale", rows[20:]))
    assert counts.seen["conflicts"] == 1
    assert_close(np.concatenate([part.outputs for part in parts]), oracle_outputs(artifact, rows))


async def test_deleted_stream_is_not_revived_from_a_cache(
    store_url: str, artifact: Artifact
) -> None:
    rows = rows_of(np.random.default_rng(12), 8)
    key = StreamKey("probe", "gone")
    async with worker(store_url, artifact) as one, worker(store_url, artifact) as two:
        await send(one, "gone", rows[:4], 0)
        await two.streams.delete(ANYONE, key)
        with pytest.raises(PositionAhead) as caught:
            await send(one, "gone", rows[4:], 4)
        assert caught.value.facts["expected"] == 0
        again = await send(one, "gone", rows[4:])
        assert again.created
        with pytest.raises(StreamNotFound):
            await two.streams.delete(ANYONE, StreamKey("probe", "never"))


async def test_sequences_store_nothing_and_long_ones_are_encoded_beside_the_event_loop(
    store_url: str, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(18)
    sequences = [rows_of(random, count) for count in (1, 10, 40)]
    threads: list[int] = []
    encode = ServedModel.encode_segments

    def record(*arguments: Any) -> Any:
        threads.append(threading.get_ident())
        return encode(*arguments)

    monkeypatch.setattr(predict, "LONG_STEPS", 10)
    monkeypatch.setattr(ServedModel, "encode_segments", record)
    async with worker(store_url, artifact) as one:
        predictions = await one.predict(ANYONE, "probe", [sequence_of(rows) for rows in sequences])
        assert (await one.streams.page(ANYONE, "probe", "", None, 10)).streams == ()
    for rows, prediction in zip(sequences, predictions, strict=True):
        assert_close(prediction.outputs, oracle_outputs(artifact, rows))
    assert [each == threading.get_ident() for each in threads] == [True, False, False]
