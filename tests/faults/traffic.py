"""Traffic monitors: the stage of each chunk when its worker was killed.

A killed worker says nothing any more, and nothing in the service helps to find out. But all it
does for a chunk passes here: the request goes in, the load of the stream goes to the store and
is answered, the commit goes out and is answered, the HTTP reply goes out. So of every request
that a dead worker owed a reply,

    before load    neither a load nor a commit of its stream was asked of the store since
    computing      its load was answered, and no commit came
    commit sent    its commit left the worker, and was not answered before the kill
    reply unsent   its commit was answered as written, and no byte of the reply came

A worker that finds the stream in its own memory loads nothing: such a chunk counts as before
load until its commit is seen. A commit that lost its race is reset, because the chunk is then
re-evaluated. Times are those of the monotonic clock.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import hiredis

from tests.faults.proxy import Connection, Direction

BEFORE_LOAD: Final = "before load"
COMPUTING: Final = "computing"
COMMIT_SENT: Final = "commit sent"
REPLY_UNSENT: Final = "reply unsent"
STAGES: Final = (BEFORE_LOAD, COMPUTING, COMMIT_SENT, REPLY_UNSENT)

_CHUNK: Final = re.compile(rb"^POST /v1/models/[^/ ]+/streams/([^/ ]+)/chunks")
_STATE_KEY: Final = re.compile(rb"\}:s:[^:]+:(.+)$", re.DOTALL)
_NEVER: Final = 0.0


@dataclass(slots=True)
class StoreTimes:
    """What the store was asked for one stream by one worker, as times; 0 where it was not."""

    loaded_s: float = _NEVER
    commit_s: float = _NEVER
    written_s: float = _NEVER


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """A request to a server that was not yet answered: a load's or a commit's streams."""

    commit: bool
    streams: tuple[str, ...]


@dataclass(slots=True)
class _StoreNotes:
    """Of one connection to the store."""

    requests: Any = field(default_factory=lambda: hiredis.Reader(notEnoughData=_MORE))
    replies: Any = field(
        default_factory=lambda: hiredis.Reader(
            notEnoughData=_MORE, protocolError=_Broken, replyError=_Error
        )
    )
    request: deque[StoreRequest | None] = field(default_factory=deque)


class _Error(Exception):
    """An error reply."""


class _Broken(Exception):
    """Bytes that are no reply."""


_MORE: Final = object()

Hook = Callable[[str, str, str], None]
"""Told of worker, stream and stage when a chunk reaches the stage."""


class StoreTraffic:
    """Monitors the traffic from workers to the store.

    Attributes:
        conflicts: commits that the store refused because the stream had moved on.
        hook: called at every load's answer, commit and commit's answer.
    """

    def __init__(self, owner_of: Callable[[Connection], str]):
        self.conflicts = 0
        self.hook: Hook | None = None
        self._owner_of = owner_of
        self._store_times: dict[tuple[str, str], StoreTimes] = {}

    def store_times(self, worker: str, stream: str) -> StoreTimes:
        """What that worker did for that stream last."""
        found = self._store_times.get((worker, stream))
        if found is None:
            found = self._store_times[worker, stream] = StoreTimes()
        return found

    def passing(self, connection: Connection, direction: Direction, data: bytes) -> None:
        """Read commands and replies; what is no worker's is not looked at."""
        worker = self._owner_of(connection)
        if not worker:
            return
        if connection.notes is None:
            connection.notes = _StoreNotes()
        notes: _StoreNotes = connection.notes
        if direction == "request":
            notes.requests.feed(data)
            for command in _all(notes.requests):
                request = _asked(command)
                notes.request.append(request)
                if request is not None and request.commit:
                    self._note(worker, request.streams, "commit_s", COMMIT_SENT)
            return
        notes.replies.feed(data)
        for value in _all(notes.replies):
            request = notes.request.popleft() if notes.request else None
            if request is not None:
                self._answered(worker, request, value)

    def closed(self, connection: Connection) -> None:
        """A broken connection answers nothing more."""

    def is_workers(self, connection: Connection) -> bool:
        """Whether a worker made the connection."""
        return bool(self._owner_of(connection))

    def has_pending_commit(self, connection: Connection) -> bool:
        """Whether a commit on this connection has no answer yet."""
        return connection.notes is not None and any(
            request is not None and request.commit for request in connection.notes.request
        )

    def _answered(self, worker: str, request: StoreRequest, value: Any) -> None:
        if not request.commit:
            if not isinstance(value, _Error):
                self._note(worker, request.streams, "loaded_s", COMPUTING)
            return
        if isinstance(value, _Error) or not isinstance(value, list):
            # the script as a whole: nothing was written, and it will be sent again
            self._reset(worker, request.streams)
            return
        for stream, outcome in zip(request.streams, value, strict=False):
            if outcome == [1]:
                self._note(worker, (stream,), "written_s", REPLY_UNSENT)
            else:
                self.conflicts += outcome[0] == 0
                self._reset(worker, (stream,))

    def _note(self, worker: str, streams: tuple[str, ...], what: str, stage: str) -> None:
        now_s = time.monotonic()
        for stream in streams:
            setattr(self.store_times(worker, stream), what, now_s)
            if self.hook is not None:
                self.hook(worker, stream, stage)

    def _reset(self, worker: str, streams: tuple[str, ...]) -> None:
        for stream in streams:
            self._store_times.pop((worker, stream), None)


