"""Open alarms of models with detection: list and acknowledge them.

Whether a stream has an open alarm is in its state and nowhere else. The store's index of open
alarms says which streams to read; each is listed by what its state says, and an entry whose state
has no alarm is removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from structlog.contextvars import bound_contextvars

from models.detection.causes import Alarm
from service.access.caller import Caller, Verb
from service.core.delivery import acknowledged_head, check_position, stream_conflict
from service.core.errors import CarryError, InvalidInput
from service.core.values import Precondition, StreamHead, StreamKey, StreamState
from service.pipeline.model_versions import ModelVersions
from service.pipeline.rewind import copy_history
from service.pipeline.served_model import ServedModel
from service.pipeline.streams import CREATE_ATTEMPTS, StreamAdministration
from service.store.base import Store, decode_value
from service.store.capabilities import IndexedAlarm
from service.store.codec import encode_replies, encode_state, pack_head
from service.store.history import HistoryCopy
from service.store.layout import CodecError

is_cursor = re.compile(r"[0-9]{1,15}").fullmatch


class OpenAlarm(NamedTuple):
    """The open alarm of a stream.

    Attributes:
        head: of the stream.
        opened_ms: when the store first had it, in epoch milliseconds.
        record: what its state says of the alarm; None if the model keeps no record.
        served: the version that wrote the state.
    """

    key: StreamKey
    head: StreamHead
    opened_ms: int
    record: Alarm | None
    served: ServedModel

    @property
    def opened_at(self) -> int | None:
        """The index of the event that opened it; None without a record."""
        return None if self.record is None else self.head.position - 1 - self.record.events


class AlarmPage(NamedTuple):
    """A page of open alarms, newest first; the cursor is None on the last."""

    alarms: Sequence[OpenAlarm]
    cursor: str | None


class Alarms:
    """The open alarms of several models in one store.

    Args:
        streams: reads streams.
        versions: returns the versions of a model; raises ModelNotFound.
        now_ms: wall clock in epoch milliseconds.

    Besides the documented errors, each method may raise Forbidden, LimitExceeded, ModelNotFound and
    the store's errors.
    """

    def __init__(
        self,
        streams: StreamAdministration,
        versions: Callable[[str], ModelVersions],
        store: Store,
        *,
        now_ms: Callable[[], int],
    ):
        self._streams = streams
        self._versions = versions
        self._store = store
        self._now_ms = now_ms

    async def page(
        self, caller: Caller, model: str, prefix: str, cursor: str | None, limit: int
    ) -> AlarmPage:
        """List a page of the open alarms of a model, of streams whose names start with `prefix`.

        It may be empty and still have a cursor, and has more than `limit` only if alarms opened at
        the same time. Streams of versions that are not loaded are left out.

        Raises:
            InvalidInput: the cursor is invalid.
        """
        with caller.admit((Verb.LIST,), model, prefix):
            versions = self._versions(model)
            if cursor is not None and not is_cursor(cursor):
                raise InvalidInput(
                    f"cursor: expected the `cursor` of the previous page, or none, got {cursor!r}",
                    at="cursor",
                )
            before_ms = None if cursor is None else int(cursor)
            # a cursor is the time of an alarm, so only of one that the caller may see
            indexed = await self._store.alarms.page(model, before_ms, limit, prefix)
            before_ms = indexed[-1].opened_ms if len(indexed) >= limit else None
            alarms = await self._read(versions, indexed)
            return AlarmPage(alarms, None if before_ms is None else str(before_ms))

    async def _read(
        self, versions: ModelVersions, entries: Sequence[IndexedAlarm]
    ) -> list[OpenAlarm]:
        """Read the streams of entries of the index, and drop the entries of those without an
        alarm."""
        alarms: list[OpenAlarm] = []
        closed: dict[IndexedAlarm, bytes] = {}
        values = await self._store.load([entry.key for entry in entries])
        for entry, value in zip(entries, values, strict=True):
            stored = decode_value(entry.key, value)
            if isinstance(stored, StreamState):
                served = versions.loaded.get(stored.fingerprint)
                if served is None or not served.fits(stored):
                    continue
                if served.has_open_alarm(stored.state):
                    record = served.read_alarm(stored.state)
                    alarms.append(
                        OpenAlarm(entry.key, stored.head, entry.opened_ms, record, served)
                    )
                    continue
            if not isinstance(value, CarryError):
                closed[entry] = value or b""
        if closed:
            await self._store.alarms.drop(closed)
        return alarms

    async def acknowledge(
        self,
        caller: Caller,
        key: StreamKey,
        position: int | None = None,
        precondition: Precondition | None = None,
    ) -> tuple[StreamState, bool]:
        """Close the open alarm of a stream, and restart its detection: what the stream does now
        becomes normal. The state of the network stays, as do epoch and position.

        The stream gets the tag of `acknowledged_head`, which an If-Match of before also names: so a
        repeated request, and the next chunk of a client that does not know of this one, are not
        rejected. A retry of the last chunk still gets its reply. The stream's history restarts with
        this state; the events before stay for other versions.

        Returns:
            The stream, and whether it had an alarm; nothing is written if it had none.

        Raises:
            StreamNotFound, StateDamaged, StateIncompatible
            StateChanged: the precondition names another state.
            PositionAhead, PositionBehind: the stream is at another position.
            Conflict: the stream kept changing.
        """
        with (
            caller.admit((Verb.WRITE_STATE,), key.model, key.stream),
            bound_contextvars(**caller.audit_names()),
        ):
            for _ in range(CREATE_ATTEMPTS):
                stored = await self._streams.load(key, precondition=precondition)
                check_position(key.stream, position, stored.head)
                served = self._versions(key.model).writer(stored.fingerprint)
                if not served.is_compatible(stored):
                    raise served.incompatible(key.stream, stored)
                if not served.has_open_alarm(stored.state):
                    return stored, False
                new = stored._replace(
                    head=acknowledged_head(stored.head),
                    updated_ms=self._now_ms(),
                    state=served.acknowledge_alarm(stored.state),
                )
                reply = await self._stored_reply(key, stored.head)
                history: HistoryCopy | None = None
                if self._versions(key.model).route.keeps_history:
                    copied = await copy_history(self._store.histories, key, stored.head)
                    if copied is None:
                        continue
                    entries = _without_start(served, copied.entries)
                    history = HistoryCopy(entries, [encode_state(new)])
                if await self._streams.replace(
                    "alarm_acknowledged", key, stored, new, history, reply=reply
                ):
                    return new, True
            raise stream_conflict(key.stream, CREATE_ATTEMPTS)

    async def _stored_reply(self, key: StreamKey, head: StreamHead) -> bytes:
        """The reply of the chunk that led to this head, encoded; empty if none is stored."""
        _, reply = await self._store.load_with_reply(key)
        if reply is None or reply.head != head:
            return b""
        (encoded,) = encode_replies([pack_head(head)], [reply.outputs])
        return encoded


def _without_start(served: ServedModel, entries: Sequence[bytes]) -> Sequence[bytes]:
    """The entries of a history without the mark of the initial state, which does not lead to an
    acknowledged one; none if they cannot be read."""
    codec = served.history_codec
    try:
        first = codec.decode(entries[0]) if entries else None
    except CodecError:
        return ()
    if first is None or not first.starts:
        return entries
    return [codec.encode(first.start, first.steps, final=first.final), *entries[1:]]
