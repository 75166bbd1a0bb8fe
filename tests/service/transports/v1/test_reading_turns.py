"""Long bodies are read in turns, so that many uploads do not delay other requests."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from models.artifact.artifact import Artifact
from service.server import reading
from service.server.connections import Connections
from service.server.heads import PIECE_BYTES
from service.server.reading import LONG_BODY_BYTES, UNCONSUMED, ReadingFlow, ReadingTurns
from tests.service.transports.v1.harness import LIMITS, harness
from tests.service.transports.v1.raw_http import answer, serving
from tests.service.transports.v1.test_connection_limits import PREDICT, several
from tests.support.servers import RealServer, becomes

UPLOADS = 16
SIZE = 40 * LONG_BODY_BYTES


async def test_long_bodies_are_read_one_per_turn_of_the_loop(
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
    crowded = [turn for turn, read in read_in.items() if len(read) > 1]
    assert len(read_in) > UPLOADS
    # those in which the bodies got long
    assert len(crowded) <= 2


@pytest.mark.parametrize("length", ["1", "1;x=y"])
async def test_tiny_chunks_of_a_body_are_parsed_over_several_turns_of_the_loop(
    pipeline_server: RealServer,
    models: Mapping[str, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    length: str,
) -> None:
    """A read of 256 KiB has up to forty thousand."""
    loop, turn, count = asyncio.get_running_loop(), 0, 60_000
    parsed_in: Counter[int] = Counter()
    set_body_bytes = Connections.set_body_bytes

    def counted(self: Connections, connection: Any, size: int) -> None:
        parsed_in[turn] += 1
        set_body_bytes(self, connection, size)
        assert connection.body_bytes >= 0

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
        reader, writer = await open_one()
        next_turn()
        head = f"{PREDICT}\r\nHost: h\r\nContent-Type: application/json"
        writer.write(f"{head}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        writer.write(f"{length}\r\n \r\n".encode() * count + b"1\r\n]\r\n0\r\n\r\n")
        # the next request is behind it in the same bytes
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await answer(reader)).startswith(b"HTTP/1.1 400 ")
        assert (await answer(reader)).startswith(b"HTTP/1.1 200 ")
    assert parsed_in.total() > count
    assert max(parsed_in.values()) < 2 * PIECE_BYTES // 6


class Flow(ReadingFlow):
    """The flow of a connection without a socket, which notes when it is read."""

    def __init__(self, number: int, read: list[int]) -> None:
        super().__init__(Mock())
        self.number, self.read = number, read

    def resume_reading(self, reason: int = UNCONSUMED) -> None:
        super().resume_reading(reason)
        if not self.read_paused:
            self.read.append(self.number)


async def test_the_connection_that_waits_longest_is_read_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two of several that wait, the loop has time for other requests."""
    monkeypatch.setattr(reading, "PAUSE_S", 0.01)
    turns, read, loop = ReadingTurns(), list[int](), asyncio.get_running_loop()
    began_s = loop.time()
    flows = [Flow(number, read) for number in range(7)]
    for flow in (*flows, flows[1]):
        turns.wait(flow)
    turns.forget(flows[0])
    flows[2].pause_reading()
    flows[3].resume_reading()
    await becomes(lambda: read == [1, 3, 4, 5, 6], "their order")
    # the first and the last do not wait; a timer may be a millisecond early
    assert loop.time() - began_s > 3 * 0.009
    flows[2].resume_reading()
    assert read[-1] == 2


async def test_a_connection_that_waits_alone_is_read_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "PAUSE_S", math.inf)
    turns, read = ReadingTurns(), list[int]()
    for number in range(3):
        turns.wait(Flow(number, read))
        await becomes(lambda number=number: read[-1:] == [number], "its turn")
