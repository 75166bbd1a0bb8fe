"""The topics of consumers for operators: how far they were read, and their newest outputs.

The consumers announce in the store what they read and write. The topics of partitions are one topic
here, with totals.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from service.access.caller import Caller, Verb
from service.core.errors import InvalidInput
from service.store.topics import Entry, TopicKeys, TopicRegistration, Topics, TopicStatus

AT_ONCE: Final = 16
"""Topics that are read at a time, so that no commit waits long behind them."""

VALID_S: Final = 1.0
"""How long a status is returned again, so that many readers cost the store no more than one."""

MAX_READ: Final = 256
"""Most outputs that are read of the topics of partitions together, or one of each."""


class TopicView(NamedTuple):
    """A topic of a consumer group.

    Attributes:
        partitions: of those that exist, key and status.
    """

    registration: TopicRegistration
    partitions: Sequence[tuple[str, TopicStatus]]


class NewOutput(NamedTuple):
    """An entry of an output topic.

    Attributes:
        model: that computed it; None if the entry does not say.
        time_ms: of the commit, epoch milliseconds.
        outputs: of the event, by name.
    """

    stream: str
    model: str | None
    position: int
    time_ms: int
    outputs: dict[str, Any]


class TopicViews:
    """Reads topics; each use case may raise Forbidden, StoreUnavailable and StoreRefused."""

    def __init__(self, topics: Topics):
        self._topics = topics
        self._reading = asyncio.Lock()
        self._views: list[TopicView] = []
        self._valid_until_s = 0.0

    async def describe(self, caller: Caller) -> list[TopicView]:
        """Read the topics of the models that the caller may use."""
        with caller.admit((Verb.METRICS,), None):
            async with self._reading:
                if time.monotonic() >= self._valid_until_s:
                    registrations = sorted(await self._topics.registrations(), key=_name_of)
                    self._views = [await self._view(registration) for registration in registrations]
                    self._valid_until_s = time.monotonic() + VALID_S
                views = self._views
        return [
            view
            for view in views
            if view.partitions and caller.covers_model(view.registration.model)
        ]

    async def _view(self, registration: TopicRegistration) -> TopicView:
        keys = registration.keys(self._topics.space)
        statuses: list[TopicStatus | None] = []
        for at in range(0, len(keys), AT_ONCE):
            statuses += await asyncio.gather(*map(self._topics.status, keys[at : at + AT_ONCE]))
        pairs = zip(keys, statuses, strict=True)
        return TopicView(registration, [(each.topic, status) for each, status in pairs if status])

    async def newest_outputs(
        self, caller: Caller, group: str, source: str, count: int
    ) -> list[NewOutput]:
        """Read the newest outputs of the streams that the caller may watch, the newest first.

        Args:
            source: name of the input topic.
            count: most outputs, those of other streams included. Of many partitions, each gives
                its newest one at least, and few more.

        Raises:
            InvalidInput: there is no such topic.
        """
        with caller.admit((Verb.WATCH,), None):
            registrations = [
                registration
                for registration in await self._topics.registrations()
                if caller.covers_model(registration.model)
            ]
            name = source, group
            wanted = next((each for each in registrations if _name_of(each) == name), None)
            if wanted is None:
                raise InvalidInput(
                    f"?topic: expected a topic that a consumer group reads, got {source!r} and "
                    f"group {group!r}",
                    at="?topic",
                    got=source,
                )
            entries = await self._newest(wanted.keys(self._topics.space), count)
        entries.sort(key=_time_of, reverse=True)
        outputs = map(_output_of, entries[:count])
        # consumers of several models may write one output topic
        return [
            each
            for each in outputs
            if each
            and each.stream.startswith(caller.prefix)
            and caller.covers_model(each.model or wanted.model)
        ]

    async def _newest(self, keys: Sequence[TopicKeys], count: int) -> list[Entry]:
        entries: list[Entry] = []
        most = max(1, min(count, MAX_READ // len(keys)))
        for at in range(0, len(keys), AT_ONCE):
            reads = [self._topics.newest(each.outputs, most) for each in keys[at : at + AT_ONCE]]
            for part in await asyncio.gather(*reads):
                entries += part
        return entries


def _name_of(registration: TopicRegistration) -> tuple[str, str]:
    return registration.source, registration.group


def _time_of(entry: Entry) -> tuple[int, int]:
    time_ms, _, number = entry.id.partition(b"-")
    return int(time_ms), int(number)


def _output_of(entry: Entry) -> NewOutput | None:
    """The output in an entry, in JSON or MessagePack; None if something else wrote it."""
    values = entry.fields or ()
    fields = dict(zip(values[::2], values[1::2], strict=True))
    try:
        stream, outputs = fields[b"stream"].decode(), fields[b"outputs"]
        model = fields[b"model"].decode() if b"model" in fields else None
        codec = msgspec.json if outputs.startswith(b"{") else msgspec.msgpack
        # MessagePack has values that JSON has not
        decoded = msgspec.to_builtins(codec.decode(outputs, type=dict[str, Any]), str_keys=True)
        return NewOutput(stream, model, int(fields[b"position"]), int(fields[b"time"]), decoded)
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
