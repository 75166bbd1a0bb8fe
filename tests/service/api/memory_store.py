"""A store in a dictionary, for tests of the API: no server, and failures on demand.

Keeps the rules of the protocol (compare-and-set, replies beside states). What real stores do is
tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from service.domain import Check, Mark, StoredReply, StreamKey, StreamPage, StreamState
from service.errors import CarryError
from service.state.protocol import Commit, CommitResult, Committed, Conflicted


class MemoryStore:
    """Implements `service.state.protocol.StateStore`."""

    def __init__(self) -> None:
        self.states: dict[StreamKey, StreamState] = {}
        self.replies: dict[StreamKey, StoredReply] = {}
        self.away: Exception | None = None
        """Raised by every call while it is set."""
        self.damaged: dict[StreamKey, CarryError] = {}
        """Answers of `load` for some streams."""
        self.on_commit: Callable[[Commit], CommitResult | None] = lambda _: None
        """May answer a commit in the store's place."""
        self.checks = [Check("store", True, "in memory")]

    async def start(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to release."""

    async def check(self) -> list[Check]:
        return self.checks

    async def load(self, keys: Sequence[StreamKey]) -> list[StreamState | CarryError | None]:
        self._fail()
        return [self.damaged.get(key) or self.states.get(key) for key in keys]

    async def load_with_reply(
        self, key: StreamKey
    ) -> tuple[StreamState | None, StoredReply | None]:
        self._fail()
        return self.states.get(key), self.replies.get(key)

    async def commit(self, commits: Sequence[Commit]) -> list[CommitResult]:
        self._fail()
        return [self.on_commit(commit) or self._commit(commit) for commit in commits]

    def _commit(self, commit: Commit) -> CommitResult:
        found = self.states.get(commit.key)
        mark = found.mark if found else None
        if mark != commit.expected:
            return Conflicted(mark)
        self.states[commit.key] = commit.new
        self.replies.pop(commit.key, None)
        if commit.reply is not None:
            self.replies[commit.key] = commit.reply
        return Committed()

    async def delete(self, key: StreamKey, expected: Mark | None = None) -> CommitResult:
        self._fail()
        found = self.states.get(key)
        if found is None or (expected is not None and found.mark != expected):
            return Conflicted(found.mark if found else None)
        del self.states[key]
        self.replies.pop(key, None)
        return Committed()

    async def streams(self, model: str, prefix: str, cursor: str | None, limit: int) -> StreamPage:
        self._fail()
        names = sorted(
            key.stream
            for key in self.states
            if key.model == model and key.stream.startswith(prefix)
        )
        start = int(cursor or 0)
        more = start + limit < len(names)
        return StreamPage(tuple(names[start : start + limit]), str(start + limit) if more else None)

    def _fail(self) -> None:
        if self.away is not None:
            raise self.away
