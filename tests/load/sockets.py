"""Many live sockets on one worker: memory of an idle one, latency of the active ones and of HTTP.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import psutil
import uvloop
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

import models
from tests.support.service import Service, running

OPENED_AT_ONCE = 100
MODEL = "flights"
ROWS = 16


class Client(asyncio.Protocol):
    """A live socket by the sans-I/O client of the `websockets` library."""

    def __init__(self, url: str):
        self._websocket = ClientProtocol(parse_uri(url), max_size=None)
        self._sent_s: list[float] = []
        self.latencies_s: list[float] = []
        self.errors = 0
        self._answer = asyncio.Event()
        self.is_open = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._websocket.send_request(self._websocket.connect())
        self._write()

    def data_received(self, data: bytes) -> None:
        self._websocket.receive_data(data)
        for event in self._websocket.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self._on_message(bytes(event.data))
        self._write()

    def _on_message(self, message: bytes) -> None:
        if not self.is_open.done():
            self.is_open.set_result(orjson.loads(message)["hello"])
            return
        self.errors += b'"status":200' not in message[:40]
        self.latencies_s.append(time.perf_counter() - self._sent_s.pop(0))
        self._answer.set()

    async def answered(self, count: int) -> None:
        """Wait until at least this many chunks are answered."""
        while len(self.latencies_s) < count:
            self._answer.clear()
            await self._answer.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.is_open.done():
            self.is_open.set_exception(ConnectionError("closed before the hello"))

    def send(self, frame: bytes) -> None:
        """Send a chunk."""
        self._sent_s.append(time.perf_counter())
        self._websocket.send_text(frame)
        self._write()

    def close(self) -> None:
        self._transport.abort()

    def _write(self) -> None:
        for part in self._websocket.data_to_send():
            self._transport.write(part)


async def open_sockets(url: str, count: int, prefix: str | None) -> list[Client]:
    """Open sockets of different streams, some at a time; without a prefix, for many streams."""
    address = httpx.URL(url)
    loop, clients = asyncio.get_running_loop(), []
    for first in range(0, count, OPENED_AT_ONCE):
        paths = [
            "live" if prefix is None else f"streams/{prefix}{at}/live"
            for at in range(first, min(first + OPENED_AT_ONCE, count))
        ]
        opened = await asyncio.gather(
            *[
                loop.create_connection(
                    lambda path=path: Client(
                        f"ws://{address.host}:{address.port}/v1/models/{MODEL}/{path}"
                    ),
                    address.host,
                    address.port,
                )
                for path in paths
            ]
        )
        part = [client for _, client in opened]
        await asyncio.gather(*[client.is_open for client in part])
        clients += part
    return clients


async def feed(client: Client, body: bytes, interval_s: float, until_s: float) -> None:
    """Send chunks at a fixed rate, whether they are answered or not."""
    next_s = time.perf_counter() + np.random.default_rng(id(client)).uniform(0, interval_s)
    while next_s < until_s:
        await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
        client.send(body)
        next_s += interval_s


async def feed_http(url: str, body: bytes, until_s: float) -> list[float]:
    """Send chunks one after another over HTTP; their latencies."""
    latencies_s = []
    async with httpx.AsyncClient(base_url=url) as client:
        while time.perf_counter() < until_s:
            began_s = time.perf_counter()
            response = await client.post(
                f"/v1/models/{MODEL}/streams/over-http/chunks",
                content=body,
                headers={"content-type": "application/json"},
            )
            response.raise_for_status()
            latencies_s.append(time.perf_counter() - began_s)
            await asyncio.sleep(0.01)
    return latencies_s


def milliseconds(latencies_s: Sequence[float]) -> dict[str, float]:
    """Percentiles."""
    p50, p99, top = np.percentile(latencies_s, [50, 99, 100]) * 1000
    return {"count": len(latencies_s), "p50_ms": p50, "p99_ms": p99, "max_ms": top}


async def pipelined(url: str, inputs: list[list[float]], count: int, streams: int) -> float:
    """Chunks per second over one socket for many streams, with half a window on its way."""
    [client] = await open_sockets(url, 1, None)
    window = client.is_open.result()["window"] // 2
    frames = [
        orjson.dumps(
            {"stream": f"p{at % streams}", "position": at // streams * ROWS, "inputs": inputs}
        )
        for at in range(count)
    ]
    began_s = time.perf_counter()
    for at, frame in enumerate(frames):
        await client.answered(at - window)
        client.send(frame)
    await client.answered(count)
    client.close()
    return count / (time.perf_counter() - began_s)


async def measure(service: Service, options: argparse.Namespace) -> dict[str, Any]:
    """Open the sockets, send the chunks."""
    assert service.process is not None
    process = psutil.Process(service.process.pid)
    async with httpx.AsyncClient(base_url=service.url) as client:
        features = (await client.get(f"/v1/models/{MODEL}")).json()["input_features"]
    inputs = np.zeros((ROWS, features)).tolist()
    body = orjson.dumps({"inputs": inputs})
    result: dict[str, Any] = {"rows": ROWS, "body_bytes": len(body)}
    alone = await feed_http(service.url, body, time.perf_counter() + options.seconds / 2)
    result["http_alone"] = milliseconds(alone)
    for streams in (1, 100):
        cpu_s = sum(process.cpu_times()[:2])
        rate = await pipelined(service.url, inputs, options.pipelined, streams)
        used_s = sum(process.cpu_times()[:2]) - cpu_s
        result[f"pipelined_{streams}_streams"] = {
            "chunks_per_s": rate,
            "service_cpu_us_per_chunk": used_s / options.pipelined * 1e6,
        }
    before = process.memory_info().rss
    began_s = time.perf_counter()
    idle = await open_sockets(service.url, options.idle, "idle")
    # a full collection of this process would be measured as latency
    gc.freeze()
    result["opened_per_s"] = options.idle / (time.perf_counter() - began_s)
    result["idle_bytes_per_socket"] = (process.memory_info().rss - before) / options.idle
    cpu_s = sum(process.cpu_times()[:2])
    await asyncio.sleep(options.seconds)
    result["idle_cpu_share"] = (sum(process.cpu_times()[:2]) - cpu_s) / options.seconds
    with_idle = await feed_http(service.url, body, time.perf_counter() + options.seconds / 2)
    result["http_with_idle"] = milliseconds(with_idle)
    active = await open_sockets(service.url, options.active, "active")
    until_s = time.perf_counter() + options.seconds
    cpu_s, own_cpu_s = sum(process.cpu_times()[:2]), time.process_time()
    *_, over_http = await asyncio.gather(
        *[feed(each, body, 1 / options.rate, until_s) for each in active],
        feed_http(service.url, body, until_s),
    )
    await asyncio.sleep(1)
    result["active_cpu_share"] = (sum(process.cpu_times()[:2]) - cpu_s) / (options.seconds + 1)
    result["client_cpu_share"] = (time.process_time() - own_cpu_s) / (options.seconds + 1)
    answered = [latency for each in active for latency in each.latencies_s]
    result["active"] = milliseconds(answered)
    result["active_chunks_per_s"] = len(answered) / options.seconds
    result["http_with_all"] = milliseconds(over_http)
    result["errors"] = sum(each.errors for each in active)
    result["unanswered"] = sum(len(each._sent_s) for each in active)
    result["closed"] = sum(each._transport.is_closing() for each in [*idle, *active])
    for each in [*idle, *active]:
        each.close()
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
