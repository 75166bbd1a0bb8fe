"""Traffic between the processes: proxies that cut and hold connections, and stages of chunks.

Nothing in the service says how far a chunk is. But all that a worker does for it passes here: the
request goes in, the load of the stream goes to the store and is answered, the commit goes out and
is answered, the reply goes out. So a request that a worker owes a reply is at one of these stages:

    before load    neither a load nor a commit of its stream was asked of the store since
    computing      its load was answered, and no commit came
    commit sent    its commit left the worker, and was not answered
    reply unsent   its commit was answered as written, and no byte of the reply came

A worker that finds the stream in its own memory loads nothing: such a chunk counts as before
load until its commit is seen. A commit that lost its race is reset, because the chunk is then
re-evaluated.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import hiredis

from tests.faults.transports import STREAM_HEADER
from tests.support.proxy import Connection, Direction, Proxy, Target

BEFORE_LOAD: Final = "before load"
COMPUTING: Final = "computing"
COMMIT_SENT: Final = "commit sent"
REPLY_UNSENT: Final = "reply unsent"
STAGES: Final = (BEFORE_LOAD, COMPUTING, COMMIT_SENT, REPLY_UNSENT)
CHUNK_REQUEST: Final = re.compile(
    rb"^POST (?:/v1/models/[^/ ]+/streams/([^/ ]+)/chunks|.+\r\n%b: ([^\r]+))"
    rb"|\x0a\x0bsequence_id\x12.\x1a.([\w-]+)" % STREAM_HEADER.encode(),
    re.DOTALL,
)
"""The beginning of a request with a chunk, or within it its message of gRPC; the group that matches
is its stream."""

_LIVE_SOCKET: Final = re.compile(rb"^GET /v1/models/[^/ ]+/streams/([^/ ]+)/live")

_STATE_KEY: Final = re.compile(rb"\}:s:[^:]+:(.+)$", re.DOTALL)
_MORE: Final = object()

Watch = Callable[[Connection, Direction, bytes], None]
"""Receives all bytes before they are forwarded."""


def let_pass(connection: Connection, direction: Direction, data: bytes) -> None:
    """No cut."""


class FaultProxy(Proxy):
    """A proxy whose bytes are watched.

    Attributes:
        cut: called with all bytes of connections that are not held: may hold them, or raise
            `CutError`.
    """

    def __init__(self, target: Callable[[], Target | None], watch: Watch, owner: str | None = None):
        super().__init__(target, owner)
        self.cut: Watch = let_pass
        self._watch = watch

    async def inspect(self, connection: Connection, direction: Direction, data: bytes) -> None:
        if connection.held is None:
            self.cut(connection, direction, data)
        if connection.held is None or direction == "reply":
            self._watch(connection, direction, data)


@dataclass(slots=True, eq=False)
class PendingChunk:
    """The last chunk of a client's connection, and its stage; None once its reply begins.

    Attributes:
        is_live: whether all that follows on the connection are frames of chunks of the stream.
    """

    stream: str
    stage: str | None = BEFORE_LOAD
    is_live: bool = False


class _Error(Exception):
    """An error reply."""


class _StoreNotes:
    """Of one connection to the store: parsers, and what has no answer yet."""

    def __init__(self) -> None:
        how = {"notEnoughData": _MORE, "replyError": _Error}
        self.requests, self.replies = hiredis.Reader(**how), hiredis.Reader(**how)
        self.unanswered: deque[tuple[bool, Sequence[str]]] = deque()


class Traffic:
    """Watches the proxies of all workers and of the store.

    Attributes:
        proxies: of the workers' clients; each has a worker as its owner.
        conflicts: commits that the store rejected because the stream had moved on.
        hook: called with worker and stage when a chunk reaches the stage.
    """

    def __init__(self, find_owner: Callable[[Connection], str] = lambda _: ""):
        self.proxies: list[Proxy] = []
        self.conflicts = 0
        self.hook: Callable[[str, str], None] = lambda worker, stage: None
        self._find_owner = find_owner

    def watch_clients(self, connection: Connection, direction: Direction, data: bytes) -> None:
        """A reply's first byte ends what is owed on its connection."""
        if direction == "reply":
            if connection.notes is not None and _begins_reply(data):
                connection.notes.stage = None
        elif match := _LIVE_SOCKET.match(data):
            connection.notes = PendingChunk(match[1].decode(), None, is_live=True)
        elif self.begins_chunk(connection, data):
            if match := CHUNK_REQUEST.search(data):
                connection.notes = PendingChunk(match[match.lastindex].decode())
            connection.notes.stage = BEFORE_LOAD
            self.hook(connection.owner, BEFORE_LOAD)

    def begins_chunk(self, connection: Connection, data: bytes) -> bool:
        """Whether a client sends the beginning of a chunk."""
        is_live = connection.notes is not None and connection.notes.is_live
        return is_live or CHUNK_REQUEST.search(data) is not None

    def watch_store(self, connection: Connection, direction: Direction, data: bytes) -> None:
        """Read commands and replies of workers."""
        worker = self.owner_of(connection)
        if not worker:
            return
        if connection.notes is None:
            connection.notes = _StoreNotes()
        notes: _StoreNotes = connection.notes
        reader = notes.requests if direction == "request" else notes.replies
        reader.feed(data)
        for value in iter(reader.gets, _MORE):
            if direction == "request":
                is_commit, streams = _read_command(value)
                notes.unanswered.append((is_commit, streams))
                if is_commit:
                    self._reach(worker, streams, COMMIT_SENT)
            elif notes.unanswered:
                self._read_answer(worker, *notes.unanswered.popleft(), value)

    def owner_of(self, connection: Connection) -> str:
        """The worker that made a connection to the store, looked up once; empty for others."""
        if connection.owner is None:
            connection.owner = self._find_owner(connection)
        return connection.owner

    def has_pending_commit(self, connection: Connection) -> bool:
        """Whether a commit on this connection has no answer yet."""
        notes = connection.notes
        return notes is not None and any(is_commit for is_commit, _ in notes.unanswered)

    def pending(self, worker: str) -> list[PendingChunk]:
        """The chunks whose replies a worker owes."""
        proxies = (proxy for proxy in self.proxies if proxy.owner == worker)
        notes = (connection.notes for proxy in proxies for connection in proxy.connections)
        return [chunk for chunk in notes if chunk is not None and chunk.stage is not None]

    def _read_answer(
        self, worker: str, is_commit: bool, streams: Sequence[str], value: Any
    ) -> None:
        if not is_commit:
            if not isinstance(value, _Error):
                self._reach(worker, streams, COMPUTING)
            return
        # a script that failed wrote nothing, and will be sent again
        outcomes = value if isinstance(value, list) else [[None]] * len(streams)
        for stream, outcome in zip(streams, outcomes, strict=False):
            self.conflicts += outcome[0] == 0
            self._reach(worker, (stream,), REPLY_UNSENT if outcome == [1] else BEFORE_LOAD)

    def _reach(self, worker: str, streams: Sequence[str], stage: str) -> None:
        for chunk in self.pending(worker) if streams else ():
            is_past = stage == COMPUTING and chunk.stage != BEFORE_LOAD
            if chunk.stream in streams and not is_past:
                chunk.stage = stage
        if streams and stage != BEFORE_LOAD:
            self.hook(worker, stage)


def _begins_reply(data: bytes) -> bool:
    """Whether a worker's bytes begin a reply. Over HTTP/2, where a frame begins with its length,
    only headers do."""
    at, is_http2 = 0, data[0] == 0
    while is_http2 and at + 9 <= len(data) and data[at + 3] != 1:
        at += 9 + int.from_bytes(data[at : at + 3])
    return not is_http2 or at + 9 <= len(data)


def _read_command(command: Any) -> tuple[bool, Sequence[str]]:
    """Whether a command is a commit, and the streams that it loads or commits."""
    name = command[0].upper() if isinstance(command, list) and command else b""
    keys: list[bytes] = command[1:] if name in (b"MGET", b"GET") else []
    if name in (b"EVALSHA", b"EVAL"):
        scripted = command[3 : 3 + int(command[2])]
        # a commit has two common arguments, then two keys and three arguments for each stream
        if 2 * (len(command) - 3 - len(scripted) - 2) == 3 * len(scripted):
            keys = scripted
    matches = (_STATE_KEY.search(key) for key in keys)
    streams = tuple(match[1].decode() for match in matches if match is not None)
    return name.startswith(b"EVAL") and bool(keys), streams