def _all(reader: Any) -> Iterator[Any]:
    while (found := reader.gets()) is not _MORE:
        yield found


def _asked(command: Any) -> StoreRequest | None:
    """The streams that a command loads or commits; None for any other command."""
    if not isinstance(command, list) or not command:
        return None
    name = command[0].upper()
    if name in (b"EVALSHA", b"EVAL"):
        keys = command[3 : 3 + int(command[2])]
        # a commit has two common arguments, then two keys and three arguments for each stream
        commit = 2 * (len(command) - 3 - len(keys) - 2) == 3 * len(keys)
        return StoreRequest(True, _streams(keys)) if commit else None
    if name in (b"MGET", b"GET"):
        return StoreRequest(False, _streams(command[1:]))
    return None


def _streams(keys: list[bytes]) -> tuple[str, ...]:
    found = (_STATE_KEY.search(key) for key in keys)
    return tuple(match[1].decode() for match in found if match is not None)


@dataclass(slots=True)
class PendingChunk:
    """A chunk that was sent to a worker.

    Attributes:
        begun: its reply has begun; it is owed no more.
    """

    stream: str
    since_s: float
    begun: bool = False


class ClientTraffic:
    """Monitors the traffic from clients to workers, one request at a time on each connection.

    Attributes:
        hook: called when a request for a chunk comes.
    """

    def __init__(self) -> None:
        self.hook: Hook | None = None
        self.pending: dict[str, dict[int, PendingChunk]] = {}

    def passing(self, connection: Connection, direction: Direction, data: bytes) -> None:
        """A reply's first byte ends what is owed on its connection."""
        pending = self.pending.setdefault(connection.proxy.owner, {})
        if direction == "reply":
            found = pending.pop(connection.number, None)
            if found is not None:
                found.begun = True
            return
        match = _CHUNK.match(data)
        if match is not None:
            stream = match[1].decode()
            pending[connection.number] = PendingChunk(stream, time.monotonic())
            if self.hook is not None:
                self.hook(connection.proxy.owner, stream, BEFORE_LOAD)

    def closed(self, connection: Connection) -> None:
        """A client that left is owed nothing."""
        self.pending.get(connection.proxy.owner, {}).pop(connection.number, None)

    def in_flight(self, worker: str) -> list[PendingChunk]:
        """What the worker owes now."""
        return list(self.pending.get(worker, {}).values())


def stage(pending: PendingChunk, store_times: StoreTimes, killed_s: float) -> str:
    """How far a chunk had come when its worker was killed."""
    since_s = pending.since_s
    if (
        since_s <= store_times.written_s <= killed_s
        and store_times.written_s >= store_times.commit_s
    ):
        return REPLY_UNSENT
    if store_times.commit_s >= since_s:
        return COMMIT_SENT
    if since_s <= store_times.loaded_s <= killed_s:
        return COMPUTING
    return BEFORE_LOAD


def count_stages(
    store: StoreTraffic, worker: str, pending: list[PendingChunk], killed_s: float
) -> Counter[str]:
    """Of what a worker owed when it was killed, how many chunks were at each stage.

    To be asked once all it wrote before its end has passed.
    """
    return Counter(
        stage(each, store.store_times(worker, each.stream), killed_s)
        for each in pending
        if not each.begun
    )
