"""The routes of version 1 of the API, as one table.

The routes, what each reads of a request, `/openapi.json`, and the tests of access and of the
reference pages come from it. A route's place in the API is a row here, its endpoint a function in
`routes/`.
"""

from __future__ import annotations

from typing import Any, Final

from service.access.caller import DESCRIBE, PREDICT, Verb
from service.codec.reply_types import EXAMPLE_EPOCH, EXAMPLE_TAG, ChunkReply, ForecastReply
from service.pipeline.recorder import ShadowReport
from service.transports.v1 import reply_types
from service.transports.v1.call import SECONDS
from service.transports.v1.route import IF_MATCH, Route, parameter
from service.transports.v1.routes import alarms, chunks, health, models, streams, topics, versions

_MODEL: Final = "/v1/models/{model}"
_STREAMS: Final = f"{_MODEL}/streams"
_STREAM: Final = f"{_STREAMS}/{{stream}}"

_TEXT: Final = {"type": "string"}
_OFF: Final = {"type": "boolean", "default": False}

_ETAG: Final[dict[str, Any]] = {
    "ETag": {
        "description": "Names the state the stream is in: its epoch and tag.",
        "schema": {"type": "string", "examples": [f'"{EXAMPLE_EPOCH}-{EXAMPLE_TAG}"']},
    }
}
_TIMING: Final[dict[str, Any]] = {
    "Server-Timing": {
        "description": "Milliseconds in queue, load, infer and commit.",
        "schema": {"type": "string"},
    }
}
_TIMEOUT: Final = parameter(
    "header",
    "Carry-Timeout",
    "How long the client waits, in decimal seconds; work that has not started by then "
    "is not started. The service has a default and a cap.",
    {**_TEXT, "pattern": SECONDS, "examples": ["2.5"]},
)
RETURN_SEQUENCES: Final = parameter(
    "query",
    "return_sequences",
    "As in Keras: false keeps the last step alone and drops the axis of time.",
    {"type": "boolean", "default": True},
)
_OPTIONS: Final = (
    RETURN_SEQUENCES,
    parameter(
        "query",
        "return_state",
        "As in Keras: true adds the state after the last step, by name.",
        _OFF,
    ),
    parameter(
        "query",
        "return_attention",
        "True adds the weight of each step, by layer that attends over the chunk; rejected if "
        "the model has none.",
        _OFF,
    ),
)
_RETURN_STATE_TOKEN: Final = parameter(
    "query",
    "return_state_token",
    "True adds the state after the last step as a signed token, which a later sequence may "
    "continue.",
    _OFF,
)
_PREFIX: Final = "Only streams whose names begin with this."
_PAGE: Final = (
    parameter("query", "cursor", "The `cursor` of the reply before.", _TEXT),
    parameter("query", "limit", "About how many streams.", {"type": "integer", "minimum": 1}),
)


