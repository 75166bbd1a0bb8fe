"""What HTTP and the codec cost a request, without sockets, engine and store.

    python -m tests.bench.micro_http [--repeats 100] [--requests 64]

Drives the application by hand, `scope, receive, send`, over a pipeline that answers at once with
a constant, and prints the processor time of each kind of request: least and median of the repeats.
The logs are on, as in `carry serve`, and go to /dev/null. A bare ASGI echo stands beside them.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import orjson
import ormsgpack
import uvloop

from models.artifact.artifact import write_artifact
from models.spec.model import parse_spec
from service.core.errors import CarryError
from service.core.values import Chunk, Reply, StreamHead, Timing
from service.ops.logs import configure_logs
from service.ops.metrics import PrometheusRecorder
from service.pipeline.pipeline import Pipeline
from service.pipeline.served_model import ServedModel
from service.transports.http.application import ApiLimits, create_api
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import contracting_weights

SPEC = parse_spec(
    {
        "name": "bench",
        "features": 16,
        "layers": [{"kind": "lstm", "units": 64}, {"kind": "lstm", "units": 64}],
        "heads": [{"kind": "dense", "name": "out", "units": 8}],
    }
)
STEPS, MANY = 16, 64
HEADERS = (
    (b"host", b"127.0.0.1:8000"),
    (b"user-agent", b"python-httpx/0.28.1"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"connection", b"keep-alive"),
)

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


class ConstantPipeline:
    """Answers every chunk with the same outputs, at once."""

    def __init__(self, served: ServedModel):
        self.models = {served.name: served}
        random = np.random.default_rng(3)
        self._outputs = random.normal(size=(STEPS, served.outputs.size)).astype(np.float32)
        self._state = served.state.zero()
        self._timing = Timing(queue_s=0.001, load_s=0.002, infer_s=0.0015, commit_s=0.0025)

    def model(self, name: str) -> ServedModel:
        """The one model."""
        return self.models[name]

    async def process(self, chunk: Chunk) -> Reply:
        """One constant reply."""
        return self._reply(chunk)

    async def process_many(self, items: Sequence[Chunk | CarryError]) -> list[Reply | CarryError]:
        """A constant reply for each."""
        return [item if isinstance(item, CarryError) else self._reply(item) for item in items]

    def _reply(self, chunk: Chunk) -> Reply:
        head = StreamHead(b"epoch678", chunk.digest[:16], 64)
        return Reply(chunk.key, head, self._outputs, self._state, timing=self._timing)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of request."""

    name: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    chunks: int = 1

    async def send(self, app: AsgiApp) -> bytes:
        """Send it once, as uvicorn would; the answer's body."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "server": ("127.0.0.1", 8000),
            "client": ("127.0.0.1", 50000),
            "scheme": "http",
            "root_path": "",
            "headers": list(self.headers),
            "state": {},
            "method": "POST",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
        }
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": self.body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(scope, receive, send)
        if sent[0]["status"] != 200:
            raise RuntimeError(f"{self.name}: {sent}")
        return bytes(sent[1]["body"])


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """The floor: read the body, answer with it."""
    message = await receive()
    headers = [(b"content-length", b"%d" % len(message["body"]))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": message["body"]})


def cases() -> Iterable[Case]:
    """Single chunks and many streams, in both media types."""
    rows = np.random.default_rng(1).normal(size=(STEPS, SPEC.input_features)).astype(np.float32)
    one, many = "/v1/models/bench/streams/stream-000123/chunks", "/v1/models/bench/chunks"
    for media, dumps, inputs in (
        ("json", orjson.dumps, cast(Any, rows.tolist())),
        ("msgpack", ormsgpack.packb, rows.tobytes()),
    ):
        chunk = {"position": 48, "inputs": inputs}
        items = [{"stream": f"stream-{at:06d}", **chunk} for at in range(MANY)]
        for name, path, body, chunks in (
            ("one chunk", one, dumps(chunk), 1),
            (f"{MANY} streams", many, dumps({"chunks": items}), MANY),
        ):
            headers = (
                *HEADERS,
                (b"content-type", b"application/" + media.encode()),
                (b"content-length", b"%d" % len(body)),
            )
            yield Case(f"{name}, {media}", path, headers, body, chunks)


async def measure(app: AsgiApp, case: Case, repeats: int, requests: int) -> list[float]:
    """Microseconds of the processor a chunk, of each repeat."""
    count = max(1, requests // case.chunks)
    found = []
    for _ in range(repeats):
        began_s = time.process_time()
        for _ in range(count):
            await case.send(app)
        found.append((time.process_time() - began_s) / count / case.chunks * 1e6)
    return found


async def compare(repeats: int, requests: int) -> None:
    """Print one line for each case."""
    with tempfile.TemporaryDirectory(prefix="carry-bench-") as folder:
        artifact = write_artifact(Path(folder) / "bench", SPEC, contracting_weights(SPEC, 1))
    served = ServedModel(artifact, NumpyRuntime(artifact))
    recorder = PrometheusRecorder()
    recorder.model(served.name, served.version, served.runtime.name)
    pipeline = cast(Pipeline, ConstantPipeline(served))
    app = cast(AsgiApp, create_api(pipeline, ApiLimits(), recorder))
    # as a worker does when it is ready
    gc.collect()
    gc.freeze()
    print(f"{'request':24} {'least us/chunk':>15} {'median':>8}")
    for case in cases():
        for name, target in ((f"echo of {case.name}", echo), (case.name, app)):
            await measure(target, case, 1, requests)
            found = await measure(target, case, repeats, requests)
            print(f"{name:32} {min(found):7.2f} {median(found):8.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What HTTP and the codec cost a request.")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--requests", type=int, default=64)
    options = parser.parse_args()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    configure_logs()
    uvloop.run(compare(options.repeats, options.requests))


if __name__ == "__main__":
    main()
