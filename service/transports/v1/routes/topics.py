"""Routes of the topics that consumers read: their progress and their newest outputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from service.pipeline.topics import TopicView
from service.store.topics import TopicStatus
from service.transports.v1.call import count, flag, query, reply_media
from service.transports.v1.context import api_of, caller_of
from service.transports.v1.replies import reply
from service.transports.v1.reply_types import (
    TopicInfo,
    TopicList,
    TopicOutput,
    TopicOutputs,
    TopicPartition,
    TopicProgress,
)

OUTPUTS: Final = 20
MAX_OUTPUTS: Final = 100
DEFAULT_GROUP: Final = "carry"


async def get_topics(request: Request) -> Response:
    """List the topics of consumers.

    Each topic that a consumer group reads: how far, by whom, and where the outputs go.
    """
    caller, api = caller_of(request), api_of(request)
    adds_partitions = flag(query(request, ["partitions"]), "partitions", default=False)
    answer = reply_media(request)
    views = await api.pipeline.topics.describe(caller)
    infos = [_info(view, api.now_ms(), adds_partitions=adds_partitions) for view in views]
    document: TopicList = {"topics": infos}
    return reply(answer, document)


async def get_outputs(request: Request) -> Response:
    """Return the newest outputs of a topic.

    Only those of streams that the key may watch.
    """
    caller, api = caller_of(request), api_of(request)
    parameters = query(request, ["topic", "group", "limit"])
    topic, group = parameters.get("topic", ""), parameters.get("group", DEFAULT_GROUP)
    most = count(parameters, "limit", default=OUTPUTS, maximum=MAX_OUTPUTS)
    answer = reply_media(request)
    newest = await api.pipeline.topics.newest_outputs(caller, group, topic, most)
    outputs: list[TopicOutput] = [
        {
            "stream": each.stream,
            "position": each.position,
            "time_ms": each.time_ms,
            "outputs": each.outputs,
        }
        for each in newest
    ]
    document: TopicOutputs = {"topic": topic, "group": group, "outputs": outputs}
    return reply(answer, document)


def _info(view: TopicView, now_ms: int, *, adds_partitions: bool) -> TopicInfo:
    registration = view.registration
    statuses = [status for _, status in view.partitions]
    partitions: list[TopicPartition] = []
    if adds_partitions:
        partitions = [
            {"topic": key, "owner": status.owner or None, **_progress([status], now_ms)}
            for key, status in view.partitions
        ]
    return {
        "topic": registration.source,
        "group": registration.group,
        "model": registration.model,
        "outputs": registration.sink,
        "dead_letters": registration.dead_letters,
        "owners": sorted({status.owner for status in statuses} - {""}),
        **_progress(statuses, now_ms),
        "partitions": partitions,
    }


def _progress(statuses: Iterable[TopicStatus], now_ms: int) -> TopicProgress:
    """The sums of these topics, and the oldest entry."""
    statuses = [*statuses]
    pending = sum(status.pending for status in statuses)
    # the server does not know it of a group that has read nothing
    read = _sum(
        0 if status.read is None and status.lag is not None else status.read for status in statuses
    )
    oldest_ms = min(
        (status.oldest_ms for status in statuses if status.oldest_ms is not None), default=None
    )
    return {
        "entries": sum(status.entries for status in statuses),
        "pending": pending,
        "lag": _sum(status.lag for status in statuses),
        "acknowledged": None if read is None else read - pending,
        "oldest_s": None if oldest_ms is None else max(0, now_ms - oldest_ms) / 1000,
    }


def _sum(counts: Iterable[int | None]) -> int | None:
    """The sum; None if one of them is not known."""
    total = 0
    for each in counts:
        if each is None:
            return None
        total += each
    return total
