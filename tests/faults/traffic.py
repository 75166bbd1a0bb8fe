"""Traffic between the processes: proxies that cut and hold connections, and the stages of chunks.

Nothing in the service says how far a chunk is. But all that a worker does for it passes here: the
request goes in, the load of the stream goes to the store and is answered, the commit goes out and
is answered, the reply goes out. `Traffic.hook` is called when a chunk of a worker reaches a stage:

    before load    its request is about to reach the worker
    computing      its load was answered
    commit sent    its commit left the worker, and is not yet forwarded to the store
    reply unsent   its commit was answered as written, and the worker does not have the answer
"""

import re
from collections.abc import Callable
from typing import Final

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
"""The beginning of a request with a chunk, or of its gRPC message."""

_LIVE_SOCKET: Final = re.compile(rb"^GET /v1/models/[^/ ]+/streams/[^/ ]+/live")
_LOAD: Final = re.compile(rb"GET\r\n\$\d+\r\n[^\r]+\}:s:")
_COMMIT: Final = re.compile(rb"EVAL.*CRRY\x01[^\x04]", re.DOTALL)
"""A script that writes a state, by docs/reference/store.md; a deletion writes a tombstone."""
_WRITTEN, _CONFLICT = b"*1\r\n:1\r\n", b"*2\r\n:0\r\n"  # of one stream in the answer to a commit
Watch = Callable[[Connection, Direction, bytes], None]
"""Receives all bytes before they are forwarded."""


def let_pass(connection: Connection, direction: Direction, data: bytes) -> None:
    """No cut."""


class FaultProxy(Proxy):
    """A proxy whose bytes are watched; `cut` is called with all bytes of connections that are not
    held, and may hold them, or raise `CutError`."""

    def __init__(self, target: Callable[[], Target | None], watch: Watch, owner: str | None = None):
        super().__init__(target, owner)
        self.cut: Watch = let_pass
        self._watch = watch

    async def inspect(self, connection: Connection, direction: Direction, data: bytes) -> None:
        if connection.held is None:
            self.cut(connection, direction, data)
        if connection.held is None or direction == "reply":
            self._watch(connection, direction, data)


class Traffic:
    """Watches the proxies of all workers and of the store.

    The notes of a worker's connection to the store are its last command, until that is answered;
    those of a client's live socket are `live`.
    """

    def __init__(self, find_owner: Callable[[Connection], str] = lambda _: ""):
        self.proxies: list[Proxy] = []  # of the workers' clients; each has a worker as its owner
        self.conflicts = 0  # commits that the store rejected because the stream had moved on
        # called with worker and stage when a chunk reaches the stage
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
        """Notice loads and commits of workers, and their answers."""
        worker = self.owner_of(connection)
        if not worker:
            return
        if direction == "request":
            if _COMMIT.search(data):
                connection.notes = "commit"
                self.hook(worker, COMMIT_SENT)
            elif _LOAD.search(data):
                connection.notes = "load"
            return
        command, connection.notes = connection.notes, None
        if command == "load" and data[:1] != b"-":
            self.hook(worker, COMPUTING)
        elif command == "commit":
            self.conflicts += data.count(_CONFLICT)
            if _WRITTEN in data:
                self.hook(worker, REPLY_UNSENT)

    def owner_of(self, connection: Connection) -> str:
        """The worker that made a connection to the store, looked up once; empty for others."""
        if connection.owner is None:
            connection.owner = self._find_owner(connection)
        return connection.owner

    def has_pending_commit(self, connection: Connection) -> bool:
        """Whether the last command on this connection is a commit without an answer."""
        return bool(connection.notes == "commit")
