"""What every section of the benchmark works with: options, cores, folder, and its results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from models.artifact.artifact import Artifact
from tests.bench.generator import Load
from tests.bench.networks import Bodies, check_answers, standard_model
from tests.bench.remote import Driver
from tests.bench.results import Results, Sample
from tests.bench.servers import (
    RUNTIMES,
    Server,
    Store,
    missing,
    running_server,
    running_store,
)
from tests.bench.traffic import TrafficSpec
from tests.support.machine import Cores

CONNECTIONS = 32
WARM_S = 0.5
SETTLED_S, SETTLED_SHARE = 0.5, 0.2
"""A server that used less than this share of a core for so long is at rest."""

SETTLES_WITHIN_S = 180.0


@dataclass(frozen=True, slots=True)
class Options:
    """How long and how much is measured.

    Attributes:
        rounds: of every row; medians and spreads are over them.
        seconds: of one closed-loop round; the others follow from it.
        streams: in the standard workload.
        many_streams: in the comparison of few and many.
        runtimes: of Carry.
        baselines: of the servers that Carry is held against.
        store: `valkey` or `redis`.
        beside: another checkout of Carry, to be held against.
    """

    rounds: int = 3
    seconds: float = 1.0
    streams: int = 1000
    many_streams: int = 100_000
    runtimes: tuple[str, ...] = tuple(RUNTIMES)
    baselines: tuple[str, ...] = ("asgi", "fastapi", "naive", "competent")
    store: str = "valkey"
    beside: Path | None = None


@dataclass
class Bench:
    """One run.

    Attributes:
        say: shows progress.
    """

    options: Options
    cores: Cores
    folder: Path
    results: Results
    say: Callable[[str], None] = print
    _said: set[str] = field(default_factory=set)

    @cached_property
    def artifact(self) -> Artifact:
        """The standard network."""
        return standard_model(self.folder / "models")

    @cached_property
    def bodies(self) -> Bodies:
        """The standard chunks."""
        return Bodies.random(16)

    def carry_kinds(self, artifact: Artifact | None = None) -> list[str]:
        """Carry's servers that can run here, the others with a note."""
        return self.available([f"carry-{name}" for name in self.options.runtimes], artifact)

    def available(self, kinds: Sequence[str], artifact: Artifact | None = None) -> list[str]:
        """Those that can run here; the others get a note once."""
        found = []
        for kind in kinds:
            reason = missing(kind, artifact or self.artifact)
            if reason is None:
                found.append(kind)
            else:
                self.note(f"{kind} is left out: {reason}")
        return found

    def note(self, text: str) -> None:
        """Keep and show a remark, once."""
        if text not in self._said:
            self._said.add(text)
            self.results.notes.append(text)
            self.say(text)

    @contextmanager
    def store(self, cores: Sequence[int] | None = None) -> Iterator[Store]:
        """A store of its own, beside the generator unless told otherwise."""
        where = self.cores.others if cores is None else cores
        with running_store(self.options.store, where) as store:
            yield store

    @contextmanager
    def server(
        self, kind: str, store: Store, artifact: Artifact | None = None, **options: Any
    ) -> Iterator[Server]:
        """A ready server on the servers' core; see `running_server`."""
        cores = options.pop("cores", self.cores.servers)
        self.say(f"starting {options.get('name') or kind}")
        with running_server(
            kind, artifact or self.artifact, store, cores, self.folder, **options
        ) as server:
            self._settled(server)
            yield server

    def _settled(self, server: Server) -> None:
        """Wait until a server has done what it does beside its first requests, such as compile."""
        ends_s = time.monotonic() + SETTLES_WITHIN_S
        used_s, busy = server.usage().cpu_s, True
        while busy:
            time.sleep(SETTLED_S)
            before_s, used_s = used_s, server.usage().cpu_s
            busy = used_s - before_s > SETTLED_S * SETTLED_SHARE
            if busy and time.monotonic() > ends_s:
                self.note(f"{server.name} was still busy by itself after {SETTLES_WITHIN_S:g} s")
                return

    @contextmanager
    def drivers(self, count: int = 1, cores: Sequence[int] | None = None) -> Iterator[list[Driver]]:
        """Generators, each in its own process, on the others' core unless told otherwise."""
        where = self.cores.others if cores is None else cores
        with ExitStack() as stack:
            yield [stack.enter_context(Driver(where)) for _ in range(count)]

    def measured(self, name: str, server: Server, store: Store, load: Callable[[], Load]) -> Load:
        """Run one load as one more round of a row."""
        before, store_before = server.usage(), store.usage()
        found = load()
        after, store_after = server.usage(), store.usage()
        if found.unsent:
            self.note(f"{name}: did not keep up, {found.unsent} requests were not sent in time")
        sample = Sample.of(
            found,
            after.cpu_s - before.cpu_s,
            store_after.cpu_s - store_before.cpu_s,
            after.rss_bytes,
        )
        self.results.add(name, sample)
        self.say(
            f"  {name}: {sample.chunks_per_s:,.0f} chunks/s, {sample.cpu_us_per_chunk:,.0f} us CPU,"
            f" p50 {sample.p50_ms:.2f} ms, p99 {sample.p99_ms:.2f} ms"
            f" (generator {sample.generator_cpu:.0%}, store {sample.store_cpu:.0%} of their core)"
        )
        return found

    def closed(
        self,
        name: str,
        driver: Driver,
        key: str,
        server: Server,
        store: Store,
        connections: int = CONNECTIONS,
        share: float = 1.0,
    ) -> Load:
        """One closed-loop round of a row, or a `share` of the time of one."""
        seconds = self.options.seconds * share
        return self.measured(
            name, server, store, lambda: driver.closed(key, server.port, connections, seconds)
        )

    def ready(
        self,
        driver: Driver,
        key: str,
        server: Server,
        bodies: Bodies,
        *,
        artifact: Artifact | None = None,
        streams: int | None = None,
        tolerance: float | None = None,
        **options: Any,
    ) -> Load:
        """Make a server's streams at a generator, warm it up, and judge some of its outputs.

        Returns:
            What the warming load saw, a few replies among it.

        Raises:
            WrongOutputsError: the outputs are not the network's.
        """
        spec = bodies.traffic(
            key.replace("/", "-").replace(" ", "-"),
            streams or self.options.streams,
            positions=server.positions,
            sampled=0 if options.get("items") or not server.positions else 1,
            **options,
        )
        load = self.warmed(driver, key, server, spec)
        if spec.sampled:
            more = {} if tolerance is None else {"tolerance": tolerance}
            check_answers(artifact or self.artifact, spec, bodies.rows, load.kept, **more)
        return load

    def warmed(self, driver: Driver, key: str, server: Server, spec: TrafficSpec) -> Load:
        """Make streams at a generator and load a server with them for a moment, unmeasured."""
        driver.traffic(key, spec)
        return driver.closed(key, server.port, min(CONNECTIONS, spec.streams), WARM_S)
