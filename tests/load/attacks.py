"""Denial-of-service tests: the effect of attacks on ordinary clients' latency and on memory.

    python -m tests.load.attacks                               # all, as a table in Markdown
    python -m tests.load.attacks --attack slow-heads --seconds 20

It starts a service with the pretrained model, a Valkey of its own and access keys. The attackers
run in another process; except in the attacks on keys, and in two over gRPC, they have a valid one,
which is the worst case. The clients use gRPC, and call a probe each time, where the attackers do.
Exits with 1 if an attacker was admitted beyond its key, or a client got an error or a wrong
position.
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
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import numpy as np
import orjson
import uvloop
from numpy.typing import NDArray

from service.access.caller import Verb
from service.access.keys import KeyText
from service.access.tokens import TokenClaims, sign_token
from tests.support.access import new_authorization
from tests.support.machine import describe_run, read_usage
from tests.support.models import PRETRAINED
from tests.support.servers import opened, real_server
from tests.support.service import Service, running
from tests.support.v2_messages import callable_of, infer_request, message_class

MIB = 2**20
MODEL = "/v1/models/flights"
VICTIM = f"{MODEL}/streams/victim"
INFERENCE = "/inference.GRPCInferenceService"
CLIENTS, ROWS, PAUSE_S, RAMP_S = 4, 16, 0.01, 3.0
PROBE = message_class("ServerLiveRequest")()


class Target(NamedTuple):
    """Where attackers connect, until when, and with which keys: a full one and a narrow one."""

    port: int
    grpc_address: str
    features: int
    key: str
    narrow_key: str
    until_s: float


def head(target: Target, path: str, length: int = 0, method: str = "POST", more: str = "") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {target.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n{more}\r\n"
    ).encode()


async def send(
    target: Target, parts: Iterable[bytes], pause_s: float = 0.0, *, reads: bool = True
) -> str:
    """Send parts on a new connection, then wait; returns the first status, or `closed`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    answer = asyncio.ensure_future(reader.readline() if reads else asyncio.sleep(3600, b""))
    try:
        for part in parts:
            if answer.done() and b" 101 " not in answer.result():
                break
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        status = (await answer)[9:12].decode() or "closed"
        if status == "101":
            await reader.read()
        return status
    finally:
        answer.cancel()
        writer.transport.abort()


async def unfinished_body(target: Target) -> str:
    return await send(target, [head(target, f"{VICTIM}/chunks", 16 * MIB), *[b" " * MIB] * 15])


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
    upgrade = (
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    )
    opening = head(target, f"{VICTIM}/live", 0, "GET", upgrade).replace(
        b"Content-Length: 0\r\n", b""
    )
    frame = b"\x01\xff" + (16 * MIB).to_bytes(8, "big") + bytes(4)
    return await send(target, [opening, frame, *[b" " * MIB] * 15], 0.02)


async def grpc_stream(target: Target) -> str:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target.grpc_address, options=options) as channel:
        method = channel.stream_stream(f"{INFERENCE}/ModelStreamInfer")
        call = method(metadata=[("authorization", target.key)])
        for _ in range(4):
            await call.write(bytes(4 * MIB - 1024))
        return str(await call.code())


async def silent_call(target: Target, path: str, key: str | None, message: bytes | None) -> str:
    """A call that sends one message or none, and does not end."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target.grpc_address, options=options) as channel:
        call = channel.stream_stream(path)(metadata=[("authorization", key)] if key else None)
        if message is not None:
            await call.write(message)
        return str(await call.code())


async def health_watch(target: Target) -> str:
    return await silent_call(target, "/grpc.health.v1.Health/Watch", None, b"")


async def silent_probe(target: Target) -> str:
    return await silent_call(target, f"{INFERENCE}/ServerLive", None, None)


async def silent_infer(target: Target) -> str:
    return await silent_call(target, f"{INFERENCE}/ModelInfer", target.key, None)


async def key_guess(target: Target) -> str:
    """Secrets of a key that exists, and of others."""
    key_id = os.urandom(6).hex() if os.urandom(1) < b"\x80" else target.key.split("_")[1]
    guess = target._replace(key=f"Bearer carry_{key_id}_{os.urandom(32).hex()}")
    return await send(guess, [head(guess, VICTIM, 0, "GET")])


async def token_forgery(target: Target) -> str:
    """Tokens that the key's holder did not sign, that claim more, and that are slow to match."""
    own, exp = KeyText(*target.narrow_key.split("_")[1:]), time.time() + 3600
    other = KeyText(target.key.split("_")[1], own.secret)
    slow = TokenClaims(exp=exp, models=("*a" * 24 + "*b",))
    claims = [(other, TokenClaims(exp=exp)), (own, TokenClaims(exp=exp, prefix="")), (own, slow)]
    thieves = [target._replace(key=f"Bearer {sign_token(*each)}") for each in claims]
    path = f"/v1/models/{'a' * 64}/streams/thief-1"
    statuses = [await send(thief, [head(thief, path, 0, "GET")]) for thief in thieves]
    return " ".join(sorted(set(statuses)))


