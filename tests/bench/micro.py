"""`make bench-micro`: the parts of a chunk's path by themselves, best of several repetitions.

    python -m tests.bench.micro [--only codec,wire] [--seconds 0.5]

Each on the standard chunk (16 events of 16 features, 8 outputs, 1,024 bytes of state), in
microseconds per chunk. `events` are made-up departures under the schema of the packaged flights
model; `http` drives the ASGI application over a pipeline that answers a constant, beside a bare
echo; `store` is a real Valkey, a batch of 32 streams a call; `step` is each runtime's own.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import tempfile
import timeit
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import orjson
import ormsgpack
import uvloop
from pydantic import TypeAdapter

from models.artifact.artifact import Artifact
from models.events.columns import canonical_bytes, columns_from_events
from models.events.encode import Clock, encode, encode_many
from models.events.parse import event_type
from models.events.reader import EventReader
from models.events.schema import CategoricalField, EventSchema
from service.core.delivery import chunk_digest
from service.core.errors import CarryError
from service.core.values import (
    Chunk,
    Feed,
    Reply,
    Steps,
    StoredReply,
    StreamHead,
    StreamKey,
    StreamState,
)
from service.engine.fair_queue import FairQueue, Job, Ticket
from service.engine.policy import BatchLimits
from service.engine.runtimes.loading import RUNTIMES, open_runtime
from service.ops.logs import configure_logs
from service.ops.metrics import PrometheusRecorder
from service.pipeline.served_model import ServedModel
from service.store.base import Commit, Committed, StateStore
from service.store.codec import decode_reply, decode_state, encode_reply, encode_state
from service.store.open import open_store
from service.store.settings import StoreSettings
from service.transports.http.application import create_api
from service.transports.http.context import ModelWire
from service.transports.http.limits import ApiLimits
from service.transports.http.media import Media, dumps
from service.transports.http.replies.reply_writer import EVERY_STEP
from tests.bench.baselines.echo_asgi import app as echo
from tests.bench.run import find_missing, running_store
from tests.bench.workload_sections import flights_model
from tests.bench.workloads import STEPS, Bodies, random_stream, standard_model
from tests.support.numpy_runtime import NumpyRuntime

REPEATS = 5
BATCH = 32
MANY = 64
CALLS = 20
"""Asynchronous calls per timed run, so that entering the event loop does not count."""

STEP_SHAPES = ((1, 1), (1, 16), (8, 16), (32, 16), (128, 16), (32, 64))
ABSENT = 0.03
"""The share of optional values that are absent."""


class Case(NamedTuple):
    """One part: how many chunks one call handles, and the call."""

    name: str
    chunks: int
    call: Callable[[], object]

    def best_us(self, seconds: float) -> float:
        """The minimum time per chunk over the repetitions, which together take about `seconds`."""
        timer = timeit.Timer(self.call)
        once_s = max(min(timer.repeat(3, 1)), 1e-8)
        number = max(1, int(seconds / REPEATS / once_s))
        return min(timer.repeat(REPEATS, number)) / number / self.chunks * 1e6


class Setup(NamedTuple):
    """What cases are made of."""

    folder: Path
    artifact: Artifact
    loop: AbstractEventLoop

    def stream(self, seed: int) -> StreamState:
        """A stream after one chunk."""
        return random_stream(seed, self.artifact.state.float_size, self.artifact.fingerprint)

    def reply(self, head: StreamHead) -> StoredReply:
        """The stored reply of one chunk."""
        outputs = np.random.default_rng(3).normal(size=(STEPS, self.artifact.outputs.size))
        return StoredReply(head, outputs.astype(np.float32))

    def repeated(self, name: str, chunks: int, call: Callable[[], Any]) -> Case:
        """A case of an asynchronous call."""

        async def run() -> None:
            for _ in range(CALLS):
                await call()

        return Case(name, chunks * CALLS, lambda: self.loop.run_until_complete(run()))


def codec_cases(setup: Setup) -> Iterator[Case]:
    """Stored states and replies, and the digest of a chunk."""
    stream = setup.stream(1)
    reply = setup.reply(stream.head)
    state_bytes, reply_bytes = encode_state(stream), encode_reply(reply)
    steps = Steps(Feed.INPUTS, STEPS, rows=Bodies.random(STEPS).rows[0])
    yield Case("encode a state", 1, lambda: encode_state(stream))
    yield Case("decode a state", 1, lambda: decode_state(state_bytes))
    yield Case("encode a reply", 1, lambda: encode_reply(reply))
    yield Case("decode a reply", 1, lambda: decode_reply(reply_bytes))
    yield Case("digest of a chunk", 1, lambda: chunk_digest(None, steps, b""))


def queue_cases(setup: Setup) -> Iterator[Case]:
    """Take a batch, release its streams, and push as many jobs again."""

    async def make_tickets() -> list[Ticket[None]]:
        return [Ticket(1, math.inf) for _ in range(1_000)]

    tickets = setup.loop.run_until_complete(make_tickets())
    for name, jobs, streams in (("32 waiting", BATCH, BATCH), ("1,000 of 300 streams", 1_000, 300)):
        queue: FairQueue[None, None] = FairQueue(BatchLimits(BATCH, 4096))
        for index in range(jobs):
            queue.push(Job(None, index % streams, STEPS, index, 0.0, tickets[index], 0))

        def turn(queue: FairQueue[None, None] = queue) -> int:
            batch = queue.take()
            for job in batch:
                queue.release(job.key)
            for job in batch:
                queue.push(job)
            return len(batch)

        yield Case(name, turn(), turn)


def event_cases(setup: Setup) -> Iterator[Case]:
    """From the bytes of events to rows: the strict validator, the fast reader, the encoder."""
    schema = flights_model(setup.folder).spec.events
    assert schema is not None
    for times, with_text in (("text", True), ("numbers", False)):
        for steps in (1, 16, 64):
            body = orjson.dumps(make_departures(schema, steps, with_text))
            for name, chunks, call in event_stages(schema, body):
                yield Case(f"{steps} with times as {times}, {name}", chunks, call)


def event_stages(schema: EventSchema, body: bytes) -> Iterator[Case]:
    """The stages of one chunk of events."""
    reader, clock = EventReader(schema), Clock()
    strict: TypeAdapter[Any] = TypeAdapter(list[event_type(schema)])
    decoder: Any = msgspec.json.Decoder(list[reader.event])
    events, objects = strict.validate_json(body), decoder.decode(body)
    columns = reader.columns(objects)
    assert columns is not None
    many, clocks = [columns] * BATCH, [clock] * BATCH
    yield Case("strict", 1, lambda: strict.validate_json(body))
    yield Case("strict, columns", 1, lambda: columns_from_events(schema, events))
    yield Case("fast, decode", 1, lambda: decoder.decode(body))
    yield Case("fast, columns", 1, lambda: reader.columns(objects))
    yield Case("digest", 1, lambda: hashlib.sha256(canonical_bytes(schema, columns)).digest())
    yield Case("encode", 1, lambda: encode(schema, columns, clock))
    yield Case(f"encode, {BATCH} together", BATCH, lambda: encode_many(schema, many, clocks))


def make_departures(schema: EventSchema, count: int, with_text: bool) -> list[dict[str, Any]]:
    """Events in the order of their time; some optional values are absent."""
    random, events = np.random.default_rng(7), []
    moment = datetime(2013, 7, 21, 23, 10, tzinfo=UTC)
    for _ in range(count):
        moment += timedelta(minutes=int(random.integers(0, 90)))
        event: dict[str, Any] = {}
        for field in schema.fields:
            if field.optional and random.random() < ABSENT:
                continue
            if field.kind == "timestamp":
                number = int(moment.timestamp() * 1000)
                event[field.name] = moment.isoformat() if with_text else number
            elif isinstance(field, CategoricalField):
                event[field.name] = str(random.choice(field.vocabulary or ("a",)))
            else:
                event[field.name] = round(float(random.normal(20, 9)), 2)
        events.append(event)
    return events


def _body(media: Media, many: int = 0) -> bytes:
    rows = Bodies.random(STEPS).rows[0]
    write: Any = orjson.dumps if media is Media.JSON else ormsgpack.packb
    inputs = rows.tolist() if media is Media.JSON else rows.tobytes()
    chunk = {"position": 48, "inputs": inputs}
    if not many:
        return bytes(write(chunk))
    return bytes(write({"chunks": [{"stream": f"stream-{n:06d}", **chunk} for n in range(many)]}))


def wire_cases(setup: Setup) -> Iterator[Case]:
    """Bodies to chunks and replies to bodies, without HTTP."""
    wire = ModelWire(ServedModel(setup.artifact, NumpyRuntime(setup.artifact)), ApiLimits())
    stream = setup.stream(1)
    outputs = setup.reply(stream.head).outputs
    reply = Reply(StreamKey("bench", "s"), stream.head, outputs, stream.state)
    read, write = wire.reader.chunk, wire.writer.reply
    for media in (Media.JSON, Media.MSGPACK):
        body, name = _body(media), media.name.lower()
        yield Case(f"{name} to chunk", 1, lambda b=body, m=media: read(b, m, "s", None))
        yield Case(f"reply to {name}", 1, lambda m=media: dumps(m, write(reply, EVERY_STEP)))
    inputs = Bodies.random(STEPS).values("json")[0]
    yield Case("orjson.loads of the inputs alone", 1, lambda: orjson.loads(inputs))


class ConstantPipeline:
    """Answers every chunk with the same outputs, at once."""

    def __init__(self, served: ServedModel, reply: StoredReply):
        self.models = {served.name: served}
        self._reply = reply
        self._state = served.state.zero()

    def model(self, name: str) -> ServedModel:
        """The one model."""
        return self.models[name]

    def check_admission(self, *request: object) -> None:
        """Admission control: accepts everything."""

    async def process(self, chunk: Chunk, deadline_s: float | None = None) -> Reply:
        """One constant reply."""
        return Reply(chunk.key, self._reply.head, self._reply.outputs, self._state)

    async def process_many(
        self, items: Sequence[Chunk | CarryError], deadline_s: float | None = None
    ) -> list[Any]:
        """A constant reply for each."""
        return [i if isinstance(i, CarryError) else await self.process(i) for i in items]


def http_cases(setup: Setup) -> Iterator[Case]:
    """Requests through the ASGI application: single chunks and many streams, in both media."""
    logging.disable()
    served = ServedModel(setup.artifact, NumpyRuntime(setup.artifact))
    recorder = PrometheusRecorder()
    recorder.model(served.name, served.version, served.runtime.name)
    pipeline = ConstantPipeline(served, setup.reply(setup.stream(1).head))
    api = create_api(cast(Any, pipeline), ApiLimits(), recorder)
    for app, label in ((echo, "echo of "), (api, "")):
        for media in (Media.JSON, Media.MSGPACK):
            for path, many in (("streams/stream-000123/chunks", 0), ("chunks", MANY)):
                body = _body(media, many)
                call = _request(app, f"/v1/models/bench/{path}", media, body)
                name = f"{label}{many or 1} in {media.name.lower()}"
                yield setup.repeated(name, max(1, many), call)


def _request(app: Any, path: str, media: Media, body: bytes) -> Callable[[], Any]:
    headers = [
        *((b"host", b"127.0.0.1:8000"), (b"accept", b"*/*"), (b"connection", b"keep-alive")),
        (b"content-type", b"application/" + media.name.lower().encode()),
        (b"content-length", b"%d" % len(body)),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "method": "POST",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message.get("status", 200) != 200:
            raise RuntimeError(f"{path}: {message}")

    return lambda: app({**scope, "headers": [*headers], "state": {}}, receive, send)


def store_cases(setup: Setup) -> Iterator[Case]:
    """A batch of streams loaded and committed."""
    keys = [StreamKey("bench", f"stream-{index:07d}") for index in range(BATCH)]
    one, two = ([setup.stream(side * BATCH + at) for at in range(BATCH)] for side in (0, 1))

    def commits(before: list[StreamState] | None, after: list[StreamState]) -> list[Commit]:
        heads = [state.head for state in before] if before else [None] * BATCH
        return [
            Commit(key, head, new, setup.reply(new.head))
            for key, head, new in zip(keys, heads, after, strict=True)
        ]

    turns = [commits(one, two), commits(two, one)]
    with running_store(()) as server:

        async def start() -> StateStore:
            store = open_store(StoreSettings(f"unix://{server.socket}"))
            await store.start()
            await store.commit(commits(None, one))
            return store

        async def commit() -> None:
            turns.reverse()
            outcomes = await store.commit(turns[1])
            if not all(isinstance(outcome, Committed) for outcome in outcomes):
                raise RuntimeError(f"expected commits, got {outcomes[:2]}")

        store = setup.loop.run_until_complete(start())
        try:
            yield setup.repeated("load, 32 streams a call", BATCH, lambda: store.load(keys))
            yield setup.repeated("commit, the same", BATCH, commit)
        finally:
            setup.loop.run_until_complete(store.close())


def step_cases(setup: Setup) -> Iterator[Case]:
    """Each runtime's own step, on one thread."""
    random = np.random.default_rng(1)
    for name in RUNTIMES:
        if find_missing(f"carry-{name}", setup.artifact) is not None:
            continue
        runtime = open_runtime(name, setup.artifact, 1)
        runtime.warm()
        while runtime.warm_next():
            pass
        for batch, steps in STEP_SHAPES:
            if batch > runtime.max_batch:
                continue
            padded, length = runtime.padded_shape(batch, steps)
            rows = random.normal(size=(padded, length, setup.artifact.spec.input_features))
            states = random.uniform(-1, 1, (padded, setup.artifact.state.float_size))
            lengths = np.full(padded, steps, np.int32)
            arguments = (rows.astype(np.float32), lengths, states.astype(np.float32))
            step = runtime.step
            yield Case(f"{name} {batch} x {steps}", batch, lambda s=step, a=arguments: s(*a))


GROUPS: dict[str, Callable[[Setup], Iterator[Case]]] = {
    "codec": codec_cases,
    "queue": queue_cases,
    "events": event_cases,
    "wire": wire_cases,
    "http": http_cases,
    "store": store_cases,
    "step": step_cases,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench-micro", description="Measures the parts.")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each case")
    options = parser.parse_args(arguments)
    groups = options.only.split(",")
    if unknown := sorted(set(groups) - set(GROUPS)):
        parser.error(f"--only: expected some of {','.join(GROUPS)}, got {','.join(unknown)}")
    configure_logs("error", "json")
    with (
        tempfile.TemporaryDirectory(prefix="carry-bench-") as folder,
        closing(uvloop.new_event_loop()) as loop,
    ):
        setup = Setup(Path(folder), standard_model(Path(folder)), loop)
        for group in groups:
            for case in GROUPS[group](setup):
                name = f"{group}, {case.name}"
                print(f"{name:56} {case.best_us(options.seconds):10.2f} us/chunk", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
