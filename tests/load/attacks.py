"""Hostile load on a service beside an ordinary client: its latency, the service's memory, answers.

    python -m tests.load.attacks          # all, as a table in Markdown
    python -m tests.load.attacks --attack slow-heads --seconds 20

It starts a service with the pretrained model, a Valkey of its own and access keys. The attackers
run in another process; except in the attacks on keys they have a valid one, which is the worst
case. Exits with 1 if an attacker was let in, or the client got an error or a wrong position.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import numpy as np
import orjson
import uvloop

import models
from service.access.principal import Verb
from tests.support.access import new_authorization
from tests.support.machine import describe_run, read_usage
from tests.support.servers import opened, real_server
from tests.support.service import Service, running

MIB = 2**20
MODEL = f"/v1/models/{(NAME := 'flights')}"
CLIENTS, ROWS, PAUSE_S = 4, 16, 0.01
ANSWER_S = 1.0


class Target(NamedTuple):
    """Where attackers connect, until when, and with which keys: a full one and a narrow one."""

    port: int
    grpc_address: str
    features: int
    key: str
    narrow_key: str
    until_s: float


Outcomes = Counter[str]
"""What attackers got: statuses, `closed` without an answer, `open` until the end."""


async def repeat(target: Target, count: int, one: Callable[..., Awaitable[str]]) -> Outcomes:
    """Run an attack on so many connections, each again whenever it ends, and count its outcomes."""
    outcomes: Outcomes = Counter()

    async def again() -> None:
        while (left_s := target.until_s - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    outcomes[await one(target)] += 1
            except TimeoutError:
                outcomes["open"] += 1
            except (OSError, EOFError, grpc.RpcError) as error:
                is_rpc = isinstance(error, grpc.aio.AioRpcError)
                outcomes[error.code().name if is_rpc else "closed"] += 1
                await asyncio.sleep(0.02)

    await asyncio.gather(*[again() for _ in range(count)])
    return outcomes


async def send(target: Target, parts: Any, pause_s: float = 0.0, *, reads: bool = True) -> str:
    """Send parts on a new connection, then wait; returns the status, or `closed`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port, limit=2**16)
    try:
        answer = asyncio.ensure_future(reader.readline() if reads else asyncio.Event().wait())
        for part in parts:
            if answer.done() or writer.is_closing():
                break
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        line = bytes(await answer).split()
        return line[1].decode() if len(line) > 1 else "closed"
    finally:
        writer.transport.abort()


def head(target: Target, path: str, length: int, method: str = "POST") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: carry\r\nAuthorization: {target.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def unfinished_body(target: Target) -> str:
    parts = [head(target, f"{MODEL}/streams/attack/chunks", 16 * MIB), *[b" " * MIB] * 15]
    return await send(target, parts)


async def slow_head(target: Target) -> str:
    return await send(target, [b"GET / HTTP/1.1\r\nX: ", *[b"a"] * 10_000], 1.0)


async def idle_socket(target: Target) -> str:
    return await send(target, [])


async def huge_predict(target: Target) -> str:
    row = b"[%s]" % b",".join([b"0"] * target.features)
    body = b'{"sequences":[{"inputs":[%s]}]}' % b",".join([row] * 100_000)
    return await send(target, [head(target, f"{MODEL}/predict", len(body)), body])


async def slow_reader(target: Target) -> str:
    return await send(target, [head(target, "/openapi.json", 0, "GET") * 20] * 50, reads=False)


async def websocket_message(target: Target) -> str:
    upgrade = head(target, f"{MODEL}/streams/attack/live", 0, "GET").replace(
        b"Content-Length: 0\r\n\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    )
    frame = b"\x01\xff" + (16 * MIB).to_bytes(8, "big") + bytes(4)
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        writer.write(upgrade)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(frame)
        for _ in range(15):
            writer.write(b" " * MIB)
            await writer.drain()
        while await reader.read(2**16):
            pass
        return "closed"
    finally:
        writer.transport.abort()


async def grpc_stream(target: Target) -> str:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target.grpc_address, options=options) as channel:
        method = "/inference.GRPCInferenceService/ModelStreamInfer"
        call = channel.stream_stream(method)(metadata=[("authorization", target.key)])
        for _ in range(4):
            await call.write(bytes(15 * MIB))
        return str(await call.code())


async def key_guess(target: Target) -> str:
    guess = target._replace(key=f"Bearer carry_{os.urandom(8).hex()}_{os.urandom(32).hex()}")
    return await send(guess, [head(guess, f"{MODEL}/streams/victim", 0, "GET")])


async def scope_escape(target: Target) -> str:
    """Every route that the narrow key must not use; 404 would tell which streams exist."""
    escape = target._replace(key=target.narrow_key)
    stream = f"{MODEL}/streams/victim"
    routes = [
        *[("GET", stream), ("DELETE", stream), ("GET", f"{stream}/state")],
        *[("PUT", f"{stream}/state"), ("POST", f"{stream}/fork"), ("POST", f"{stream}/chunks")],
        *[("POST", f"{stream}/forecast"), ("GET", f"{stream}/outputs"), ("GET", "/metrics")],
        *[("GET", f"{MODEL}/streams?prefix="), ("DELETE", f"{MODEL}/streams?prefix=")],
        *[("GET", f"{stream}/live"), ("DELETE", f"{MODEL}/streams?prefix=attacker")],
    ]
    statuses = set()
    for method, path in routes:
        body = b"" if method == "GET" else b"{}"
        statuses.add(await send(escape, [head(escape, path, len(body), method) + body]))
    return " ".join(sorted(statuses))


ATTACKS: dict[str, tuple[int, Callable[[Target], Awaitable[str]]]] = {
    "unfinished-bodies": (140, unfinished_body),
    "slow-heads": (500, slow_head),
    "idle-sockets": (2000, idle_socket),
    "huge-predicts": (8, huge_predict),
    "slow-readers": (100, slow_reader),
    "websocket-messages": (140, websocket_message),
    "grpc-streams": (32, grpc_stream),
    "key-guessing": (8, key_guess),
    "scope-escapes": (8, scope_escape),
}
REJECTED = {"unfinished-bodies", "slow-heads", "key-guessing", "scope-escapes"}
"""Attacks none of whose requests may be answered with success."""


def attack(name: str, target: Target) -> Outcomes:
    """Run an attack; in a process of its own, since attackers share no cores with the service."""
    os.nice(10)
    count, one = ATTACKS[name]
    return uvloop.run(repeat(target, count, one))


class Client:
    """Ordinary clients, each with a stream of its own, one chunk after another."""

    def __init__(self, url: str, key: str, body: bytes):
        headers = {"Authorization": key, "Content-Type": "application/json"}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=30)
        self._body = body
        self._positions = dict.fromkeys(["victim", *map("client{}".format, range(1, CLIENTS))], 0)
        self.errors = 0

    async def feed(self, seconds: float) -> list[float]:
        """Send chunks for so long; returns the latencies in seconds."""
        latencies_s: list[float] = []

        async def feed_one(name: str) -> None:
            while time.monotonic() < until_s:
                began_s = time.perf_counter()
                path = f"{MODEL}/streams/{name}/chunks"
                reply = await self._http.post(path, content=self._body)
                latencies_s.append(time.perf_counter() - began_s)
                self._positions[name] += ROWS
                found = reply.json().get("position") if reply.status_code == 200 else None
                self.errors += found != self._positions[name]
                await asyncio.sleep(PAUSE_S)

        until_s = time.monotonic() + seconds
        await asyncio.gather(*map(feed_one, self._positions))
        return latencies_s


