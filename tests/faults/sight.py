"""What the paths saw: how far each chunk had come when its worker was killed.

A killed worker says nothing any more, and nothing in the service helps to find out. But all it
does for a chunk passes here: the request goes in, the load of the stream goes to the store and
is answered, the commit goes out and is answered, the HTTP reply goes out. So of every request
that a dead worker owed a reply,

    before load    neither a load nor a commit of its stream was asked of the store since
    computing      its load was answered, and no commit came
    commit sent    its commit left the worker, and was not answered before the kill
    reply unsent   its commit was answered as written, and no byte of the reply came

A worker that finds the stream in its own memory loads nothing: such a chunk counts as before
load until its commit is seen. A commit that lost its race is forgotten, because the chunk then
begins anew. Times are those of the monotonic clock.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import hiredis

from tests.faults.path import Direction, Link

BEFORE_LOAD: Final = "before load"
COMPUTING: Final = "computing"
COMMIT_SENT: Final = "commit sent"
REPLY_UNSENT: Final = "reply unsent"
STAGES: Final = (BEFORE_LOAD, COMPUTING, COMMIT_SENT, REPLY_UNSENT)

_CHUNK: Final = re.compile(rb"^POST /v1/models/[^/ ]+/streams/([^/ ]+)/chunks")
_STATE_KEY: Final = re.compile(rb"\}:s:[^:]+:(.+)$", re.DOTALL)
_NEVER: Final = 0.0


@dataclass(slots=True)
class Work:
    """What the store was asked for one stream by one worker, as times; 0 where it was not."""

    loaded_s: float = _NEVER
    commit_s: float = _NEVER
    written_s: float = _NEVER


@dataclass(frozen=True, slots=True)
class Asked:
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
    asked: deque[Asked | None] = field(default_factory=deque)


class _Error(Exception):
    """An error reply."""


class _Broken(Exception):
    """Bytes that are no reply."""


_MORE: Final = object()

Hook = Callable[[str, str, str], None]
"""Told of worker, stream and stage when a chunk reaches the stage."""


class StoreSight:
    """Watches the ways from workers to the store.

    Attributes:
        conflicts: commits that the store refused because the stream had moved on.
        hook: told of every load's answer, commit and commit's answer.
    """

    def __init__(self, whose: Callable[[Link], str]):
        self.conflicts = 0
        self.hook: Hook | None = None
        self._whose = whose
        self._work: dict[tuple[str, str], Work] = {}

    def work(self, worker: str, stream: str) -> Work:
        """What that worker did for that stream last."""
        found = self._work.get((worker, stream))
        if found is None:
            found = self._work[worker, stream] = Work()
        return found

    def passing(self, link: Link, direction: Direction, data: bytes) -> None:
        """Read commands and replies; what is no worker's is not looked at."""
        worker = self._whose(link)
        if not worker:
            return
        if link.notes is None:
            link.notes = _StoreNotes()
        notes: _StoreNotes = link.notes
        if direction == "request":
            notes.requests.feed(data)
            for command in _all(notes.requests):
                asked = _asked(command)
                notes.asked.append(asked)
                if asked is not None and asked.commit:
                    self._note(worker, asked.streams, "commit_s", COMMIT_SENT)
            return
        notes.replies.feed(data)
        for value in _all(notes.replies):
            asked = notes.asked.popleft() if notes.asked else None
            if asked is not None:
                self._answered(worker, asked, value)

    def closed(self, link: Link) -> None:
        """A broken connection answers nothing more."""

    def is_workers(self, link: Link) -> bool:
        """Whether a worker made the connection."""
        return bool(self._whose(link))

    def owes(self, link: Link) -> bool:
        """Whether a commit on this connection has no answer yet."""
        return link.notes is not None and any(
            asked is not None and asked.commit for asked in link.notes.asked
        )

    def _answered(self, worker: str, asked: Asked, value: Any) -> None:
        if not asked.commit:
            if not isinstance(value, _Error):
                self._note(worker, asked.streams, "loaded_s", COMPUTING)
            return
        if isinstance(value, _Error) or not isinstance(value, list):
            # the script as a whole: nothing was written, and it will be sent again
            self._forget(worker, asked.streams)
            return
        for stream, outcome in zip(asked.streams, value, strict=False):
            if outcome == [1]:
                self._note(worker, (stream,), "written_s", REPLY_UNSENT)
            else:
                self.conflicts += outcome[0] == 0
                self._forget(worker, (stream,))

    def _note(self, worker: str, streams: tuple[str, ...], what: str, stage: str) -> None:
        now_s = time.monotonic()
        for stream in streams:
            setattr(self.work(worker, stream), what, now_s)
            if self.hook is not None:
                self.hook(worker, stream, stage)

    def _forget(self, worker: str, streams: tuple[str, ...]) -> None:
        for stream in streams:
            self._work.pop((worker, stream), None)


