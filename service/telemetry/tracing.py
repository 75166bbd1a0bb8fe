"""Traces by OpenTelemetry: a span of each sampled request, and of each batch that serves one.

    request                   of every transport; a child of the caller's span, if it sent one
      batch                   a child of the first of its traced requests, linked to each of them
        load, infer, commit

A batch serves many requests, so its span cannot be a child of each: it has links instead. It is in
the trace of one of them, so that with little sampling every traced request shows its batch. Its
spans are made when it has ended, from times that it takes anyway: an untraced batch costs nothing.

Sampling, exporter and resource are those of the standard variables `OTEL_...`. The packages are of
the extra `otel`: only a service that traces imports this module.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final, NamedTuple

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.core.tracing import Period, RequestSpan
from service.telemetry.access_log import GRPC, GRPC_ERRORS, request_facts

SCOPE: Final = "carry"
ERROR_STATUS: Final = 500
"""HTTP statuses from here on, and gRPC's below, are errors of the service."""
MAX_READING_NS: Final = 100_000
READINGS: Final = 10
"""Clocks whose reading takes longer are read again, as often as this."""

_ATTRIBUTES: Final = {
    "request_id": "carry.request_id",
    "model": "carry.model",
    "stream": "carry.stream",
    "code": "error.type",
    "received_bytes": "http.request.body.size",
    "sent_bytes": "http.response.body.size",
}
"""The attributes of a span for members of a line in the access log."""


def open_tracer() -> OtelTracer:
    """The tracer that exports by OTLP over HTTP, in a thread of its own."""
    attributes = {"service.name": SCOPE, "service.version": version("carry")}
    provider = TracerProvider(resource=Resource(attributes).merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelTracer(provider)


class _Request(NamedTuple):
    """The span of a request (`RequestSpan`)."""

    span: Any
    trace_id: str

    def end(
        self, method: str, route: str | None, status: int, facts: Mapping[str, str | int | None]
    ) -> None:
        """End it; once."""
        span = self.span
        if method == GRPC:
            service, _, name = (route or "").strip("/").partition("/")
            span.update_name(f"{service}/{name}")
            attributes: dict[str, Any] = {
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": name,
                "rpc.grpc.status_code": status,
            }
            is_error = status in GRPC_ERRORS
        else:
            span.update_name(f"{method} {route}" if route else method)
            attributes = {"http.request.method": method, "http.response.status_code": status}
            if route:
                attributes["http.route"] = route
            is_error = status >= ERROR_STATUS
        attributes |= {_ATTRIBUTES[name]: value for name, value in facts.items() if value}
        span.set_attributes(attributes)
        if is_error:
            span.set_status(trace.StatusCode.ERROR)
        span.end()


class OtelTracer:
    """A `Tracer` over a provider of spans."""

    def __init__(self, provider: TracerProvider):
        self._provider = provider
        self._tracer = provider.get_tracer(SCOPE, version("carry"))
        self._extract = TraceContextTextMapPropagator().extract

    def close(self) -> None:
        """Export what is left; once, and waits for it."""
        self._provider.shutdown()

    def start_request(self, headers: Mapping[str, str], began_s: float) -> RequestSpan | None:
        """Start the span of a request; None if it is not sampled."""
        parent = self._extract(headers, Context()) if headers else Context()
        span = self._tracer.start_span(
            "request", parent, kind=trace.SpanKind.SERVER, start_time=_epoch_ns(began_s)
        )
        context = span.get_span_context()
        if not span.is_recording():
            return None
        return _Request(span, f"{context.trace_id:032x}")

    def current_span(self) -> RequestSpan | None:
        """The span of the request that is being served in this context."""
        facts = request_facts.get()
        return None if facts is None else facts.span

    def record_batch(
        self,
        model: str,
        requests: Sequence[RequestSpan],
        chunks: int,
        batch: Period,
        stages: Mapping[str, Period],
    ) -> None:
        """Record a batch with the spans of those of its requests that are sampled."""
        spans: list[Any] = [each.span for each in requests if isinstance(each, _Request)]
        whole = self._tracer.start_span(
            "batch",
            trace.set_span_in_context(spans[0]),
            attributes={"carry.model": model, "carry.batch.chunks": chunks},
            links=[trace.Link(span.get_span_context()) for span in spans],
            start_time=_epoch_ns(batch[0]),
        )
        inside = trace.set_span_in_context(whole)
        for name, (began_s, ended_s) in stages.items():
            span = self._tracer.start_span(name, inside, start_time=_epoch_ns(began_s))
            span.end(_epoch_ns(ended_s))
        whole.end(_epoch_ns(batch[1]))


def _epoch_ns(monotonic_s: float) -> int:
    """A time of the monotonic clock as nanoseconds of the epoch.

    A pause of the process between the readings of both clocks would move it.
    """
    for _ in range(READINGS):
        before_ns, now_ns, after_ns = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        if after_ns - before_ns < MAX_READING_NS:
            break
    return now_ns - before_ns + round(monotonic_s * 1e9)
