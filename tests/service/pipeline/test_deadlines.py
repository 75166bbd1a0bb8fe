"""Deadlines through the whole pipeline: errors say what happened to the stream."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE
from service.core.errors import (
    DeadlineExceeded,
    NotDurable,
    OutcomeUnknown,
    PositionAhead,
    ShuttingDown,
    StoreUnavailable,
    StreamNotFound,
)
from service.core.values import Reply, StreamKey
from service.store.base import COMMITTED, CommitColumns, CommitResult, Conflicted, StoredValue
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.clock import ManualClock
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.pipelines import chunk_of, oracle_outputs, rows_of, send, worker
from tests.support.servers import RealServer, becomes, real_server
from tests.support.streams import rows as commit_rows


class HeldStore(RedisStore):
    """A store that holds loads or commits back, for fault injection only.

    Attributes:
        loading, committing: number of loads and commits of each stream.
    """

    def __init__(self, url: str, wait_s: float = 60):
        super().__init__(StoreSettings(url, store_wait_s=wait_s))
        self.loads, self.commits = asyncio.Event(), asyncio.Event()
        self.loads.set()
        self.commits.set()
        self.loading: Counter[str] = Counter()
        self.committing: Counter[str] = Counter()

    async def load(
        self, keys: Sequence[StreamKey], deadline_s: float = math.inf
    ) -> list[StoredValue]:
        self.loading.update(key.stream for key in keys)
        await self.loads.wait()
        return await super().load(keys, deadline_s)

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        results = await super().commit(commits, deadline_s)
        self.committing.update(key.stream for key in commits.keys)
        await self.commits.wait()
        return results


async def wait_for_count(counter: Counter[str], stream: str, times: int = 1) -> None:
    """Wait until the counter of a stream reaches a number."""
    await becomes(lambda: counter[stream] >= times, f"{times} of {stream!r}")


def later() -> float:
    """A deadline of the real clock that does not pass."""
    return time.monotonic() + 60


async def test_short_deadline_does_not_cancel_the_commit_of_other_streams(
    store_url: str, artifact: Artifact, clock: ManualClock
) -> None:
    """The store answers a batch after the deadline of one chunk and before that of the other."""
    rows = rows_of(np.random.default_rng(54), 6)

    class Punctual(HeldStore):
        """A store that knows no outcome after the deadline that it was given."""

        async def commit(
            self, commits: CommitColumns, deadline_s: float = math.inf
        ) -> list[CommitResult]:
            results = await super().commit(commits, deadline_s)
            if clock.now_s < deadline_s:
                return results
            return [OutcomeUnknown("no answer", stream=key.stream) for key in commits.keys]

    store = Punctual(store_url)
    async with worker(store_url, artifact, store=store) as one:
        store.commits.clear()
        mate = asyncio.create_task(send(one, "mate", rows, 0, deadline_s=clock.later()))
        late = asyncio.create_task(send(one, "late", rows, 0, deadline_s=clock.soon()))
        await wait_for_count(store.committing, "late")
        clock.expire()
        with pytest.raises(OutcomeUnknown):
            await late
        store.commits.set()
        assert_close((await mate).outputs, oracle_outputs(artifact, rows))


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


async def test_chunk_loading_at_its_deadline_is_never_applied(
    store_url: str, artifact: Artifact, clock: ManualClock
) -> None:
    rows = rows_of(np.random.default_rng(41), 6)
    store = HeldStore(store_url)
    async with worker(store_url, artifact, store=store) as one:
        store.loads.clear()
        waiting = asyncio.create_task(send(one, "mate", rows, 0, deadline_s=clock.later()))
        late = asyncio.create_task(send(one, "late", rows, 0, deadline_s=clock.soon()))
        await wait_for_count(store.loading, "late")
        clock.expire()
        with pytest.raises(DeadlineExceeded) as caught:
            await late
        assert caught.value.retryable
        store.loads.set()
        assert_close((await waiting).outputs, oracle_outputs(artifact, rows))
        with pytest.raises(StreamNotFound):
            await one.streams.read(ANYONE, StreamKey("probe", "late"))
        assert not (await send(one, "late", rows, 0, deadline_s=clock.later())).replayed


class LateRuntime(NumpyRuntime):
    """A network whose next call passes the `soon` deadlines of the clock."""

    clock: ManualClock | None = None

    def step(self, *arguments: object) -> object:
        if self.clock is not None:
            self.clock.expire()
        return super().step(*arguments)


async def test_chunk_computed_after_its_deadline_is_not_committed(
    store_url: str, artifact: Artifact, clock: ManualClock
) -> None:
    rows = rows_of(np.random.default_rng(42), 6)
    runtime = LateRuntime(artifact)
    async with worker(store_url, artifact, runtime=runtime) as one:
        await send(one, "known", rows, 0)
        runtime.clock = clock
        late, mate = await asyncio.gather(
            send(one, "late", rows, 0, deadline_s=clock.soon()),
            send(one, "mate", rows, 0, deadline_s=clock.later()),
            return_exceptions=True,
        )
        assert isinstance(late, DeadlineExceeded)
        assert_close(mate.outputs, oracle_outputs(artifact, rows))
        with pytest.raises(StreamNotFound):
            await one.streams.read(ANYONE, StreamKey("probe", "late"))


async def test_chain_continues_after_a_chunk_that_expired_while_committing(
    store_url: str, artifact: Artifact, clock: ManualClock
) -> None:
    """Later chunks were computed from its state, and are applied after it."""
    rows = rows_of(np.random.default_rng(43), 16)
    store = HeldStore(store_url)
    async with worker(store_url, artifact, store=store) as one:
        first = await send(one, "chain", rows[:4], 0)
        store.commits.clear()
        second = asyncio.create_task(send(one, "chain", rows[4:8], 4, deadline_s=clock.soon()))
        rest = [
            asyncio.create_task(send(one, "chain", rows[at : at + 4], at, deadline_s=clock.later()))
            for at in (8, 12)
        ]
        await wait_for_count(store.committing, "chain", 2)
        clock.expire()
        with pytest.raises(OutcomeUnknown):
            await second
        store.commits.set()
        replies = await asyncio.gather(*rest)
        kept = [first.outputs, *(reply.outputs for reply in replies)]
        expected = oracle_outputs(artifact, rows)
        assert_close(np.concatenate(kept), np.concatenate([expected[:4], expected[8:]]))


async def test_chain_is_re_evaluated_after_a_chunk_that_was_not_written(
    store_url: str, artifact: Artifact, clock: ManualClock
) -> None:
    rows = rows_of(np.random.default_rng(44), 12)

    class Losing(HeldStore):
        """Loses the commit of one position, and answers once `commits` is set."""

        async def commit(
            self, commits: CommitColumns, deadline_s: float = math.inf
        ) -> list[CommitResult]:
            if commit_rows(commits)[0].new.head.position != 8:
                return await super().commit(commits, deadline_s)
            self.committing["chain"] += 1
            await self.commits.wait()
            return [OutcomeUnknown("no answer", stream="chain")]

    store = Losing(store_url)
    async with worker(store_url, artifact, store=store) as one:
        await send(one, "chain", rows[:4], 0)
        store.commits.clear()
        second = asyncio.create_task(send(one, "chain", rows[4:8], 4, deadline_s=clock.soon()))
        third = asyncio.create_task(send(one, "chain", rows[8:], 8, deadline_s=clock.later()))
        await wait_for_count(store.committing, "chain", 2)
        clock.expire()
        with pytest.raises(OutcomeUnknown):
            await second
        store.commits.set()
        with pytest.raises(PositionAhead) as caught:
            await third
        assert caught.value.facts["expected"] == 4


async def test_conflicting_commit_counts_as_not_sent(
    store_url: str, artifact: Artifact, clock: ManualClock
) -> None:
    """An append that lost a race, and had no time for a second try, may be sent again."""
    rows = rows_of(np.random.default_rng(53), 4)

    class Racing(HeldStore):
        """Its first commit conflicts, and the load of the retry is blocked."""

        async def commit(
            self, commits: CommitColumns, deadline_s: float = math.inf
        ) -> list[CommitResult]:
            if self.committing:
                return await super().commit(commits, deadline_s)
            self.committing["raced"] += 1
            self.loads.clear()
            return [Conflicted(None)] * len(commits.keys)

    store = Racing(store_url)
    async with worker(store_url, artifact, store=store) as one:
        late = asyncio.create_task(send(one, "raced", rows, deadline_s=clock.soon()))
        await wait_for_count(store.loading, "raced", 2)
        clock.expire()
        with pytest.raises(DeadlineExceeded) as caught:
            await late
        assert caught.value.retryable
        store.loads.set()
        again = await send(one, "raced", rows, deadline_s=clock.later())
        assert again.head.position == len(rows)


class ShortStore(RedisStore):
    """Writes, and reports that the write is not durable yet."""

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        assert await super().commit(commits, deadline_s) == [COMMITTED] * len(commits.keys)
        return [NotDurable("not yet", stream=key.stream, retry_after_s=1) for key in commits.keys]


async def test_not_durable_is_retryable_with_a_position_only(
    store_url: str, artifact: Artifact
) -> None:
    rows = rows_of(np.random.default_rng(45), 4)
    store = ShortStore(StoreSettings(store_url, store_wait_s=60))
    async with worker(store_url, artifact, store=store) as one:
        with pytest.raises(NotDurable) as caught:
            await send(one, "placed", rows, 0)
        assert caught.value.retryable
        assert caught.value.facts["retry_after_s"] == 1
        with pytest.raises(NotDurable, match="applied twice") as caught:
            await send(one, "placed", rows)
        assert not caught.value.retryable
        assert "retry_after_s" not in caught.value.facts
        assert caught.value.facts["stream"] == "placed"


@pytest.fixture
def own_server() -> RealServer:
    with real_server("valkey") as server:
        yield server


async def test_unavailable_store_is_awaited_until_each_deadline(
    own_server: RealServer, artifact: Artifact
) -> None:
    """Expired chunks fail, also behind blocked batches; the others continue when the store
    returns."""
    random = np.random.default_rng(46)
    rows = {name: rows_of(random, 5) for name in ("patient", "b", "c", "d", "e", "f")}
    store = HeldStore(own_server.url)
    async with worker("", artifact, store=store, in_flight=2) as one:
        await send(one, "known", rows["b"], 0)
        own_server.kill()
        patient = asyncio.create_task(send(one, "patient", rows["patient"], 0, deadline_s=later()))
        await wait_for_count(store.loading, "patient")

        async def send_until_unavailable(name: str) -> StoreUnavailable:
            while True:
                deadline_s = time.monotonic() + 0.6
                # a busy machine may suspend this process until the deadline
                with pytest.raises((StoreUnavailable, DeadlineExceeded)) as caught:
                    await send(one, name, rows[name], 0, deadline_s=deadline_s)
                if isinstance(caught.value, StoreUnavailable):
                    return caught.value

        hasty = []
        for name in "bcdef":
            hasty.append(asyncio.create_task(send_until_unavailable(name)))
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            for error in await asyncio.gather(*hasty):
                assert error.retryable
                assert "the store" in error.detail
        assert not patient.done()
        own_server.start()
        assert_close((await patient).outputs, oracle_outputs(artifact, rows["patient"]))
        again = [await send(one, name, rows[name], 0, deadline_s=later()) for name in "bcdef"]
        assert not any(reply.replayed for reply in again)


async def test_short_deadline_is_not_reported_as_store_unavailable(
    store_url: str, artifact: Artifact, clock: ManualClock
) -> None:
    """With the deadline passing at each reading of the clock in turn."""
    rows = rows_of(np.random.default_rng(47), 4)
    clock.tick_s = 1e-3
    async with worker(store_url, artifact) as one:
        for readings in range(12):
            chunk = chunk_of(f"short-{readings}", rows, 0)
            [result] = await one.process_many(
                ANYONE, [chunk], clock.now_s + readings * clock.tick_s
            )
            assert isinstance(result, DeadlineExceeded | OutcomeUnknown | Reply), result
            assert readings or isinstance(result, DeadlineExceeded)


async def test_hanging_store_at_shutdown_is_outcome_unknown(
    store_url: str, artifact: Artifact, tmp_path: Path
) -> None:
    rows = rows_of(np.random.default_rng(48), 4)
    store = HeldStore(store_url)
    async with worker(store_url, artifact, store=store, drain_s=0.05) as one:
        store.commits.clear()
        sent = asyncio.create_task(send(one, "sent", rows, 0))
        await wait_for_count(store.committing, "sent")
        store.loads.clear()
        loading = asyncio.create_task(send(one, "loading", rows, 0))
        await asyncio.sleep(0)
        await one.stop()
        outcomes = await asyncio.gather(sent, loading, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown, ShuttingDown]
        store.loads.set()
