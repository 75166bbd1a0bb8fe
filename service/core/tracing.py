"""Traces of requests and batches: the interface of a tracer, and of the span of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class RequestSpan(Protocol):
    """The span of a request that is sampled."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""

    def end(
        self, method: str, route: str | None, status: int, facts: Mapping[str, str | int | None]
    ) -> None:
        """End it; once. `facts` are members of its line in the access log; None is unknown."""


Period = tuple[float, float]
"""When something began and ended, on the monotonic clock."""


class Tracer(Protocol):
    """Makes spans; never raises, never blocks. Called from the event loop."""

    def start_request(self, headers: Mapping[str, str], began_s: float) -> RequestSpan | None:
        """Start the span of a request; None if it is not sampled.

        Args:
            headers: those of the request whose names are `PROPAGATED`, in lower case.
            began_s: when it began, on the monotonic clock.
        """

    def current_span(self) -> RequestSpan | None:
        """The span of the request that is being served in this context."""

    def record_batch(
        self,
        model: str,
        requests: Sequence[RequestSpan],
        chunks: int,
        batch: Period,
        stages: Mapping[str, Period],
    ) -> None:
        """Record a batch and its stages, with the spans of those of its requests that are sampled,
        at least one."""


PROPAGATED = ("traceparent", "tracestate")
"""Headers that carry the trace of the caller (W3C Trace Context)."""
