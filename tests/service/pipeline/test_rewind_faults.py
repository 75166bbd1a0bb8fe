"""Rewinds whose reply the store's connection loses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.access.caller import ANYONE
from service.core.errors import OutcomeUnknown
from service.core.values import StreamKey
from service.pipeline.pipeline import Pipeline
from service.store.history import StoredHistory
from service.store.redis.histories import RedisHistories
from tests.support.pipelines import oracle_outputs, rows_of, send, worker
from tests.support.proxy import LossyPath
from tests.support.servers import real_server
from tests.support.versions import stop_polling

HISTORY = HistorySpec(events=16)
KEY = StreamKey("probe", "s")
ROWS = rows_of(np.random.default_rng(5), 20)


class Lossy(NamedTuple):
    """A service on a path that can lose replies, and one beside it on a sound one."""

    path: LossyPath
    pipeline: Pipeline
    others: Pipeline


@pytest.fixture
async def lossy(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lossy]:
    # or the path could lose the reply to a report
    stop_polling(monkeypatch)
    with real_server("valkey") as server:
        async with (
            LossyPath.to(server.socket, server.folder) as path,
            worker(path.url, artifact, history=HISTORY) as pipeline,
            worker(server.url, artifact, history=HISTORY) as others,
        ):
            await send(others, "s", ROWS[:6], 0)
            await send(others, "s", ROWS[6:9], 6)
            # the server knows the scripts already
            await others.streams.rewind(ANYONE, KEY, 9, None)
            yield Lossy(path, pipeline, others)


@pytest.fixture
def lose(lossy: Lossy, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Loses the reply to the write that follows the next read of a history."""
    read = RedisHistories.read

    async def read_before(*arguments: Any, **options: Any) -> StoredHistory:
        history = await read(*arguments, **options)
        monkeypatch.setattr(RedisHistories, "read", read)
        lossy.path.losses = 1
        return history

    return lambda: monkeypatch.setattr(RedisHistories, "read", read_before)


async def test_a_rewind_whose_reply_was_lost_is_applied_once(
    lossy: Lossy, lose: Callable[[], None], artifact: Artifact
) -> None:
    lose()
    new = await lossy.pipeline.streams.rewind(ANYONE, KEY, 7, None)
    assert lossy.path.losses == 0
    stored = await lossy.others.streams.read(ANYONE, KEY)
    assert (stored.head, stored.head.position) == (new.head, 7)
    reply = await send(lossy.others, "s", ROWS[10:14], 7, epoch=new.head.epoch)
    expected = oracle_outputs(artifact, np.concatenate([ROWS[:7], ROWS[10:14]]))[7:]
    np.testing.assert_allclose(reply.outputs, expected, rtol=1e-5, atol=1e-5)


async def test_a_rewind_that_others_may_have_continued_has_an_unknown_outcome(
    lossy: Lossy, lose: Callable[[], None]
) -> None:
    async def rewind_again() -> None:
        await lossy.others.streams.rewind(ANYONE, KEY, 3, None)

    after: Callable[[], Awaitable[None]] = rewind_again
    lose()
    lossy.path.after_loss = after
    with pytest.raises(OutcomeUnknown) as unknown:
        await lossy.pipeline.streams.rewind(ANYONE, KEY, 7, None)
    stored = await lossy.others.streams.read(ANYONE, KEY)
    assert stored.head.position == unknown.value.facts["position"] == 3
    assert unknown.value.facts["epoch"] == stored.head.epoch.hex()
