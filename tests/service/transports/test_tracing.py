"""Spans of requests and batches, by the SDK's exporter in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler
from opentelemetry.trace import SpanKind, StatusCode

from service.telemetry import tracing
from service.telemetry.access_log import access_log
from service.telemetry.tracing import OtelTracer
from service.transports.v1.fast_path import split_trace_headers
from tests.service.transports.live.sockets import (
    error,
    live,
    live_application,
    reply,
    text,
)
from tests.service.transports.v1.harness import Harness, rows
from tests.service.transports.v1.raw_http import (
    INPUTS,
    answer,
    chunk,
    converse,
    port_of,
    request,
    serving,
)
from tests.service.transports.v2.conftest import add_v2
from tests.service.transports.v2.v2 import V2
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer, becomes

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01"
NOT_SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"
CHUNKS = "POST /v1/models/{model}/streams/{stream}/chunks"
LIVE = "WEBSOCKET /v1/models/{model}/streams/{stream}/live"


class Spans:
    """A tracer, and the spans that it has exported."""

    def __init__(self, root: Sampler = ALWAYS_ON):
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBased(root))
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = OtelTracer(provider)

    def named(self, name: str) -> list[ReadableSpan]:
        """The spans of a name, in the order of their ends."""
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    async def ended(self, name: str, count: int = 1) -> list[ReadableSpan]:
        """The spans of a name, once there are so many."""
        await becomes(lambda: len(self.named(name)) == count, f"{count} spans {name}")
        return self.named(name)


@pytest.fixture
async def api(pipeline_server: RealServer, tmp_path: Path, spans: Spans) -> AsyncIterator[Harness]:
    """A running application with every transport over HTTP."""
    models = {"probe": make_artifact(tmp_path)}
    async with live_application(
        pipeline_server, models, extend=add_v2, tracer=spans.tracer
    ) as running:
        yield running


@pytest.fixture
def spans() -> Spans:
    return Spans()


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def trace_of(span: ReadableSpan) -> str:
    return f"{span.context.trace_id:032x}"


def linked(span: ReadableSpan) -> list[Any]:
    return [link.context.span_id for link in span.links]


def is_inside(inner: ReadableSpan, outer: ReadableSpan) -> bool:
    """Whether one span lies in the time of another, but for the clocks' difference."""
    slack_ns = 1_000_000
    return outer.start_time - slack_ns <= inner.start_time and inner.end_time <= (
        outer.end_time + slack_ns
    )


@pytest.mark.parametrize("fast_path", [True, False])
async def test_a_chunk_continues_the_callers_trace(
    api: Harness, spans: Spans, fast_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "name_stream", lambda name: f"<{name}>")
    lines = (f"traceparent: {SAMPLED}", "tracestate: vendor=1", "X-Request-Id: mine")
    body = chunk()
    async with serving(api, fast_path=fast_path) as server:
        [response] = await converse(port_of(server), request(body, *lines, stream="ann"))
        [span] = await spans.ended(CHUNKS)
    assert response.startswith(b"HTTP/1.1 200")
    assert b"x-request-id: mine" in response
    assert (trace_of(span), parent_of(span)) == (TRACE_ID, PARENT_ID)
    assert span.context.trace_state.get("vendor") == "1"
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "http.route": CHUNKS.removeprefix("POST "),
        "http.response.status_code": 200,
        "http.request.body.size": len(body),
        "http.response.body.size": len(response.partition(b"\r\n\r\n")[2]),
        "carry.request_id": "mine",
        "carry.model": "probe",
        "carry.stream": "<ann>",
    }
    [batch] = spans.named("batch")
    assert parent_of(batch) == f"{span.context.span_id:016x}"
    assert linked(batch) == [span.context.span_id]
    assert dict(batch.attributes) == {"carry.model": "probe", "carry.batch.chunks": 1}
    for stage in ("load", "infer", "commit"):
        [inner] = spans.named(stage)
        assert parent_of(inner) == f"{batch.context.span_id:016x}"
        assert trace_of(inner) == TRACE_ID
        assert is_inside(inner, batch)
    assert is_inside(batch, span)


async def test_a_batch_is_linked_to_all_of_its_requests(api: Harness, spans: Spans) -> None:
    bodies = [request(chunk(), stream=f"s{n}") for n in range(6)]
    async with serving(api) as server:
        await converse(port_of(server), request(chunk(), stream="first"))
        connections = [await _connect(port_of(server)) for _ in bodies]
        for (_, writer), body in zip(connections, bodies, strict=True):
            writer.write(body)
        for reader, writer in connections:
            await answer(reader)
            writer.close()
        requests = await spans.ended(CHUNKS, 7)
    batches = spans.named("batch")
    assert sum(batch.attributes["carry.batch.chunks"] for batch in batches) == 7
    links = [link for batch in batches for link in linked(batch)]
    assert sorted(links) == sorted(span.context.span_id for span in requests)
    assert max(len(linked(batch)) for batch in batches) > 1
    for batch in batches:
        assert batch.parent.span_id == linked(batch)[0]
    # each root has a trace of its own
    assert len({trace_of(span) for span in requests}) == 7


async def _connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def test_a_request_for_many_streams_is_one_span(api: Harness, spans: Spans) -> None:
    items = [{"stream": f"s{n}", "inputs": INPUTS.tolist()} for n in range(3)]
    response = await api.client.post("/v1/models/probe/chunks", json={"chunks": items})
    assert response.status_code == 200
    [span] = await spans.ended("POST /v1/models/{model}/chunks")
    for batch in spans.named("batch"):
        assert linked(batch) == [span.context.span_id]
    assert sum(batch.attributes["carry.batch.chunks"] for batch in spans.named("batch")) == 3


