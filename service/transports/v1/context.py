"""What every route needs: access control, limits, recorder, readers and writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request

from service.access.caller import ANYONE, Caller
from service.access.key_cache import AccessKeys
from service.codec.reply_writer import ReplyWriter
from service.codec.request_reader import RequestReader
from service.codec.settings import RequestSettings
from service.core.tracing import Tracer
from service.pipeline.pipeline import Pipeline
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel
from service.server.errors import DuplicateField
from service.server.heads import AcceptsHost, accept_any_host, check_origin
from service.telemetry.access_log import note_key
from service.transports.common.long_bodies import LongBodies

SAFE_METHODS: Final = ("GET", "HEAD")
"""Methods that change nothing; a page of another site cannot read their replies."""


class ModelCodec:
    """The codec of one model: requests to values, and values to replies.

    Attributes:
        reader: reads its requests.
        writer: writes its replies.
    """

    __slots__ = ("reader", "served", "writer")

    def __init__(self, served: ServedModel, limits: RequestSettings):
        self.served = served
        self.reader = RequestReader(served.artifact, limits)
        self.writer = ReplyWriter(served.artifact)


@dataclass(frozen=True, slots=True)
class ApiContext:
    """Shared by all requests of an application, in its `state.api`.

    Attributes:
        access: names the caller of a request, which each use case of the pipeline takes.
        now_ms: wall clock in epoch milliseconds, for the age of streams.
        long_bodies: lets long bodies be decoded one at a time.
        tracer: makes spans of requests; None makes none.
        origins: allowed origins of pages, besides the service's own host.
        accepts_host: whether requests for a host name are answered.
        requires_keys: whether `access` names the callers; otherwise everybody may do everything, as
            on the admin port.
        codecs: readers and writers, by model.
    """

    pipeline: Pipeline
    access: AccessKeys
    limits: RequestSettings
    recorder: Recorder
    now_ms: Callable[[], int]
    long_bodies: LongBodies
    codecs: Mapping[str, ModelCodec]
    tracer: Tracer | None = None
    origins: frozenset[str] = frozenset()
    accepts_host: AcceptsHost = accept_any_host
    requires_keys: bool = True


def api_of(request: Request) -> ApiContext:
    """The context of the application that serves this request."""
    context: ApiContext = request.app.state.api
    return context


def caller_of(request: Request) -> Caller:
    """The caller of a request; ask for it before anything else.

    Raises:
        Unauthenticated, StoreUnavailable: see `AccessKeys.caller`.
        DuplicateField: there are several Authorization headers.
        OriginNotAllowed: a page of another site sent it, and the service is open.
    """
    api = api_of(request)
    if not api.requires_keys:
        return ANYONE
    access = api.access
    if access.open_caller is not None:
        if request.method not in SAFE_METHODS:
            # no key keeps the pages of other sites out: check the origin instead
            check_origin(request.scope["headers"], api.origins)
        return access.open_caller
    values = [value for name, value in request.scope["headers"] if name == b"authorization"]
    if len(values) > 1:
        raise DuplicateField(
            f"Authorization: expected it once, got it {len(values)} times", at="Authorization"
        )
    caller = access.caller(values[0] if values else None)
    note_key(caller.key_id)
    return caller