async def measure(service: Service, store_url: str, options: argparse.Namespace) -> int:
    """Run the attacks one after another; print a row each, and return how many failed."""
    async with opened(store_url) as store:
        key = await new_authorization(store)
        verbs = tuple(set(Verb) - {Verb.METRICS})
        narrow = await new_authorization(store, verbs=verbs, models=(NAME,), prefix="attacker-")
    await asyncio.sleep(2)
    async with httpx.AsyncClient(base_url=service.url, headers={"Authorization": key}) as http:
        features = (await http.get(MODEL)).json()["input_features"]
    client = Client(service.url, key, orjson.dumps({"inputs": np.zeros((ROWS, features)).tolist()}))
    await client.feed(2)
    failed, loop = 0, asyncio.get_running_loop()
    print("| attack | connections | p99 alone | p99 beside it | memory before | most | answers |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        await loop.run_in_executor(pool, os.getpid)  # imports this module there
        for name in options.attack or ATTACKS:
            alone, before = await client.feed(options.seconds), read_usage(service.process.pid)
            until_s = time.monotonic() + options.seconds + ANSWER_S
            port = int(service.url.rpartition(":")[2])
            target = Target(port, service.grpc_address(), features, key, narrow, until_s)
            attacking = loop.run_in_executor(pool, attack, name, target)
            await asyncio.sleep(ANSWER_S)
            feeding = asyncio.create_task(client.feed(options.seconds))
            most_bytes = before.rss_bytes
            while not feeding.done():
                most_bytes = max(most_bytes, read_usage(service.process.pid).rss_bytes)
                await asyncio.wait([feeding], timeout=0.05)
            outcomes = await attacking
            let_in = [each for each in outcomes if each.startswith(("1", "2")) or " 2" in each]
            failed += bool(client.errors or (name in REJECTED and let_in))
            p99_ms = [1000 * np.percentile(each, 99) for each in (alone, feeding.result())]
            answers = ", ".join(f"{each}: {number:,}" for each, number in outcomes.most_common(4))
            print(
                f"| {name} | {ATTACKS[name][0]:,} | {p99_ms[0]:.1f} ms | {p99_ms[1]:.1f} ms | "
                f"{before.rss_bytes // MIB} MiB | {most_bytes // MIB} MiB | {answers} |",
                flush=True,
            )
    print(f"\nerrors of the client: {client.errors}; {describe_run()}")
    return failed


def main() -> int:
    """Start store and service, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attack", action="append", choices=ATTACKS)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pretrained = Path(models.__file__).parent / "pretrained"
    with (
        tempfile.TemporaryDirectory() as folder,
        real_server("valkey") as store,
        running(Path(folder), pretrained, redis_url=store.url, CARRY_GRPC_PORT="0") as service,
    ):
        return min(1, uvloop.run(measure(service, store.url, options)))


if __name__ == "__main__":
    sys.exit(main())