@pytest.mark.parametrize("binary", [True, False], ids=["fast path", "slow path"])
async def test_v2_is_traced(api: Harness, spans: Spans, binary: bool) -> None:
    api.client.headers["traceparent"] = SAMPLED
    assert len(api.app.state.http.fast_routes) == 2
    await V2(api).infer(rows(3), binary=binary, sequence_id="seven")
    [span] = await spans.ended("POST /v2/models/{model}/infer")
    assert (trace_of(span), parent_of(span)) == (TRACE_ID, PARENT_ID)
    assert span.attributes["carry.model"] == "probe"
    [batch] = spans.named("batch")
    assert linked(batch) == [span.context.span_id]


async def test_each_chunk_of_a_socket_is_a_span(api: Harness, spans: Spans) -> None:
    async with (
        live(api) as sockets,
        sockets.open(additional_headers={"traceparent": SAMPLED}) as (client, _),
    ):
        await client.send(text(INPUTS, 0))
        await reply(client)
        await client.send(text(INPUTS, 99))
        await error(client, "position_ahead")
        first, second = await spans.ended(LIVE, 2)
    for span in (first, second):
        assert (trace_of(span), parent_of(span)) == (TRACE_ID, PARENT_ID)
        assert span.attributes["carry.model"] == "probe"
    assert first.attributes["http.response.status_code"] == 200
    assert second.attributes["http.response.status_code"] == 409
    assert second.attributes["error.type"] == "position_ahead"
    assert second.attributes["http.request.body.size"] > 0
    assert {link for batch in spans.named("batch") for link in linked(batch)} == {
        first.context.span_id,
        second.context.span_id,
    }


@pytest.mark.parametrize("fast_path", [True, False])
async def test_failures_have_their_code(api: Harness, spans: Spans, fast_path: bool) -> None:
    async with serving(api, fast_path=fast_path) as server:
        await converse(port_of(server), request(chunk(5)))
        api.store.away = RuntimeError("broken")
        await converse(port_of(server), request(chunk(), stream="other"))
        ahead, broken = await spans.ended(CHUNKS, 2)
    assert ahead.attributes["error.type"] == "position_ahead"
    assert ahead.status.status_code is StatusCode.UNSET
    assert broken.attributes["error.type"] == "internal_error"
    assert broken.attributes["http.response.status_code"] == 500
    assert broken.status.status_code is StatusCode.ERROR


class TestSampling:
    @pytest.fixture
    def spans(self) -> Spans:
        return Spans(ALWAYS_OFF)

    @pytest.mark.parametrize("fast_path", [True, False])
    async def test_the_callers_decision_counts(
        self, api: Harness, spans: Spans, fast_path: bool
    ) -> None:
        async with serving(api, fast_path=fast_path) as server:
            port = port_of(server)
            lines = (None, f"traceparent: {NOT_SAMPLED}", f"traceparent: {SAMPLED}")
            for number, line in enumerate(lines):
                headers = [line] if line else []
                await converse(port, request(chunk(), *headers, stream=f"s{number}"))
            [span] = await spans.ended(CHUNKS)
        assert trace_of(span) == TRACE_ID
        assert len(spans.named("batch")) == 1

    def test_an_unsampled_request_has_no_span(self, spans: Spans) -> None:
        for headers in ({}, {"traceparent": NOT_SAMPLED}, {"traceparent": "odd"}):
            assert spans.tracer.start_request(headers, 0.0) is None


@pytest.mark.parametrize("paused", range(4))
def test_times_of_spans_are_right_if_the_process_pauses_while_it_reads_the_clocks(
    paused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch_ns, now_ns = 10**18, 10**12
    pauses_ns = iter([10**9 if at == paused else 100 for at in range(4)])

    def read() -> int:
        nonlocal now_ns
        now_ns += next(pauses_ns, 100)
        return now_ns

    clock = SimpleNamespace(
        monotonic=lambda: read() / 1e9, monotonic_ns=read, time_ns=lambda: epoch_ns + read()
    )
    monkeypatch.setattr(tracing, "time", clock)
    assert tracing._epoch_ns(7.0) == pytest.approx(epoch_ns + 7 * 10**9, rel=0, abs=10_000)


def _headers(*lines: str) -> bytes:
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize(
    ("lines", "left", "propagated"),
    [
        (["Host: a"], ["Host: a"], {}),
        (["TraceParent:  x ", "Host: a"], ["Host: a"], {"traceparent": "x"}),
        (["Host: a", "traceparent: x"], ["Host: a"], {"traceparent": "x"}),
        (["traceparent: x", "traceparent: y", "Host: a"], ["Host: a"], {}),
        (["x-traceparent: x"], ["x-traceparent: x"], {}),
        (["traceparent:"], ["traceparent:"], {}),
        (
            ["tracestate: a=1, b=2", "A: traceparent: x", "traceparent: y"],
            ["A: traceparent: x"],
            {"tracestate": "a=1, b=2", "traceparent": "y"},
        ),
    ],
)
def test_trace_headers_are_separated_from_other_headers(
    lines: Sequence[str], left: Sequence[str], propagated: dict[str, str]
) -> None:
    assert split_trace_headers(_headers(*lines)) == (_headers(*left), propagated)


async def test_the_fast_path_parses_headers_once_for_different_traces(
    api: Harness, spans: Spans
) -> None:
    [fast, *_] = api.http_state().fast_routes
    async with serving(api) as server:
        for number in range(5):
            line = f"traceparent: 00-{TRACE_ID}-{number + 1:016x}-01"
            body = request(chunk(number * len(INPUTS)), line)
            await converse(port_of(server), body)
        requests = await spans.ended(CHUNKS, 5)
    assert [parent_of(span) for span in requests] == [f"{n:016x}" for n in range(1, 6)]
    assert len(fast._headers) <= 2
