"""Open alarms of a model with detection: list and acknowledge them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from service.codec.body_types import AcknowledgeBody
from service.codec.field_rules import stream_prefix
from service.codec.reply_types import (
    EpochText,
    ModelName,
    PositionNumber,
    StreamName,
    TagText,
    Version,
    closed,
)
from service.pipeline.alarms import OpenAlarm
from service.transports.v1.call import Call, count
from service.transports.v1.replies import etag
from service.transports.v1.reply_types import StreamInfo
from service.transports.v1.routes.streams import PAGE_STREAMS, stream_info


@closed
class AlarmInfo(TypedDict):
    """The open alarm of a stream. Members that may be null are so if the model's alarms have no
    `close_above`."""

    stream: StreamName
    version: Version
    """Of the model, which wrote the state."""
    epoch: EpochText
    position: PositionNumber
    tag: TagText
    opened_ms: Annotated[
        int,
        Field(
            description="When the chunk that opened it was stored, epoch milliseconds; of a "
            "restored, forked or loaded stream its next chunk."
        ),
    ]
    opened: Annotated[int | None, Field(description="Index of the event that opened it.")]
    events: Annotated[int | None, Field(description="Events of the stream after that one.")]
    severity: float | None
    """Nats of its most unusual event, as a multiple of those of the threshold."""
    probability: Annotated[float | None, Field(description="Of the stream's last event.")]
    target: str | None
    channel: Annotated[str | None, Field(examples=["level"])]
    cause: Annotated[
        str | None,
        Field(
            description="What was unusual in the event that opened it, in words.",
            examples=["level of pressure 6.1 above its usual"],
        ),
    ]


@closed
class AlarmList(TypedDict):
    """A page of open alarms, newest first."""

    model: ModelName
    alarms: list[AlarmInfo]
    cursor: str | None
    """Ask for the next page with it; null on the last."""


@closed
class Acknowledged(StreamInfo):
    """The stream after an acknowledgement."""

    closed: bool
    """Whether this request closed an alarm; false if none was open, as after a repeated one."""


async def get_alarms(call: Call) -> Response:
    """List the open alarms of a model.

    One page, newest first; continue with its `cursor` until that is null. A page may be empty
    before the last, and have more than `limit` if alarms opened at the same time.

    Each alarm is read from the state of its stream. That of a restored, forked, rewound or loaded
    stream is listed from its next chunk on, that of a version that is not loaded is not.
    """
    name, parameters = call.served.name, call.parameters
    limit = count(parameters, "limit", default=PAGE_STREAMS, maximum=call.api.limits.max_items)
    prefix = stream_prefix(parameters.get("prefix", ""))
    page = await call.api.pipeline.alarms.page(
        call.caller, name, prefix, parameters.get("cursor") or None, limit
    )
    document: AlarmList = {
        "model": name,
        "alarms": [_alarm_info(each) for each in page.alarms],
        "cursor": page.cursor,
    }
    return call.reply(document)


async def post_acknowledge(call: Call) -> Response:
    """Close the open alarm of a stream, and take what it does now as normal.

    Detection of the stream restarts, as for a new stream; the network's state, epoch and
    position stay. The tag changes, but an `If-Match` with the one before names this state too, so
    that clients that send chunks do not notice. Nothing changes if no alarm is open.

    With a `position` the stream has to be at that position, with `If-Match` in the state that it
    names: a request that is repeated later is then not applied to the next alarm. The stream cannot
    be rewound to before an acknowledgement.
    """
    body = await call.read_as(AcknowledgeBody, empty=AcknowledgeBody())
    record, was_open = await call.api.pipeline.alarms.acknowledge(
        call.caller, call.key, body.position, call.precondition
    )
    document: Acknowledged = {**stream_info(call, call.key, record), "closed": was_open}
    return call.reply(document, headers=[etag(record.head)])


def _alarm_info(alarm: OpenAlarm) -> AlarmInfo:
    head, record = alarm.head, alarm.record
    return {
        "stream": alarm.key.stream,
        "version": alarm.served.version,
        "epoch": head.epoch.hex(),
        "position": head.position,
        "tag": head.tag.hex(),
        "opened_ms": alarm.opened_ms,
        "opened": alarm.opened_at,
        "events": None if record is None else record.events,
        "severity": None if record is None else record.severity,
        "probability": None if record is None else record.probability,
        "target": None if record is None else record.cause.target,
        "channel": None if record is None else record.cause.kind,
        "cause": None if record is None else record.cause.words,
    }
