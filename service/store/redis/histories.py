"""The histories of streams on Redis or Valkey (`service.store.history`), written by scripts.

The keys of a history are in the slot of the stream's state, so that one script reads or writes all.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

from service.core.errors import StoreRefused, StoreUnavailable
from service.core.memo import Memo
from service.core.values import StreamKey
from service.store.base import CommitColumns, CommitResult
from service.store.codec import COMPARED, EPOCH, WRITER, read_packed_head, unpack_head
from service.store.history import Histories, HistoryColumns, HistoryCopy, StoredHistory
from service.store.redis.alarm_index import AlarmIndex
from service.store.redis.commands import (
    CACHED_NAMES,
    CALL,
    PendingCommand,
    Script,
    pack_arguments,
)
from service.store.redis.outcomes import Outcome, ServerReply, read_value
from service.store.redis.router import Router

ALL: Final = "*"
_INDEX: Final = struct.Struct("<Q8s")

Groups = Callable[[Sequence[StreamKey]], list[tuple[int, Sequence[int]]]]
Results = Callable[[CommitColumns, Outcome, float], Awaitable[list[CommitResult]]]


class RedisHistories(Histories):
    """The histories of a store.

    Args:
        alarm_index: packs what commits change in the index of open alarms.
        group_by_slot: returns the slots of streams' keys, each with the indexes of its streams.
        results: returns the results of the commits of a script.
    """

    def __init__(
        self, router: Router, alarm_index: AlarmIndex, group_by_slot: Groups, results: Results
    ):
        self._router = router
        self._alarm_index = alarm_index
        self._keys = router.settings.keys
        self._group_by_slot = group_by_slot
        self._results = results
        settings = router.settings
        self._ttls = alarm_index.ttls(0)
        self._packed_names = Memo(self._pack_names, CACHED_NAMES)
        self._max_reply_bytes = settings.reply_max_bytes
        self._commit_script = Script.load("commit_with_history")
        self._read_script = Script.load("history_read")
        self._write_script = Script.load("history_write")
        self._version_script = Script.load("version_commit")

    def commit_command(
        self, commits: CommitColumns, histories: HistoryColumns, slot: int
    ) -> PendingCommand:
        """The call of the script that commits streams of one slot with their histories."""
        keys, script, packed_names = commits.keys, self._commit_script, self._packed_names
        index, alarms = self._alarm_index, commits.alarms
        changed, ttls, indexes, changes = index.pack(keys, alarms) if alarms else index.unchanged
        numkeys = b"%d" % (4 * len(keys) + changed)
        packed = [
            CALL % (7 + 8 * len(keys) + 4 * changed, script.by_hash, len(numkeys), numkeys),
            *[packed_names[key] for key in keys],
            indexes,
            ttls,
            pack_arguments(histories.events, histories.snapshots),
        ]
        for expected, state, reply, entry in zip(
            commits.expected, commits.states, commits.replies, histories.entries, strict=True
        ):
            reply = reply if len(reply) <= self._max_reply_bytes else b""
            packed.append(pack_arguments(expected[COMPARED], state, reply, entry))
        packed.append(changes)
        future = asyncio.get_running_loop().create_future()
        return PendingCommand(b"".join(packed), future, script, keys, slot)

    def _pack_names(self, key: StreamKey) -> bytes:
        return pack_arguments(*self._keys.all_of(key))

    async def read(
        self,
        key: StreamKey,
        fingerprint: bytes,
        position: int | None = None,
        deadline_s: float = math.inf,
    ) -> StoredHistory:
        asked = "" if position is None else position
        ((record, *valid),) = await self._read([key], fingerprint, asked, deadline_s)
        if not valid:
            return StoredHistory(record)
        index, entries, snapshots, own = valid
        if position is not None:
            snapshots = [
                each for each in snapshots if each and _is_usable(each, fingerprint, position)
            ]
        return StoredHistory(
            record,
            True,
            entries,
            snapshots[0] if snapshots else None,
            [at for at, version in _INDEX.iter_unpack(index) if version == fingerprint[:8]],
            own if own[EPOCH] == record[EPOCH] else None,
        )

    async def copy(
        self, keys: Sequence[StreamKey], deadline_s: float = math.inf
    ) -> list[tuple[bytes | None, HistoryCopy | None]]:
        copies: list[tuple[bytes | None, HistoryCopy | None]] = []
        for record, *valid in await self._read(keys, b"", ALL, deadline_s):
            history = None
            if valid:
                _, entries, snapshots, _ = valid
                history = HistoryCopy(entries, snapshots[::-1])
            copies.append((record, history))
        return copies

    async def _read(
        self,
        keys: Sequence[StreamKey],
        fingerprint: bytes,
        position: int | str,
        deadline_s: float,
    ) -> list[list[Any]]:
        """What `history_read.lua` returns of each stream."""
        arguments = fingerprint, position
        found: dict[int, list[Any]] = {}
        for group, outcome in await self._call(self._read_script, keys, arguments, deadline_s):
            found.update(zip(group, read_value(outcome), strict=True))
        return [found[index] for index in range(len(keys))]

    async def _call(
        self,
        script: Script,
        keys: Sequence[StreamKey],
        arguments: Sequence[bytes | str | int],
        deadline_s: float,
        of_streams: Sequence[bytes] | None = None,
    ) -> Iterable[tuple[Sequence[int], Outcome]]:
        """Call a script with the keys of states and histories, once for each slot; returns the
        outcomes with the indexes of their streams.

        Args:
            of_streams: a further argument of each stream.
        """
        groups = self._group_by_slot(keys)
        commands: list[PendingCommand] = []
        for slot, group in groups:
            names = [self._keys.all_of(keys[index]) for index in group]
            own = [of_streams[index] for index in group] if of_streams else []
            commands.append(
                PendingCommand.for_script(
                    script,
                    [name for state, _, *history in names for name in (state, *history)],
                    [*arguments, *own],
                    slot,
                )
            )
        outcomes = await self._router.execute(*commands, deadline_s=deadline_s)
        return zip([group for _, group in groups], outcomes, strict=True)

    async def write(
        self,
        key: StreamKey,
        expected: bytes,
        state: bytes,
        history: HistoryCopy,
        deadline_s: float = math.inf,
        *,
        reply: bytes = b"",
        keeps_snapshots: bool = False,
    ) -> CommitResult:
        entries, snapshots = history
        arguments: list[str | bytes | int] = [
            *self._ttls,
            expected[COMPARED],
            state,
            reply,
            int(keeps_snapshots),
            len(entries),
            *entries,
            *snapshots,
        ]
        ((slot, _),) = self._group_by_slot([key])
        names = self._keys.all_of(key)
        command = PendingCommand.for_script(self._write_script, names, arguments, slot, [key])
        (outcome,) = await self._router.execute(command, durably=True, deadline_s=deadline_s)
        if isinstance(outcome, StoreUnavailable | StoreRefused):
            raise outcome
        commits = CommitColumns([key], [expected], [state], [reply])
        (result,) = await self._results(commits, outcome, deadline_s)
        return result

    async def commit_versions(
        self, keys: Sequence[StreamKey], states: Sequence[bytes], deadline_s: float = math.inf
    ) -> list[bool]:
        script = self._version_script
        written: dict[int, bool] = {}
        for group, outcome in await self._call(script, keys, self._ttls, deadline_s, states):
            values = outcome.value if isinstance(outcome, ServerReply) else [0] * len(group)
            written.update(zip(group, map(bool, values), strict=True))
        return [written[index] for index in range(len(keys))]


def _is_usable(snapshot: bytes, fingerprint: bytes, position: int) -> bool:
    """Whether the version wrote a snapshot, at or before a position; the script rounds numbers
    beyond 2^53, and compares parts of fingerprints."""
    head = unpack_head(read_packed_head(snapshot))
    return snapshot[WRITER] == fingerprint and head is not None and head.position <= position
