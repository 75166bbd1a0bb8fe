"""A chunk that another worker applies between this worker's computation and its commit."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE
from service.core.errors import AlreadyApplied
from service.store.base import CommitColumns, CommitResult
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.pipelines import chunk_of, oracle_outputs, rows_of, send, worker


class OvertakenStore(RedisStore):
    """Runs a callback before its next commit, to simulate a race."""

    first: Callable[[], Awaitable[object]] | None = None

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        first, self.first = self.first, None
        if first is not None:
            await first()
        return await super().commit(commits, deadline_s)


@pytest.mark.parametrize("reply_max_bytes", [16, 65_536])
async def test_duplicate_gets_the_stored_or_the_computed_reply(
    store_url: str, artifact: Artifact, reply_max_bytes: int
) -> None:
    """Where no reply is kept, only a worker that computed the very chunk has one."""
    rows = rows_of(np.random.default_rng(55), 12)
    settings = StoreSettings(store_url, reply_max_bytes=reply_max_bytes, store_wait_s=60)
    store = OvertakenStore(settings)
    async with (
        worker(store_url, artifact, store=store) as one,
        worker(store_url, artifact, reply_max_bytes=reply_max_bytes) as two,
    ):
        await send(one, "s", rows[:8], 0)
        chunk = chunk_of("s", rows[8:], 8)
        others = []

        async def overtake() -> None:
            others.append(await two.process(ANYONE, chunk))

        store.first = overtake
        reply = await one.process(ANYONE, chunk)
        assert reply.head == others[0].head
        assert reply.replayed == (reply_max_bytes > 16)
        np.testing.assert_array_equal(reply.outputs, others[0].outputs)
        np.testing.assert_allclose(
            reply.outputs, oracle_outputs(artifact, rows)[8:], rtol=1e-5, atol=1e-5
        )
        if reply_max_bytes == 16:
            with pytest.raises(AlreadyApplied):
                await one.process(ANYONE, chunk)
