"""Many live sockets on one worker: memory of an idle one, latency of chunks and HTTP requests.

    python -m tests.load.sockets                      # 10,000 idle and 500 active
    python -m tests.load.sockets --idle 1000 --active 50 --seconds 5

It starts a service with the pretrained model and its own Valkey, opens the idle sockets, then sends
chunks on the active ones at a fixed rate, while one HTTP client sends chunks one after another. It
prints a JSON document. Both processes need a file descriptor for each socket.
"""

import argparse
import asyncio
import gc
import json
import resource
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvloop
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from carry_client import AsyncCarry, model_path, stream_path
from tests.support.machine import read_usage
from tests.support.models import PRETRAINED
from tests.support.service import Service, running

OPENED_AT_ONCE = 100
MODEL = "flights"
ROWS = 16


class Latencies:
    """What active sockets measured."""

    def __init__(self) -> None:
        self.answered_s: list[float] = []
        self.errors = self.unanswered = 0

    async def feed(
        self, socket: ClientConnection, body: bytes, interval_s: float, until_s: float
    ) -> None:
        """Send chunks at a fixed rate, whether they are answered or not, for some time, and wait a
        second more for answers."""
        sent_s: deque[float] = deque()

        async def receive() -> None:
            async for answer in socket:
                self.answered_s.append(time.perf_counter() - sent_s.popleft())
                self.errors += '"status":200' not in str(answer[:40])

        receiver = asyncio.create_task(receive())
        next_s = time.perf_counter() + np.random.default_rng(id(socket)).uniform(0, interval_s)
        with suppress(ConnectionClosed):
            while next_s < until_s:
                await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
                sent_s.append(time.perf_counter())
                await socket.send(body, text=True)
                next_s += interval_s
        await asyncio.wait([receiver], timeout=until_s + 1 - time.perf_counter())
        receiver.cancel()
        self.unanswered += len(sent_s)


async def open_sockets(url: str, prefix: str, count: int) -> list[ClientConnection]:
    """Open a socket for each of so many streams, some at a time, and read its hello."""
    base, opening = url.replace("http", "ws", 1), asyncio.Semaphore(OPENED_AT_ONCE)

    async def open_socket(number: int) -> ClientConnection:
        address = f"{base}{stream_path(MODEL, f'{prefix}{number}')}/live"
        async with opening:
            socket = await connect(address, ping_interval=None, compression=None, proxy=None)
            await socket.recv()
            return socket

    return await asyncio.gather(*map(open_socket, range(count)))


async def feed_http(carry: AsyncCarry, body: bytes, until_s: float) -> dict[str, float]:
    """Send chunks one after another over HTTP; their latencies."""
    latencies_s, path = [], f"{stream_path(MODEL, 'over-http')}/chunks"
    while time.perf_counter() < until_s:
        began_s = time.perf_counter()
        await carry.request("POST", path, body)
        latencies_s.append(time.perf_counter() - began_s)
        await asyncio.sleep(0.01)
    return percentiles(latencies_s)


def percentiles(latencies_s: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    p50, p99, top = np.percentile(latencies_s, [50, 99, 100]) * 1000
    return {"count": len(latencies_s), "p50_ms": p50, "p99_ms": p99, "max_ms": top}


async def measure(service: Service, options: argparse.Namespace) -> dict[str, Any]:
    """Open the sockets, send the chunks."""
    url, seconds, pid = service.url, options.seconds, service.process.pid
    carry = AsyncCarry(url, encoding="json")
    features = (await carry.request("GET", model_path(MODEL)))["input_features"]
    body = orjson.dumps({"inputs": np.zeros((ROWS, features)).tolist()})
    result: dict[str, Any] = {"rows": ROWS, "body_bytes": len(body)}
    half_s = seconds / 2
    result["http_alone"] = await feed_http(carry, body, time.perf_counter() + half_s)
    before, began_s = read_usage(pid), time.perf_counter()
    idle = await open_sockets(url, "idle", options.idle)
    # a full collection of this process would be measured as latency
    gc.freeze()
    result["opened_per_s"] = options.idle / (time.perf_counter() - began_s)
    opened = read_usage(pid)
    result["idle_bytes_per_socket"] = (opened.memory_bytes - before.memory_bytes) / options.idle
    await asyncio.sleep(seconds)
    result["idle_cpu_share"] = (read_usage(pid).cpu_s - opened.cpu_s) / seconds
    result["http_with_idle"] = await feed_http(carry, body, time.perf_counter() + half_s)
    active, latencies = await open_sockets(url, "active", options.active), Latencies()
    before, until_s = read_usage(pid), time.perf_counter() + seconds
    *_, result["http_with_all"] = await asyncio.gather(
        *[latencies.feed(each, body, 1 / options.rate, until_s) for each in active],
        feed_http(carry, body, until_s),
    )
    result["active_cpu_share"] = (read_usage(pid).cpu_s - before.cpu_s) / seconds
    result["active"] = percentiles(latencies.answered_s)
    result["active_chunks_per_s"] = len(latencies.answered_s) / seconds
    result |= {"errors": latencies.errors, "unanswered": latencies.unanswered}
    result["closed"] = sum(each.close_code is not None for each in (*idle, *active))
    for each in (*idle, *active):
        each.transport.abort()
    await carry.close()
    return result


def main() -> None:
    """Start a service, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--active", type=int, default=500)
    parser.add_argument("--rate", type=float, default=2.0, help="chunks a second and active socket")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connections = str(options.idle + options.active + 100)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), PRETRAINED, CARRY_MAX_CONNECTIONS=connections) as service,
    ):
        result = uvloop.run(measure(service, options))
        print(json.dumps(result, indent=2, default=lambda number: round(float(number), 3)))


if __name__ == "__main__":
    main()