ROUTES: Final = (
    Route(
        "POST",
        f"{_STREAM}/chunks",
        chunks.post_chunk,
        verbs=PREDICT,
        replies={200: "Applied, now or before."},
        reply=ChunkReply,
        headers={**_ETAG, **_TIMING},
        parameters=(*_OPTIONS, IF_MATCH, _TIMEOUT),
        body="Chunk",
    ),
    Route(
        "POST",
        f"{_MODEL}/chunks",
        chunks.post_chunks,
        verbs=PREDICT,
        replies={200: "One outcome per item."},
        reply=reply_types.ManyReply,
        parameters=(*_OPTIONS, _TIMEOUT),
        body="Many",
    ),
    Route(
        "POST",
        f"{_MODEL}/predict",
        chunks.post_predict,
        verbs=PREDICT,
        replies={200: "One prediction per sequence."},
        reply=reply_types.PredictReply,
        parameters=(*_OPTIONS, _RETURN_STATE_TOKEN, _TIMEOUT),
        body="Predict",
    ),
    Route(
        "GET",
        _STREAM,
        streams.get_stream,
        verbs=DESCRIBE,
        replies={200: "The stream."},
        reply=reply_types.StreamInfo,
        headers=_ETAG,
        parameters=(IF_MATCH,),
    ),
    Route(
        "DELETE",
        _STREAM,
        streams.delete_stream,
        verbs=(Verb.DELETE,),
        replies={204: "Deleted."},
        parameters=(IF_MATCH,),
    ),
    Route(
        "GET",
        f"{_STREAM}/state",
        streams.get_state,
        verbs=(Verb.READ_STATE,),
        replies={200: "The state."},
        reply=reply_types.StateReply,
        headers=_ETAG,
        parameters=(
            IF_MATCH,
            parameter(
                "query",
                "version",
                "The version whose state is read, by its label or the first digits of its "
                "fingerprint; by default the one that wrote it.",
                _TEXT,
            ),
        ),
    ),
    Route(
        "PUT",
        f"{_STREAM}/state",
        streams.put_state,
        verbs=(Verb.WRITE_STATE,),
        replies={200: "Overwritten.", 201: "Created."},
        reply=reply_types.StreamInfo,
        headers=_ETAG,
        parameters=(IF_MATCH,),
        body="StateBody",
    ),
    Route(
        "POST",
        f"{_STREAM}/fork",
        streams.post_fork,
        verbs=(Verb.FORK,),
        replies={200: "Overwritten.", 201: "Created."},
        reply=reply_types.StreamInfo,
        headers=_ETAG,
        parameters=({**IF_MATCH, "description": "ETags of the stream `to`, to overwrite it."},),
        body="ForkBody",
    ),
    Route(
        "GET",
        f"{_STREAM}/history",
        streams.get_history,
        verbs=(Verb.READ_STATE,),
        replies={200: "The history."},
        reply=reply_types.HistoryReply,
        headers=_ETAG,
        parameters=(
            parameter(
                "query",
                "from",
                "The position of the first event.",
                {"type": "integer", "minimum": 0, "default": 0},
            ),
            parameter("query", "limit", "Most events.", {"type": "integer", "minimum": 1}),
            IF_MATCH,
        ),
    ),
    Route(
        "POST",
        f"{_STREAM}/rewind",
        streams.post_rewind,
        verbs=(Verb.WRITE_STATE,),
        replies={200: "Rewound."},
        reply=reply_types.StreamInfo,
        headers=_ETAG,
        parameters=(IF_MATCH,),
        body="RewindBody",
    ),
    Route(
        "POST",
        f"{_STREAM}/acknowledge",
        alarms.post_acknowledge,
        verbs=(Verb.WRITE_STATE,),
        replies={200: "Acknowledged, now or before."},
        reply=alarms.Acknowledged,
        headers=_ETAG,
        parameters=(IF_MATCH,),
        body="AcknowledgeBody",
        body_required=False,
    ),
    Route(
        "GET",
        f"{_MODEL}/alarms",
        alarms.get_alarms,
        verbs=(Verb.LIST,),
        replies={200: "One page."},
        reply=alarms.AlarmList,
        parameters=(parameter("query", "prefix", _PREFIX, _TEXT), *_PAGE),
    ),
    Route(
        "GET",
        _STREAMS,
        streams.get_streams,
        verbs=(Verb.LIST,),
        replies={200: "One page."},
        reply=reply_types.StreamList,
        parameters=(parameter("query", "prefix", _PREFIX, _TEXT), *_PAGE),
    ),
    Route(
        "DELETE",
        _STREAMS,
        streams.delete_streams,
        verbs=(Verb.DELETE,),
        replies={200: "Deleted."},
        reply=reply_types.Deleted,
        parameters=(parameter("query", "prefix", _PREFIX, _TEXT, required=True), *_PAGE),
    ),
    Route(
        "POST",
        f"{_STREAM}/forecast",
        streams.post_forecast,
        verbs=PREDICT,
        replies={200: "The forecast."},
        reply=ForecastReply,
        headers=_ETAG,
        parameters=(IF_MATCH, _TIMEOUT),
        body="Forecast",
    ),
    Route(
        "GET",
        "/v1/models",
        models.get_models,
        verbs=(Verb.MODELS,),
        replies={200: "The models."},
        reply=reply_types.ModelList,
    ),
    Route(
        "GET",
        _MODEL,
        models.get_model,
        verbs=(Verb.MODELS,),
        replies={200: "The model."},
        reply=reply_types.ModelDetail,
    ),
    Route(
        "GET",
        f"{_MODEL}/versions",
        versions.get_versions,
        verbs=(Verb.MODELS, Verb.MANAGE_MODELS),
        replies={200: "The versions."},
        reply=reply_types.VersionList,
    ),
    Route(
        "POST",
        f"{_MODEL}/versions",
        versions.post_version,
        verbs=(Verb.MANAGE_MODELS,),
        replies={200: "Loaded by one process; the others load it."},
        reply=reply_types.VersionInfo,
        body="VersionBody",
    ),
    Route(
        "DELETE",
        f"{_MODEL}/versions/{{version}}",
        versions.delete_version,
        verbs=(Verb.MANAGE_MODELS,),
        replies={204: "Retired."},
    ),
    Route(
        "GET",
        f"{_MODEL}/versions/{{version}}/report",
        versions.get_report,
        verbs=(Verb.MODELS, Verb.MANAGE_MODELS),
        replies={200: "The report."},
        reply=ShadowReport,
    ),
    Route(
        "POST",
        f"{_MODEL}/aliases",
        versions.post_alias,
        verbs=(Verb.MANAGE_MODELS,),
        replies={200: "Changed; every process follows within a second."},
        reply=reply_types.VersionList,
        body="AliasBody",
    ),
    Route(
        "GET",
        "/v1/topics",
        topics.get_topics,
        verbs=(Verb.METRICS,),
        replies={200: "The topics."},
        reply=reply_types.TopicList,
        parameters=(parameter("query", "partitions", "True adds each partition.", _OFF),),
    ),
    Route(
        "GET",
        "/v1/topics/outputs",
        topics.get_outputs,
        verbs=(Verb.WATCH,),
        replies={200: "The outputs."},
        reply=reply_types.TopicOutputs,
        parameters=(
            parameter("query", "topic", "Name of the input topic.", _TEXT, required=True),
            parameter("query", "group", "The consumer group.", {**_TEXT, "default": "carry"}),
            parameter("query", "limit", "About how many.", {"type": "integer", "minimum": 1}),
        ),
    ),
)

HEALTH: Final = (
    Route(
        "GET",
        "/health/live",
        health.get_live,
        replies={200: "The process answers."},
        reply=reply_types.Live,
        is_health=True,
    ),
    Route(
        "GET",
        "/health/ready",
        health.get_ready,
        replies={200: "Every check passes.", 503: "A check fails."},
        reply=reply_types.Ready,
        is_health=True,
    ),
    Route(
        "GET",
        "/health/store",
        health.get_store,
        verbs=(Verb.METRICS,),
        replies={200: "The condition of the store."},
        reply=reply_types.StoreReport,
        is_health=True,
    ),
)

METRICS: Final = Route(
    "GET",
    "/metrics",
    health.get_metrics,
    verbs=(Verb.METRICS,),
    replies={200: "The metrics."},
    content={"text/plain": {"schema": {"type": "string"}}},
    is_health=True,
)