async def scope_escape(target: Target) -> str:
    """Requests that a key of other streams must not make; 404 would reveal which streams exist."""
    thief = target._replace(key=target.narrow_key)
    reads = [VICTIM, f"{VICTIM}/state", f"{VICTIM}/outputs", f"{MODEL}/streams?prefix="]
    posts = [f"{VICTIM}/{each}" for each in ("fork", "chunks", "forecast")]
    routes = [("GET", path) for path in (*reads, "/metrics")] + [("POST", path) for path in posts]
    routes += [("DELETE", path) for path in (VICTIM, reads[-1])] + [("PUT", f"{VICTIM}/state")]
    requests = [head(thief, path, 2 * (way != "GET"), way) for way, path in routes]
    return " ".join(sorted({await send(thief, [each + b"{}"]) for each in requests}))


ATTACKS: dict[str, tuple[int, Callable[[Target], Awaitable[str]]]] = {
    "unfinished-bodies": (140, unfinished_body),
    "slow-heads": (500, slow_head),
    "idle-sockets": (2000, idle_socket),
    "huge-predicts": (8, huge_predict),
    "slow-readers": (100, slow_reader),
    "websocket-messages": (140, websocket_message),
    "grpc-streams": (32, grpc_stream),
    "grpc-watches": (1100, health_watch),
    "grpc-silent-probes": (200, silent_probe),
    "grpc-silent-calls": (120, silent_infer),
    "key-guessing": (8, key_guess),
    "scope-escapes": (8, scope_escape),
    "token-forgeries": (8, token_forgery),
}
PERMITTED = ("huge-predicts", "slow-readers", "websocket-messages", "grpc-streams")
"""Attacks whose requests a valid key permits: they may be answered with success."""


async def attack_until(
    target: Target, count: int, one: Callable[..., Awaitable[str]]
) -> Counter[str]:
    """Attack on so many connections, each repeatedly; counts the outcomes."""
    outcomes: Counter[str] = Counter()

    async def attack_repeatedly() -> None:
        while (left_s := target.until_s - time.monotonic()) > 0:
            try:
                outcomes[await asyncio.wait_for(one(target), left_s)] += 1
            except TimeoutError:
                outcomes["open"] += 1
            except grpc.aio.AioRpcError as error:
                outcomes[error.code().name] += 1
            except (OSError, EOFError, asyncio.InvalidStateError):
                outcomes["closed"] += 1
            await asyncio.sleep(0.02)

    await asyncio.gather(*[attack_repeatedly() for _ in range(count)])
    return outcomes


def attack(name: str, target: Target) -> Counter[str]:
    """Run an attack, in a process of its own, which takes no time from the service."""
    os.nice(10)
    return uvloop.run(attack_until(target, *ATTACKS[name]))


def cpu_s(pid: int) -> float:
    """CPU time of a process on Linux, in nanoseconds' resolution."""
    return time.clock_gettime(~pid << 3 | 2)


