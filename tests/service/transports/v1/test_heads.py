"""Requests with ambiguous framing, sent to a real service.

However a request is segmented, each gets one reply, and no hidden request creates a stream.
"""

from __future__ import annotations

import asyncio
import re
import socket
from contextlib import suppress
from itertools import pairwise
from urllib.parse import urlsplit

import httpx
import pytest
import uvloop

from tests.service.transports.v1.corpus.heads import (
    EXCHANGES,
    HIDDEN,
    LAST,
    Exchange,
)
from tests.support.service import Service

PAUSE_S = 0.03
"""Pause between two segments, so that the server reads them separately."""

STREAMS = "/v1/models/post-lstm/streams"
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


async def answers(service: Service, *segments: bytes) -> list[int]:
    """The statuses of all that comes back until the service closes the connection."""
    address, loop = urlsplit(service.url), asyncio.get_running_loop()
    received = b""

    async def receive() -> None:
        nonlocal received
        # a service that closes a connection with unread bytes resets it
        with suppress(ConnectionError):
            while part := await loop.sock_recv(connection, 65536):
                received += part

    # not a stream: its reader drops what it has when the connection is reset
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.setblocking(False)
        receiving = asyncio.create_task(receive())
        try:
            with suppress(ConnectionError):
                for segment in segments:
                    await loop.sock_sendall(connection, segment)
                    await asyncio.sleep(PAUSE_S)
            async with asyncio.timeout(60):
                await receiving
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
    return [int(status) for status in _STATUS.findall(received)]


def segments(sent: bytes) -> dict[str, tuple[bytes, ...]]:
    """The same bytes, cut in different places."""
    end = sent.find(b"\r\n\r\n") + 4
    middle = end + (len(sent) - end) // 2
    cuts = {"at the head": (end,), "in the body": (middle,), "at 8192": (8192,)}
    cuts["several"] = (end - 2, end, end + 1, middle)
    cut = {"whole": (sent,)}
    for name, places in cuts.items():
        edges = [0, *sorted({place for place in places if 0 < place < len(sent)}), len(sent)]
        cut[name] = tuple(sent[start:end] for start, end in pairwise(edges))
    return cut


def expected(exchange: Exchange) -> list[int]:
    return [*exchange.statuses, *([] if exchange.closes else [200])]


@pytest.mark.parametrize("name", EXCHANGES)
def test_every_request_is_answered_once_however_it_is_segmented(
    service: Service, client: httpx.Client, name: str
) -> None:
    exchange = EXCHANGES[name]
    for stream in (HIDDEN, "."):
        client.delete(STREAMS, params={"prefix": stream}).raise_for_status()
    cuts = segments(exchange.sent + LAST)

    async def send() -> list[list[int]]:
        return await asyncio.gather(*[answers(service, *cut) for cut in cuts.values()])

    got = uvloop.run(send())
    assert dict(zip(cuts, got, strict=True)) == dict.fromkeys(cuts, expected(exchange))
    for stream in (HIDDEN, "."):
        assert client.get(STREAMS, params={"prefix": stream}).json()["streams"] == []
