"""The way to a Redis Cluster: each request to the node that has its slot.

One lane for each primary. Requests of one slot go to one lane, so that what was asked first is
carried out first, as on a single server. The map of slots is read at the start, and again when
a node sends a request elsewhere, puts it off or does not answer: by one task at a time, after
a jittered pause, from whichever node answers.

    MOVED        the slot has another node: it is noted, and the request goes there
    ASK          the slot is being moved, these keys already were: asked there, this once
    TRYAGAIN     the slot is being moved, some of the keys were: asked again after a pause
    CLUSTERDOWN  no majority, or nobody has the slot: asked again after a pause
    node gone    as soon as the map names another, what the lost node owes goes there, as
                 requests that may have been carried out already

While the map changes, requests of one stream may overtake each other: one waits in a pause, the
next finds its node at once. That is enough, because no request relies on its order. A commit
expects the head that the one before it writes; it comes too early, and is a conflict, and its
chunk is judged anew. One that is repeated on another node finds its own head, or what it
expected, or neither, and is settled as on a single server. Order only saves these detours.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

import structlog
from redis.backoff import EqualJitterBackoff
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, TryAgainError

from service.core.errors import CarryError, StoreRefused, StoreUnavailable
from service.store.redis.connections import RETRY_AFTER_S, TRIES
from service.store.redis.pipelined_connection import MAX_PAUSE_S, PAUSE_S, Lane
from service.store.redis.redis_server import Server
from service.store.redis.router import Layout, Link
from service.store.redis.store_request import Request
from service.store.redis.topology import Address, Topology, node_url, read_topology, seeds
from service.store.settings import StoreSettings

REFRESH_S: Final = 0.1
"""Least time between two looks at the map, half of it jitter."""

ASKED_S: Final = 1.0
"""How long one node may take to give the map before another is asked."""

NO_NODE: Final = "none"

log = structlog.get_logger(__name__)


class ClusterLink(Link):
    """The way to the nodes of a cluster.

    Raises:
        StoreRefused: the address cannot be used.
    """

    def __init__(self, settings: StoreSettings):
        super().__init__(settings)
        self._settings = settings
        self._seeds = seeds(settings.url)
        self._asked_s = min(ASKED_S, settings.wait_s / TRIES)
        scheme = settings.url.partition("://")[0]
        self.where = f"{scheme}://{','.join(map(str, self._seeds))}"
        self._servers = {seed: self._open(seed) for seed in self._seeds}
        self._map: Topology | None = None
        self._owners: list[Address | None] = []
        self._refreshing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._last: CarryError | None = None
        self._backoff = EqualJitterBackoff(cap=MAX_PAUSE_S, base=PAUSE_S)

    async def start(self) -> None:
        failures = 0
        try:
            async with asyncio.timeout(self._wait_s):
                while (error := await self._look()) is not None:
                    if isinstance(error, StoreRefused):
                        raise error
                    if failures == 0:
                        log.warning("store_away", store=self.where, reason=error.detail)
                    await asyncio.sleep(self._backoff.compute(failures))
                    failures += 1
        except TimeoutError:
            raise self._unavailable() from self._last

    async def close(self) -> None:
        for task in (*self._tasks, *([self._refreshing] if self._refreshing else [])):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in list(self._servers.values()):
            await server.close()

    def slot(self, key: str) -> int:
        """The cluster's hash slot."""
        return key_slot(key.encode())

    def owner(self, slot: int) -> Address | str:
        """The address of a slot's node; `NO_NODE` if it has none."""
        return (self._owners[slot] if self._owners else None) or NO_NODE

    async def layout(self) -> Layout:
        error = await self._look()
        if error is not None or self._map is None:
            raise self._unavailable() from error
        servers = [self._server(address) for address in self._map.primaries]
        gap = f"{self._map.uncovered} slots have no node" if self._map.uncovered else ""
        return Layout(self._map.layout, servers, gap)

    def server_of(self, slot: int) -> Server | None:
        owner = self._owners[slot] if self._owners else None
        return None if owner is None else self._server(owner)

    def others(self) -> list[Server]:
        return [self._server(address) for address in self._map.replicas] if self._map else []

    def reconnect(self) -> None:
        self._refresh_soon()

    # What lanes tell

    def redirected(self, request: Request, error: RedisError) -> bool:
        """Send a request elsewhere, or again later; nothing of it was carried out."""
        if not isinstance(error, (AskError, TryAgainError, ClusterDownError)):
            return False
        request.put_off = error
        request.asking = False
        first = request.hops == 0
        request.hops += 1
        if isinstance(error, AskError):
            lane = request.lane
            asked = self._address_of(lane)
            target = Address(error.host or (asked.host if asked else ""), error.port)
            if isinstance(error, MovedError):
                self._owners[error.slot_id] = target
                self._refresh_soon()
                if not first:
                    # Two nodes may send it to and fro until they agree.
                    self._spawn(self._again(request, self._backoff.compute(request.hops)))
                    return True
            else:
                request.asking = True
            self._spawn(self._to(self._server(target).lane, request))
            return True
        if isinstance(error, ClusterDownError):
            self._refresh_soon()
        self._spawn(self._again(request, self._backoff.compute(request.hops)))
        return True

    def away(self) -> None:
        """A node does not answer: another may have taken its place."""
        self._refresh_soon()

    # Requests

    def _place(self, requests: Sequence[Request]) -> Sequence[Lane]:
        lanes: dict[Lane, list[Request]] = {}
        for request in requests:
            owner = self._owners[request.slot]
            if owner is None:
                request.hops += 1
                self._refresh_soon()
                self._spawn(self._again(request, self._backoff.compute(request.hops)))
            else:
                lanes.setdefault(self._server(owner).lane, []).append(request)
        for lane, group in lanes.items():
            lane.put(group)
        return list(lanes)

    def _trouble(self) -> BaseException | None:
        return self._last

    async def _again(self, request: Request, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        if not request.future.done():
            for lane in self._place((request,)):
                lane.flush()

    async def _to(self, lane: Lane, request: Request) -> None:
        if not request.future.done():
            lane.put((request,))
            lane.flush()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The map

    def _refresh_soon(self) -> None:
        """Look at the map, unless somebody does already."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

    async def _refresh(self) -> None:
        # Jitter: all workers lose a node at once, and need not ask for the map at once.
        await asyncio.sleep(random.uniform(0, REFRESH_S / 2))  # noqa: S311
        await self._look()
        await asyncio.sleep(random.uniform(REFRESH_S / 2, REFRESH_S))  # noqa: S311

    async def _look(self) -> CarryError | None:
        """Read the map from the first node that gives it; why none did."""
        known = list({*self._servers, *self._seeds})
        random.shuffle(known)
        errors: list[CarryError] = []
        for address in known:
            try:
                reply = await self._server(address).try_once(self._asked_s, "CLUSTER", "SLOTS")
                found = read_topology(reply, address)
            except CarryError as error:
                errors.append(error)
                continue
            if found.primaries:
                self._adopt(found)
                return None
            errors.append(StoreUnavailable(f"{address} knows of no node that has slots"))
        # A node that is away may still give it; where all refuse, they will go on to.
        self._last = next((e for e in errors if isinstance(e, StoreUnavailable)), errors[0])
        return self._last

    def _adopt(self, found: Topology) -> None:
        """Take a map over, and what the nodes owe that have no slots any more."""
        if self._map is None or found.layout != self._map.layout:
            log.info(
                "cluster_layout",
                store=self.where,
                primaries=[str(address) for address in found.primaries],
                uncovered_slots=found.uncovered,
            )
        self._map, self._owners = found, list(found.owners)
        for address in self._servers.keys() - {*found.primaries}:
            lane = self._servers[address].lane
            if not lane.is_answering:
                for request in lane.hand_over():
                    request.asking = False
                    self._spawn(self._again(request, 0))
            if lane.is_idle and address not in {*found.replicas, *self._seeds}:
                self._spawn(self._servers.pop(address).close())

    def _server(self, address: Address) -> Server:
        server = self._servers.get(address)
        if server is None:
            server = self._servers[address] = self._open(address)
        return server

    def _open(self, address: Address) -> Server:
        url = node_url(self._settings.url, address)
        return Server(replace(self._settings, url=url), router=self)

    def _address_of(self, lane: Lane | None) -> Address | None:
        return next((at for at, each in self._servers.items() if each.lane is lane), None)

    def _unavailable(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"no node of the store at {self.where} gave its slots within {self._wait_s:g} s: "
            f"{self._last}",
            retry_after_s=RETRY_AFTER_S,
        )
