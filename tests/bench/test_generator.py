"""The load generator: what it sends, what it rejects, and how an open loop counts."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import ormsgpack
import pytest

from tests.bench.generator import Driver, Generator, Load, draw_arrivals
from tests.bench.traffic import Traffic, TrafficSpec, WrongReplyError, position_in
from tests.bench.workloads import Bodies

Answer = Callable[[str, bytes], bytes]
"""From a request's path and body to the bytes of the reply; none hang up."""

BODIES = Bodies.random(3, features=2, count=4)
STALL_S = 0.15


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def chunked(*pieces: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


def accept_chunk(path: str, body: bytes) -> bytes:
    """What a service would answer to a chunk of JSON."""
    return ok(b'{"position":%d,"x":1}' % end_of(body))


def end_of(body: bytes) -> int:
    chunk = json.loads(body)
    return int(chunk["position"] + len(chunk["inputs"]))


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
    answer: Answer, spec: TrafficSpec, connections: int, seconds: float, **options: Any
) -> Load:
    generator = Generator()
    generator.traffic("t", spec)
    with stub(answer) as port:
        return generator.closed("t", port, connections, seconds, **options)


def test_streams_are_sent_consecutive_positions_and_their_bodies_in_turn() -> None:
    seen: dict[str, list[tuple[int, object]]] = {}

    def answer(path: str, body: bytes) -> bytes:
        chunk = json.loads(body)
        seen.setdefault(path.split("/")[5], []).append((chunk["position"], chunk["inputs"]))
        return accept_chunk(path, body)

    spec = BODIES.traffic("a", 5)
    load = run_closed(answer, spec, 3, 0.2)
    assert set(seen) <= {spec.name(stream).decode() for stream in range(5)}
    assert sum(map(len, seen.values())) == load.chunks == len(load.latencies_s)
    assert load.events == 3 * load.chunks
    assert 0 < load.latencies_s.sum() <= 3 * load.seconds
    for name, chunks in seen.items():
        stream = int(name.rpartition("-")[2])
        assert [position for position, _ in chunks] == [3 * at for at in range(len(chunks))]
        for at, (_, inputs) in enumerate(chunks):
            np.testing.assert_array_equal(
                np.float32(inputs), BODIES.rows[spec.body(stream, at)], strict=True
            )


def test_load_continues_until_sampled_streams_have_enough_chunks() -> None:
    spec = BODIES.traffic("a", 5, sampled=2)
    load = run_closed(accept_chunk, spec, 2, 0.0, least=3)
    assert {(reply.stream, reply.chunk) for reply in load.sampled} >= {
        (stream, chunk) for stream in range(2) for chunk in range(3)
    }
    assert run_closed(accept_chunk, spec, 2, 0.0).chunks == 2


def test_no_stream_has_two_requests_in_flight() -> None:
    busy: Counter[str] = Counter()
    most: Counter[str] = Counter()
    both = threading.Barrier(2)

    def answer(path: str, body: bytes) -> bytes:
        busy[path] += 1
        # Two requests are always in flight together, but for the last one.
        with suppress(threading.BrokenBarrierError):
            both.wait(STALL_S)
        most[path] = max(most[path], busy[path])
        busy[path] -= 1
        return accept_chunk(path, body)

    assert run_closed(answer, BODIES.traffic("a", 3), 2, 0.1).chunks > 10
    assert set(most.values()) == {1}


@pytest.mark.parametrize("media", ["json", "msgpack"])
def test_one_request_for_many_streams(media: str) -> None:
    seen: list[list[dict[str, Any]]] = []

    def answer(path: str, body: bytes) -> bytes:
        assert path == "/v1/models/bench/chunks"
        items = (json.loads(body) if media == "json" else ormsgpack.unpackb(body))["chunks"]
        seen.append(items)
        results = [{"status": 200, "reply": {"position": item["position"] + 3}} for item in items]
        if media == "json":
            return ok(json.dumps({"results": results}, separators=(",", ":")).encode())
        return ok(ormsgpack.packb({"results": results}))

    load = run_closed(answer, BODIES.traffic("a", 6, media=media, items=4), 1, 0.1)
    assert load.chunks == 4 * len(seen) == 4 * len(load.latencies_s)
    for items in seen:
        assert len({item["stream"] for item in items}) == 4
        for item in items:
            inputs = item["inputs"]
            rows = np.float32(inputs) if media == "json" else np.frombuffer(inputs, "<f4")
            assert rows.size == 6


