"""Streams that are written into a store without a service, and the memory that they take there."""

from __future__ import annotations

from typing import Any

from models.artifact.artifact import Artifact
from service.core.values import StreamKey
from service.store.codec import encode_state
from service.store.settings import StoreSettings
from tests.bench.results import Results
from tests.bench.traffic import TrafficSpec
from tests.bench.workloads import random_stream
from tests.support.servers import RealServer, until

FILL_BATCH, DISTINCT_STATES = 2_000, 512
STATE_BYTES = (256, 512, 1024, 2048, 4096, 16384)
REWRITTEN_WITHIN_S = 600.0


def fill_store(store: RealServer, spec: TrafficSpec, artifact: Artifact) -> None:
    """Write every stream of a spec as the service would have left it after a first chunk."""
    size, fingerprint = artifact.state.float_size, artifact.fingerprint
    values = [
        encode_state(random_stream(seed, size, fingerprint)) for seed in range(DISTINCT_STATES)
    ]
    with store.client() as client:
        for start in range(0, spec.streams, FILL_BATCH):
            streams = range(start, min(spec.streams, start + FILL_BATCH))
            client.mset({_state_key(spec.name(s)): values[s % DISTINCT_STATES] for s in streams})


def _state_key(stream: str) -> Any:
    return StoreSettings("unix:///nowhere").keys.state(StreamKey("bench", stream))


def rewrite_file(store: RealServer) -> None:
    """Let the server rewrite its file now, so that it does not while it is measured."""
    with store.client() as client:

        def is_done() -> bool:
            info = client.info("persistence")
            return not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]

        # It may have started one by itself.
        until(is_done, "the end of the file's rewriting", REWRITTEN_WITHIN_S)
        client.bgrewriteaof()
        until(is_done, "the end of the file's rewriting", REWRITTEN_WITHIN_S)


def measure_bytes_per_stream(store: RealServer, artifact: Artifact, results: Results) -> None:
    """The memory of streams of several sizes in the store, without their replies."""
    shares = []
    with store.client() as client:
        for raw in STATE_BYTES:
            key = _state_key(f"size-{raw:07d}")
            stream = random_stream(raw, raw // 4, artifact.fingerprint)
            client.set(key, encode_state(stream))
            used = client.memory_usage(key, samples=0)
            client.delete(key)
            results.figure(f"streams/bytes of a stream with {raw} bytes of state", [used])
            shares.append(used / (1.25 * raw + 200))
    results.figure("streams/bytes over bound", [max(shares)])
