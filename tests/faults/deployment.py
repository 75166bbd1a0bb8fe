"""The deployment under test: workers on a store, and proxies between all processes."""

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from tests.faults import network
from tests.faults.sentinel_store import SentinelStore
from tests.faults.stores import (
    NO_REWRITE,
    WORKERS,
    ClusterStore,
    EmbeddedValkey,
    SingleStore,
    has_connection,
)
from tests.faults.traffic import FaultProxy, Traffic
from tests.faults.transports import TRANSPORTS, WorkerClient
from tests.support.proxy import Connection, Target
from tests.support.servers import RealServer
from tests.support.service import Service

PLANTED_BUGS: Final = Path(__file__).parent / "planted_bugs"
_SETTINGS: Final = {
    "CARRY_RUNTIME": "onnxruntime",
    "CARRY_STORE_WAIT_S": "3",
    # no longer than a client assumes of an abandoned request
    "CARRY_TIMEOUT_S": "3",
    "CARRY_DRAIN_S": "2",
}
"""The workers' time limits are shorter than the pauses of a run."""
_STARTS: Final = 20
MOST_RUNS: Final = 8
"""With a planted bug, each with another seed, until one has a finding: on a busy machine the race
that the bug loses may not occur in a run."""


Stores = SingleStore | ClusterStore | SentinelStore


def make_store(
    kind: str, folder: Path, models: Path, settings: dict[str, str], traffic: Traffic
) -> Stores:
    """The store of a run, in a folder; it is not started yet."""
    match kind:
        case "valkey":
            return SingleStore(EmbeddedValkey(folder, models, settings), traffic)
        case "redis":
            redis_server = RealServer("redis", folder, *NO_REWRITE)
            return SingleStore(redis_server, traffic)
        case "sentinel":
            return SentinelStore(folder, traffic)
    return ClusterStore(folder, traffic, strict="CARRY_DURABILITY" in settings)


def new_seed() -> int:
    """A seed, printed: it repeats the faults of a run."""
    seed = secrets.randbelow(1 << 31)
    print(f"seed {seed}", flush=True)
    return seed


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one run; most of them are options of the command too."""

    store: str
    seed: int = field(default_factory=new_seed)
    events: int = 500_000
    faults: int = 110
    streams: int = 48
    transports: tuple[str, ...] = tuple(TRANSPORTS)
    plant: str | None = None
    strict: bool = False
    verbose: bool = False
    kills_per_stage: int = 0  # further kills follow until each stage was hit this often
    removals: float = 0.003  # share of chunks before which the stream is deleted or expires
    short_lived: int = 7  # one stream of this many is deleted and created all the time; 0: none
    appenders: int = 2
    append_pause_s: float = 0.3  # mean pause between two bursts of an appender
    longest_s: float = 10.0  # no pause is longer
    workers: int = len(WORKERS)
    settings: Mapping[str, str] = field(default_factory=dict)  # further ones, of the workers
    model: str = network.MODEL  # folder of its artifact, in that of the models
    burn_in: int | None = None  # of the model


class Worker(Service):
    """A `carry serve` behind a proxy; `serves` while it is up."""

    def __init__(self, name: str, folder: Path, models: Path, url: str, settings: dict[str, str]):
        folder.mkdir()
        super().__init__(folder, models, redis_url=url)
        self.name, self.serves = name, False
        self._settings = settings
        self._ports: dict[str, int] = {}
        self._starting: asyncio.Task[None] | None = None

    def restart(self) -> None:
        """Start it in the background."""
        self._starting = asyncio.create_task(self._start())

    async def wait_until_up(self) -> None:
        """Wait for a restart."""
        await self._starting

    async def end(self) -> None:
        """Kill it once it does not start any more."""
        with contextlib.suppress(AssertionError):
            await self.wait_until_up()
        self.kill()

    def address(self, protocol: str) -> Target | None:
        """Where it serves a protocol."""
        return ("127.0.0.1", self._ports[protocol]) if self.serves else None

    async def _start(self) -> None:
        """An unavailable store may keep it from starting, as a supervisor would see."""
        for attempt in range(1, _STARTS + 1):
            try:
                await asyncio.to_thread(self.start, **self._settings)
                break
            except AssertionError:
                if attempt == _STARTS or not self.ended():
                    raise
        self._ports = {"http": int(self.url.rpartition(":")[2])}
        if "CARRY_GRPC_PORT" in self._settings:
            self._ports["grpc"] = int(self.grpc_address().rpartition(":")[2])
        self.serves = True


class Deployment:
    """Workers on a store, and the client of each, through its proxy."""

    store: Stores
    models: Path

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.clients: dict[str, WorkerClient] = {}
        self.traffic = Traffic(self._find_owner)

    async def expire(self, stream: str) -> None:
        """Let a stream's keys expire, once all writes that are held back have reached the store:
        streams live longer than a network holds bytes."""
        for proxy in self.store.proxies:
            await proxy.wait_until_drained(lambda connection: connection.held is not None)
        await asyncio.to_thread(self.store.expire, stream)

    async def wait_until_up(self) -> None:
        """Wait until all workers serve."""
        for worker in self.workers:
            await worker.wait_until_up()

    def _find_owner(self, connection: Connection) -> str:
        up = [worker for worker in self.workers if worker.process is not None]
        owners = (each.name for each in up if has_connection(each.process.pid, connection))
        return next(owners, "")


@asynccontextmanager
async def deploy(options: RunOptions) -> AsyncIterator[Deployment]:
    """Workers that serve on a store; all processes are ended in any case."""
    settings, deployment = _SETTINGS | options.settings, Deployment()
    if options.strict and options.store == "cluster":
        settings["CARRY_DURABILITY"] = "replicated"
    if options.plant is not None:
        settings["PLANTED_BUG"] = options.plant
        settings["PYTHONPATH"] = str(PLANTED_BUGS)
    async with AsyncExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="carry-faults-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        models = deployment.models = folder / "models"
        network.write(models, options.model, burn_in=options.burn_in)
        traffic = deployment.traffic
        (folder / "store").mkdir()
        store = make_store(options.store, folder / "store", models, settings, traffic)
        deployment.store = store
        stack.push_async_callback(asyncio.to_thread, store.stop)
        for proxy in store.proxies:
            await stack.enter_async_context(proxy.listening())
        await asyncio.to_thread(store.start)
        protocols = ["http"]
        if any(each.startswith("grpc") for each in options.transports):
            protocols.append("grpc")
            settings = {**settings, "CARRY_GRPC_PORT": "0"}
        for name in WORKERS[: options.workers]:
            worker = Worker(name, folder / name, models, store.url_for(name), settings)
            urls = []
            for protocol in protocols:
                address = partial(worker.address, protocol)
                proxy = FaultProxy(address, traffic.watch_clients, name)
                await stack.enter_async_context(proxy.listening())
                traffic.proxies.append(proxy)
                urls.append(f"http://127.0.0.1:{proxy.port}")
            worker.restart()
            stack.push_async_callback(worker.end)
            client = WorkerClient(name, urls, options.transports)
            stack.push_async_callback(client.close)
            deployment.workers.append(worker)
            deployment.clients[name] = client
        await deployment.wait_until_up()
        yield deployment
