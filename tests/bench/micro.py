"""`make bench-micro`: the parts of a chunk's way by themselves, best of several repetitions.

    python -m tests.bench.micro [--only codec,wire] [--seconds 0.2] [--jsonl FILE]

Codec, queue, encoder, wire and store, each on the standard chunk (16 events of 16 features,
8 outputs, 1,024 bytes of state), in microseconds per chunk of this process's time. The store is
a real Valkey, a batch of 32 streams a call. Says where a change of one part shows; what a whole
chunk costs is `make bench`'s to say.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import uvloop

from models.artifact.artifact import Artifact
from models.events.encode import Clock, encode
from models.events.frame import columns_from_frame
from models.spec.state import State
from service.core.delivery import chunk_digest
from service.core.values import (
    Feed,
    LastChunk,
    Reply,
    Steps,
    StoredReply,
    StreamHead,
    StreamKey,
    StreamState,
)
from service.engine.fair_queue import FairQueue
from service.engine.jobs import Job, Ticket
from service.engine.policy import BatchLimits
from service.ops.logs import configure_logs
from service.pipeline.served_model import ServedModel
from service.store.base import Commit, Committed, StateStore
from service.store.codec import decode_reply, decode_state, encode_reply, encode_state
from service.store.open import open_store
from service.store.settings import StoreSettings
from service.transports.http.context import ModelWire
from service.transports.http.limits import ApiLimits
from service.transports.http.media import Media, dumps
from service.transports.http.replies.reply_writer import EVERY_STEP
from tests.bench.networks import STEPS, Bodies, standard_model
from tests.bench.sections.events import STREAM, flights_model
from tests.bench.servers import running_store
from tests.support.numpy_runtime import NumpyRuntime

GROUPS = ("codec", "queue", "encode", "wire", "store")
REPEATS = 5
BATCH = 32
CALLS = 20
"""Store calls per timed run, so that entering the event loop does not count."""


@dataclass(frozen=True, slots=True)
class Case:
    """One part.

    Attributes:
        name: `group, what`.
        chunks: how many chunks one call handles.
    """

    name: str
    chunks: int
    call: Callable[[], object]

    def best_us(self, seconds: float) -> float:
        """The least time per chunk over the repetitions, which together take about `seconds`."""
        timer = timeit.Timer(self.call)
        once_s = max(min(timer.repeat(3, 1)), 1e-8)
        number = max(1, int(seconds / REPEATS / once_s))
        return min(timer.repeat(REPEATS, number)) / number / self.chunks * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench-micro", description="Measures the parts.")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each case")
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    given = parser.parse_args(arguments)
    for name, us in measure(given.only.split(","), given.seconds).items():
        print(f"{name:44} {us:10.2f} us/chunk")
        if given.jsonl is not None:
            with given.jsonl.open("a") as output:
                output.write(json.dumps({"kind": "micro", "name": name, "us_per_chunk": us}) + "\n")
    return 0


def measure(groups: Sequence[str], seconds: float) -> dict[str, float]:
    """Microseconds per chunk of every case of some groups."""
    found = {}
    configure_logs("error", "json")
    with tempfile.TemporaryDirectory(prefix="carry-bench-") as folder:
        artifact = standard_model(Path(folder))
        for group in groups:
            with CASES[group](Path(folder), artifact) as cases:
                for case in cases:
                    found[case.name] = case.best_us(seconds)
    return found


def _stream(artifact: Artifact, seed: int) -> StreamState:
    random = np.random.default_rng(seed)
    floats = random.uniform(-1, 1, artifact.state.float_size).astype(np.float32)
    return StreamState(
        head=StreamHead(random.bytes(8), random.bytes(16), STEPS),
        feed=Feed.INPUTS,
        fingerprint=artifact.fingerprint,
        last=LastChunk(0, random.bytes(16)),
        updated_ms=1_700_000_000_000,
        state=State(floats, artifact.state.zero().ints),
    )


def _reply(artifact: Artifact, head: StreamHead) -> StoredReply:
    random = np.random.default_rng(3)
    return StoredReply(head, random.normal(size=(STEPS, artifact.outputs.size)).astype(np.float32))


@contextmanager
def _codec(folder: Path, artifact: Artifact) -> Iterator[list[Case]]:
    stream = _stream(artifact, 1)
    reply = _reply(artifact, stream.head)
    state_bytes, reply_bytes = encode_state(stream), encode_reply(reply)
    steps = Steps(Feed.INPUTS, STEPS, rows=Bodies.random(STEPS).rows[0])
    yield [
        Case("codec, encode a state", 1, lambda: encode_state(stream)),
        Case("codec, decode a state", 1, lambda: decode_state(state_bytes)),
        Case("codec, encode a reply", 1, lambda: encode_reply(reply)),
        Case("codec, decode a reply", 1, lambda: decode_reply(reply_bytes)),
        Case("codec, digest of a chunk", 1, lambda: chunk_digest(None, steps, b"")),
    ]


@contextmanager
def _queue(folder: Path, artifact: Artifact) -> Iterator[list[Case]]:
    limits = BatchLimits(BATCH, 4096)
    tickets = uvloop.run(_tickets(1_000))

    def case(name: str, jobs: int, streams: int) -> Case:
        """Take a batch, release its streams, and push as many jobs again."""
        queue: FairQueue[None, None] = FairQueue(limits)
        for index in range(jobs):
            queue.push(Job(None, index % streams, STEPS, index, 0.0, tickets[index], 0))

        def turn() -> int:
            taken = queue.take()
            for job in taken:
                queue.release(job.key)
            for job in taken:
                queue.push(job)
            return len(taken)

        return Case(name, turn(), turn)

    yield [
        case("queue, 32 waiting chunks", BATCH, BATCH),
        case("queue, 1,000 chunks of 300 streams", 1_000, 300),
    ]


async def _tickets(count: int) -> list[Ticket[None]]:
    return [Ticket(1, math.inf) for _ in range(count)]


@contextmanager
def _encode(folder: Path, artifact: Artifact) -> Iterator[list[Case]]:
    import polars as pl

    from models.examples.flights.data import flight_events

    schema = flights_model(folder).spec.events
    assert schema is not None
    frame = flight_events().filter(pl.col("stream") == STREAM).head(STEPS)
    columns = columns_from_frame(schema, frame)
    yield [
        Case("encode, 16 departures to rows", 1, lambda: encode(schema, columns, Clock())),
    ]


@contextmanager
def _wire(folder: Path, artifact: Artifact) -> Iterator[list[Case]]:
    served = ServedModel(artifact, NumpyRuntime(artifact))
    wire = ModelWire(served, ApiLimits())
    stream = _stream(artifact, 1)
    outputs = _reply(artifact, stream.head).outputs
    reply = Reply(StreamKey("bench", "stream-0000001"), stream.head, outputs, stream.state)
    rows = Bodies.random(STEPS)
    cases = []
    for media, name in ((Media.JSON, "json"), (Media.MSGPACK, "msgpack")):
        value = rows.values("json" if media is Media.JSON else "msgpack")[0]
        body = (
            b'{"position":48,"inputs":' + value + b"}"
            if media is Media.JSON
            else b"\x82\xa8position\x30\xa6inputs" + value
        )
        cases += [
            Case(
                f"wire, {name} body to chunk",
                1,
                lambda body=body, media=media: wire.reader.chunk(
                    body, media, "stream-0000001", None
                ),
            ),
            Case(
                f"wire, reply to {name}",
                1,
                lambda media=media: dumps(media, wire.writer.reply(reply, EVERY_STEP)),
            ),
        ]
    parsed = rows.values("json")[0]
    cases.append(Case("wire, orjson.loads of the inputs alone", 1, lambda: orjson.loads(parsed)))
    yield cases


@contextmanager
def _store(folder: Path, artifact: Artifact) -> Iterator[list[Case]]:
    keys = [StreamKey("bench", f"stream-{index:07d}") for index in range(BATCH)]
    pair = [[_stream(artifact, side * BATCH + index) for index in range(BATCH)] for side in (0, 1)]
    kept = _reply(artifact, pair[0][0].head)

    def commits(before: list[StreamState] | None, after: list[StreamState]) -> list[Commit]:
        return [
            Commit(
                key,
                before[at].head if before else None,
                after[at],
                StoredReply(after[at].head, kept.outputs),
            )
            for at, key in enumerate(keys)
        ]

    forth, back = commits(pair[0], pair[1]), commits(pair[1], pair[0])
    with running_store("valkey", ()) as server, closing(uvloop.new_event_loop()) as loop:

        async def begin() -> StateStore:
            found = open_store(StoreSettings(server.url))
            await found.start()
            await found.commit(commits(None, pair[0]))
            return found

        async def load() -> None:
            for _ in range(CALLS):
                await store.load(keys)

        async def commit() -> None:
            for _ in range(CALLS // 2):
                for batch in (forth, back):
                    outcomes = await store.commit(batch)
                    if not all(isinstance(outcome, Committed) for outcome in outcomes):
                        raise RuntimeError(f"expected commits, got {outcomes[:2]}")

        store = loop.run_until_complete(begin())
        try:
            yield [
                Case(
                    "store, load, 32 streams a call",
                    BATCH * CALLS,
                    lambda: loop.run_until_complete(load()),
                ),
                Case(
                    "store, commit, the same",
                    BATCH * CALLS,
                    lambda: loop.run_until_complete(commit()),
                ),
            ]
        finally:
            loop.run_until_complete(store.close())


CASES = {
    "codec": _codec,
    "queue": _queue,
    "encode": _encode,
    "wire": _wire,
    "store": _store,
}
"""The groups; each opens what its cases need."""


if __name__ == "__main__":
    raise SystemExit(main())
