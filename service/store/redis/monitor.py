"""Monitor of a store: whether its servers accept commits, checked on request and periodically.

Each check reads the configuration of every primary and runs a trial commit on it, with the script
of all commits, on a key that expires after a millisecond: a server whose memory is full, whose disk
fails or whose user may not run scripts answers PING and yet rejects every chunk.

    unavailable   the server does not answer, rejects commits, or lacks replicas: its streams wait
                  or fail, others are served. The store is ready while one primary is available.
    unsafe        the server is not configured as the settings require (it may evict keys, or
                  syncs too late): streams could be lost silently. The store is not ready, as the
                  service rejects such a server at start.

It also counts the streams of each model in bounded time, however many there are. A server with at
most `SAMPLE_KEYS` keys is scanned, and its counts are exact. A larger one is sampled: of
`SAMPLE_KEYS` random keys (RANDOMKEY), each stands for as many keys as the server has, divided by
the sample. The standard error of a model that has a share p of the keys is
sqrt(p (1 - p) / SAMPLE_KEYS) of all keys, 1.6 % of them at most. Per server it takes 2,000 short
commands, in pipelines of `KEYS_PER_ROUND_TRIP`, so that no commit waits long behind one.

Use from one event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Final

import structlog

from service.core.errors import CarryError, StoreUnavailable
from service.core.values import Check, ServerStatus
from service.store.capabilities import LIVE_S, StoreMonitor, StreamCount
from service.store.keys import KeySpace
from service.store.layout import HEADER_BYTES, CodecError, StateHeader
from service.store.redis.commands import Command, Script
from service.store.redis.connections import end_tasks
from service.store.redis.pipelined_connection import RedisServer
from service.store.redis.router import Router
from service.store.redis.scan import scan_page, scan_step
from service.store.redis.server_checks import (
    PROBE_TIMEOUT_S,
    ServerFault,
    find_fault,
    memory_ratio,
    parse_info,
)

RECHECK_INTERVAL_S: Final = 30.0
"""Interval of checks when no client asks for readiness."""

SAMPLE_KEYS: Final = 1_000
KEYS_PER_ROUND_TRIP: Final = 100

log = structlog.get_logger(__name__)


class RedisMonitor(StoreMonitor):
    """Monitor of a store; concurrent callers share one check.

    Args:
        commit_script: the script that writes streams.
    """

    def __init__(self, router: Router, commit_script: Script):
        self.telemetry = router.telemetry
        self._router = router
        self._settings = router.settings
        self._commit_script = commit_script
        self._checking: asyncio.Task[Check] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._last_faults: tuple[ServerFault, ...] = ()
        self._memory_ratios: dict[RedisServer, float] = {}

    def start(self) -> None:
        """Start the periodic checks; once, inside the event loop."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """Stop the checks; before the connections are closed."""
        await end_tasks(self._watcher, self._checking)

    async def check(self) -> Check:
        """Check the servers now. Never raises."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.get_running_loop().create_task(self._check())
        return await asyncio.shield(self._checking)

    async def count_streams(self) -> dict[str, StreamCount]:
        keys, totals = self._settings.keys, defaultdict[str, StreamCount](StreamCount)
        for server in (await self._router.layout()).servers:
            for model, count in (await _count_on(server, keys)).items():
                added = [a + b for a, b in zip(totals[model], count, strict=True)]
                totals[model] = StreamCount(*added)
        return dict(totals)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RECHECK_INTERVAL_S)
            await self.check()

    async def _check(self) -> Check:
        telemetry = self.telemetry
        try:
            layout = await self._router.layout()
        except CarryError as error:
            telemetry.is_up = False
            self._log_changes([ServerFault(error.detail)])
            return Check("store", False, error.detail)
        probes = self._probes(layout.servers)
        results = await asyncio.gather(
            *(self._check_server(server, probes.get(server)) for server in layout.servers)
        )
        faults = [each for each in results if each is not None]
        statuses = tuple(
            ServerStatus(server.redacted_url, "up")
            if fault is None
            else ServerStatus(
                server.redacted_url, "unsafe" if fault.is_unsafe else "down", fault.detail
            )
            for server, fault in zip(layout.servers, results, strict=True)
        )
        is_serving = len(faults) < len(layout.servers)
        is_safe = not any(each.is_unsafe for each in faults)
        telemetry.is_up = is_serving and is_safe
        telemetry.servers_up = len(layout.servers) - len(faults)
        telemetry.servers_down = len(faults)
        # a server that does not answer keeps its last ratio
        self._memory_ratios = {s: self._memory_ratios.get(s, 0.0) for s in layout.servers}
        telemetry.memory_ratio = max(self._memory_ratios.values(), default=0.0)
        if layout.coverage_error:
            faults.insert(0, ServerFault(layout.coverage_error))
        self._log_changes(faults)
        detail = "; ".join(each.detail for each in faults)
        return Check(
            "store",
            telemetry.is_up,
            detail or f"{self._router.redacted_url} accepts commits",
            degraded=telemetry.is_up and bool(faults),
            servers=statuses,
        )

    def _probes(self, servers: Collection[RedisServer]) -> dict[RedisServer, Command]:
        """Make a trial commit for each server that has a partition, on a key that it stores."""
        probes: dict[RedisServer, Command] = {}
        name = secrets.token_hex(4)
        for partition in range(self._settings.partitions):
            if len(probes) == len(servers):
                break
            key = self._settings.keys.probe(partition, name)
            server = self._router.server_of(self._router.slot(key))
            if server is not None and server not in probes:
                # It expects no stream; state and reply expire after 1 ms. It writes a reply,
                # because a full server lets a script continue that has deleted something.
                text, reply_key = self._commit_script.text, f"{key}:reply"
                probes[server] = ("EVAL", text, 2, key, reply_key, 1, 1, "", "state", "reply")
        return probes

    async def _check_server(self, server: RedisServer, probe: Command | None) -> ServerFault | None:
        try:
            info = parse_info(await server.execute_once(PROBE_TIMEOUT_S, "INFO"))
            self._memory_ratios[server] = memory_ratio(info)
            fault = await find_fault(server, info, self._settings)
            if fault is not None:
                return fault
            if probe is not None:
                [result] = await server.execute_once(PROBE_TIMEOUT_S, *probe)
                if result[0] != 1:
                    message = b" ".join(result[1:]).decode("utf-8", "replace")
                    return ServerFault(f"{server.redacted_url} refuses commits: {message}")
        except CarryError as error:
            return ServerFault(error.detail)
        return None

    def _log_changes(self, faults: Iterable[ServerFault]) -> None:
        """Log faults that differ from those of the last check."""
        now = tuple(faults)
        if now == self._last_faults:
            return
        self._last_faults = now
        if not now:
            log.info("store_recovered", store=self._router.redacted_url)
        for fault in now:
            level = log.error if fault.is_unsafe else log.warning
            level("store_degraded", store=self._router.redacted_url, reason=fault.detail)


