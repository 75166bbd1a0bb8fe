"""Traffic between the processes: proxies that cut and hold connections, and the stages of chunks.

Nothing in the service says how far a chunk is. But all that a worker does for it passes here: the
request goes in, the load of the stream goes to the store and is answered, the commit goes out and
is answered, the reply goes out. `Traffic.hook` is called when a chunk of a worker reaches a stage:

    before load    its request is about to reach the worker
    computing      its load was answered
    commit sent    its commit left the worker, and is not yet forwarded to the store
    reply unsent   its commit was answered as written, and the worker does not have the answer
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import hiredis

from tests.support.proxy import Connection, Direction, Proxy, Target

BEFORE_LOAD: Final = "before load"
COMPUTING: Final = "computing"
COMMIT_SENT: Final = "commit sent"
REPLY_UNSENT: Final = "reply unsent"
STAGES: Final = (BEFORE_LOAD, COMPUTING, COMMIT_SENT, REPLY_UNSENT)
CHUNK_REQUEST: Final = re.compile(
    rb"^POST /v(?:1/models/[^/ ]+/streams/[^/ ]+/chunks|2/models/[^/ ]+/infer)"
    rb"|\x0a\x0bsequence_id\x12"
)
"""The beginning of a request with a chunk, or within it its message of gRPC."""

_LIVE_SOCKET: Final = re.compile(rb"^GET /v1/models/[^/ ]+/streams/[^/ ]+/live")
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


class _Error(Exception):
    """An error reply."""


class _StoreNotes:
    """Of one connection to the store: parsers, and the commands that have no answer yet."""

    def __init__(self) -> None:
        how = {"notEnoughData": _MORE, "replyError": _Error}
        self.requests, self.replies = hiredis.Reader(**how), hiredis.Reader(**how)
        self.unanswered: deque[str] = deque()


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
        """Notice requests with chunks."""
        if direction == "request" and self.begins_chunk(connection, data):
            self.hook(connection.owner, BEFORE_LOAD)

    def begins_chunk(self, connection: Connection, data: bytes) -> bool:
        """Whether a client sends the beginning of a chunk: all on a live socket but its opening."""
        if _LIVE_SOCKET.match(data):
            connection.notes = "live"
            return False
        return connection.notes == "live" or CHUNK_REQUEST.search(data) is not None

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
                notes.unanswered.append(_kind_of(value))
                if notes.unanswered[-1] == "commit":
                    self.hook(worker, COMMIT_SENT)
            elif notes.unanswered:
                self._read_answer(worker, notes.unanswered.popleft(), value)

    def owner_of(self, connection: Connection) -> str:
        """The worker that made a connection to the store, looked up once; empty for others."""
        if connection.owner is None:
            connection.owner = self._find_owner(connection)
        return connection.owner

    def has_pending_commit(self, connection: Connection) -> bool:
        """Whether a commit on this connection has no answer yet."""
        return connection.notes is not None and "commit" in connection.notes.unanswered

    def _read_answer(self, worker: str, kind: str, value: Any) -> None:
        if kind == "load" and not isinstance(value, _Error):
            self.hook(worker, COMPUTING)
        # a script that failed wrote nothing, and will be sent again
        if kind == "commit" and isinstance(value, list):
            self.conflicts += sum(outcome[0] == 0 for outcome in value)
            if [1] in value:
                self.hook(worker, REPLY_UNSENT)


def _kind_of(command: Any) -> str:
    """`load` and `commit` of streams; empty for any other command."""
    name = command[0].upper() if isinstance(command, list) and command else b""
    if name in (b"MGET", b"GET") and b"}:s:" in command[1]:
        return "load"
    if name in (b"EVALSHA", b"EVAL"):
        # a commit has two common arguments, then two keys and three arguments for each stream
        keys = int(command[2])
        return "commit" if keys and 2 * (len(command) - 3 - keys - 2) == 3 * keys else ""
    return ""