class Clients:
    """Ordinary clients, each with a stream of its own, one chunk after another."""

    def __init__(self, http: httpx.AsyncClient, channel: grpc.aio.Channel, pid: int, features: int):
        self._http, self._channel, self._pid = http, channel, pid
        self._metadata = (("authorization", http.headers["Authorization"]),)
        self._rows = np.zeros((ROWS, features))
        self._body = orjson.dumps({"inputs": self._rows.tolist()})
        self._positions = dict.fromkeys(["victim", *map(str, range(1, CLIENTS))], 0)
        self.errors = 0

    async def _send_http(self, name: str) -> int:
        reply = await self._http.post(f"{MODEL}/streams/{name}/chunks", content=self._body)
        return int(reply.json().get("position", 0))

    async def _send_grpc(self, name: str) -> int:
        try:
            await callable_of(self._channel, "ServerLive")(PROBE, timeout=30)
            chunk = infer_request("flights", self._rows, name)
            infer = callable_of(self._channel, "ModelInfer")
            reply = await infer(chunk, metadata=self._metadata, timeout=30)
        except grpc.aio.AioRpcError:
            return 0
        return int(reply.parameters["position"].int64_param)

    async def feed(self, seconds: float, *, uses_grpc: bool = False) -> NDArray[np.float64]:
        """Send chunks for so long; returns the 99th percentiles, in ms, of the latency and of the
        CPU time that the service used meanwhile, which other programs do not change."""
        measured, until_s = [], time.monotonic() + seconds

        async def feed_one(name: str) -> None:
            while time.monotonic() < until_s:
                began_s, used_s = time.perf_counter(), cpu_s(self._pid)
                position = await (self._send_grpc if uses_grpc else self._send_http)(name)
                measured.append((time.perf_counter() - began_s, cpu_s(self._pid) - used_s))
                self.errors += position != self._positions[name] + ROWS
                self._positions[name] = position or self._positions[name]
                await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*map(feed_one, self._positions))
        return np.asarray(1000 * np.percentile(measured, 99, axis=0))


async def measure(service: Service, store_url: str, options: argparse.Namespace) -> int:
    """Run the attacks one after another, print a row for each; returns the exit status."""
    async with opened(store_url) as store:
        key = await new_authorization(store.keys)
        verbs = tuple(set(Verb) - {Verb.METRICS})
        narrow = await new_authorization(store.keys, verbs=verbs, prefix="thief-")
    await asyncio.sleep(2)  # until the service knows the keys
    headers = {"Authorization": key, "Content-Type": "application/json"}
    http = httpx.AsyncClient(base_url=service.url, headers=headers, timeout=30)
    pid = service.process.pid
    features = (await http.get(MODEL)).json()["input_features"]
    channel = grpc.aio.insecure_channel(service.grpc_address())
    clients, failed = Clients(http, channel, pid, features), False
    loop, port = asyncio.get_running_loop(), int(service.url.rpartition(":")[2])
    print("| attack | connections | p99 without | with it | CPU time without | with it "
        "| memory before | peak | responses |")  # fmt: skip
    print("|" + " --- |" * 9)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        await loop.run_in_executor(pool, os.getpid)  # imports this module there
        await clients.feed(2)
        for name in options.attack or ATTACKS:
            uses_grpc = name.startswith("grpc")
            alone = await clients.feed(options.seconds, uses_grpc=uses_grpc)
            before = read_usage(pid).memory_bytes
            until_s = time.monotonic() + options.seconds + RAMP_S
            target = Target(port, service.grpc_address(), features, key, narrow, until_s)
            attacking = loop.run_in_executor(pool, attack, name, target)
            await asyncio.sleep(RAMP_S)
            feed = clients.feed(options.seconds, uses_grpc=uses_grpc)
            feeding, most = asyncio.create_task(feed), before
            while not feeding.done():
                most = max(most, read_usage(pid).memory_bytes)
                await asyncio.wait([feeding], timeout=0.05)
            got = await attacking
            failed |= name not in PERMITTED and any(each[:1] == "2" or " 2" in each for each in got)
            print(
                f"| {name} | {ATTACKS[name][0]:,} "
                f"| {alone[0]:.1f} ms | {feeding.result()[0]:.1f} ms "
                f"| {alone[1]:.1f} ms | {feeding.result()[1]:.1f} ms "
                f"| {before // MIB} MiB | {most // MIB} MiB "
                f"| {', '.join(f'{each}: {number:,}' for each, number in got.most_common(4))} |",
                flush=True,
            )
    print(f"\nclients: {clients.errors} errors; {describe_run()}")
    return int(failed or clients.errors > 0)


def main() -> int:
    """Start store and service, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attack", action="append", choices=ATTACKS)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with (
        tempfile.TemporaryDirectory() as folder,
        real_server("valkey") as store,
        running(Path(folder), PRETRAINED, redis_url=store.url, CARRY_GRPC_PORT="0") as service,
    ):
        return uvloop.run(measure(service, store.url, options))


if __name__ == "__main__":
    sys.exit(main())
