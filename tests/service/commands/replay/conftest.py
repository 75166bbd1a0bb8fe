"""A stand-in service with small random weights, events to replay, and replays against it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import uvloop
from aiohttp.test_utils import TestServer

from carry_client import AsyncCarry
from models.events.columns import columns_from_events
from service.commands.replay.events import StreamEvents, split_streams
from service.commands.replay.send import Pace, Replay
from tests.service.commands.replay.standin import SPEC, Standin
from tests.support.oracle import contracting_weights

STANDIN_SEED = 3
"""Of the stand-in's weights."""
LENGTHS = {"s1": 40, "s2": 23, "s:3": 61, "s4": 1}


@pytest.fixture
def streams() -> list[StreamEvents]:
    """Four streams whose events are mixed in time, some values absent."""
    random = np.random.default_rng(5)
    names = [name for name, length in LENGTHS.items() for _ in range(length)]
    random.shuffle(names)
    at = np.cumsum(random.integers(0, 60_000, len(names))) + 1_357_000_000_000
    events = [
        {
            "at": int(moment),
            "delay": float(random.normal(4, 20)),
            "kind": str(random.choice(["a", "b", "c"])),
            "wind": None if random.random() < 0.3 else float(random.normal()),
        }
        for moment in at
    ]
    assert SPEC.events is not None
    return split_streams(SPEC.events, columns_from_events(SPEC.events, events), names)


@pytest.fixture
def standin() -> Standin:
    return Standin(contracting_weights(SPEC, STANDIN_SEED))


@pytest.fixture
def data(tmp_path: Path, streams: list[StreamEvents]) -> Path:
    """The same events as a table, in the order of their time."""
    events = [
        {"who": stream.name, **event}
        for stream in streams
        for event in stream.events(0, len(stream))
    ]
    path = tmp_path / "events.jsonl"
    lines = [orjson.dumps(event) for event in sorted(events, key=lambda event: event["at"])]
    path.write_bytes(b"\n".join(lines))
    return path


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

    async def run(pace: Pace | None = None, **client: Any) -> Replay:
        async with AsyncCarry(url, **{"deadline_s": 60, **client}) as carry:
            return await replay(carry, streams, pace or Pace((1, 9)))

    return run


async def replay(carry: AsyncCarry, streams: list[StreamEvents], pace: Pace) -> Replay:
    model = carry.model("small")
    replay = Replay(model, await model.describe(), streams, pace)
    await replay.run()
    return replay
