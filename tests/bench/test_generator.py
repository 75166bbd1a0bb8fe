"""The load generator: what it sends, what it rejects, and how an open loop counts."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import numpy as np
import orjson
import ormsgpack
import pytest

from tests.bench import generator
from tests.bench.generator import Load, draw_arrivals, make_streams
from tests.bench.processes import helper_process
from tests.bench.traffic import Media, TrafficSpec, WrongReplyError
from tests.bench.workloads import Bodies

Answer = Callable[[str, bytes], bytes]
"""From a request's path and body to the bytes of the reply; none hang up."""

BODIES = Bodies.random(3, features=2, count=4)
STALL_S = 0.15


def traffic(streams: int, media: Media = "json", items: int = 0, sampled: int = 0) -> TrafficSpec:
    path = "/v1/models/bench/chunks" if items else "/v1/models/bench/streams/{}/chunks"
    values, steps = BODIES.values(media), (3, 3, 3, 3)
    return TrafficSpec(
        path, media, "inputs", values, steps, "a", streams, items=items, sampled=sampled
    )


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def reply_of(chunk: dict[str, Any]) -> dict[str, Any]:
    return {"position": chunk["position"] + 3, "x": [1.5]}


def accept_chunk(path: str, body: bytes) -> bytes:
    """What a service would answer to a chunk of JSON."""
    return ok(orjson.dumps(reply_of(orjson.loads(body))))


@contextmanager
def stub(answer: Answer) -> Iterator[int]:
    """A server of keep-alive connections, one thread each; its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            reply = answer(self.path, body)
            self.close_connection = not reply
            with suppress(ConnectionError):
                self.wfile.write(reply)

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def run_closed(
    answer: Answer, spec: TrafficSpec, connections: int, seconds: float, least: int = 0
) -> Load:
    make_streams("t", spec)
    with stub(answer) as port:
        return generator.run_closed("t", port, connections, seconds, least)


@pytest.mark.parametrize("media", ["json", "msgpack"])
@pytest.mark.parametrize("items", [0, 3])
def test_each_stream_is_sent_its_bodies_in_turn_at_consecutive_positions(
    items: int, media: Media
) -> None:
    spec = traffic(4, media=media, items=items)
    loads = orjson.loads if media == "json" else ormsgpack.unpackb
    dumps = cast(Callable[[Any], bytes], orjson.dumps if media == "json" else ormsgpack.packb)
    seen = defaultdict(list)

    def answer(path: str, body: bytes) -> bytes:
        content, stream = loads(body), path.split("/")[-2]
        chunks = content["chunks"] if items else [{"stream": stream, **content}]
        for chunk in chunks:
            seen[chunk["stream"]].append((chunk["position"], chunk["inputs"]))
        results = [{"status": 200, "reply": reply_of(chunk)} for chunk in chunks]
        return ok(dumps({"results": results} if items else results[0]["reply"]))

    load = run_closed(answer, spec, 1 if items else 3, 0.2)
    assert sum(map(len, seen.values())) == load.chunks == len(load.latencies_s) * max(1, items)
    assert load.events == 3 * load.chunks
    assert 0 < load.latencies_s.sum() <= 3 * load.seconds
    assert set(seen) == {spec.name(stream) for stream in range(4)}
    for name, chunks in seen.items():
        for at, (position, inputs) in enumerate(chunks):
            rows = np.float32(inputs) if media == "json" else np.frombuffer(inputs, "<f4")
            body = BODIES.rows[spec.body(int(name[-7:]), at)]
            assert position == 3 * at
            np.testing.assert_array_equal(rows.reshape(3, 2), body, strict=True)


def test_replies_of_sampled_streams_are_kept_until_there_are_enough() -> None:
    load = run_closed(accept_chunk, traffic(5, sampled=2), 2, 0.0, least=3)
    for stream in (0, 1):
        replies = [reply for reply in load.sampled if reply.stream == stream]
        assert len(replies) >= 3
        for index, reply in enumerate(replies):
            assert reply.chunk == index
            assert orjson.loads(reply.reply)["position"] == 3 * (index + 1)
    assert run_closed(accept_chunk, traffic(5, sampled=2), 2, 0.0).chunks == 2


@pytest.mark.parametrize(
    ("reply", "items", "message"),
    [
        (ok(b'{"position":4}'), 0, r"expected positions \[3\], got \[4\]"),
        (ok(b'{"outputs":{}}'), 0, r"got \[None\]"),
        (ok(b'{"position":'), 0, "truncated"),
        (ok(b'{"results":[{"reply":{"position":3}},{"status":503}]}'), 2, r"\[3, None\]"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 14\r\n\r\n{}", 0, "got status 503: .*Busy"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"position":3}', 0, "status 200 and a length"),
        (ok(b'{"position":3}') * 2, 0, "expected one whole reply"),
        (b"", 0, "expected one whole reply"),
    ],
)
def test_invalid_reply_ends_the_run(reply: bytes, items: int, message: str) -> None:
    with pytest.raises(WrongReplyError, match=message):
        run_closed(lambda path, body: reply, traffic(2, items=items), 1, 5)


def test_rejected_chunk_is_followed_by_another_at_its_position() -> None:
    sent: list[tuple[int, Any]] = []

    def answer(path: str, body: bytes) -> bytes:
        chunk = orjson.loads(body)
        sent.append((chunk["position"], chunk["inputs"]))
        busy = b"HTTP/1.1 429 Busy\r\nContent-Length: 2\r\n\r\n{}"
        return busy if len(sent) % 2 else accept_chunk(path, body)

    load = run_closed(answer, replace(traffic(1), may_reject=True), 1, 0.1)
    assert load.rejected >= load.chunks > 1
    for at in range(0, len(sent) - 1, 2):
        assert sent[at][0] == sent[at + 1][0] == 3 * at / 2
        assert sent[at][1] != sent[at + 1][1]
    with pytest.raises(WrongReplyError, match="got status 429"):
        run_closed(answer, traffic(1), 1, 1)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    moments = draw_arrivals(1000, 20, 7)
    gaps = np.diff(moments)
    assert 0 <= moments[0] < moments[-1] < 20
    assert len(moments) == pytest.approx(20_000, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)


def test_open_loop_latency_counts_requests_due_during_a_stall() -> None:
    stalled, never = threading.Event(), threading.Event()

    def answer(path: str, body: bytes) -> bytes:
        if not stalled.is_set():
            stalled.set()
            never.wait(STALL_S)
        return accept_chunk(path, body)

    make_streams("t", traffic(50))
    with stub(answer) as port:
        load = generator.run_open("t", port, 200, 0.5, seed=1, connections=1)
    due = draw_arrivals(200, 0.5, 1)
    during = int((due < due[0] + STALL_S / 2).sum())
    assert load.chunks == len(due)
    assert load.unsent == 0
    assert during > 5
    assert (load.latencies_s > STALL_S / 2).sum() >= during


def test_an_error_is_raised_by_the_call_in_a_helper_process() -> None:
    with stub(lambda *_: ok(b'{"position":4}')) as port, helper_process(()) as process:
        process.submit(make_streams, "t", traffic(1))
        with pytest.raises(WrongReplyError, match="expected positions"):
            process.submit(generator.run_closed, "t", port, 1, 5).result()
