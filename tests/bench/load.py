"""A closed-loop load generator: each connection sends its next chunk when the last is answered.

Plain sockets, HTTP/1.1 and keep-alive, bodies made beforehand, so that the generator is not
what is measured. Loopback only, bounded by a duration. Every reply's status is checked, and
its position where the server gives one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import orjson

HOST = "127.0.0.1"


@dataclass(slots=True)
class Load:
    """What one run saw.

    Attributes:
        seconds: from the first chunk sent to the last answered.
        latencies_s: one per chunk.
    """

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def chunks_per_s(self) -> float:
        """The rate over the whole run."""
        return len(self.latencies_s) / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """A percentile of the latencies, in milliseconds."""
        return float(np.percentile(self.latencies_s, percent)) * 1000


class Streams:
    """The chunks of a connection's own streams, in turn, each at its next position."""

    def __init__(self, names: list[str], *, features: int, steps: int, seed: int):
        random = np.random.default_rng(seed)
        rows = random.normal(size=(8, steps, features)).round(4)
        self._inputs = [orjson.dumps(block.tolist()) for block in rows]
        self._names = names
        self._positions = dict.fromkeys(names, 0)
        self._steps = steps
        self._count = 0

    def next(self) -> tuple[str, bytes, int]:
        """The stream, the body, and the position that the reply must give."""
        name = self._names[self._count % len(self._names)]
        inputs = self._inputs[self._count % len(self._inputs)]
        self._count += 1
        position = self._positions[name]
        self._positions[name] = position + self._steps
        return name, b'{"position":%d,"inputs":%b}' % (position, inputs), position + self._steps


async def run(
    port: int,
    path: Callable[[str], str],
    connections: list[Streams],
    duration_s: float,
    *,
    check_position: bool,
) -> Load:
    """Load the server at `port` for a time.

    Raises:
        RuntimeError: a reply has another status than 200, or another position.
    """
    load = Load()
    began_s = time.perf_counter()
    ends_s = began_s + duration_s
    await asyncio.gather(
        *(_connection(port, path, streams, ends_s, load, check_position) for streams in connections)
    )
    load.seconds = time.perf_counter() - began_s
    return load


async def _connection(
    port: int,
    path: Callable[[str], str],
    streams: Streams,
    ends_s: float,
    load: Load,
    check_position: bool,
) -> None:
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        while (sent_s := time.perf_counter()) < ends_s:
            name, body, position = streams.next()
            head = (
                f"POST {path(name)} HTTP/1.1\r\nHost: {HOST}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            reply_head = await reader.readuntil(b"\r\n\r\n")
            lower = reply_head.lower()
            length = int(lower.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            reply = await reader.readexactly(length)
            load.latencies_s.append(time.perf_counter() - sent_s)
            if b" 200 " not in reply_head.split(b"\r\n", 1)[0]:
                raise RuntimeError(f"expected status 200, got {reply_head!r} {reply[:500]!r}")
            if check_position and b'"position":%d,' % position not in reply:
                raise RuntimeError(f"expected position {position}, got {reply[:300]!r}")
    finally:
        writer.close()
