"""What every route needs: its entry to the pipeline, limits, recorder, readers and writers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from service.core.errors import DuplicateField
from service.core.tracing import Tracer
from service.core.values import Check
from service.pipeline.entries import Entries
from service.pipeline.entry import Entry
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel
from service.transports.http.bodies.request_reader import RequestReader
from service.transports.http.limits import ApiLimits
from service.transports.http.long_bodies.admission import LongBodyAdmission
from service.transports.http.long_bodies.long_reader import LongReader
from service.transports.http.replies.reply_writer import ReplyWriter


class ModelWire:
    """Requests to values and values to replies, for one model.

    Attributes:
        reader: reads its requests.
        long: reads its long requests, yielding the event loop.
        writer: writes its replies.
    """

    __slots__ = ("long", "reader", "served", "writer")

    def __init__(self, served: ServedModel, limits: ApiLimits):
        self.served = served
        self.reader = RequestReader(served, limits)
        self.long = LongReader(self.reader)
        self.writer = ReplyWriter(served)


@dataclass(frozen=True, slots=True)
class ApiContext:
    """Shared by all requests of an application, in its `state.api`.

    There is no pipeline in it: a request gets one from `entries`, which check its access key.

    Attributes:
        readiness: runs the readiness checks.
        now_ms: wall clock in epoch milliseconds, for the age of streams.
        long_bodies: admission of long bodies.
        tracer: makes spans of requests; None makes none.
        wires: readers and writers that `wire` built, by model; a model may have changed since.
    """

    entries: Entries
    readiness: Callable[[], Awaitable[list[Check]]]
    limits: ApiLimits
    recorder: Recorder
    now_ms: Callable[[], int]
    long_bodies: LongBodyAdmission
    tracer: Tracer | None = None
    wires: dict[str, ModelWire] = field(default_factory=dict)

    def wire(self, served: ServedModel) -> ModelWire:
        """Reader and writer of a served model, built on first use and when the model changes."""
        wire = self.wires.get(served.name)
        if wire is None or wire.served is not served:
            wire = self.wires[served.name] = ModelWire(served, self.limits)
        return wire


def api_of(request: Request) -> ApiContext:
    """The context of the application that serves this request."""
    context: ApiContext = request.app.state.api
    return context


def entry_of(request: Request) -> Entry:
    """The pipeline as the sender of a request may use it; call it before anything else.

    Raises:
        Unauthenticated, StoreUnavailable: see `Entries.entry`.
        DuplicateField: there are several Authorization headers.
    """
    entries = api_of(request).entries
    if entries.open is not None:
        return entries.open
    values = [value for name, value in request.scope["headers"] if name == b"authorization"]
    if len(values) > 1:
        raise DuplicateField(
            f"Authorization: expected it once, got it {len(values)} times", at="Authorization"
        )
    return entries.entry(values[0] if values else None)
