"""What every route needs: the pipeline, the limits, the recorder, and readers and writers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from service.pipeline.pipeline import Pipeline
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

    Attributes:
        now_ms: wall clock in epoch milliseconds, for the age of streams.
        long_bodies: admission of long bodies.
        wires: readers and writers that `wire` built, by model; a model may have changed since.
    """

    pipeline: Pipeline
    limits: ApiLimits
    recorder: Recorder
    now_ms: Callable[[], int]
    long_bodies: LongBodyAdmission
    wires: dict[str, ModelWire] = field(default_factory=dict)

    def wire(self, model: str) -> ModelWire:
        """Reader and writer of a served model, built on first use and when the model changes.

        Raises:
            ModelNotFound
        """
        served = self.pipeline.model(model)
        wire = self.wires.get(model)
        if wire is None or wire.served is not served:
            wire = self.wires[model] = ModelWire(served, self.limits)
        return wire


def api_of(request: Request) -> ApiContext:
    """The context of the application that serves this request."""
    context: ApiContext = request.app.state.api
    return context