def test_messagepack_request_round_trips() -> None:
    spec = BODIES.traffic("a", 1, media="msgpack", position=300)
    request, ticket = Traffic(spec).request()
    head, _, body = request.partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head
    assert b"Content-Type: application/msgpack" in head
    chunk = ormsgpack.unpackb(body)
    assert chunk["position"] == 300
    rows = np.frombuffer(chunk["inputs"], "<f4").reshape(3, 2)
    np.testing.assert_array_equal(rows, BODIES.rows[0])
    assert ticket == ((0, 303),)


@pytest.mark.parametrize("position", [0, 127, 128, 255, 256, 65_535, 65_536, 2**32, 2**63 - 1])
def test_position_is_read_from_either_media(position: int) -> None:
    packed = b"head" + ormsgpack.packb({"a": 1, "position": position, "b": [2.5]})
    assert position_in(packed, 4, "msgpack") == position
    assert position_in(b'{"a":1,"position":%d}' % position, 0, "json") == position


@pytest.mark.parametrize("items", [0, 2])
def test_wrong_position_ends_the_run(items: int) -> None:
    count = 0

    def answer(path: str, body: bytes) -> bytes:
        nonlocal count
        count += 1
        sent = json.loads(body)
        positions = [
            c["position"] + 3 + (count == 5) for c in (sent["chunks"] if items else [sent])
        ]
        return ok(b",".join(b'{"position":%d}' % position for position in positions))

    with pytest.raises(WrongReplyError, match="expected position"):
        run_closed(answer, BODIES.traffic("a", 4, items=items), 1, 5)


@pytest.mark.parametrize(
    "reply",
    [
        b'HTTP/1.1 503 Service Unavailable\r\nContent-Length: 14\r\n\r\n{"position":3}',
        b'HTTP/1.1 200 OK\r\n\r\n{"position":3}',
        b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"position":3}more',
        b"",
    ],
)
def test_invalid_reply_ends_the_run(reply: bytes) -> None:
    with pytest.raises(WrongReplyError):
        run_closed(lambda path, body: reply, BODIES.traffic("a", 1), 1, 5)


def test_item_without_a_position_ends_the_run() -> None:
    reply = ok(b'{"results":[{"status":200,"reply":{"position":3}},{"status":503}]}')
    with pytest.raises(WrongReplyError, match="expected positions"):
        run_closed(lambda path, body: reply, BODIES.traffic("a", 2, items=2), 1, 5)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_chunked_reply_is_joined(is_chunked: bool) -> None:
    filling = b"0\r\n\r\n" * 200_000

    def answer(path: str, body: bytes) -> bytes:
        pieces = b'{"x":"', filling, b'","position":%d}' % end_of(body)
        return chunked(*pieces) if is_chunked else ok(b"".join(pieces))

    load = run_closed(answer, BODIES.traffic("a", 1, sampled=1), 1, 0.1)
    assert load.chunks > 1
    assert load.sampled[0].reply == b'{"x":"%b","position":3}' % filling


def test_first_replies_of_sampled_streams_are_in_order() -> None:
    load = run_closed(accept_chunk, BODIES.traffic("a", 4, sampled=2), 2, 0.2)
    assert {reply.stream for reply in load.sampled} == {0, 1}
    for stream in (0, 1):
        replies = [reply for reply in load.sampled if reply.stream == stream]
        assert [reply.chunk for reply in replies] == list(range(len(replies)))
        for reply in replies:
            assert json.loads(reply.reply)["position"] == 3 * (reply.chunk + 1)


def test_arrivals_follow_the_seed_and_the_rate() -> None:
    moments = draw_arrivals(1000, 20, 7)
    np.testing.assert_array_equal(moments, draw_arrivals(1000, 20, 7))
    gaps = np.diff(moments)
    assert (gaps >= 0).all()
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

    generator = Generator()
    generator.traffic("t", BODIES.traffic("a", 50))
    with stub(answer) as port:
        load = generator.open("t", port, 1, 200, 0.5, 1)
    due = draw_arrivals(200, 0.5, 1)
    during = int((due < due[0] + STALL_S / 2).sum())
    assert load.chunks == len(due)
    assert load.unsent == 0
    assert during > 5
    assert (load.latencies_s > STALL_S / 2).sum() >= during
    assert (load.late_s > STALL_S / 2).sum() >= during - 1


def test_percentiles_are_in_milliseconds() -> None:
    load = Load(2.0, np.arange(1, 101) / 1000, chunks=100)
    assert load.percentile_ms(50) == pytest.approx(50.5)
    assert load.percentile_ms(99) == pytest.approx(99.01)
    assert load.chunks_per_s == 50


def test_driver_raises_the_error_of_its_process() -> None:
    with stub(lambda path, body: ok(b'{"position":4}')) as port, Driver(()) as driver:
        driver.traffic("t", BODIES.traffic("a", 1))
        with pytest.raises(WrongReplyError, match="expected position 3"):
            driver.closed("t", port, 1, 5)
