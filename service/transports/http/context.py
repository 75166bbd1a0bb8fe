"""What every route needs: the pipeline, the limits, the recorder and each model's wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from service.pipeline.pipeline import Pipeline
from service.pipeline.recorder import Recorder
from service.transports.http.limits import ApiLimits
from service.transports.http.long_bodies.admission import LongBodyAdmission
from service.transports.http.wire import ModelWire


@dataclass(frozen=True, slots=True)
class ApiContext:
    """Lives in the application's `state.api`.

    Attributes:
        now_ms: wall clock in epoch milliseconds, for the age of streams.
        long_bodies: admission of long bodies.
    """

    pipeline: Pipeline
    limits: ApiLimits
    recorder: Recorder
    now_ms: Callable[[], int]
    long_bodies: LongBodyAdmission
    _wires: dict[str, ModelWire] = field(default_factory=dict)

    def wire(self, model: str) -> ModelWire:
        """The wire of a served model, made at its first use and anew when the model changes.

        Raises:
            ModelNotFound
        """
        served = self.pipeline.model(model)
        wire = self._wires.get(model)
        if wire is None or wire.served is not served:
            wire = self._wires[model] = ModelWire(served, self.limits)
        return wire


def api_of(request: Request) -> ApiContext:
    """The context of the application that serves this request."""
    context: ApiContext = request.app.state.api
    return context
