"""What every route needs: access control, limits, recorder, readers and writers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from starlette.requests import Request

from service.codec.long_bodies.admission import LongBodyAdmission
from service.codec.long_bodies.long_reader import LongReader
from service.codec.reply_writer import ReplyWriter
from service.codec.request_reader import RequestReader
from service.codec.rows_items import RowsItemsReader
from service.codec.settings import RequestSettings
from service.core.tracing import Tracer
from service.core.values import Check
from service.pipeline.access_control import AccessControl
from service.pipeline.recorder import Recorder
from service.pipeline.scoped_pipeline import PipelineInterface
from service.pipeline.served_model import ServedModel
from service.server.errors import DuplicateField
from service.server.origins import AcceptsHost, accept_any_host, check_origin
from service.telemetry.access_log import note_key

SAFE_METHODS: Final = ("GET", "HEAD")
"""Methods that change nothing; a page of another site cannot read their replies."""


class ModelCodec:
    """The codec of one model: requests to values, and values to replies.

    Attributes:
        reader: reads its requests.
        long: reads its long requests, yielding the event loop.
        rows_items: reads its requests of many chunks of rows.
        writer: writes its replies.
    """

    __slots__ = ("long", "reader", "rows_items", "served", "writer")

    def __init__(self, served: ServedModel, limits: RequestSettings):
        self.served = served
        self.reader = RequestReader(served, limits)
        self.long = LongReader(self.reader)
        self.rows_items = RowsItemsReader(self.reader)
        self.writer = ReplyWriter(served)


@dataclass(frozen=True, slots=True)
class ApiContext:
    """Shared by all requests of an application, in its `state.api`.

    It has no pipeline: a request gets one from `access`, in the scope of its access key.

    Attributes:
        readiness: runs the readiness checks.
        now_ms: wall clock in epoch milliseconds, for the age of streams.
        long_bodies: admission of long bodies.
        tracer: makes spans of requests; None makes none.
        origins: allowed origins of pages, besides the service's own host.
        accepts_host: whether requests for a host name are answered.
        codecs: readers and writers that `codec` built, by model; a model may have changed since.
    """

    access: AccessControl
    readiness: Callable[[], Awaitable[list[Check]]]
    limits: RequestSettings
    recorder: Recorder
    now_ms: Callable[[], int]
    long_bodies: LongBodyAdmission
    tracer: Tracer | None = None
    origins: frozenset[str] = frozenset()
    accepts_host: AcceptsHost = accept_any_host
    codecs: dict[str, ModelCodec] = field(default_factory=dict)

    def codec(self, served: ServedModel) -> ModelCodec:
        """Reader and writer of a served model, built on first use and when the model changes."""
        codec = self.codecs.get(served.name)
        if codec is None or codec.served is not served:
            codec = self.codecs[served.name] = ModelCodec(served, self.limits)
        return codec


def api_of(request: Request) -> ApiContext:
    """The context of the application that serves this request."""
    context: ApiContext = request.app.state.api
    return context


def pipeline_of(request: Request) -> PipelineInterface:
    """The pipeline in the scope of the request's access key; call it before anything else.

    Raises:
        Unauthenticated, StoreUnavailable: see `AccessControl.pipeline`.
        DuplicateField: there are several Authorization headers.
        OriginNotAllowed: a page of another site sent it, and the service is open.
    """
    access = api_of(request).access
    if access.open_pipeline is not None:
        if request.method not in SAFE_METHODS:
            _check_origin(request)
        return access.open_pipeline
    values = [value for name, value in request.scope["headers"] if name == b"authorization"]
    if len(values) > 1:
        raise DuplicateField(
            f"Authorization: expected it once, got it {len(values)} times", at="Authorization"
        )
    pipeline = access.pipeline(values[0] if values else None)
    note_key(pipeline.key_id)
    return pipeline


def _check_origin(request: Request) -> None:
    """Reject what a page of another site sends, which would need a key if the service had any.

    Raises:
        OriginNotAllowed
    """
    origins = [value for name, value in request.scope["headers"] if name == b"origin"]
    # a page cannot set `Sec-Fetch-Site`, and a proxy may have changed the host
    if origins and request.headers.getlist("sec-fetch-site") != ["same-origin"]:
        texts = [value.decode("latin-1") for value in origins]
        check_origin(texts, request.headers.get("host", ""), api_of(request).origins)
