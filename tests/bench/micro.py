"""`make bench-micro`: the parts of a chunk's path by themselves, best of several repetitions.

    python -m tests.bench.micro [--only http] [--seconds 0.5]

Each on the standard chunk (16 events of 16 features, 8 outputs, 1,024 bytes of state), in
microseconds per chunk. `http` drives the ASGI application over a pipeline that answers a constant;
`step` is each runtime's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
import timeit
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import uvloop

from service.core.values import Reply, StreamHead
from service.engine.runtimes.loading import RUNTIMES
from service.ops.logs import configure_logs
from service.ops.metrics import PrometheusRecorder
from service.pipeline.served_model import ServedModel
from service.transports.http.application import create_api
from service.transports.http.limits import ApiLimits
from tests.bench import workloads
from tests.bench.sections import MEDIA
from tests.bench.traffic import Traffic
from tests.bench.workloads import STEPS, Bodies
from tests.support.numpy_runtime import NumpyRuntime

REPEATS, CALLS = 5, 20
"""Repetitions of each case, and asynchronous calls per timed run, so that entering the event loop
does not count."""

MANY = 64
STEP_SHAPES = ((1, 1), (1, 16), (8, 16), (32, 16), (128, 16), (32, 64))

Case = tuple[str, int, Callable[[], object]]
"""A part's name, how many chunks one call handles, and the call."""


class Parts:
    """The cases of each group, by its name."""

    def __init__(self, folder: Path, loop: AbstractEventLoop):
        self.run, self.artifact = loop.run_until_complete, workloads.standard_model(folder)

    def http(self) -> Iterator[Case]:
        """Requests through the ASGI application: single chunks and many streams, in both media."""
        logging.disable()
        served = ServedModel(self.artifact, NumpyRuntime(self.artifact))
        rows, state = Bodies.random(STEPS).rows[0], served.state.zero()
        head, outputs = (
            StreamHead(bytes(8), bytes(16), STEPS),
            rows[:, : self.artifact.outputs.size],
        )
        recorder = PrometheusRecorder()
        recorder.model(served.name, served.version, served.runtime.name)

        async def process(chunk: Any, deadline_s: float | None = None) -> Reply:
            return Reply(chunk.key, head, outputs, state)

        async def process_many(items: Sequence[Any], deadline_s: float | None = None) -> list[Any]:
            return [await process(item) for item in items]

        pipeline = SimpleNamespace(
            models={served.name: served},
            model=lambda name: served,
            check_admission=lambda *request: None,
            process=process,
            process_many=process_many,
        )
        api = create_api(cast(Any, pipeline), ApiLimits(), recorder)
        bodies = Bodies((rows,))
        for media, items in product(MEDIA, (0, MANY)):
            options: Any = {"media": media, "items": items}
            traffic = workloads.make_traffic(self.artifact, bodies, "stream", MANY, **options)
            calls, chunks = _asgi_calls(api, Traffic(traffic).request()[0]), max(1, items)
            yield f"{chunks} in {media}", chunks * CALLS, lambda calls=calls: self.run(calls())

    def step(self) -> Iterator[Case]:
        """Each runtime's own step, on one thread."""
        for name in (name for name in RUNTIMES if importlib.util.find_spec(name)):
            artifact, runtime = workloads.warm_runtime(name, self.artifact.path)
            for batch, steps in STEP_SHAPES:
                if batch <= runtime.max_batch:
                    inputs = workloads.step_arguments(runtime, artifact, batch, steps)
                    yield f"{name} {batch} x {steps}", batch, partial(runtime.step, *inputs)


GROUPS = ("http", "step")


def _asgi_calls(app: Any, request: bytes) -> Callable[[], Any]:
    """Calls an application with a request, as a server does, many times."""
    head, _, body = request.partition(b"\r\n\r\n")
    line, *headers = head.split(b"\r\n")
    path = line.split(b" ")[1]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path.decode(),
        "raw_path": path,
        "query_string": b"",
    }
    fields = [tuple(header.lower().split(b": ")) for header in headers]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message.get("status", 200) != 200:
            raise RuntimeError(f"{path!r}: {message}")

    async def call() -> None:
        for _ in range(CALLS):
            await app({**scope, "headers": [*fields], "state": {}}, receive, send)

    return call


def measure_call_s(call: Callable[[], object], seconds: float) -> float:
    """The minimum time of a call over the repetitions, which together take about `seconds`."""
    timer = timeit.Timer(call)
    once_s = max(min(timer.repeat(3, 1)), 1e-8)
    number = max(1, int(seconds / REPEATS / once_s))
    return min(timer.repeat(REPEATS, number)) / number


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="make bench-micro", description="Measures the parts.")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each case")
    options = parser.parse_args()
    configure_logs("error", "json")
    with (
        tempfile.TemporaryDirectory(prefix="carry-bench-") as folder,
        closing(uvloop.new_event_loop()) as loop,
    ):
        parts = Parts(Path(folder), loop)
        for group in options.only:
            for name, chunks, call in getattr(parts, group)():
                us = measure_call_s(call, options.seconds) / chunks * 1e6
                print(f"{f'{group}, {name}':56} {us:10.2f} us/chunk", flush=True)


if __name__ == "__main__":
    main()
