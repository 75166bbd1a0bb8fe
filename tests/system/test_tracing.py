"""Traces of a running service, over HTTP and gRPC, received by OTLP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.pipelines import make_artifact
from tests.support.servers import until
from tests.support.service import POLL_S, Service, running
from tests.support.v2_messages import callable_of, infer_request

TRACE_ID, PARENT_ID = (
    bytes.fromhex("4bf92f3577b34da6a3ce929d0e0e4736"),
    bytes.fromhex("00f067aa0ba902b7"),
)
SAMPLED = f"00-{TRACE_ID.hex()}-{PARENT_ID.hex()}-01"
ROWS = [[0.5] * 3] * 4
INFER = "inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "inference.GRPCInferenceService/ModelStreamInfer"


class Collector(ThreadingHTTPServer):
    """Receives spans by OTLP over HTTP.

    Attributes:
        spans: what it has received.
        resources: the attributes of their resources.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exports)
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []

    def named(self, name: str) -> list[Any]:
        """The spans of a name."""
        return [span for span in self.spans if span.name == name]


class Exports(BaseHTTPRequestHandler):
    """Stores what is posted to its server."""

    server: Collector

    def do_POST(self) -> None:
        """Store the spans of a request."""
        body = self.rfile.read(int(self.headers["content-length"]))
        assert self.path == "/v1/traces"
        for resource_spans in ExportTraceServiceRequest.FromString(body).resource_spans:
            attributes = resource_spans.resource.attributes
            self.server.resources.append({each.key: each.value.string_value for each in attributes})
            for scope_spans in resource_spans.scope_spans:
                self.server.spans += scope_spans.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def traced(tmp_path: Path, collector: Collector) -> Iterator[Service]:
    models = make_artifact(tmp_path / "models").path
    options = {
        "CARRY_TRACING": "1",
        "CARRY_LOG_STREAMS": "hashed",
        "CARRY_GRPC_PORT": "0",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_SERVICE_NAME": "carry-test",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with running(tmp_path, models, **options) as service:
        yield service


def test_the_traces_of_callers_continue_over_http_and_grpc(
    traced: Service, collector: Collector
) -> None:
    address = "/v1/models/probe/streams/{}/chunks"
    body = {"inputs": ROWS}
    with httpx.Client(base_url=traced.url) as client:
        client.post(address.format("quiet"), json=body).raise_for_status()
        headers = {"traceparent": SAMPLED}
        client.post(address.format("ann@home"), json=body, headers=headers).raise_for_status()
    metadata = (("traceparent", SAMPLED),)
    chunk = infer_request("probe", np.array(ROWS), "ann@home")
    with grpc.insecure_channel(traced.grpc_address()) as channel:
        infer = callable_of(channel, "ModelInfer")
        infer(infer_request("probe", np.array(ROWS), "quiet"))
        infer(chunk, metadata=metadata)
        stream = callable_of(channel, "ModelStreamInfer")
        replies = stream(iter([chunk] * 2), metadata=metadata)
        assert [reply.error_message for reply in replies] == ["", ""]
    until(lambda: len(collector.named("batch")) == 4, "the batches", poll_s=POLL_S)
    traced.stop()

    [posted] = collector.named("POST /v1/models/{model}/streams/{stream}/chunks")
    [inferred] = collector.named(INFER)
    streamed = collector.named(STREAM_INFER)
    assert len(streamed) == 2
    requests = [posted, inferred, *streamed]
    for span in requests:
        assert (span.trace_id, span.parent_span_id) == (TRACE_ID, PARENT_ID)
    names = {
        each.value.string_value
        for span in requests
        for each in span.attributes
        if each.key == "carry.stream"
    }
    [hashed] = names
    assert len(hashed) == 16
    assert "ann@home" not in hashed
    assert {each["service.name"] for each in collector.resources} == {"carry-test"}
    assert all(each["service.version"] for each in collector.resources)
    assert f'"trace_id":"{TRACE_ID.hex()}"' in traced.log()
    assert f'"stream":"{hashed}"' in traced.log()
    assert "ann@home" not in traced.log()
