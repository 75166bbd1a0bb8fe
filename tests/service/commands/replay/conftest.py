"""A stand-in service with small random weights, events to replay, and replays against it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import uvloop
from aiohttp.test_utils import TestServer

from carry_client import AsyncCarry
from service.commands.replay.send import Replay, StreamEvents, split_streams
from tests.service.commands.replay.standin import SPEC, Standin
from tests.support.oracle import contracting_weights

STANDIN_SEED = 3
"""Of the stand-in's weights."""
LENGTHS = {"s1": 40, "s2": 23, "s:3": 61, "s4": 1}


@pytest.fixture
def table() -> pl.DataFrame:
    """Events of four streams, mixed in time, some values absent."""
    random = np.random.default_rng(5)
    names = [name for name, length in LENGTHS.items() for _ in range(length)]
    random.shuffle(names)
    count = len(names)
    return pl.DataFrame(
        {
            "who": names,
            "at": np.cumsum(random.integers(0, 60_000, count)) + 1_357_000_000_000,
            "delay": random.normal(4, 20, count),
            "kind": random.choice(["a", "b", "c"], count),
            "wind": [None if random.random() < 0.3 else random.normal() for _ in range(count)],
        }
    )


@pytest.fixture
def streams(table: pl.DataFrame) -> list[StreamEvents]:
    assert SPEC.events is not None
    return split_streams(SPEC.events, table, stream="who")


@pytest.fixture
def data(tmp_path: Path, table: pl.DataFrame) -> Path:
    """The events of `table` as a file."""
    path = tmp_path / "events.jsonl"
    table.write_ndjson(path)
    return path


@pytest.fixture
def standin() -> Standin:
    return Standin(contracting_weights(SPEC, STANDIN_SEED))


@pytest.fixture
def background(standin: Standin) -> Iterator[str]:
    """The stand-in's address, served by a loop in another thread."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = TestServer(standin.app())

    def run(work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result()

    run(server.start_server())
    yield str(server.make_url("/"))
    run(server.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
async def server(standin: Standin) -> AsyncIterator[TestServer]:
    server = TestServer(standin.app())
    await server.start_server()
    yield server
    await server.close()


@pytest.fixture
def url(server: TestServer) -> str:
    return str(server.make_url("/"))


Replayed = Callable[..., Awaitable[Replay]]


@pytest.fixture
def replayed(url: str, streams: list[StreamEvents]) -> Replayed:
    """Replays the streams through the stand-in, in chunks of at most nine events."""

    async def run(client: dict[str, Any] | None = None, **pace: Any) -> Replay:
        async with AsyncCarry(url, **{"deadline_s": 60, **(client or {})}) as carry:
            return await replay(carry, streams, **{"chunk": (1, 9), **pace})

    return run


async def replay(carry: AsyncCarry, streams: list[StreamEvents], **pace: Any) -> Replay:
    model = carry.model("small")
    replay = Replay(model, await model.describe(), streams, **pace)
    await replay.run()
    return replay
