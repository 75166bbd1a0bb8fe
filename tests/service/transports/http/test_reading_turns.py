"""Long bodies are read in turns, so that many uploads do not delay other requests."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from models.artifact.artifact import Artifact
from service.transports.http.connection.connections import Connections
from service.transports.http.connection.reading_turns import (
    LONG_BODY_BYTES,
    READS_PER_TURN,
    ReadingTurns,
)
from tests.service.transports.http.harness import LIMITS, harness
from tests.service.transports.http.raw_http import answer, serving
from tests.service.transports.http.test_connection_limits import PREDICT, several
from tests.support.servers import RealServer

UPLOADS = 8 * READS_PER_TURN
SIZE = 40 * LONG_BODY_BYTES


async def test_long_bodies_are_read_a_few_per_turn_of_the_loop(
    pipeline_server: RealServer, models: Mapping[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, turn = asyncio.get_running_loop(), 0
    read_in: defaultdict[int, set[Any]] = defaultdict(set)
    set_body_bytes = Connections.set_body_bytes

    def counted(self: Connections, connection: Any, size: int) -> None:
        if connection.body_bytes > LONG_BODY_BYTES:
            read_in[turn].add(connection)
        set_body_bytes(self, connection, size)

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(next_turn)

    monkeypatch.setattr(Connections, "set_body_bytes", counted)
    async with (
        harness(pipeline_server, models, limits=replace(LIMITS, max_body_bytes=SIZE)) as api,
        serving(api) as server,
        several(server) as open_one,
    ):
        clients = [await open_one() for _ in range(UPLOADS)]
        next_turn()
        head = f"{PREDICT}\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {SIZE}"
        for _, writer in clients:
            writer.write(head.encode() + b"\r\n\r\n" + b" " * (SIZE - 1))
        await asyncio.gather(*[writer.drain() for _, writer in clients])
        for reader, writer in clients:
            writer.write(b"]")
            assert (await answer(reader)).startswith(b"HTTP/1.1 400 ")
    crowded = [turn for turn, read in read_in.items() if len(read) > READS_PER_TURN]
    assert len(read_in) > UPLOADS
    # those in which the bodies got long
    assert len(crowded) <= 2


async def test_the_connection_that_waits_longest_is_read_first() -> None:
    turns, read = ReadingTurns(), list[int]()
    for number in range(3 * READS_PER_TURN):
        turns.wait(number, lambda number=number: read.append(number))
    turns.wait(1, lambda: read.append(-1))
    turns.forget(0)
    for _ in range(3):
        await asyncio.sleep(0)
    assert read == list(range(1, 3 * READS_PER_TURN))
