"""What the OpenAPI document says of each route, beside its docstring.

Each constant is the keyword arguments of a route's decorator. Bodies and problems are
references into the components, which `openapi_document` fills in for the served models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from service.codec import reply_types
from service.codec.field_rules import (
    EXAMPLE_EPOCH,
    EXAMPLE_TAG,
)
from service.codec.media import SERVED, Media
from service.core import errors
from service.core.errors import CarryError
from service.transports.v1.problems import LATER, PROBLEM_JSON, REFERENCE
from service.transports.v1.request_fields import SECONDS
from service.transports.v1.statuses import STATUS

Arguments = dict[str, Any]

_ETAG = {
    "ETag": {
        "description": "Names the state the stream is in: its epoch and tag.",
        "schema": {"type": "string", "examples": [f'"{EXAMPLE_EPOCH}-{EXAMPLE_TAG}"']},
    }
}
_TIMING = {
    "Server-Timing": {
        "description": "Milliseconds in queue, load, infer and commit.",
        "schema": {"type": "string"},
    }
}
_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds to wait before the same request is sent again, if it may be.",
        "schema": {"type": "integer", "minimum": 1},
    }
}


def _parameter(
    place: str, name: str, description: str, schema: Mapping[str, Any], *, required: bool = False
) -> dict[str, Any]:
    return {
        "in": place,
        "name": name,
        "description": description,
        "required": required,
        "schema": dict(schema),
    }


_TEXT = {"type": "string"}
_IF_MATCH = _parameter(
    "header",
    "If-Match",
    "Apply only if the stream is in one of the states that these strong ETags name; `*` for any.",
    _TEXT,
)
_TIMEOUT = _parameter(
    "header",
    "Carry-Timeout",
    "How long the client waits, in decimal seconds; work that has not started by then "
    "is not started. The service has a default and a cap.",
    {**_TEXT, "pattern": SECONDS, "examples": ["2.5"]},
)
_REQUEST_ID = _parameter(
    "header", "X-Request-ID", "An id for logs and problems; generated if absent.", _TEXT
)
_OPTIONS = [
    _parameter(
        "query",
        "return_sequences",
        "As in Keras: false keeps the last step alone and drops the axis of time.",
        {"type": "boolean", "default": True},
    ),
    _parameter(
        "query",
        "return_state",
        "As in Keras: true adds the state after the last step, by name.",
        {"type": "boolean", "default": False},
    ),
    _parameter(
        "query",
        "return_attention",
        "True adds the weight of each step, by layer that attends over the chunk; rejected if "
        "the model has none.",
        {"type": "boolean", "default": False},
    ),
]
_PREFIX = "Only streams whose names begin with this."


def _problems(*kinds: type[CarryError]) -> dict[int | str, Any]:
    """The problem responses of a route, one per status, with an example per code."""
    by_status: defaultdict[int, list[type[CarryError]]] = defaultdict(list)
    for kind in kinds:
        by_status[STATUS[kind]].append(kind)
    return {
        status: {
            "description": ", ".join(f"`{kind.code}`: {kind.title}" for kind in kinds_of_status),
            **({"headers": _RETRY_AFTER} if status in LATER else {}),
            "content": {
                PROBLEM_JSON: {
                    "schema": _reference(reply_types.Problem.__name__),
                    "examples": {kind.code: _problem_example(kind) for kind in kinds_of_status},
                }
            },
        }
        for status, kinds_of_status in sorted(by_status.items())
    }


def _problem_example(kind: type[CarryError]) -> dict[str, Any]:
    return {
        "summary": kind.title,
        "value": {
            "type": f"{REFERENCE}#{kind.code}",
            "title": kind.title,
            "status": STATUS[kind],
            "detail": f"{kind.title}.",
            "code": kind.code,
            "retryable": kind.retryable,
            "request_id": "6f1d0c2e9a7b4853",
        },
    }


def _reply(
    model: Any, description: str, headers: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A response in JSON, for FastAPI to document, and the same in MessagePack."""
    packed = {"schema": _reference(model.__name__)}
    return {
        "model": model,
        "description": description,
        "content": {Media.MSGPACK.value: packed},
        **({"headers": dict(headers)} if headers else {}),
    }


