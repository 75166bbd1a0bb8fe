"""Many live sockets on one worker: memory of an idle one, latency of chunks and HTTP requests.

    python -m tests.load.sockets                      # 10,000 idle and 500 active
    python -m tests.load.sockets --idle 1000 --active 50 --seconds 5

It starts a service with the pretrained model and its own Valkey, opens the idle sockets, then sends
chunks on the active ones at a fixed rate, while one HTTP client sends chunks one after another. It
prints a JSON document. Both processes need a file descriptor for each socket.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import resource
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import uvloop
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

import models
from carry_client import AsyncCarry, model_path, stream_path
from tests.support.service import Service, running

OPENED_AT_ONCE = 100
MODEL = "flights"
ROWS = 16


class Socket:
    """A live socket, and the latencies of its chunks."""

    def __init__(self, connection: ClientConnection, hello: dict[str, Any]):
        self.connection, self.hello = connection, hello
        self.sent_s: deque[float] = deque()
        self.latencies_s: list[float] = []
        self.errors = 0

    @classmethod
    async def open(cls, url: str, opening: asyncio.Semaphore) -> Socket:
        """Connect, and read the hello."""
        async with opening:
            connection = await connect(url, ping_interval=None, compression=None, proxy=None)
            return cls(connection, orjson.loads(await connection.recv())["hello"])

    async def send(self, frame: bytes) -> None:
        """Send a chunk."""
        self.sent_s.append(time.perf_counter())
        await self.connection.send(frame, text=True)

    async def receive(self, count: int) -> None:
        """Receive so many answers."""
        for _ in range(count):
            answer = await self.connection.recv(decode=False)
            self.latencies_s.append(time.perf_counter() - self.sent_s.popleft())
            self.errors += b'"status":200' not in answer[:40]

    async def feed(self, body: bytes, interval_s: float, until_s: float) -> None:
        """Send chunks at a fixed rate, whether they are answered or not, for some time; a second
        later what was not answered stays in `sent_s`."""
        receiver = asyncio.create_task(self.receive(1 << 30))
        next_s = time.perf_counter() + np.random.default_rng(id(self)).uniform(0, interval_s)
        with suppress(ConnectionClosed):
            while next_s < until_s:
                await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
                await self.send(body)
                next_s += interval_s
        await asyncio.wait([receiver], timeout=until_s + 1 - time.perf_counter())
        receiver.cancel()


async def open_sockets(url: str, paths: Iterable[str]) -> list[Socket]:
    """Open sockets, some at a time."""
    base, opening = url.replace("http", "ws", 1), asyncio.Semaphore(OPENED_AT_ONCE)
    return await asyncio.gather(*[Socket.open(f"{base}{path}/live", opening) for path in paths])


async def feed_http(carry: AsyncCarry, inputs: Any, until_s: float) -> dict[str, float]:
    """Send chunks one after another over HTTP; their latencies."""
    latencies_s, path = [], f"{stream_path(MODEL, 'over-http')}/chunks"
    while time.perf_counter() < until_s:
        began_s = time.perf_counter()
        await carry.request("POST", path, {"inputs": inputs})
        latencies_s.append(time.perf_counter() - began_s)
        await asyncio.sleep(0.01)
    return percentiles(latencies_s)


def percentiles(latencies_s: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    p50, p99, top = np.percentile(latencies_s, [50, 99, 100]) * 1000
    return {"count": len(latencies_s), "p50_ms": p50, "p99_ms": p99, "max_ms": top}


async def send_pipelined(url: str, inputs: list[list[float]], count: int, streams: int) -> None:
    """Send chunks over one socket for many streams, with half a window on its way."""
    [socket] = await open_sockets(url, [model_path(MODEL)])
    window = socket.hello["window"] // 2
    for at in range(count):
        if at >= window:
            await socket.receive(1)
        position = at // streams * ROWS
        chunk = {"stream": f"p{at % streams}", "position": position, "inputs": inputs}
        await socket.send(orjson.dumps(chunk))
    await socket.receive(min(window, count))
    await socket.connection.close()


@contextmanager
def cpu_share(process: psutil.Process, shares: dict[str, float], name: str) -> Iterator[None]:
    """The share of a core that a process uses in the block."""
    began_s, cpu_s = time.perf_counter(), sum(process.cpu_times()[:2])
    yield
    used_s = sum(process.cpu_times()[:2]) - cpu_s
    shares[name] = used_s / (time.perf_counter() - began_s)


async def measure(service: Service, options: argparse.Namespace) -> dict[str, Any]:
    """Open the sockets, send the chunks."""
    url, seconds, process = service.url, options.seconds, psutil.Process(service.process.pid)
    carry = AsyncCarry(url, encoding="json")
    features = (await carry.request("GET", model_path(MODEL)))["input_features"]
    inputs = np.zeros((ROWS, features)).tolist()
    body = orjson.dumps({"inputs": inputs})
    result: dict[str, Any] = {"rows": ROWS, "body_bytes": len(body)}
    half_s = seconds / 2
    result["http_alone"] = await feed_http(carry, inputs, time.perf_counter() + half_s)
    for streams in (1, 100):
        rates: dict[str, float] = {}
        began_s = time.perf_counter()
        with cpu_share(process, rates, "cpu"):
            await send_pipelined(url, inputs, options.pipelined, streams)
        rate = options.pipelined / (time.perf_counter() - began_s)
        cost = {"chunks_per_s": rate, "service_cpu_us_per_chunk": rates["cpu"] / rate * 1e6}
        result[f"pipelined_{streams}_streams"] = cost
    before, began_s = process.memory_info().rss, time.perf_counter()
    idle = await open_sockets(url, [stream_path(MODEL, f"idle{at}") for at in range(options.idle)])
    # a full collection of this process would be measured as latency
    gc.freeze()
    result["opened_per_s"] = options.idle / (time.perf_counter() - began_s)
    result["idle_bytes_per_socket"] = (process.memory_info().rss - before) / options.idle
    with cpu_share(process, result, "idle_cpu_share"):
        await asyncio.sleep(seconds)
    result["http_with_idle"] = await feed_http(carry, inputs, time.perf_counter() + half_s)
    names = [stream_path(MODEL, f"active{at}") for at in range(options.active)]
    active, own = await open_sockets(url, names), psutil.Process()
    until_s = time.perf_counter() + seconds
    with cpu_share(process, result, "active_cpu_share"), cpu_share(own, result, "client_cpu_share"):
        *_, result["http_with_all"] = await asyncio.gather(
            *[each.feed(body, 1 / options.rate, until_s) for each in active],
            feed_http(carry, inputs, until_s),
        )
    answered = [latency_s for each in active for latency_s in each.latencies_s]
    result["active"] = percentiles(answered)
    result["active_chunks_per_s"] = len(answered) / seconds
    result["errors"] = sum(each.errors for each in active)
    result["unanswered"] = sum(len(each.sent_s) for each in active)
    everyone = [*idle, *active]
    result["closed"] = sum(each.connection.close_code is not None for each in everyone)
    for each in everyone:
        each.connection.transport.abort()
    await carry.close()
    return result


def main() -> None:
    """Start a service, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--active", type=int, default=500)
    parser.add_argument("--rate", type=float, default=2.0, help="chunks a second and active socket")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--pipelined", type=int, default=10_000, help="chunks over one socket")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pretrained = Path(models.__file__).parent / "pretrained"
    connections = str(options.idle + options.active + 100)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), pretrained, CARRY_MAX_CONNECTIONS=connections) as service,
    ):
        result = uvloop.run(measure(service, options))
        print(json.dumps(result, indent=2, default=lambda number: round(float(number), 3)))


if __name__ == "__main__":
    main()
