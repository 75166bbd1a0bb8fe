"""Streams on one Redis or Valkey server.

One string per stream (see `codec`), its last reply in a second key with a short life of its
own. Loads are one MGET; commits are one call of one Lua script, which compares and writes
each stream on its own. Commits go through one connection, in the order in which they were
made. Nothing here is a lock: a commit that comes too late finds out by its compare-and-set.

A commit whose reply was lost is repeated. If it then finds its own mark, it was written. If
it finds the stream further on in the same epoch, nobody can tell whether it was written
before others went on, and the answer is OutcomeUnknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import structlog

from service.delivery import standing
from service.domain import Check, Mark, StoredReply, StreamKey, StreamPage, StreamState
from service.errors import (
    CarryError,
    InternalError,
    InvalidInput,
    OutcomeUnknown,
    StateDamaged,
    StoreRefused,
)
from service.state.codec import (
    CodecError,
    decode_mark,
    decode_reply,
    decode_state,
    encode_reply,
    encode_state,
    mark_bytes,
)
from service.state.connections import RETRY_AFTER_S
from service.state.link import ReplyLost, Script, ServerLink
from service.state.protocol import COMMITTED, Commit, CommitResult, Committed, Conflicted
from service.state.scan import scan_page
from service.state.server_checks import check_server
from service.state.settings import StoreSettings

PING_S: Final = 1.0
CURSOR_DIGITS: Final = 20
_WRITTEN: Final = [1]

log = structlog.get_logger(__name__)


class RedisStore:
    """A `StateStore` on a single server.

    Raises:
        StoreRefused: the settings' address cannot be used.
    """

    def __init__(self, settings: StoreSettings):
        self._settings = settings
        self._keys = settings.keys
        self._link = ServerLink(settings)
        self._commit = Script.load("commit")
        self._delete = Script.load("delete")

    async def start(self) -> None:
        """Check the server and set the store up where it is new; once, before use.

        Raises:
            StoreUnavailable, StoreRefused: the server does not answer, or must not be used.
        """
        server = await check_server(self._link, self._settings)
        log.info("store_ready", store=self._link.where, server=server)

    async def close(self) -> None:
        """Release connections; once, after the last call returned."""
        await self._link.close()

    async def check(self) -> list[Check]:
        """Readiness: whether the server answers now. Never raises."""
        try:
            await self._link.ping(PING_S)
        except CarryError as error:
            return [Check("store", False, error.detail)]
        return [Check("store", True, f"{self._link.where} answers")]

    async def load(self, keys: Sequence[StreamKey]) -> list[StreamState | CarryError | None]:
        """Many streams in one round trip; None where there is none, StateDamaged where the
        bytes are refused.

        Raises:
            StoreUnavailable, StoreRefused: the server as a whole.
        """
        if not keys:
            return []
        values = await self._link.read_in_order("MGET", *map(self._keys.state, keys))
        return [self._decoded(key, value) for key, value in zip(keys, values, strict=True)]

    async def load_with_reply(
        self, key: StreamKey
    ) -> tuple[StreamState | None, StoredReply | None]:
        """One stream and its kept reply, read together; a damaged reply counts as not kept.

        Raises:
            StateDamaged: the state's bytes are refused.
            StoreUnavailable, StoreRefused: the server as a whole.
        """
        value, kept = await self._link.read_in_order("MGET", *self._keys.pair(key))
        state = self._decoded(key, value)
        if isinstance(state, CarryError):
            raise state
        if kept is None:
            return state, None
        try:
            return state, decode_reply(kept)
        except CodecError as error:
            log.warning("reply_damaged", model=key.model, stream=key.stream, reason=str(error))
            return state, None

    async def commit(self, commits: Sequence[Commit]) -> list[CommitResult]:
        """Compare-and-set many streams in one round trip, each on its own.

        A stream that is found at the commit's own mark at the first try was moved there by
        a duplicate of the same chunk: Conflicted, and its stored reply is the answer.

        Raises:
            StoreUnavailable: nothing was sent.
            StoreRefused: the server as a whole; nothing was written.
        """
        keys: list[str] = []
        arguments: list[str | bytes | int] = [
            self._settings.idle_ttl_ms,
            self._settings.reply_ttl_ms,
        ]
        asked: list[Commit] = []
        refused: dict[int, CommitResult] = {}
        for index, commit in enumerate(commits):
            try:
                state, reply = encode_state(commit.new), self._reply_bytes(commit.reply)
            except CodecError as error:
                refused[index] = _not_encodable(commit.key, error)
                continue
            expected = commit.expected
            keys += self._keys.pair(commit.key)
            arguments += (b"" if expected is None else mark_bytes(expected), state, reply)
            asked.append(commit)
        results = await self._run_commit(keys, arguments, asked) if asked else []
        for index, result in refused.items():
            results.insert(index, result)
        return results

    async def delete(self, key: StreamKey, expected: Mark | None = None) -> CommitResult:
        """Forget a stream and its reply; with `expected`, only if the stream is at that mark.

        Returns:
            Committed if it was there and is gone, otherwise Conflicted with what was found.

        Raises:
            StoreUnavailable, StoreRefused: the server as a whole; nothing was deleted.
        """
        keys = list(self._keys.pair(key))
        mark = b"" if expected is None else mark_bytes(expected)
        try:
            answer = await self._link.run(self._delete, keys, [mark])
        except ReplyLost as error:
            return _outcome_unknown(key, expected, error)
        result = self._result(key, answer.value)
        if answer.repeated and result == Conflicted(None):
            # The try whose answer was lost may have deleted it; either way it is gone.
            return COMMITTED
        return result

    async def streams(self, model: str, prefix: str, cursor: str | None, limit: int) -> StreamPage:
        """A page of at most `limit` names (more only where one bucket of the server's table
        holds more); it may be empty and still have a cursor.

        Raises:
            InvalidInput: the cursor is not one of a page.
            StoreUnavailable, StoreRefused: the server as a whole.
        """
        at = "0" if cursor is None else cursor
        if len(at) > CURSOR_DIGITS or not at.isascii() or not at.isdigit() or int(at) >= 2**64:
            raise InvalidInput(
                f"cursor: expected the one of the last page, got {cursor!r}", at="cursor"
            )
        pattern = self._keys.pattern(model, prefix)

        async def step(at: int, count: int) -> tuple[int, list[str]]:
            reply = await self._link.read("SCAN", at, "MATCH", pattern, "COUNT", count)
            found = map(self._keys.parse, (name.decode("utf-8", "replace") for name in reply[1]))
            return int(reply[0]), [key.stream for key in found if key is not None]

        names, following = await scan_page(step, int(at), limit, self._settings.scan_count)
        return StreamPage(tuple(names), None if following is None else str(following))

    async def _run_commit(
        self, keys: list[str], arguments: list[str | bytes | int], commits: list[Commit]
    ) -> list[CommitResult]:
        try:
            answer = await self._link.run(self._commit, keys, arguments)
        except ReplyLost as error:
            return [_outcome_unknown(commit.key, commit.expected, error) for commit in commits]
        outcomes: list[CommitResult] = []
        for commit, reply in zip(commits, answer.value, strict=True):
            result = COMMITTED if reply == _WRITTEN else self._result(commit.key, reply)
            if answer.repeated and isinstance(result, Conflicted):
                result = settle(commit, result)
            outcomes.append(result)
        return outcomes

    def _reply_bytes(self, reply: StoredReply | None) -> bytes:
        if reply is None or self._settings.reply_ttl_ms == 0:
            return b""
        value = encode_reply(reply)
        return value if len(value) <= self._settings.reply_max_bytes else b""

    def _result(self, key: StreamKey, reply: list[Any]) -> CommitResult:
        """The outcome of one stream, as a script returned it."""
        if reply[0] == 1:
            return COMMITTED
        if reply[0] == 0:
            try:
                return Conflicted(decode_mark(reply[1]) if len(reply) > 1 else None)
            except CodecError as error:
                return _damaged(key, error)
        text = reply[1].decode("utf-8", "replace")
        if text.startswith("READONLY"):
            self._link.reconnect()
        log.error("store_refused", model=key.model, stream=key.stream, reason=text)
        return StoreRefused(
            f"the store at {self._link.where} refused stream {key.stream!r}: {text}",
            stream=key.stream,
            retry_after_s=RETRY_AFTER_S,
        )

    def _decoded(self, key: StreamKey, value: bytes | None) -> StreamState | CarryError | None:
        if value is None:
            return None
        try:
            return decode_state(value)
        except CodecError as error:
            return _damaged(key, error)


def settle(commit: Commit, result: Conflicted) -> CommitResult:
    """What the conflict of a repeated commit says about its earlier tries.

    The stream at the commit's own mark, or anywhere in an epoch that the commit itself
    began: it was written. Further on in the epoch it had: not known. Otherwise the commit
    is in no history of the stream as it is now, which is a conflict like any other.
    """
    found, new = result.found, commit.new.mark
    if found is None:
        return result
    if (found.epoch, found.tag) == (new.epoch, new.tag):
        return Committed()
    before = commit.expected
    if found.epoch == new.epoch:
        if before is None or before.epoch != new.epoch:
            return Committed()
        if found.position > before.position:
            return _outcome_unknown(commit.key, found, "others moved the stream on meanwhile")
    return result


def _outcome_unknown(key: StreamKey, mark: Mark | None, reason: ReplyLost | str) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"whether the store wrote stream {key.stream!r} is not known: {reason}",
        retry_after_s=RETRY_AFTER_S,
        **(standing(key.stream, mark) if isinstance(reason, str) else {"stream": key.stream}),
    )


def _damaged(key: StreamKey, error: CodecError) -> StateDamaged:
    log.error("state_damaged", model=key.model, stream=key.stream, reason=str(error))
    return StateDamaged(
        f"the stored state of stream {key.stream!r} is refused: {error}", stream=key.stream
    )


def _not_encodable(key: StreamKey, error: CodecError) -> InternalError:
    log.error("state_not_encodable", model=key.model, stream=key.stream, reason=str(error))
    return InternalError(
        f"the new state of stream {key.stream!r} cannot be stored: {error}", stream=key.stream
    )
