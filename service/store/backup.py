"""Backup files: the states of streams in one portable, checksummed file, and their restoration.

    offset  size  what
         0     4  magic "CRRB"
         4     4  format, 1 to 3, u32 little-endian
         8     -  blocks: length u32, CRC-32 of the content u32, content (MessagePack)

The content of the first block describes the backup, that of the last is the number of streams, and
each block between has a list of `[model, stream, state]`, the state as the store has it (`codec`),
of a stream with a history of `[model, stream, state, entries, snapshots]`, these oldest first.
A file without its last block is incomplete. A backup contains every stream that exists throughout,
each at the state of one moment, with its epoch, position and last chunk; neither stored replies,
tombstones, nor states for other versions of the model. It is independent of the number of
partitions and servers.

The description of format 3 ends with the records of the access keys by id, none if they were not
asked for, and nil if the store never had any; and the records of the models' versions by model.
Earlier versions wrote format 2, without histories and versions, and format 1, also without keys.

A restoration never rolls a stream back: a stream that is in the store already is written only if
the backup has a later position of the same epoch. So it may be repeated, and a stream that a
listing returned twice gets its latest state. The record of a model's versions is written only if
the store has none of the model.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, NamedTuple

import ormsgpack

from models.spec.model import MODEL_NAME
from models.spec.stream_name import is_stream_name
from service.core.delivery import start_epoch
from service.core.errors import CarryError, OperatorError, StateDamaged
from service.core.values import StreamHead, StreamKey, StreamState
from service.store.base import (
    CommitColumns,
    CommitResult,
    Committed,
    Loaded,
    Store,
    decode_stream,
    decode_value,
)
from service.store.codec import encode_state, pack_head
from service.store.history import HistoryCopy
from service.store.history_codec import read_range
from service.store.layout import CodecError

MAGIC: Final = b"CRRB"
FORMAT: Final = 3
FORMAT_WITHOUT_KEYS: Final = 1
FORMAT_WITHOUT_VERSIONS: Final = 2
PAGE_STREAMS: Final = 1000
STREAMS_AT_ONCE: Final = 200
"""Streams that are read together: few, so that large states fit in memory."""

BLOCK_BYTES: Final = 16 * 2**20
"""About as much is written and restored together, or a single larger state."""

MAX_BLOCK_BYTES: Final = 2**30
WRITE_ATTEMPTS: Final = 8

_START = struct.Struct("<4sI")
_BLOCK = struct.Struct("<II")
_is_model_name = re.compile(MODEL_NAME[1:-1]).fullmatch


class BackedUpStream(NamedTuple):
    """A stream of a backup.

    Attributes:
        history: None if it has none.
    """

    state: StreamState
    history: HistoryCopy | None = None


class BackupError(OperatorError):
    """A backup file that cannot be used, or a stream that could not be restored."""


@dataclass(frozen=True, slots=True)
class BackupInfo:
    """The description at the beginning of a backup.

    Attributes:
        created_ms: epoch milliseconds.
        namespace: of the store that was backed up.
        model: the only model in it; None for all.
        prefix: with which the names of all its streams begin.
        keys: records of the access keys by id, none if they were not asked for; None if the store
            never had any.
        models: records of the models' versions by model.
    """

    created_ms: int
    namespace: str
    model: str | None
    prefix: str
    keys: Mapping[str, bytes] | None = None
    models: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class BackupProgress:
    """What a backup or a restoration did so far.

    Attributes:
        streams: streams written, into the file or into the store.
        kept: streams that the store has at the same or a later position, or in another epoch.
        damaged: streams whose stored state is damaged, which a backup leaves out.
    """

    streams: int = 0
    kept: int = 0
    damaged: list[StreamKey] = field(default_factory=list)


Report = Callable[[BackupProgress], None]


async def write_backup(
    store: Store, file: BinaryIO, info: BackupInfo, report: Report
) -> BackupProgress:
    """Write the streams of a store into a file.

    Args:
        report: is called after each page.

    Raises:
        StoreUnavailable, StoreRefused: the file is incomplete.
    """
    progress = BackupProgress()
    writer = BackupWriter(file, info)
    async for page in _pages(store, info):
        for first in range(0, len(page), STREAMS_AT_ONCE):
            names = page[first : first + STREAMS_AT_ONCE]
            for records in await _read_streams(store, names, progress):
                writer.write(records)
            report(progress)
    writer.finish()
    return progress


class BackupWriter:
    """Writes a backup, block by block.

    Attributes:
        streams: written so far.
    """

    def __init__(self, file: BinaryIO, info: BackupInfo):
        self._file = file
        self.streams = 0
        keys, models = None if info.keys is None else dict(info.keys), dict(info.models)
        file.write(_START.pack(MAGIC, FORMAT))
        self._write([info.created_ms, info.namespace, info.model, info.prefix, keys, models])

    def write(self, records: list[list[Any]]) -> None:
        """Write a block of records, about `BLOCK_BYTES` of them or one that is larger."""
        self._write(records)
        self.streams += len(records)

    def finish(self) -> None:
        """Write the last block: the backup is complete."""
        self._write(self.streams)

    def _write(self, content: object) -> None:
        packed = ormsgpack.packb(content)
        self._file.write(_BLOCK.pack(len(packed), zlib.crc32(packed)))
        self._file.write(packed)


async def _read_streams(
    store: Store, keys: Sequence[StreamKey], progress: BackupProgress
) -> list[list[list[Any]]]:
    """Read streams; returns the contents of one or more blocks."""
    blocks: list[list[list[Any]]] = []
    size_bytes = BLOCK_BYTES
    for key, (value, history) in zip(keys, await store.histories.copy(keys), strict=True):
        loaded = decode_value(key, value)
        if isinstance(loaded, StreamState):
            record: list[Any] = [key.model, key.stream, encode_state(loaded)]
            record_bytes = len(record[2])
            if history is not None:
                record += map(list, history)
                record_bytes += sum(len(each) for part in history for each in part)
            size_bytes += record_bytes
            if size_bytes > BLOCK_BYTES:
                blocks.append([])
                size_bytes = record_bytes
            blocks[-1].append(record)
            progress.streams += 1
        elif isinstance(loaded, StateDamaged):
            progress.damaged.append(key)
        elif isinstance(loaded, CarryError):
            raise loaded
    return blocks


class BackupReader:
    """Reads a backup, and validates all that it reads.

    Attributes:
        info: the description.

    Raises:
        BackupError: the file is not a backup, or this version cannot read it.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        start = file.read(_START.size)
        if len(start) < _START.size or start[:4] != MAGIC:
            raise BackupError("expected a backup written by `carry backup`, got another file")
        if not FORMAT_WITHOUT_KEYS <= (version := _START.unpack(start)[1]) <= FORMAT:
            raise BackupError(f"expected format 1 to {FORMAT} of a backup, got {version}")
        content = self._read_block(0)
        length = {FORMAT_WITHOUT_KEYS: 4, FORMAT_WITHOUT_VERSIONS: 5}.get(version, 6)
        if not isinstance(content, list) or len(content) != length:
            raise BackupError("the backup's description is invalid")
        for what, records in zip(("access keys", "versions"), content[4:], strict=False):
            if records is None and what == "access keys" and version == FORMAT:
                continue
            if type(records) is not dict or {*map(type, records.values())} - {bytes}:
                raise BackupError(f"the backup's {what} are invalid")
        self.info = BackupInfo(*content)

    def __iter__(self) -> Iterator[list[tuple[StreamKey, BackedUpStream]]]:
        """Yield the streams block by block.

        Raises:
            BackupError: the file is damaged or incomplete.
        """
        count = 0
        while isinstance(content := self._read_block(count), list):
            try:
                yield [_parse_record(record) for record in content]
            except (CodecError, TypeError, ValueError) as error:
                raise BackupError(f"a state after {count:,} streams is invalid: {error}") from None
            count += len(content)
        if content != count:
            raise BackupError(f"expected {content} streams in the backup, got {count:,}")

    def _read_block(self, streams: int) -> Any:
        head = self._file.read(_BLOCK.size)
        length, checksum = _BLOCK.unpack(head) if len(head) == _BLOCK.size else (0, 0)
        content = self._file.read(length) if 0 < length <= MAX_BLOCK_BYTES else b""
        if not content or len(content) < length:
            raise BackupError(f"the backup is incomplete: it ends after {streams:,} streams")
        if zlib.crc32(content) != checksum:
            raise BackupError(f"the backup is damaged: wrong checksum after {streams:,} streams")
        try:
            return ormsgpack.unpackb(content)
        except ValueError as error:
            raise BackupError(f"the block after {streams:,} streams is invalid: {error}") from None


