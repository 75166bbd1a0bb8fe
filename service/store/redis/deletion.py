"""Deletion of streams on Redis or Valkey: compare-and-sets that write tombstones."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from service.core.delivery import new_epoch
from service.core.errors import CarryError, Conflict, StoreUnavailable
from service.core.values import EPOCH_BYTES, FIRST_TAG, StreamHead, StreamKey, Tombstone
from service.store.base import COMMITTED, CommitResult, Conflicted
from service.store.capabilities import OutputChannel
from service.store.codec import (
    COMPARED,
    HEADER_BYTES,
    TOMBSTONE_PREFIX,
    encode_tombstone,
    pack_head,
    read_packed_head,
)
from service.store.redis.commands import PendingCommand, Script
from service.store.redis.outcomes import (
    WRITTEN,
    Outcome,
    ReplyLost,
    ServerReply,
    not_durable_error,
    outcome_unknown_error,
    parse_result,
    resolve_retried_deletion,
)
from service.store.redis.router import Router
from service.store.settings import StoreSettings

DELETE_ATTEMPTS: Final = 6


class StreamDeletion:
    """Deletes streams of one store.

    Args:
        outputs: where deletions of watched streams are published.
        slot_of: the slot of a stream; 0 on a single server.
        ensure_durable: waits until a write of an earlier attempt is durable, and returns its
            result.
    """

    def __init__(
        self,
        router: Router,
        settings: StoreSettings,
        outputs: OutputChannel,
        slot_of: Callable[[StreamKey], int],
        ensure_durable: Callable[[StreamKey, float], Awaitable[CommitResult]],
    ):
        self._router = router
        self._settings = settings
        self._keys = settings.keys
        self._outputs = outputs
        self._slot_of = slot_of
        self._ensure_durable = ensure_durable
        self._script = Script.load("delete")

    async def delete(
        self, key: StreamKey, expected: StreamHead | None = None, deadline_s: float = math.inf
    ) -> CommitResult:
        """Replace a stream by a tombstone, with a bounded number of compare-and-sets.

        Without `expected`, each attempt expects the head that the one before found: epoch and tag,
        and after repeated conflicts only the epoch. An attempt that arrives late finds neither.

        Raises:
            StoreUnavailable, StoreRefused: the store as a whole; nothing was deleted.
        """
        if deadline_s == math.inf:
            deadline_s = time.monotonic() + self._settings.store_wait_s
        condition = pack_head(expected)[COMPARED]
        is_stream, may_have_deleted = expected is not None, False
        for attempts_left in reversed(range(DELETE_ATTEMPTS)):
            outcome = await self._write_tombstone(key, condition, deadline_s)
            if isinstance(outcome, ReplyLost):
                return outcome_unknown_error(key, expected, outcome)
            if isinstance(outcome, CarryError):
                if may_have_deleted:
                    return outcome_unknown_error(key, expected, outcome.detail)
                raise outcome
            if outcome.value == WRITTEN:
                self._outputs.publish(key, 0, b"")
                if not outcome.is_durable:
                    return not_durable_error(self._settings, key)
                return COMMITTED if is_stream or may_have_deleted else Conflicted(None)
            if expected is not None:
                result = parse_result(self._router, key, outcome.value)
                if outcome.is_retry and isinstance(result, Conflicted):
                    result = resolve_retried_deletion(key, expected, result)
                    if result is COMMITTED:
                        result = await self._ensure_durable(key, deadline_s)
                return result
            # An earlier attempt may have deleted a stream and left a tombstone, which is replaced.
            may_have_deleted = may_have_deleted or outcome.is_retry
            header = outcome.value[1] if len(outcome.value) > 1 else None
            condition = b"" if header is None else read_packed_head(header)[COMPARED]
            if attempts_left <= DELETE_ATTEMPTS // 2:
                condition = condition[:EPOCH_BYTES]
            is_stream = header is not None and not header.startswith(TOMBSTONE_PREFIX)
        reason = f"concurrent writes changed it {DELETE_ATTEMPTS} times in a row"
        if may_have_deleted:
            return outcome_unknown_error(key, expected, reason)
        return Conflict(f"stream {key.stream!r} is not deleted: {reason}", stream=key.stream)

    async def delete_many(self, keys: Sequence[StreamKey]) -> list[CommitResult]:
        """Delete many streams as `delete` does, in two round trips if nobody else writes them."""
        deadline_s = time.monotonic() + self._settings.store_wait_s
        results: dict[StreamKey, CommitResult] = {}
        conditions: dict[StreamKey, bytes] = {}
        for key, outcome in (await self._read_headers(keys, deadline_s)).items():
            if isinstance(outcome, StoreUnavailable):
                results[key] = outcome
            elif isinstance(outcome, ServerReply) and not _is_absent(outcome.value):
                conditions[key] = read_packed_head(outcome.value)[COMPARED]
        for key, outcome in (await self._write_tombstones(conditions, deadline_s)).items():
            if isinstance(outcome, ReplyLost):
                results[key] = outcome_unknown_error(key, None, outcome)
            elif isinstance(outcome, CarryError):
                results[key] = outcome
            elif outcome.value == WRITTEN:
                self._outputs.publish(key, 0, b"")
                error = not_durable_error(self._settings, key)
                results[key] = COMMITTED if outcome.is_durable else error
        for key in keys:
            if key not in results:  # another writer, a lost reply, or a value of another type
                try:
                    results[key] = await self.delete(key)
                except CarryError as failure:
                    results[key] = failure
        return [results[key] for key in keys]

    async def fence(self, keys: Sequence[StreamKey]) -> set[StreamKey]:
        """Write a tombstone for each stream that does not exist, so that no commit that was sent
        before can create it; returns for which it was written."""
        deadline_s = time.monotonic() + self._settings.store_wait_s
        conditions = {
            key: read_packed_head(outcome.value)[COMPARED] if outcome.value else b""
            for key, outcome in (await self._read_headers(keys, deadline_s)).items()
            if isinstance(outcome, ServerReply) and _is_absent(outcome.value)
        }
        outcomes = await self._write_tombstones(conditions, deadline_s)
        return {
            key
            for key, outcome in outcomes.items()
            if isinstance(outcome, ServerReply) and outcome.value == WRITTEN
        }

    async def _read_headers(
        self, keys: Sequence[StreamKey], deadline_s: float
    ) -> dict[StreamKey, Outcome]:
        reads = [
            PendingCommand.of(
                "GETRANGE", self._keys.state(key), 0, HEADER_BYTES - 1, slot=self._slot_of(key)
            )
            for key in keys
        ]
        outcomes = await self._router.execute(*reads, deadline_s=deadline_s)
        return dict(zip(keys, outcomes, strict=True))

    async def _write_tombstone(
        self, key: StreamKey, condition: bytes, deadline_s: float
    ) -> Outcome:
        return (await self._write_tombstones({key: condition}, deadline_s))[key]

    async def _write_tombstones(
        self, conditions: Mapping[StreamKey, bytes], deadline_s: float
    ) -> dict[StreamKey, Outcome]:
        """Try once to write tombstones over values whose heads begin with these bytes."""
        commands = [self._tombstone_command(*each) for each in conditions.items()]
        outcomes = await self._router.execute(*commands, durably=True, deadline_s=deadline_s)
        return dict(zip(conditions, outcomes, strict=True))

    def _tombstone_command(self, key: StreamKey, condition: bytes) -> PendingCommand:
        tombstone = encode_tombstone(Tombstone(StreamHead(new_epoch(), FIRST_TAG, 0)))
        ttl_ms = round(1000 * self._settings.tombstone_ttl_s)
        arguments: list[str | bytes | int] = [condition, tombstone, ttl_ms]
        names, slot = list(self._keys.pair(key)), self._slot_of(key)
        return PendingCommand.for_script(self._script, names, arguments, slot, [key])


def _is_absent(header: bytes) -> bool:
    """Whether there is no stream: nothing is stored, or a tombstone."""
    return header[: len(TOMBSTONE_PREFIX)] in (b"", TOMBSTONE_PREFIX)
