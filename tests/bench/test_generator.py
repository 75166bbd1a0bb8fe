"""The load generator: what it sends, what it rejects, and how an open loop counts."""

import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from tests.bench import generator
from tests.bench.generator import Load, draw_arrivals, make_streams
from tests.bench.traffic import TrafficSpec, WrongReplyError
from tests.bench.workloads import Bodies

pytestmark = pytest.mark.harness

Answer = Callable[[bytes], bytes]  # from a request's body to the bytes of the reply; none hang up
BODIES = Bodies.random(3, features=2, count=4)
STALL_S = 0.15


def traffic(streams: int, items: int = 0) -> TrafficSpec:
    values, steps = BODIES.values("json"), (3, 3, 3, 3)
    return TrafficSpec("/chunks", "json", "inputs", values, steps, "a", streams, items=items)


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def accept_chunk(body: bytes) -> bytes:
    """What a service would answer to a chunk of JSON."""
    return ok(b'{"position":%d}' % (orjson.loads(body)["position"] + 3))


@contextmanager
def stub(answer: Answer) -> Iterator[int]:
    """A server of one connection after another, on its port; requests are short."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                while request := self.request.recv(1 << 16):
                    if not (reply := answer(request.rpartition(b"\r\n\r\n")[2])):
                        break
                    self.request.sendall(reply)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def run_closed(answer: Answer, spec: TrafficSpec) -> Load:
    """A second of load, by a clock whose readings take the time: the same on any machine."""
    readings = count(0.0, 0.01)
    clock = SimpleNamespace(perf_counter=lambda: next(readings), process_time=time.process_time)
    make_streams("t", spec)
    with stub(answer) as port, pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "time", clock)
        return generator.run_closed("t", port, 1, 1)


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
        run_closed(lambda body: reply, traffic(2, items=items))


def test_rejected_chunk_is_followed_by_another_at_its_position() -> None:
    sent: list[tuple[int, Any]] = []

    def answer(body: bytes) -> bytes:
        chunk = orjson.loads(body)
        sent.append((chunk["position"], chunk["inputs"]))
        busy = b"HTTP/1.1 429 Busy\r\nContent-Length: 2\r\n\r\n{}"
        return busy if len(sent) % 2 else accept_chunk(body)

    load = run_closed(answer, replace(traffic(1), may_reject=True))
    assert load.rejected >= load.chunks > 1
    for at in range(0, len(sent) - 1, 2):
        assert sent[at][0] == sent[at + 1][0] == 3 * at / 2
        assert sent[at][1] != sent[at + 1][1]
    with pytest.raises(WrongReplyError, match="got status 429"):
        run_closed(answer, traffic(1))


def test_open_loop_latency_counts_requests_due_during_a_stall() -> None:
    stalled, never = threading.Event(), threading.Event()

    def answer(body: bytes) -> bytes:
        if not stalled.is_set():
            stalled.set()
            never.wait(STALL_S)
        return accept_chunk(body)

    make_streams("t", traffic(50))
    with stub(answer) as port:
        load = generator.run_open("t", port, 200, 0.5, seed=1, connections=1)
    due = draw_arrivals(200, 0.5, 1)
    during = int((due < due[0] + STALL_S / 2).sum())
    assert load.chunks == len(due)
    assert load.unanswered == 0
    assert during > 5
    assert (load.latencies_s > STALL_S / 2).sum() >= during