async def restore_backup(
    store: Store,
    backup: BackupReader,
    *,
    model: str | None,
    prefix: str,
    replace: bool,
    report: Report,
) -> BackupProgress:
    """Write the streams of a backup into a store.

    Args:
        model: restores the streams of this model only; None for all.
        prefix: restores only streams whose names begin with it.
        replace: writes every stream at its state in the backup, whatever is stored.
        report: is called after each block.

    Raises:
        BackupError: the file is damaged, or the store did not accept a stream. What was written
            stays; the restoration can be repeated.
        StoreUnavailable, StoreRefused: the store as a whole.
    """
    progress = BackupProgress()
    for block in backup:
        latest = {
            key: stream
            for key, stream in block
            if model in (None, key.model) and key.stream.startswith(prefix)
        }
        if latest:
            await _restore(store, latest, replace, progress)
            report(progress)
    return progress


async def restore_versions(store: Store, records: Mapping[str, bytes]) -> dict[str, bool]:
    """Write the records of models' versions of which the store has none.

    Before their streams are restored: so no service answers these by other versions.

    Returns:
        Whether the record was written, by model; without those that the store has already.

    Raises:
        NotDurable, StoreUnavailable, StoreRefused
    """
    outcomes: dict[str, bool] = {}
    for model, record in records.items():
        while model not in outcomes:
            version, stored = await store.models.read(None) or (b"", {})
            if stored.get(model) == record:
                break
            # if the write fails, a process has changed a record since
            if model in stored or await store.models.write(version, model, record):
                outcomes[model] = model not in stored
    return outcomes


