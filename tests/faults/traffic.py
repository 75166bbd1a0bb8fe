"""Traffic monitor: the stage of each chunk when its worker was killed.

A killed worker reports nothing, and nothing in the service helps to find out. But all it does for a
chunk passes here: the request goes in, the load of the stream goes to the store and is answered,
the commit goes out and is answered, the HTTP reply goes out. So of every request that a killed
worker owed a reply,

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
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
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
_MORE: Final = object()
_Streams = tuple[str, ...]


@dataclass(slots=True)
class PendingChunk:
    """A chunk that was sent to a worker; `replied` once its reply begins."""

    stream: str
    since_s: float
    replied: bool = False


class _Error(Exception):
    """An error reply."""


def _reader() -> Any:
    return hiredis.Reader(notEnoughData=_MORE, replyError=_Error)


@dataclass(slots=True)
class _StoreNotes:
    """Of one connection to the store: parsers, and what has no answer yet."""

    requests: Any = field(default_factory=_reader)
    replies: Any = field(default_factory=_reader)
    unanswered: deque[tuple[bool, _Streams]] = field(default_factory=deque)


class Traffic:
    """Monitors the proxies of all workers and of the store.

    Attributes:
        conflicts: commits that the store rejected because the stream had moved on.
        hook: called with worker and stage when a chunk reaches the stage.
        times: by worker and stream, when each stage after the first was reached last.
    """

    def __init__(self, find_owner: Callable[[Connection], str] = lambda _: ""):
        self.conflicts = 0
        self.hook: Callable[[str, str], None] | None = None
        self.times: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        self._find_owner = find_owner

    def watch_clients(self, connection: Connection, direction: Direction, data: bytes) -> None:
        """A reply's first byte ends what is owed on its connection."""
        if direction == "reply":
            if connection.notes is not None:
                connection.notes.replied = True
            connection.notes = None
        elif match := _CHUNK.match(data):
            connection.notes = PendingChunk(match[1].decode(), time.monotonic())
            if self.hook is not None:
                self.hook(connection.owner, BEFORE_LOAD)

    def owner_of(self, connection: Connection) -> str:
        """The worker that made a connection to the store, looked up once; empty for others."""
        if connection.owner is None:
            connection.owner = self._find_owner(connection)
        return connection.owner

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
                    self._note(worker, streams, COMMIT_SENT)
            elif notes.unanswered:
                self._read_answer(worker, *notes.unanswered.popleft(), value)

    def has_pending_commit(self, connection: Connection) -> bool:
        """Whether a commit on this connection has no answer yet."""
        notes = connection.notes
        return notes is not None and any(is_commit for is_commit, _ in notes.unanswered)

    def count_stages(
        self, worker: str, pending: Iterable[PendingChunk], killed_s: float
    ) -> Counter[str]:
        """Of what a worker owed when it was killed, how many chunks were at each stage.

        To be asked once all it wrote before its end has passed.
        """
        return Counter(
            _stage(each.since_s, self.times[worker, each.stream], killed_s)
            for each in pending
            if not each.replied
        )

    def _read_answer(self, worker: str, is_commit: bool, streams: _Streams, value: Any) -> None:
        if not is_commit:
            if not isinstance(value, _Error):
                self._note(worker, streams, COMPUTING)
            return
        # a script that failed wrote nothing, and will be sent again
        outcomes = value if isinstance(value, list) else [[None]] * len(streams)
        for stream, outcome in zip(streams, outcomes, strict=False):
            if outcome == [1]:
                self._note(worker, (stream,), REPLY_UNSENT)
            else:
                self.conflicts += outcome[0] == 0
                self.times.pop((worker, stream), None)

    def _note(self, worker: str, streams: _Streams, stage: str) -> None:
        for stream in streams:
            self.times[worker, stream][stage] = time.monotonic()
        if streams and self.hook is not None:
            self.hook(worker, stage)


def _stage(since_s: float, times: dict[str, float], killed_s: float) -> str:
    """The stage of a chunk when its worker was killed."""
    loaded_s, commit_s, written_s = (times.get(stage, 0.0) for stage in STAGES[1:])
    if since_s <= written_s <= killed_s and written_s >= commit_s:
        return REPLY_UNSENT
    if commit_s >= since_s:
        return COMMIT_SENT
    return COMPUTING if since_s <= loaded_s <= killed_s else BEFORE_LOAD


def _read_command(command: Any) -> tuple[bool, _Streams]:
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
