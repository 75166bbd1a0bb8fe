"""Streams on Redis or Valkey, one server or a cluster.

One string per stream (see `codec`), its last reply in a second key with a short life of its
own. Loads are one MGET and commits one call of one Lua script, which compares and writes each
stream on its own: for all streams of a call on a single server, for those of one partition on a
cluster, all of them under way at once. Requests of one stream go through one connection, in
the order in which they were made. Nothing here is a lock: a commit that comes too late finds
out by its compare-and-set.

A commit whose reply was lost is repeated. If it then finds its own head, it was written. If
it finds the stream further on in the same epoch, or in an epoch begun since, nobody can tell
whether it was written before others went on, and the answer is OutcomeUnknown. A commit that
was written and is not as durable as the settings want is NotDurable.

A deletion is a compare-and-set as well and leaves a tombstone, so that neither it nor an earlier
commit changes anything when it is delivered late.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any, Final

import structlog

from service.core.delivery import new_epoch
from service.core.errors import (
    CarryError,
    Conflict,
    InvalidInput,
    NotDurable,
    StoreRefused,
    StoreUnavailable,
)
from service.core.values import (
    EPOCH_BYTES,
    FIRST_TAG,
    Check,
    StoredReply,
    StreamHead,
    StreamKey,
    StreamPage,
    StreamState,
    Tombstone,
)
from service.store.base import COMMITTED, Commit, CommitResult, Conflicted, Loaded
from service.store.codec import (
    TOMBSTONE_BEGIN,
    CodecError,
    decode_head,
    decode_reply,
    decode_state,
    encode_reply,
    encode_state,
    encode_tombstone,
    head_bytes,
    raw_head,
)
from service.store.redis.cluster_router import ClusterLink
from service.store.redis.connections import RETRY_AFTER_S, is_passing
from service.store.redis.outcomes import (
    damaged,
    not_encodable,
    outcome_unknown,
    resolve_repeated_commit,
    resolve_repeated_deletion,
)
from service.store.redis.readiness import Readiness
from service.store.redis.redis_server import Server
from service.store.redis.router import Link, ServerLink, first_error
from service.store.redis.scan import Place, scan_page
from service.store.redis.server_checks import check_servers
from service.store.redis.store_request import Answer, Outcome, ReplyLost, Request, Script
from service.store.settings import Durability, StoreSettings

DELETE_ATTEMPTS: Final = 6
_WRITTEN: Final = [1]

log = structlog.get_logger(__name__)


class RedisStore:
    """A `StateStore` on a single server or a cluster, as the address says.

    Raises:
        StoreRefused: the settings' address cannot be used.
    """

    def __init__(self, settings: StoreSettings):
        self._settings = settings
        self._keys = settings.keys
        self._link: Link = ClusterLink(settings) if settings.is_cluster else ServerLink(settings)
        self._slots: list[int] | None = None
        if settings.is_cluster:
            partitions = range(settings.partitions)
            self._slots = [self._link.slot(self._keys.begin(each)) for each in partitions]
        self._is_durable = settings.durability is not Durability.MEMORY
        self._commit = Script.load("commit")
        self._deletion = Script.load("delete")
        self._confirming = Script.load("confirm")
        self._readiness = Readiness(self._link, settings, self._commit)

    async def start(self) -> None:
        """Check the servers and set the store up where it is new; once, before use.

        Raises:
            StoreUnavailable, StoreRefused: a server does not answer, or must not be used.
        """
        await self._link.start()
        server = await check_servers(self._link, self._settings)
        self._readiness.start()
        log.info("store_ready", store=self._link.where, server=server)

    async def close(self) -> None:
        """Release connections; once, after the last call returned."""
        await self._readiness.close()
        await self._link.close()

    async def check(self) -> list[Check]:
        """Readiness: whether the servers accept commits and are as durable as required."""
        return [await self._readiness.check()]

    def shard(self, key: StreamKey) -> Hashable:
        """The node of a cluster that stores a stream, as far as known; None for a single server."""
        return None if self._slots is None else self._link.owner(self._slot(key))

    async def load(
        self, keys: Sequence[StreamKey], deadline_s: float | None = None
    ) -> list[Loaded]:
        """Many streams in one round trip; None where there is none, StateDamaged where the
        bytes are refused, and the error of its server where only some of a cluster answer.

        Raises:
            StoreUnavailable, StoreRefused: the store as a whole.
        """
        if not keys:
            return []
        names = list(map(self._keys.state, keys))
        if self._slots is None:
            (outcome,) = await self._link.ask(Request.of("MGET", *names), deadline_s=deadline_s)
            values = self._value(outcome)
            return [self._decoded(key, value) for key, value in zip(keys, values, strict=True)]
        groups = self._by_slot(keys)
        outcomes = await self._link.ask(
            *(
                Request.of("MGET", *(names[index] for index in group), slot=slot)
                for slot, group in groups
            ),
            deadline_s=deadline_s,
        )
        if (error := first_error(outcomes)) is not None:
            raise error
        found: list[Loaded] = [None] * len(keys)
        for (_, group), outcome in zip(groups, outcomes, strict=True):
            try:
                values = self._value(outcome)
            except CarryError as error:
                values = [error] * len(group)
            for index, value in zip(group, values, strict=True):
                failed = isinstance(value, CarryError)
                found[index] = value if failed else self._decoded(keys[index], value)
        return found

    async def load_with_reply(
        self, key: StreamKey, deadline_s: float | None = None
    ) -> tuple[StreamState | None, StoredReply | None]:
        """One stream and its kept reply, read together; a damaged reply counts as not kept.

        What is read is as durable as a commit is: where that is more than the server's memory,
        it is written to (the reply's lifetime), and waited for like a commit.

        Raises:
            StateDamaged: the state's bytes are refused.
            NotDurable: it is not as durable as the settings want.
            StoreUnavailable, StoreRefused: the store as a whole.
        """
        value, kept = await self._confirmed(key, deadline_s)
        state = self._decoded(key, value)
        if isinstance(state, CarryError):
            raise state
        if state is None or isinstance(state, Tombstone):
            return None, None
        if kept is None:
            return state, None
        try:
            return state, decode_reply(kept)
        except CodecError as error:
            log.warning("reply_damaged", model=key.model, stream=key.stream, reason=str(error))
            return state, None

    async def commit(
        self, commits: Sequence[Commit], deadline_s: float | None = None
    ) -> list[CommitResult]:
        """Compare-and-set many streams in one round trip, each on its own.

        A stream that is found at the commit's own head at the first try was moved there by
        a duplicate of the same chunk: Conflicted, and its stored reply is the answer.

        Raises:
            StoreUnavailable: nothing was sent.
            StoreRefused: the store as a whole; nothing was written.
        """
        results: list[CommitResult | None] = [None] * len(commits)
        requests: list[Request] = []
        asked: list[list[int]] = []
        for slot, group in self._by_slot([commit.key for commit in commits]):
            keys: list[str] = []
            arguments: list[str | bytes | int] = [
                self._settings.idle_ttl_ms,
                self._settings.reply_ttl_ms,
            ]
            members: list[int] = []
            for index in group:
                commit = commits[index]
                try:
                    state, reply = encode_state(commit.new), self._reply_bytes(commit.reply)
                except CodecError as error:
                    results[index] = not_encodable(commit.key, error)
                    continue
                expected = commit.expected
                keys += self._keys.pair(commit.key)
                arguments += (b"" if expected is None else head_bytes(expected), state, reply)
                members.append(index)
            if members:
                requests.append(Request.run(self._commit, keys, arguments, slot))
                asked.append(members)
        if requests:
            outcomes = await self._link.ask(*requests, durably=True, deadline_s=deadline_s)
            if (refusal := first_error(outcomes)) is not None:
                raise refusal
            for members, outcome in zip(asked, outcomes, strict=True):
                found = await self._committed(
                    [commits[index] for index in members], outcome, deadline_s
                )
                for index, result in zip(members, found, strict=True):
                    results[index] = result
        return [result for result in results if result is not None]

    async def delete(
        self, key: StreamKey, expected: StreamHead | None = None, deadline_s: float | None = None
    ) -> CommitResult:
        """Replace a stream by a tombstone, in a bounded number of compare-and-sets.

        Without `expected`, each attempt expects what the one before found: epoch and tag, and after
        repeated conflicts only the epoch. An attempt that is delivered late finds neither.

        Returns:
            Committed if there was a stream and is none, otherwise Conflicted with what was found.

        Raises:
            StoreUnavailable, StoreRefused: the store as a whole; nothing was deleted.
        """
        if deadline_s is None:
            deadline_s = time.monotonic() + self._settings.wait_s
        condition = b"" if expected is None else head_bytes(expected)
        is_stream, is_unsure = expected is not None, False
        for attempts_left in reversed(range(DELETE_ATTEMPTS)):
            tombstone = Tombstone(StreamHead(new_epoch(), FIRST_TAG, 0))
            outcome = await self._write_tombstone(key, condition, tombstone, deadline_s)
            if isinstance(outcome, ReplyLost):
                return outcome_unknown(key, expected, outcome)
            if isinstance(outcome, CarryError):
                if is_unsure:
                    return outcome_unknown(key, expected, outcome.detail)
                raise outcome
            if outcome.value == _WRITTEN:
                if not outcome.durable:
                    return self._not_durable(key)
                return COMMITTED if is_stream or is_unsure else Conflicted(None)
            if expected is not None:
                result = self._result(key, outcome.value)
                if outcome.repeated and isinstance(result, Conflicted):
                    result = resolve_repeated_deletion(key, expected, result)
                    if result is COMMITTED:
                        result = await self._confirm(key, deadline_s)
                return result
            # An earlier attempt may have deleted a stream; its tombstone is replaced as any other.
            is_unsure = is_unsure or outcome.repeated
            header = outcome.value[1] if len(outcome.value) > 1 else None
            condition = b"" if header is None else head_bytes(raw_head(header))
            if attempts_left <= DELETE_ATTEMPTS // 2:
                condition = condition[:EPOCH_BYTES]
            is_stream = header is not None and not header.startswith(TOMBSTONE_BEGIN)
        reason = f"others moved it on {DELETE_ATTEMPTS} times in a row"
        if is_unsure:
            return outcome_unknown(key, expected, reason)
        return Conflict(f"stream {key.stream!r} is not deleted: {reason}", stream=key.stream)

    async def _write_tombstone(
        self, key: StreamKey, condition: bytes, tombstone: Tombstone, deadline_s: float
    ) -> Outcome:
        """One attempt to write a tombstone over a value whose head begins with `condition`."""
        names, slot = list(self._keys.pair(key)), self._slot(key)
        lifetime = self._settings.tombstone_ttl_ms
        arguments: list[str | bytes | int] = [condition, encode_tombstone(tombstone), lifetime]
        request = Request.run(self._deletion, names, arguments, slot)
        (outcome,) = await self._link.ask(request, durably=True, deadline_s=deadline_s)
        return outcome

    async def streams(self, model: str, prefix: str, cursor: str | None, limit: int) -> StreamPage:
        """A page of at most `limit` names (more only where one bucket of the server's table
        holds more); it may be empty and still have a cursor.

        Raises:
            InvalidInput: the cursor is not one of a page.
            StoreUnavailable, StoreRefused: the store as a whole.
        """
        try:
            place = Place() if cursor is None else Place.parse(cursor)
        except ValueError as error:
            raise InvalidInput(
                f"cursor: expected the one of the last page, got {cursor!r}", at="cursor"
            ) from error
        pattern = self._keys.pattern(model, prefix)
        name, servers, _ = await self._link.layout()
        place = place.within(name, len(servers))
        server = servers[place.server]

        async def step(at: int, count: int) -> tuple[int, list[str]]:
            reply = await server.read("SCAN", at, "MATCH", pattern, "COUNT", count)
            found = map(self._keys.parse, (name.decode("utf-8", "replace") for name in reply[1]))
            return int(reply[0]), [key.stream for key in found if key is not None]

        names, at = await scan_page(step, place.cursor, limit, self._settings.scan_count)
        names = await self._existing(server, model, names)
        following: Place | None = None
        if at is not None:
            following = place._replace(cursor=at)
        elif place.server + 1 < len(servers):
            following = Place(name, place.server + 1)
        elif (now := (await self._link.layout()).name) != name:
            following = Place(now)
        return StreamPage(tuple(names), None if following is None else str(following))

    async def _existing(self, server: Server, model: str, names: list[str]) -> list[str]:
        """The names without those of tombstones and of keys that no longer exist."""
        if not names:
            return names
        last = len(TOMBSTONE_BEGIN) - 1
        keys = (self._keys.state(StreamKey(model, name)) for name in names)
        begins = await server.read_each([("GETRANGE", key, 0, last) for key in keys])
        # A slot that is migrating answers with an error: its streams are listed.
        return [
            name
            for name, begin in zip(names, begins, strict=True)
            if begin not in (b"", TOMBSTONE_BEGIN)
        ]

    def _slot(self, key: StreamKey) -> int:
        return 0 if self._slots is None else self._slots[self._keys.partition(key)]

    def _by_slot(self, keys: Sequence[StreamKey]) -> list[tuple[int, Sequence[int]]]:
        """Which streams one request may be about: slots, and indices of keys."""
        if self._slots is None:
            return [(0, range(len(keys)))]
        groups: dict[int, list[int]] = {}
        for index, key in enumerate(keys):
            groups.setdefault(self._slot(key), []).append(index)
        return list(groups.items())

    async def _committed(
        self, commits: Sequence[Commit], outcome: Outcome, deadline_s: float | None
    ) -> list[CommitResult]:
        """What became of the commits of one script."""
        if isinstance(outcome, ReplyLost):
            return [outcome_unknown(commit.key, commit.expected, outcome) for commit in commits]
        if isinstance(outcome, CarryError):
            return [outcome] * len(commits)
        results: list[CommitResult] = []
        for commit, reply in zip(commits, outcome.value, strict=True):
            if reply == _WRITTEN:
                results.append(COMMITTED if outcome.durable else self._not_durable(commit.key))
                continue
            result = self._result(commit.key, reply)
            if outcome.repeated and isinstance(result, Conflicted):
                result = resolve_repeated_commit(commit, result)
                if result is COMMITTED:
                    result = await self._confirm(commit.key, deadline_s)
            results.append(result)
        return results

    async def _confirm(self, key: StreamKey, deadline_s: float | None) -> CommitResult:
        """The result of a write that an earlier attempt made, once it is durable."""
        if self._is_durable:
            try:
                await self._confirmed(key, deadline_s)
            except CarryError as error:
                return self._not_durable(key, error.detail)
        return COMMITTED

    async def _confirmed(self, key: StreamKey, deadline_s: float | None) -> list[bytes | None]:
        """State and reply, as durable as a commit is."""
        names, slot = list(self._keys.pair(key)), self._slot(key)
        if self._is_durable:
            lifetime = max(1, self._settings.reply_ttl_ms)
            request = Request.run(self._confirming, names, [lifetime], slot)
        else:
            request = Request.of("MGET", *names, slot=slot)
        (outcome,) = await self._link.ask(request, durably=self._is_durable, deadline_s=deadline_s)
        found: list[bytes | None] = self._value(outcome)
        if isinstance(outcome, Answer) and not outcome.durable and found[0] is not None:
            raise self._not_durable(key)
        return found

    def _value(self, outcome: Outcome) -> Any:
        """The reply to a request that changes nothing of a stream."""
        if isinstance(outcome, Answer):
            return outcome.value
        if isinstance(outcome, CarryError):
            raise outcome
        cause = outcome.__cause__ or outcome
        away = isinstance(cause, (TimeoutError, ReplyLost)) or is_passing(cause)
        raise (StoreUnavailable if away else StoreRefused)(
            f"the store does not answer: {outcome}", retry_after_s=RETRY_AFTER_S
        ) from outcome

    def _not_durable(self, key: StreamKey, reason: str = "") -> NotDurable:
        wanted = f"{self._settings.replicas} replicas"
        if self._settings.durability is Durability.FSYNC:
            wanted = "the disk"
        return NotDurable(
            f"stream {key.stream!r} was written, and {wanted} did not confirm it in time"
            + (f": {reason}" if reason else ""),
            stream=key.stream,
            retry_after_s=RETRY_AFTER_S,
        )

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
                return Conflicted(decode_head(reply[1]) if len(reply) > 1 else None)
            except CodecError as error:
                return damaged(key, error, reply[1])
        text = reply[1].decode("utf-8", "replace")
        if text.startswith("READONLY"):
            self._link.reconnect()
        log.error("store_refused", model=key.model, stream=key.stream, reason=text)
        return StoreRefused(
            f"the store at {self._link.where} refused stream {key.stream!r}: {text}",
            stream=key.stream,
            retry_after_s=RETRY_AFTER_S,
        )

    def _decoded(self, key: StreamKey, value: bytes | None) -> Loaded:
        if value is None:
            return None
        try:
            return decode_state(value)
        except CodecError as error:
            return damaged(key, error, value)