async def _count_on(server: RedisServer, keys: KeySpace) -> dict[str, StreamCount]:
    total = int(await server.read("DBSIZE"))
    if total <= SAMPLE_KEYS:
        # in bounded steps: a server that grows meanwhile is not scanned forever
        step = scan_step(server, keys)
        streams, _ = await scan_page(step, 0, 2 * SAMPLE_KEYS, KEYS_PER_ROUND_TRIP)
        weight = 1.0
    else:
        parsed = map(keys.parse, await _sample(server))
        streams, weight = [key for key in parsed if key is not None], total / SAMPLE_KEYS
    live_since_ms = (time.time() - LIVE_S) * 1000
    counts: defaultdict[str, StreamCount] = defaultdict(StreamCount)
    for at in range(0, len(streams), KEYS_PER_ROUND_TRIP):
        part = streams[at : at + KEYS_PER_ROUND_TRIP]
        headers = await server.read_many(
            [("GETRANGE", keys.state(key), 0, HEADER_BYTES - 1) for key in part]
        )
        for key, header in zip(part, headers, strict=True):
            if isinstance(header, Exception):  # of a stream that is migrating
                continue
            with suppress(CodecError):
                state = StateHeader.decode(header)
                if state.is_tombstone:
                    continue
                stored, live, state_bytes = counts[key.model]
                counts[key.model] = StreamCount(
                    stored + weight,
                    live + weight * (state.updated_ms >= live_since_ms),
                    state_bytes + weight * state.size_bytes,
                )
    return dict(counts)


async def _sample(server: RedisServer) -> list[str]:
    """Random keys of a server, with repetitions."""
    names: list[str] = []
    commands = [("RANDOMKEY",)] * KEYS_PER_ROUND_TRIP
    while len(names) < SAMPLE_KEYS:
        replies = await server.read_many(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                await server.read("RANDOMKEY")  # raises what the server rejects
                raise StoreUnavailable(f"{server.redacted_url}: {reply}") from reply
            names.append("" if reply is None else reply.decode("utf-8", "replace"))
    return names
