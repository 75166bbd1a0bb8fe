"""A thousand streams and very many: the same load, and the bytes that each takes in the store."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from models.spec.state import State
from service.core.values import Feed, LastChunk, StreamHead, StreamKey, StreamState
from service.store.codec import encode_state
from service.store.redis.keys import KeySpace
from service.store.settings import StoreSettings
from tests.bench.context import CONNECTIONS, WARM_S, Bench
from tests.bench.networks import STEPS
from tests.bench.servers import Store
from tests.bench.targets import FEW
from tests.bench.traffic import TrafficSpec
from tests.support.machine import wait_until

CACHES = {"uncached": {"CARRY_STATE_CACHE_BYTES": "0"}, "cached": {}}
"""The two servers on each store; each has half of its streams, named by its own prefix."""

FILL_BATCH = 2_000
DISTINCT = 512
"""Different states that the streams of a filled store share between them."""

STATE_BYTES = (256, 512, 1024, 2048, 4096, 16384)
REWRITTEN_WITHIN_S = 600.0


def run(bench: Bench) -> None:
    """One runtime; a store with few and one with many streams, with and without the cache."""
    many = bench.options.many_streams
    for kind in bench.carry_kinds()[-1:]:
        with bench.drivers() as [driver], ExitStack() as stack:
            servers = {}
            for count in (FEW, many):
                store = stack.enter_context(bench.store())
                bench.say(f"filling a store with {count:,} streams")
                for cache, environment in CACHES.items():
                    spec = bench.bodies.traffic(cache, count // 2, position=STEPS)
                    fill(store, spec, bench.artifact.fingerprint, bench.artifact.state.zero())
                    key = f"{count}-{cache}"
                    server = stack.enter_context(
                        bench.server(kind, store, environment=environment, name=key)
                    )
                    servers[key] = (server, store)
                    driver.traffic(key, spec)
                    driver.closed(key, server.port, CONNECTIONS, WARM_S)
                _rewrite(store)
            for _ in range(bench.options.rounds):
                for key, (server, store) in servers.items():
                    bench.closed(f"streams/{key}/{kind}", driver, key, server, store)
            bytes_per_stream(bench, store)
        for name, above, below in (
            (f"{many} over {FEW}", f"{many}-uncached", f"{FEW}-uncached"),
            (f"{FEW}, cache on over off", f"{FEW}-cached", f"{FEW}-uncached"),
            (f"{many}, cache on over off", f"{many}-cached", f"{many}-uncached"),
        ):
            bench.results.ratio(
                f"streams/{name}", f"streams/{above}/{kind}", f"streams/{below}/{kind}"
            )


def fill(store: Store, spec: TrafficSpec, fingerprint: bytes, zero: State) -> None:
    """Write every stream of a spec as the service would have left it after a first chunk."""
    random = np.random.default_rng(1)
    values = []
    for _ in range(DISTINCT):
        floats = random.uniform(-1, 1, zero.floats.size).astype(np.float32)
        values.append(encode_state(_stream(State(floats, zero.ints), fingerprint, random)))
    keys = _keys()
    with store.client() as client:
        for start in range(0, spec.streams, FILL_BATCH):
            stop = min(spec.streams, start + FILL_BATCH)
            client.mset(
                {
                    keys.state(StreamKey("bench", spec.name(stream).decode())): values[
                        stream % DISTINCT
                    ]
                    for stream in range(start, stop)
                }
            )


def _stream(state: State, fingerprint: bytes, random: np.random.Generator) -> StreamState:
    return StreamState(
        head=StreamHead(random.bytes(8), random.bytes(16), STEPS),
        feed=Feed.INPUTS,
        fingerprint=fingerprint,
        last=LastChunk(0, random.bytes(16)),
        updated_ms=1_700_000_000_000,
        state=state,
    )


def _rewrite(store: Store) -> None:
    """Let the server write its file anew now, so that it does not while it is measured."""
    with store.client() as client:

        def is_done() -> bool:
            found = client.info("persistence")
            return not found["aof_rewrite_in_progress"] and not found["aof_rewrite_scheduled"]

        # It may have begun to by itself.
        wait_until(is_done, "the end of the file's rewriting", REWRITTEN_WITHIN_S)
        client.bgrewriteaof()
        wait_until(is_done, "the end of the file's rewriting", REWRITTEN_WITHIN_S)


def bytes_per_stream(bench: Bench, store: Store) -> None:
    """What streams of several sizes take in the store, without their replies."""
    random = np.random.default_rng(2)
    shares = []
    with store.client() as client:
        for raw in STATE_BYTES:
            state = State(random.uniform(-1, 1, raw // 4).astype(np.float32), np.zeros(0, np.int64))
            key = _keys().state(StreamKey("bench", f"size-{raw:07d}"))
            client.set(key, encode_state(_stream(state, bench.artifact.fingerprint, random)))
            used = client.memory_usage(key, samples=0)
            client.delete(key)
            bench.results.figure(f"streams/bytes of a stream with {raw} bytes of state", [used])
            shares.append(used / (1.25 * raw + 200))
    bench.results.figure("streams/bytes over bound", [max(shares)])


def _keys() -> KeySpace:
    return StoreSettings("unix:///nowhere").keys