async def _restore(
    store: Store, streams: dict[StreamKey, BackedUpStream], replace: bool, progress: BackupProgress
) -> None:
    """Write each stream with a compare-and-set, until each is written or kept."""
    failure: CarryError | None = None
    for _ in range(WRITE_ATTEMPTS):
        if not streams:
            return
        keys: list[StreamKey] = []
        expected: list[bytes] = []
        new: list[bytes] = []
        for key, value in zip(list(streams), await store.load(list(streams)), strict=True):
            loaded = decode_value(key, value)
            if isinstance(loaded, StateDamaged):
                await store.delete(key, loaded.head)
                continue
            if isinstance(loaded, CarryError):
                failure = loaded
                continue
            state = _restorable(streams[key].state, loaded, replace)
            if state is not None:
                keys.append(key)
                expected.append(pack_head(loaded.head if loaded else None))
                new.append(encode_state(state))
            else:
                del streams[key]
                progress.kept += 1
        histories = [streams[key].history for key in keys]
        for key, result in zip(
            keys, await _write(store, keys, expected, new, histories), strict=True
        ):
            if isinstance(result, Committed):
                del streams[key]
                progress.streams += 1
            elif isinstance(result, CarryError):
                failure = result
    if streams:
        key = next(iter(streams))
        reason = failure.detail if failure else "other writers changed it again and again"
        raise BackupError(f"model {key.model!r}, stream {key.stream!r} was not restored: {reason}")


async def _write(
    store: Store,
    keys: Sequence[StreamKey],
    expected: Sequence[bytes],
    states: Sequence[bytes],
    histories: Sequence[HistoryCopy | None],
) -> Sequence[CommitResult]:
    """Compare-and-set streams; those without a history in one round trip."""
    plain = [at for at, history in enumerate(histories) if history is None]
    commits = CommitColumns(keys, expected, states, [b""] * len(keys)).select(plain)
    results = dict(zip(plain, await store.commit(commits), strict=True))
    for at, (key, history) in enumerate(zip(keys, histories, strict=True)):
        if history is not None:
            results[at] = await store.histories.write(key, expected[at], states[at], history)
    return [results[at] for at in range(len(keys))]


def _restorable(state: StreamState, stored: Loaded, replace: bool) -> StreamState | None:
    """The state to write over what is stored; None to keep that.

    A state that replaces another history starts an epoch, as `PUT .../state` does: two histories
    with one epoch could be taken for one.
    """
    if not isinstance(stored, StreamState) or _continues(state.head, stored.head):
        return state
    if stored.head == state.head or not replace:
        return None
    new = start_epoch(state, fingerprint=state.fingerprint, now_ms=state.updated_ms)
    return new._replace(source=state.source)


def _continues(head: StreamHead, earlier: StreamHead) -> bool:
    return head.epoch == earlier.epoch and head.position > earlier.position


def _parse_record(record: Any) -> tuple[StreamKey, BackedUpStream]:
    model, stream, value, *history = record
    if not isinstance(model, str) or not isinstance(stream, str):
        raise ValueError("expected the names of a model and a stream")
    if not _is_model_name(model) or not is_stream_name(stream):
        raise ValueError(f"the name of model {model[:100]!r} or stream {stream[:300]!r}")
    state, copy = decode_stream(value), None
    if history:
        entries, snapshots = history
        copy = HistoryCopy(entries, snapshots)
        list(map(read_range, entries))
        list(map(decode_stream, snapshots))
    return StreamKey(model, stream), BackedUpStream(state, copy)


async def _pages(store: Store, info: BackupInfo) -> AsyncIterator[Sequence[StreamKey]]:
    cursor: str | None = None
    while True:
        page = await store.streams(info.model, info.prefix, cursor, PAGE_STREAMS)
        if page.keys:
            yield page.keys
        cursor = page.cursor
        if cursor is None:
            return