def _all(reader: Any) -> Iterator[Any]:
    while (found := reader.gets()) is not _MORE:
        yield found


def _asked(command: Any) -> Asked | None:
    """The streams that a command loads or commits; None for any other command."""
    if not isinstance(command, list) or not command:
        return None
    name = command[0].upper()
    if name in (b"EVALSHA", b"EVAL"):
        keys = command[3 : 3 + int(command[2])]
        # a commit has two common arguments, then two keys and three arguments for each stream
        commit = 2 * (len(command) - 3 - len(keys) - 2) == 3 * len(keys)
        return Asked(True, _streams(keys)) if commit else None
    if name in (b"MGET", b"GET"):
        return Asked(False, _streams(command[1:]))
    return None


def _streams(keys: list[bytes]) -> tuple[str, ...]:
    found = (_STATE_KEY.search(key) for key in keys)
    return tuple(match[1].decode() for match in found if match is not None)


@dataclass(slots=True)
class Owed:
    """A chunk that was sent to a worker.

    Attributes:
        begun: its reply has begun; it is owed no more.
    """

    stream: str
    since_s: float
    begun: bool = False


class ClientSight:
    """Watches the ways from clients to workers, one request at a time on each connection.

    Attributes:
        hook: told when a request for a chunk comes.
    """

    def __init__(self) -> None:
        self.hook: Hook | None = None
        self.owed: dict[str, dict[int, Owed]] = {}

    def passing(self, link: Link, direction: Direction, data: bytes) -> None:
        """A reply's first byte ends what is owed on its connection."""
        owed = self.owed.setdefault(link.path.owner, {})
        if direction == "reply":
            found = owed.pop(link.number, None)
            if found is not None:
                found.begun = True
            return
        match = _CHUNK.match(data)
        if match is not None:
            stream = match[1].decode()
            owed[link.number] = Owed(stream, time.monotonic())
            if self.hook is not None:
                self.hook(link.path.owner, stream, BEFORE_LOAD)

    def closed(self, link: Link) -> None:
        """A client that left is owed nothing."""
        self.owed.get(link.path.owner, {}).pop(link.number, None)

    def in_flight(self, worker: str) -> list[Owed]:
        """What the worker owes now."""
        return list(self.owed.get(worker, {}).values())


def stage(owed: Owed, work: Work, killed_s: float) -> str:
    """How far a chunk had come when its worker was killed."""
    since_s = owed.since_s
    if since_s <= work.written_s <= killed_s and work.written_s >= work.commit_s:
        return REPLY_UNSENT
    if work.commit_s >= since_s:
        return COMMIT_SENT
    if since_s <= work.loaded_s <= killed_s:
        return COMPUTING
    return BEFORE_LOAD


def count_stages(store: StoreSight, worker: str, owed: list[Owed], killed_s: float) -> Counter[str]:
    """Of what a worker owed when it was killed, how many chunks were at each stage.

    To be asked once all it wrote before its end has passed.
    """
    return Counter(
        stage(each, store.work(worker, each.stream), killed_s) for each in owed if not each.begun
    )
