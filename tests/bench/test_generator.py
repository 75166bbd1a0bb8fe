"""The load generator: what it sends, what it notices, and how an open loop counts."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import ormsgpack
import pytest

from tests.bench.generator import Driver, Generator, Load, draw_arrivals
from tests.bench.traffic import Traffic, TrafficSpec, WrongReplyError, position_in
from tests.bench.workloads import Bodies

Answer = Callable[[str, bytes], bytes]
"""From a request's path and body to the bytes of the reply."""

BODIES = Bodies.random(3, features=2, count=4)
STALL_S = 0.15


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def honest(path: str, body: bytes) -> bytes:
    """What a service would answer to a chunk of JSON."""
    chunk = json.loads(body)
    return ok(b'{"position":%d,"x":1}' % (chunk["position"] + len(chunk["inputs"])))


@contextmanager
def stub(answer: Answer) -> Iterator[int]:
    """A server of keep-alive connections, one thread each; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        stream = connection.makefile("rwb")
        try:
            while line := stream.readline():
                length = 0
                while (header := stream.readline()) != b"\r\n":
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.partition(b":")[2])
                stream.write(answer(line.split()[1].decode(), stream.read(length)))
                stream.flush()
        except OSError:
            return
        finally:
            hang_up(connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threads.append(threading.Thread(target=serve, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for connection, thread in zip(connections, threads, strict=True):
            hang_up(connection)
            thread.join()
            connection.close()


def hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def generator(spec: TrafficSpec) -> Generator:
    found = Generator()
    found.traffic("t", spec)
    return found


def test_every_stream_is_sent_consecutive_positions_and_its_bodies_in_turn() -> None:
    seen: dict[str, list[tuple[int, object]]] = {}

    def answer(path: str, body: bytes) -> bytes:
        chunk = json.loads(body)
        seen.setdefault(path.split("/")[5], []).append((chunk["position"], chunk["inputs"]))
        return honest(path, body)

    spec = BODIES.traffic("a", 5)
    with stub(answer) as port:
        load = generator(spec).closed("t", port, 3, 0.2)
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


def test_a_load_goes_on_until_the_sampled_streams_had_enough() -> None:
    spec = BODIES.traffic("a", 5, sampled=2)
    with stub(honest) as port:
        load = generator(spec).closed("t", port, 2, 0.0, least=3)
        short = generator(spec).closed("t", port, 2, 0.0)
    assert {(kept.stream, kept.chunk) for kept in load.sampled} >= {
        (stream, chunk) for stream in range(2) for chunk in range(3)
    }
    assert short.chunks == 2


def test_no_stream_has_two_requests_in_flight() -> None:
    busy: Counter[str] = Counter()
    most: Counter[str] = Counter()
    both = threading.Barrier(2)

    def answer(path: str, body: bytes) -> bytes:
        busy[path] += 1
        # Two requests are always under way together, but for the last one.
        with suppress(threading.BrokenBarrierError):
            both.wait(STALL_S)
        most[path] = max(most[path], busy[path])
        busy[path] -= 1
        return honest(path, body)

    with stub(answer) as port:
        load = generator(BODIES.traffic("a", 3)).closed("t", port, 2, 0.1)
    assert load.chunks > 10
    assert set(most.values()) == {1}


@pytest.mark.parametrize("media", ["json", "msgpack"])
def test_many_streams_in_one_request(media: str) -> None:
    seen: list[list[dict[str, object]]] = []

    def answer(path: str, body: bytes) -> bytes:
        assert path == "/v1/models/bench/chunks"
        items = (json.loads(body) if media == "json" else ormsgpack.unpackb(body))["chunks"]
        seen.append(items)
        results = [{"status": 200, "reply": {"position": item["position"] + 3}} for item in items]
        if media == "json":
            return ok(json.dumps({"results": results}, separators=(",", ":")).encode())
        return ok(ormsgpack.packb({"results": results}))

    spec = BODIES.traffic("a", 6, media=media, items=4)
    with stub(answer) as port:
        load = generator(spec).closed("t", port, 1, 0.1)
    assert load.chunks == 4 * len(seen)
    assert load.chunks == 4 * len(load.latencies_s)
    for items in seen:
        assert len({item["stream"] for item in items}) == 4
        for item in items:
            given = item["inputs"]
            rows = np.float32(given) if media == "json" else np.frombuffer(given, "<f4")
            assert rows.size == 6


def test_one_chunk_in_messagepack_reads_back() -> None:
    spec = BODIES.traffic("a", 1, media="msgpack", position=300)
    request, ticket = Traffic(spec).request()
    head, _, body = request.partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head
    assert b"Content-Type: application/msgpack" in head
    chunk = ormsgpack.unpackb(body)
    assert chunk["position"] == 300
    np.testing.assert_array_equal(
        np.frombuffer(chunk["inputs"], "<f4").reshape(3, 2), BODIES.rows[0]
    )
    assert ticket == ((0, 303),)


@pytest.mark.parametrize("position", [0, 127, 128, 255, 256, 65_535, 65_536, 2**32, 2**63 - 1])
def test_a_position_is_read_from_either_media(position: int) -> None:
    packed = b"head" + ormsgpack.packb({"a": 1, "position": position, "b": [2.5]})
    assert position_in(packed, 4, "msgpack") == position
    assert position_in(b'{"a":1,"position":%d}' % position, 0, "json") == position


@pytest.mark.parametrize("items", [0, 2])
def test_a_wrong_position_ends_the_run(items: int) -> None:
    count = 0

    def answer(path: str, body: bytes) -> bytes:
        nonlocal count
        count += 1
        sent = json.loads(body)
        chunks = sent["chunks"] if items else [sent]
        positions = [chunk["position"] + 3 + (count == 5) for chunk in chunks]
        return ok(b",".join(b'{"position":%d}' % position for position in positions))

    with stub(answer) as port, pytest.raises(WrongReplyError, match="expected position"):
        generator(BODIES.traffic("a", 4, items=items)).closed("t", port, 1, 5)


def test_an_item_without_a_position_ends_the_run() -> None:
    def answer(path: str, body: bytes) -> bytes:
        return ok(b'{"results":[{"status":200,"reply":{"position":3}},{"status":503}]}')

    with stub(answer) as port, pytest.raises(WrongReplyError, match="expected positions"):
        generator(BODIES.traffic("a", 2, items=2)).closed("t", port, 1, 5)


@pytest.mark.parametrize(
    "reply",
    [
        b'HTTP/1.1 503 Service Unavailable\r\nContent-Length: 14\r\n\r\n{"position":3}',
        b'HTTP/1.1 200 OK\r\n\r\n{"position":3}',
        b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"position":3}more',
        b"",
    ],
)
def test_a_reply_that_is_no_whole_ok_ends_the_run(reply: bytes) -> None:
    def answer(path: str, body: bytes) -> bytes:
        if not reply:
            raise OSError
        return reply

    with stub(answer) as port, pytest.raises(WrongReplyError):
        generator(BODIES.traffic("a", 1)).closed("t", port, 1, 5)


def test_chunked_reply_is_decoded() -> None:
    filling = b"0\r\n\r\n" * 50_000

    def answer(path: str, body: bytes) -> bytes:
        end = json.loads(body)["position"] + 3
        pieces = [b'{"x":"', filling, b'","position":%d}' % end, b""]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks

    spec = BODIES.traffic("a", 1, sampled=1)
    with stub(answer) as port:
        load = generator(spec).closed("t", port, 1, 0.1)
    assert load.chunks > 1
    assert len(load.sampled[0].reply) == len(b'{"x":"","position":3}') + len(filling)


def test_a_reply_in_many_pieces_is_put_together() -> None:
    filling = b"x" * 3_000_000

    def answer(path: str, body: bytes) -> bytes:
        end = json.loads(body)["position"] + 3
        return ok(b'{"x":"%b","position":%d}' % (filling, end))

    spec = BODIES.traffic("a", 1, sampled=1)
    with stub(answer) as port:
        load = generator(spec).closed("t", port, 1, 0.1)
    assert load.chunks > 1
    assert len(load.sampled[0].reply) == len(b'{"x":"","position":3}') + len(filling)


def test_the_first_replies_of_sampled_streams_are_kept_in_order() -> None:
    with stub(honest) as port:
        load = generator(BODIES.traffic("a", 4, sampled=2)).closed("t", port, 2, 0.2)
    assert {kept.stream for kept in load.sampled} == {0, 1}
    for stream in (0, 1):
        kept = [reply for reply in load.sampled if reply.stream == stream]
        assert [reply.chunk for reply in kept] == list(range(len(kept)))
        for reply in kept:
            assert json.loads(reply.reply)["position"] == 3 * (reply.chunk + 1)


def test_arrivals_are_fixed_by_the_seed_and_come_at_the_rate() -> None:
    moments = draw_arrivals(1000, 20, 7)
    np.testing.assert_array_equal(moments, draw_arrivals(1000, 20, 7))
    assert (np.diff(moments) >= 0).all()
    assert moments[0] >= 0
    assert moments[-1] < 20
    assert len(moments) == pytest.approx(20_000, rel=0.05)
    gaps = np.diff(moments)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)


def test_an_open_loop_charges_a_stall_with_everyone_who_came_during_it() -> None:
    stalled = threading.Event()
    never = threading.Event()

    def answer(path: str, body: bytes) -> bytes:
        if not stalled.is_set():
            stalled.set()
            never.wait(STALL_S)
        return honest(path, body)

    with stub(answer) as port:
        load = generator(BODIES.traffic("a", 50)).open("t", port, 1, 200, 0.5, 1)
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


def test_a_driver_reports_what_its_process_found_wrong() -> None:
    def answer(path: str, body: bytes) -> bytes:
        return ok(b'{"position":4}')

    with stub(answer) as port, Driver(()) as driver:
        driver.traffic("t", BODIES.traffic("a", 1))
        with pytest.raises(WrongReplyError, match=re.escape("expected position 3")):
            driver.closed("t", port, 1, 5)
