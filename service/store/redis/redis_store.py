"""The state store on Redis or Valkey, a single server or a cluster.

Each stream has one string key for its state (see `codec`) and a second one for its last reply,
with a short TTL. A load is one MGET, and a commit is one call of a Lua script that compares and
writes each stream independently. On a single server, one call serves all streams; on a cluster,
there is one call per slot, all sent concurrently. Each is packed into one buffer here: the client
library would allocate and format every argument by itself. Commands of one stream use one
pipelined connection, in the order of the calls. There are no locks: concurrency control is
optimistic, and a commit that comes too late fails its compare-and-set.

A commit whose reply was lost is retried. If it then finds its own head, it was written. If it
finds the stream at a later position of the same epoch, or in a newer epoch, nobody can tell whether
it was written before, and the result is OutcomeUnknown. A commit that was written but is not as
durable as the settings require is NotDurable.

A deletion is a compare-and-set too and leaves a tombstone, so that neither a deletion nor an
earlier commit changes anything when it is delivered late. Each attempt expects the head that the
one before found: epoch and tag, and after repeated conflicts only the epoch.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog

from service.core.delivery import new_epoch
from service.core.errors import CarryError, Conflict, StoreRefused, StoreUnavailable
from service.core.memo import Memo
from service.core.values import (
    EPOCH_BYTES,
    FIRST_TAG,
    StoredReply,
    StreamHead,
    StreamKey,
    StreamPage,
    StreamState,
    Tombstone,
)
from service.store.base import (
    COMMITTED,
    CommitColumns,
    CommitResult,
    Conflicted,
    Store,
    StoredValue,
    decode_value,
)
from service.store.codec import (
    COMPARED,
    TOMBSTONE_PREFIX,
    decode_reply,
    encode_tombstone,
    pack_head,
    read_packed_head,
    unpack_head,
)
from service.store.layout import CodecError, StateHeader
from service.store.redis.address import check_address, check_tls_files
from service.store.redis.alarm_index import AlarmIndex, RedisAlarms
from service.store.redis.capabilities import (
    RedisRateLeases,
    RedisStoredKeys,
    RedisStoredModels,
    RedisStreamUsage,
)
from service.store.redis.cluster_router import ClusterRouter
from service.store.redis.commands import (
    CACHED_NAMES,
    CALL,
    PendingCommand,
    Script,
)
from service.store.redis.histories import RedisHistories
from service.store.redis.monitor import RedisMonitor
from service.store.redis.outcomes import (
    WRITTEN,
    Outcome,
    ReplyLost,
    ServerReply,
    not_durable_error,
    outcome_unknown_error,
    parse_result,
    read_value,
    resolve_retried_commit,
    resolve_retried_deletion,
)
from service.store.redis.output_channel import RedisOutputChannel
from service.store.redis.router import Router, SingleServerRouter
from service.store.redis.scan import list_streams
from service.store.redis.sentinel_router import SentinelRouter
from service.store.redis.server_checks import check_servers
from service.store.redis.topics import RedisTopics
from service.store.settings import Durability, StoreSettings

DELETE_ATTEMPTS: Final = 6

T = TypeVar("T")

log = structlog.get_logger(__name__)


def open_router(settings: StoreSettings) -> Router:
    """Create the router of the settings' address; `start` it before use.

    Raises:
        StoreRefused: the address cannot be used.
    """
    try:
        check_address(settings.url)
    except ValueError as error:
        raise StoreRefused(f"the store's address cannot be used: {error}") from None
    check_tls_files(settings.url)
    if settings.is_cluster:
        return ClusterRouter(settings)
    return SentinelRouter(settings) if settings.is_sentinel else SingleServerRouter(settings)


@dataclass(slots=True)
class _Deletion:
    """The state of a deletion between its attempts.

    Attributes:
        expected: deletes it only at this head; None at any.
        condition: the first bytes of the head that the next attempt expects; none if nothing may be
            stored.
        is_stream: whether that is the head of a stream.
        may_have_deleted: whether an earlier attempt, whose reply was lost, may have deleted it.
    """

    expected: StreamHead | None = None
    condition: bytes = b""
    is_stream: bool = False
    may_have_deleted: bool = False


class RedisStore(Store):
    """The store on a single server or a cluster, depending on the address; `start` it before use.

    Raises:
        StoreRefused: the settings' address cannot be used.
    """

    def __init__(self, settings: StoreSettings):
        self._settings = settings
        self._keys = settings.keys
        self._router = open_router(settings)
        self._slots: list[int] | None = None
        if settings.is_cluster:
            prefixes = map(self._keys.partition_prefix, range(settings.partitions))
            self._slots = [self._router.slot(prefix) for prefix in prefixes]
        self._awaits_durability = settings.durability is not Durability.MEMORY
        self._commit_script = Script.load("commit")
        self._alarm_index = AlarmIndex(settings)
        self._max_reply_bytes = settings.reply_max_bytes
        self._packed_names = Memo(self._pack_names, CACHED_NAMES)
        self._packed_lengths = Memo(_pack_lengths, CACHED_NAMES)
        self._confirm_script = Script.load("confirm")
        self._delete_script = Script.load("delete")
        self.outputs = RedisOutputChannel(self._router)
        self.usage = RedisStreamUsage(self._router, self._fence)
        self.rates = RedisRateLeases(self._router)
        self.keys = RedisStoredKeys(self._router)
        self.models = RedisStoredModels(self._router)
        self.monitor = RedisMonitor(self._router, self._commit_script)
        self.topics = RedisTopics(self._router)
        self.alarms = RedisAlarms(self._router)
        self.histories = RedisHistories(
            self._router, self._alarm_index, self._group_by_slot, self._commit_results
        )

    async def start(self) -> None:
        await self._router.start()
        server = await check_servers(self._router)
        self.monitor.start()
        log.info("store_ready", store=self._router.redacted_url, server=server)

    async def close(self) -> None:
        await self.monitor.close()
        await self.topics.close()
        await self._router.close()

    @property
    def is_cluster(self) -> bool:
        """Whether it is a cluster."""
        return self._slots is not None

    def shard(self, key: StreamKey) -> Hashable:
        return None if self._slots is None else self._router.node_of(self._slot(key))

    async def load(
        self, keys: Sequence[StreamKey], deadline_s: float = math.inf
    ) -> list[StoredValue]:
        if not keys:
            return []
        groups = self._group_by_slot(keys)
        commands = [
            self._load_command([keys[index] for index in group], slot) for slot, group in groups
        ]
        outcomes = await self._router.execute(*commands, deadline_s=deadline_s)
        _check_executed(outcomes)
        if len(groups) == 1:
            values: list[StoredValue] = read_value(outcomes[0])
            return values
        parts: list[list[StoredValue]] = []
        for (_, group), outcome in zip(groups, outcomes, strict=True):
            try:
                parts.append(read_value(outcome))
            except CarryError as error:
                parts.append([error] * len(group))
        return _in_order(groups, parts)

    async def load_with_reply(
        self, key: StreamKey, deadline_s: float = math.inf
    ) -> tuple[StreamState | None, StoredReply | None]:
        value, reply = await self._read_durably(key, deadline_s)
        state = decode_value(key, value)
        if isinstance(state, CarryError):
            raise state
        if state is None or isinstance(state, Tombstone):
            return None, None
        if reply is None:
            return state, None
        try:
            return state, decode_reply(reply)
        except CodecError as error:
            log.warning("reply_damaged", model=key.model, stream=key.stream, reason=str(error))
            return state, None

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        if not commits.keys:
            return []
        groups = self._group_by_slot(commits.keys)
        parts = [commits if len(groups) == 1 else commits.select(group) for _, group in groups]
        commands = [
            self._commit_command(part, slot) for part, (slot, _) in zip(parts, groups, strict=True)
        ]
        outcomes = await self._router.execute(*commands, durably=True, deadline_s=deadline_s)
        _check_executed(outcomes)
        if len(groups) == 1:
            results = await self._commit_results(commits, outcomes[0], deadline_s)
        else:
            results_of_parts = [
                await self._commit_results(part, outcome, deadline_s)
                for part, outcome in zip(parts, outcomes, strict=True)
            ]
            results = _in_order(groups, results_of_parts)
        if self.outputs.watched:
            self._publish(commits, results)
        return results

    def _pack_names(self, key: StreamKey) -> tuple[bytes, bytes]:
        """The packed name of a stream's state, and those of its state and its reply."""
        # `pack_arguments` costs more, which counts with many streams, whose names are not cached
        names = self._keys.pair(key)
        packed = "".join([f"${len(name.encode())}\r\n{name}\r\n" for name in names]).encode()
        return packed[: len(packed) // 2], packed

    def _load_command(self, keys: Sequence[StreamKey], slot: int) -> PendingCommand:
        """The command that reads streams of one slot."""
        names = [self._packed_names[key][0] for key in keys]
        packed = b"".join([b"*%d\r\n$4\r\nMGET\r\n" % (1 + len(keys)), *names])
        return PendingCommand(packed, asyncio.get_running_loop().create_future(), slot=slot)

    def _commit_command(self, commits: CommitColumns, slot: int) -> PendingCommand:
        """The call of the script that commits streams of one slot."""
        if commits.histories is not None:
            return self.histories.commit_command(commits, commits.histories, slot)
        keys, expected, states, replies = (
            commits.keys, commits.expected, commits.states, commits.replies
        )  # fmt: skip
        index, alarms = self._alarm_index, commits.alarms
        changed, ttls, indexes, changes = index.pack(keys, alarms) if alarms else index.unchanged
        packed_names, numkeys = self._packed_names, b"%d" % (2 * len(keys) + changed)
        script, max_bytes = self._commit_script, self._max_reply_bytes
        lengths = self._packed_lengths
        packed = [
            CALL % (5 + 5 * len(keys) + 4 * changed, script.by_hash, len(numkeys), numkeys),
            *[packed_names[key][1] for key in keys],
            indexes,
            ttls,
        ]
        for head, state, reply in zip(expected, states, replies, strict=True):
            head, reply = head[COMPARED], reply if len(reply) <= max_bytes else b""
            # joined once: formatting them would copy states and replies twice
            of_head, of_state, of_reply = lengths[len(head), len(state), len(reply)]
            packed += (of_head, head, of_state, state, of_reply, reply, b"\r\n")
        packed.append(changes)
        future = asyncio.get_running_loop().create_future()
        return PendingCommand(b"".join(packed), future, script, keys, slot)

    def _publish(self, commits: CommitColumns, results: Sequence[CommitResult]) -> None:
        """Publish the outputs of the watched streams among those that were committed."""
        for index, key in enumerate(commits.keys):
            if key in self.outputs.watched and results[index] is COMMITTED:
                header = StateHeader.decode(commits.states[index])
                if (last := header.last) is not None:
                    reply = commits.replies[index]
                    self.outputs.publish(key, last.start, reply, header.fingerprint)

    async def delete(
        self, key: StreamKey, expected: StreamHead | None = None, deadline_s: float = math.inf
    ) -> CommitResult:
        deletion = _Deletion(expected, pack_head(expected)[COMPARED], expected is not None)
        result = (await self._delete({key: deletion}, deadline_s))[key]
        if isinstance(result, StoreUnavailable | StoreRefused):
            raise result
        return result

    async def delete_many(self, keys: Sequence[StreamKey]) -> list[CommitResult]:
        results = await self._delete({key: _Deletion() for key in keys})
        return [results[key] for key in keys]

    async def _delete(
        self, pending: dict[StreamKey, _Deletion], deadline_s: float = math.inf
    ) -> dict[StreamKey, CommitResult]:
        if deadline_s == math.inf:
            deadline_s = time.monotonic() + self._settings.store_wait_s
        results: dict[StreamKey, CommitResult] = {}
        for attempts_left in reversed(range(DELETE_ATTEMPTS)):
            if not pending:
                break
            conditions = {key: deletion.condition for key, deletion in pending.items()}
            for key, outcome in (await self._write_tombstones(conditions, deadline_s)).items():
                result = await self._deletion_result(key, pending[key], outcome, deadline_s)
                if result is not None:
                    results[key] = result
                    del pending[key]
                elif attempts_left <= DELETE_ATTEMPTS // 2:
                    pending[key].condition = pending[key].condition[:EPOCH_BYTES]
        for key, deletion in pending.items():
            reason = f"concurrent writes changed it {DELETE_ATTEMPTS} times in a row"
            error = Conflict(f"stream {key.stream!r} is not deleted: {reason}", stream=key.stream)
            unknown = outcome_unknown_error(key, None, reason)
            results[key] = unknown if deletion.may_have_deleted else error
        return results

    async def _deletion_result(
        self, key: StreamKey, deletion: _Deletion, outcome: Outcome, deadline_s: float
    ) -> CommitResult | None:
        """The result of a deletion; None if it has to be retried at the head that it met."""
        if isinstance(outcome, ReplyLost):
            return outcome_unknown_error(key, deletion.expected, outcome)
        if isinstance(outcome, CarryError):
            unknown = outcome_unknown_error(key, None, outcome.detail)
            return unknown if deletion.may_have_deleted else outcome
        if outcome.value == WRITTEN:
            self.outputs.publish(key, 0, b"", b"")
            if not outcome.is_durable:
                return not_durable_error(self._settings, key)
            is_deleted = deletion.is_stream or deletion.may_have_deleted
            return COMMITTED if is_deleted else Conflicted(None)
        if deletion.expected is not None:
            result = parse_result(self._router, key, outcome.value)
            if outcome.is_retry and isinstance(result, Conflicted):
                result = resolve_retried_deletion(key, deletion.expected, result)
                if result is COMMITTED:
                    result = await self._ensure_durable(key, deadline_s)
            return result
        # an earlier attempt may have deleted a stream and left a tombstone, which is replaced
        deletion.may_have_deleted = deletion.may_have_deleted or outcome.is_retry
        header = outcome.value[1] if len(outcome.value) > 1 else None
        deletion.condition = b"" if header is None else read_packed_head(header)[COMPARED]
        deletion.is_stream = header is not None and not header.startswith(TOMBSTONE_PREFIX)
        return None

    async def _fence(self, keys: Sequence[StreamKey]) -> set[StreamKey]:
        """Write a tombstone for each stream that does not exist, so that no commit that was sent
        before can create it; returns for which it was written."""
        deadline_s = time.monotonic() + self._settings.store_wait_s
        outcomes = await self._write_tombstones(dict.fromkeys(keys, b""), deadline_s)
        tombstones = {
            key: read_packed_head(outcome.value[1])[COMPARED]
            for key, outcome in outcomes.items()
            if isinstance(outcome, ServerReply)
            and len(outcome.value) > 1
            and outcome.value[1].startswith(TOMBSTONE_PREFIX)
        }
        outcomes |= await self._write_tombstones(tombstones, deadline_s)
        return {
            key
            for key, outcome in outcomes.items()
            if isinstance(outcome, ServerReply) and outcome.value == WRITTEN
        }

    async def _write_tombstones(
        self, conditions: Mapping[StreamKey, bytes], deadline_s: float
    ) -> dict[StreamKey, Outcome]:
        """Try once to write tombstones over values whose heads begin with these bytes."""
        ttl_ms, commands = round(1000 * self._settings.tombstone_ttl_s), list[PendingCommand]()
        for key, condition in conditions.items():
            tombstone = encode_tombstone(Tombstone(StreamHead(new_epoch(), FIRST_TAG, 0)))
            names, slot = self._keys.all_of(key), self._slot(key)
            arguments = (condition, tombstone, ttl_ms)
            commands.append(
                PendingCommand.for_script(self._delete_script, names, arguments, slot, [key])
            )
        outcomes = await self._router.execute(*commands, durably=True, deadline_s=deadline_s)
        return dict(zip(conditions, outcomes, strict=True))

    async def streams(
        self, model: str | None, prefix: str, cursor: str | None, limit: int
    ) -> StreamPage:
        return await list_streams(self._router, model, prefix, cursor, limit)

    def _slot(self, key: StreamKey) -> int:
        return 0 if self._slots is None else self._slots[self._keys.partition(key)]

    def _group_by_slot(self, keys: Sequence[StreamKey]) -> list[tuple[int, Sequence[int]]]:
        """Group streams that one command may contain: slots, and indices of keys."""
        if self._slots is None:
            return [(0, range(len(keys)))]
        groups: dict[int, list[int]] = {}
        for index, key in enumerate(keys):
            groups.setdefault(self._slot(key), []).append(index)
        return list(groups.items())

    async def _commit_results(
        self, commits: CommitColumns, outcome: Outcome, deadline_s: float
    ) -> list[CommitResult]:
        """The results of those commits that one script call made."""
        if isinstance(outcome, ReplyLost):
            return [outcome_unknown_error(key, None, outcome) for key in commits.keys]
        if isinstance(outcome, CarryError):
            return [outcome] * len(commits.keys)
        if outcome.is_durable and outcome.value.count(WRITTEN) == len(commits.keys):
            return [COMMITTED] * len(commits.keys)
        results: list[CommitResult] = []
        for index, (key, reply) in enumerate(zip(commits.keys, outcome.value, strict=True)):
            if reply == WRITTEN:
                results.append(
                    COMMITTED if outcome.is_durable else not_durable_error(self._settings, key)
                )
                continue
            result = parse_result(self._router, key, reply)
            if outcome.is_retry and isinstance(result, Conflicted):
                expected = unpack_head(commits.expected[index])
                new = StateHeader.decode(commits.states[index]).head
                result = resolve_retried_commit(key, expected, new, result)
                if result is COMMITTED:
                    result = await self._ensure_durable(key, deadline_s)
            results.append(result)
        return results

    async def _ensure_durable(self, key: StreamKey, deadline_s: float) -> CommitResult:
        """Wait until a write of an earlier attempt is durable, and return its result."""
        if self._awaits_durability:
            try:
                await self._read_durably(key, deadline_s)
            except CarryError as error:
                return not_durable_error(self._settings, key, error.detail)
        return COMMITTED

    async def _read_durably(self, key: StreamKey, deadline_s: float) -> list[bytes | None]:
        """Read state and reply, and wait until they are as durable as a commit."""
        names, slot = self._keys.pair(key), self._slot(key)
        if self._awaits_durability:
            ttl_ms = max(1, round(1000 * self._settings.reply_ttl_s))
            command = PendingCommand.for_script(self._confirm_script, names, [ttl_ms], slot, [key])
        else:
            command = PendingCommand.of("MGET", *names, slot=slot)
        (outcome,) = await self._router.execute(
            command, durably=self._awaits_durability, deadline_s=deadline_s
        )
        values: list[bytes | None] = read_value(outcome)
        if isinstance(outcome, ServerReply) and not outcome.is_durable and values[0] is not None:
            raise not_durable_error(self._settings, key)
        return values


def _pack_lengths(lengths: tuple[int, int, int]) -> tuple[bytes, bytes, bytes]:
    """What precedes the head, the state and the reply of a stream in the call of the script."""
    of_head, of_state, of_reply = [b"$%d\r\n" % length for length in lengths]
    return of_head, b"\r\n" + of_state, b"\r\n" + of_reply


def _check_executed(outcomes: Sequence[Outcome]) -> None:
    """Raise the first error if every outcome is an error, so that no command was executed."""
    first = outcomes[0]
    if isinstance(first, CarryError) and all(isinstance(each, CarryError) for each in outcomes):
        raise first


def _in_order(groups: list[tuple[int, Sequence[int]]], parts: list[list[T]]) -> list[T]:
    """The results of groups of streams, in the order of the streams."""
    results: dict[int, T] = {}
    for (_, group), part in zip(groups, parts, strict=True):
        results.update(zip(group, part, strict=True))
    return [results[index] for index in range(len(results))]
