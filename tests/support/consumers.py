"""Consumers in this process, the entries that they read, and what they write."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from service.build import build_pipeline
from service.consume import make_relay
from service.consumers.config import make_config
from service.consumers.consumer import Consumer
from service.consumers.relay import Relay
from service.consumers.store import TopicStore
from service.settings import Settings
from service.store.redis.redis_store import RedisStore
from tests.support.forks import COMMAND, Fork
from tests.support.pipelines import oracle_outputs
from tests.support.servers import WAIT_S, RealServer, becomes, until

PROBE: dict[str, Any] = {"model": "probe", "from": "events", "to": "scores", "create": True}


@asynccontextmanager
async def relaying(
    url: str, settings: dict[str, Any] | None = None, **config: Any
) -> AsyncIterator[Relay]:
    """A relay that runs without its consumer; it is stopped at the end."""
    loaded = Settings.load({"redis_url": url, "store_wait_s": WAIT_S, **(settings or {})})
    store = RedisStore(loaded.store)
    await store.start()
    relay = make_relay(loaded, make_config(PROBE | config, "test"), store)
    assert relay is not None
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        relay.stop()
        await task
        await relay.sink.close()
        await store.close()


@asynccontextmanager
async def consuming(
    url: str, artifact: Artifact, settings: dict[str, Any] | None = None, **config: Any
) -> AsyncIterator[Consumer]:
    """A consumer that runs; it is stopped at the end."""
    waits = {"store_wait_s": WAIT_S}
    flags = {"redis_url": url, "models_dir": artifact.path, **waits, **(settings or {})}
    loaded = Settings.load(flags)
    store = TopicStore(loaded.store)
    configured = make_config(PROBE | config, "test")
    async with build_pipeline(loaded, store=store, model=configured.model) as service:
        consumer = Consumer(service, store, configured)
        await consumer.check_topics()
        task = asyncio.create_task(consumer.run())
        try:
            yield consumer
        finally:
            consumer.stop()
            await task


def fields_of(stream: str, row: NDArray[np.float32], **others: Any) -> dict[str, Any]:
    """The fields of an entry with a row of the probe model."""
    return {"stream": stream, "event": json.dumps(row.tolist()), **others}


def add(client: Any, topic: str, *entries: dict[str, Any]) -> list[bytes]:
    """Add entries to a topic; returns their ids."""
    pipe = client.pipeline(transaction=False)
    for fields in entries:
        pipe.xadd(topic, fields)
    return pipe.execute()


def outputs_of(client: Any, topic: str) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """The positions and outputs of each stream in an output topic, in order."""
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for _, fields in client.xrange(topic):
        values = found.setdefault(fields[b"stream"].decode(), [])
        values.append((int(fields[b"position"]), json.loads(fields[b"outputs"])))
    return found


def assert_outputs(
    artifact: Artifact,
    found: list[tuple[int, dict[str, Any]]],
    rows: NDArray[np.float32],
) -> None:
    """The outputs of a stream are each event's exactly once, in order, and equal the oracle."""
    assert [position for position, _ in found] == [*range(len(rows))]
    packed = [np.concatenate([np.ravel(value) for value in each.values()]) for _, each in found]
    np.testing.assert_allclose(packed, oracle_outputs(artifact, rows), rtol=1e-5, atol=1e-5)


async def until_count(client: Any, topic: str, count: int) -> None:
    """Wait until a topic has as many entries, and no more."""
    await becomes(lambda: client.xlen(topic) >= count, f"{count} entries in {topic}")
    assert client.xlen(topic) == count


def interleaved(rows: dict[str, NDArray[np.float32]]) -> Sequence[dict[str, Any]]:
    """Entries of several streams in turns, of as many rows each."""
    count = len(next(iter(rows.values())))
    return [fields_of(name, each[at]) for at in range(count) for name, each in rows.items()]


class ConsumerProcess:
    """A `carry consume` process and its log."""

    def __init__(self, log: Path, *words: str, **environment: str):
        self._log = log
        with log.open("wb") as stderr:
            files = [subprocess.DEVNULL, stderr, stderr]
            with open(os.devnull, "rb") as nothing:
                files[0] = nothing
                self.fork = Fork([COMMAND, "consume", *words], {**os.environ, **environment}, files)

    def lines(self) -> list[dict[str, Any]]:
        """The lines of its log, without one that is being written."""
        lines = self._log.read_bytes().rpartition(b"\n")[0].splitlines()
        return [msgspec.json.decode(line) for line in lines if line.startswith(b"{")]

    def wait_for(self, message: str, count: int = 1) -> dict[str, Any]:
        """Wait for a log line."""

        def found() -> list[dict[str, Any]]:
            assert self.fork.poll() in (None, 0), self._log.read_text()
            lines = [each for each in self.lines() if each["message"] == message]
            return lines if len(lines) >= count else []

        return until(found, message, poll_s=0.02)[count - 1]


@contextmanager
def consumer_processes(
    server: RealServer, artifact: Artifact, folder: Path
) -> Iterator[Callable[..., ConsumerProcess]]:
    """Starts processes with the `consumer.yaml` of a folder, and kills them at the end."""
    words = ("--redis-url", server.url, "--models", str(artifact.path))
    started: list[ConsumerProcess] = []

    def start(*options: str) -> ConsumerProcess:
        log, config = folder / f"consumer-{len(started)}.log", str(folder / "consumer.yaml")
        started.append(ConsumerProcess(log, config, *words, *options))
        return started[-1]

    try:
        yield start
    finally:
        for each in started:
            each.fork.send_signal(signal.SIGCONT)
            each.fork.kill()