def _reference(component: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{component}"}


def _body(component: str) -> dict[str, Any]:
    schema = _reference(component)
    return {"required": True, "content": {media: {"schema": schema} for media in SERVED}}


def _route(
    replies: Mapping[int, Any],
    parameters: list[dict[str, Any]],
    *problems: type[CarryError],
    body: str | None = None,
) -> Arguments:
    extra: dict[str, Any] = {"parameters": [*parameters, _REQUEST_ID]}
    if body is not None:
        extra["requestBody"] = _body(body)
        problems = (*_BODY, *problems)
    rejected = _problems(*_ANY, *problems, errors.InternalError)
    return {"responses": {**replies, **rejected, **replies}, "openapi_extra": extra}


_ANY = (
    errors.InvalidInput,
    errors.MalformedRequest,
    errors.DuplicateField,
    errors.HeadTooLarge,
    errors.HostNotAllowed,
    errors.ExpectationFailed,
    errors.RequestTimeout,
    errors.TooManyConnections,
    errors.Unauthenticated,
    errors.Forbidden,
)
_BODY = (
    errors.MalformedBody,
    errors.BodyTooLarge,
    errors.UnsupportedMediaType,
)
_NAMED = (errors.InvalidName, errors.ModelNotFound, errors.NotAcceptable)
_STORE = (errors.StoreUnavailable, errors.StoreRefused)
_WRITTEN = (errors.OutcomeUnknown, errors.NotDurable)
_ENGINE = (
    errors.NotFinite,
    errors.Overloaded,
    errors.LimitExceeded,
    errors.DeadlineExceeded,
    errors.InferenceTimeout,
    errors.ShuttingDown,
)
_OVERWRITING = (
    errors.DeadlineExceeded,
    errors.Overloaded,
    errors.LimitExceeded,
    errors.InvalidPrecondition,
    errors.StreamExists,
    errors.StateChanged,
    errors.StateIncompatible,
    errors.Conflict,
    errors.StateDamaged,
)

CHUNK = _route(
    {200: _reply(reply_types.ChunkReply, "Applied, now or before.", {**_ETAG, **_TIMING})},
    [*_OPTIONS, _IF_MATCH, _TIMEOUT],
    errors.ChunkTooLong,
    errors.ChunksUnsupported,
    errors.FinalUnsupported,
    errors.ResetsUnsupported,
    *_NAMED,
    errors.InvalidPrecondition,
    errors.EpochMismatch,
    errors.PositionAhead,
    errors.PositionBehind,
    errors.AlreadyApplied,
    errors.InputKindMismatch,
    errors.StreamFinal,
    errors.StateChanged,
    errors.StateIncompatible,
    errors.Conflict,
    errors.StateDamaged,
    *_STORE,
    *_WRITTEN,
    *_ENGINE,
    errors.StreamOverloaded,
    body="Chunk",
)
MANY = _route(
    {200: _reply(reply_types.ManyReply, "One outcome per item.")},
    [*_OPTIONS, _TIMEOUT],
    errors.ChunksUnsupported,
    errors.ModelNotFound,
    errors.NotAcceptable,
    errors.InvalidPrecondition,
    errors.LimitExceeded,
    body="Many",
)
PREDICT = _route(
    {200: _reply(reply_types.PredictReply, "One prediction per sequence.")},
    [
        *_OPTIONS,
        _parameter(
            "query",
            "return_state_token",
            "True adds the state after the last step as a signed token, which a later sequence may "
            "continue.",
            {"type": "boolean", "default": False},
        ),
        _TIMEOUT,
    ],
    errors.ChunkTooLong,
    errors.StateTokenInvalid,
    errors.StateTokenOfOtherModel,
    errors.StateTokenOfOtherVersion,
    errors.InputKindMismatch,
    errors.ModelNotFound,
    errors.NotAcceptable,
    *_STORE,
    *_ENGINE,
    body="Predict",
)
STREAM = _route(
    {200: _reply(reply_types.StreamInfo, "The stream.", _ETAG)},
    [_IF_MATCH],
    *_NAMED,
    errors.InvalidPrecondition,
    errors.StreamNotFound,
    errors.StateChanged,
    errors.StateDamaged,
    *_STORE,
)
DELETE_STREAM = _route(
    {204: {"description": "Forgotten."}},
    [_IF_MATCH],
    errors.InvalidName,
    errors.ModelNotFound,
    errors.InvalidPrecondition,
    errors.StreamNotFound,
    errors.StateChanged,
    errors.Conflict,
    errors.StateDamaged,
    *_STORE,
    *_WRITTEN,
)
OUTPUTS = _route(
    {
        200: {
            "description": "Events `stream`, `outputs`, `gap` and `end`, until the client "
            "disconnects. The `id` of an event is a position.",
            "content": {"text/event-stream": {"schema": _TEXT}},
        }
    },
    [
        _parameter(
            "query",
            "from",
            "Deliver outputs from this position on, as far as they are known; by default from the "
            "current position.",
            {"type": "integer", "minimum": 0},
        ),
        _parameter(
            "header",
            "Last-Event-ID",
            "As `from`, and before it; browsers send it when they reconnect.",
            {"type": "integer", "minimum": 0},
        ),
        _OPTIONS[0],
    ],
    errors.InvalidName,
    errors.ModelNotFound,
    *_STORE,
    errors.ShuttingDown,
)
STATE = _route(
    {200: _reply(reply_types.StateReply, "The state.", _ETAG)},
    [_IF_MATCH],
    *_NAMED,
    errors.InvalidPrecondition,
    errors.StreamNotFound,
    errors.StateChanged,
    errors.StateIncompatible,
    errors.StateDamaged,
    *_STORE,
)
RESTORE = _route(
    {
        200: _reply(reply_types.StreamInfo, "Overwritten.", _ETAG),
        201: _reply(reply_types.StreamInfo, "Created.", _ETAG),
    },
    [_IF_MATCH],
    errors.ChunksUnsupported,
    *_NAMED,
    *_OVERWRITING,
    *_STORE,
    *_WRITTEN,
    body="StateBody",
)
FORK = _route(
    {
        200: _reply(reply_types.StreamInfo, "Overwritten.", _ETAG),
        201: _reply(reply_types.StreamInfo, "Created.", _ETAG),
    },
    [{**_IF_MATCH, "description": "ETags of the stream `to`, to overwrite it."}],
    *_NAMED,
    errors.StreamNotFound,
    *_OVERWRITING,
    *_STORE,
    *_WRITTEN,
    body="ForkBody",
)
FORECAST = _route(
    {200: _reply(reply_types.ForecastReply, "What is seen ahead.", _ETAG)},
    [_IF_MATCH, _TIMEOUT],
    *_NAMED,
    errors.InvalidPrecondition,
    errors.ForecastUnsupported,
    errors.StreamNotFound,
    errors.StateChanged,
    errors.PositionAhead,
    errors.PositionBehind,
    errors.StateIncompatible,
    errors.StateDamaged,
    *_STORE,
    *_ENGINE,
    body="Forecast",
)
STREAMS = _route(
    {200: _reply(reply_types.StreamList, "One page.")},
    [
        _parameter("query", "prefix", _PREFIX, _TEXT),
        _parameter("query", "cursor", "The `cursor` of the page before.", _TEXT),
        _parameter("query", "limit", "About how many names.", {"type": "integer", "minimum": 1}),
    ],
    *_NAMED,
    *_STORE,
)
DELETE_STREAMS = _route(
    {200: _reply(reply_types.Deleted, "Forgotten.")},
    [
        _parameter("query", "prefix", _PREFIX, _TEXT, required=True),
        _parameter("query", "cursor", "The `cursor` of the request before.", _TEXT),
        _parameter("query", "limit", "About how many streams.", {"type": "integer", "minimum": 1}),
    ],
    *_NAMED,
    errors.Conflict,
    *_STORE,
    *_WRITTEN,
)
MODELS = _route({200: _reply(reply_types.ModelList, "The models.")}, [], errors.NotAcceptable)
MODEL = _route(
    {200: _reply(reply_types.ModelDetail, "The model.")},
    [],
    errors.ModelNotFound,
    errors.NotAcceptable,
)


LIVE: Arguments = {"responses": {200: {"model": reply_types.Live, "description": "It answers."}}}
READY: Arguments = {
    "responses": {
        200: {"model": reply_types.Ready, "description": "Every check passes."},
        503: {"model": reply_types.Ready, "description": "Some check fails."},
    }
}
STORE: Arguments = {
    "responses": {200: {"model": reply_types.StoreReport, "description": "How the store is."}}
}
