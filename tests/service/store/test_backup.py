"""Backups: complete, checked before they are used, and restored without rewinding a stream."""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from contextlib import nullcontext
from typing import Any
from unittest.mock import ANY

import numpy as np
import ormsgpack
import pytest
from msgspec.structs import replace

from service.core.delivery import start_epoch
from service.core.values import Feed, SourceMark, Steps, StreamKey, StreamState
from service.store import backup as module
from service.store.backup import (
    BackupError,
    BackupInfo,
    BackupProgress,
    BackupReader,
    restore_backup,
    restore_versions,
    write_backup,
)
from service.store.base import Committed, Store
from service.store.codec import encode_state
from service.store.history import HistoryColumns
from service.store.history_codec import HistoryCodec
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, emptied, opened, real_server
from tests.support.streams import (
    Commit,
    OpenStore,
    Streams,
    columns,
    committed,
    key,
    load,
    same_stream,
)

ALL = BackupInfo(1_700_000_000_000, "carry", None, "")


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    """An empty one of each kind."""
    return emptied(every_store)


async def backed_up(store: Store, info: BackupInfo = ALL) -> tuple[bytes, BackupProgress]:
    file = io.BytesIO()
    progress = await write_backup(store, file, info, lambda _: None)
    return file.getvalue(), progress


async def restored(
    store: Store, backup: bytes, replace: bool = False, prefix: str = "", **options: Any
) -> BackupProgress:
    reader = BackupReader(io.BytesIO(backup))
    model = options.get("model")
    return await restore_backup(
        store, reader, model=model, prefix=prefix, replace=replace, report=lambda _: None
    )


async def stored(store: Store, *keys: StreamKey) -> list[StreamState]:
    return [state for state in await load(store, keys) if isinstance(state, StreamState)]


async def test_source_marks_are_restored_also_in_another_epoch(
    store: Store, open_on: OpenStore, streams: Streams
) -> None:
    """The topic's events are in the restored state as they were before."""
    new = streams.first()._replace(source=SourceMark("events", 7, 1))
    loaded = Commit(key("a"), None, new, None)
    await committed(store, loaded)
    backup, _ = await backed_up(store)
    other = await open_on(namespace="other")
    assert (await restored(other, backup)).streams == 1
    assert same_stream(*await stored(other, key("a")), new)
    await committed(other, streams.next(loaded))
    assert (await restored(other, backup, replace=True)).streams == 1
    (found,) = await stored(other, key("a"))
    assert found.head.epoch != new.head.epoch
    assert found.source == new.source
    # a fork or a state that a client sends is another stream
    assert start_epoch(new, fingerprint=new.fingerprint, now_ms=1).source is None


async def test_backup_restores_every_stream_into_a_store_of_another_size(
    open_on: OpenStore, streams: Streams, every_store: RealServer | Cluster
) -> None:
    store = await open_on(partitions=16)
    commits = [streams.creation(key(f"s:{i}", f"m{i % 3}")) for i in range(2_500)]
    await committed(store, *commits)
    await store.delete(commits[0].key)
    backup, progress = await backed_up(store)
    assert progress.streams == 2_499
    other = await open_on(namespace="other", partitions=1024)
    assert (await restored(other, backup)).streams == 2_499
    found = await load(other, [commit.key for commit in commits])
    assert found[0] is None
    for state, commit in zip(found[1:], commits[1:], strict=True):
        assert same_stream(state, commit.new)
    await committed(other, streams.next(commits[1]))


async def test_backup_of_one_model_and_prefix(open_on: OpenStore, streams: Streams) -> None:
    store = await open_on()
    names = [key("ab1"), key("ab2"), key("b"), key("x:ab"), key("ab1", "other")]
    await committed(store, *map(streams.creation, names))
    backup, _ = await backed_up(store, BackupInfo(0, "carry", "flights", "ab"))
    listed = {each for block in BackupReader(io.BytesIO(backup)) for each, _ in block}
    assert listed == {key("ab1"), key("ab2")}
    backup, _ = await backed_up(store, BackupInfo(0, "carry", None, "ab"))
    listed = {each for block in BackupReader(io.BytesIO(backup)) for each, _ in block}
    assert listed == {key("ab1"), key("ab2"), key("ab1", "other")}
    other = await open_on(namespace="other")
    assert (await restored(other, backup, model="other", prefix="a")).streams == 1


async def test_restore_never_rolls_a_stream_back(open_on: OpenStore, streams: Streams) -> None:
    store, backup_store = await open_on(), await open_on(namespace="other")
    behind, ahead, foreign = (streams.creation(key(name)) for name in ("behind", "ahead", "new"))
    later = streams.next(ahead)
    await committed(store, behind, ahead, foreign)
    await committed(store, later)
    there = streams.next(behind)
    elsewhere = streams.creation(foreign.key)
    await committed(backup_store, behind, ahead, elsewhere)
    further = streams.next(elsewhere)
    await committed(backup_store, there, further)
    backup, _ = await backed_up(backup_store)

    progress = await restored(store, backup)
    assert (progress.streams, progress.kept) == (1, 2)
    found = await stored(store, behind.key, ahead.key, foreign.key)
    for state, commit in zip(found, (there, later, foreign), strict=True):
        assert same_stream(state, commit.new)
    assert (await restored(store, backup)).streams == 0

    assert (await restored(store, backup, replace=True)).streams == 2
    found = await stored(store, behind.key, ahead.key, foreign.key)
    assert same_stream(found[0], there.new)
    for state, commit, replaced in zip(found[1:], (ahead, further), (later, foreign), strict=True):
        started = commit.new._replace(head=state.head, last=None)
        assert same_stream(state, started)
        assert state.head.position == commit.new.head.position
        assert state.head.epoch not in (commit.new.head.epoch, replaced.new.head.epoch)

    # another history of the epoch that the first backup has is not taken for its continuation
    backup, _ = await backed_up(store)
    await committed(store, streams.next(Commit(ahead.key, None, found[1], None)))
    assert (await restored(store, backup)).kept == 3


async def test_histories_are_backed_up_and_restored(open_on: OpenStore, streams: Streams) -> None:
    store = await open_on(partitions=3)
    plain, kept = streams.creation(key("plain")), streams.creation(key("kept"))
    await committed(store, plain)
    for number in range(4):
        kept = streams.next(kept) if number else kept
        histories = HistoryColumns([ENTRIES.encode(4 * number, four_rows(number))], 8, 2)
        result = await store.commit(replace(columns(kept), histories=histories))
        assert result == [Committed()]
    backup, progress = await backed_up(store)
    assert progress.streams == 2
    other = await open_on(namespace="other")
    for replaces in (False, True):
        assert (await restored(other, backup, replaces)).streams == 2 - 2 * replaces
        names = [plain.key, kept.key]
        assert await other.histories.copy(names) == await store.histories.copy(names)
    await committed(other, streams.next(kept))
    assert (await restored(other, backup, replace=True)).streams == 1
    ((_, history),) = await other.histories.copy([kept.key])
    ((_, before),) = await store.histories.copy([kept.key])
    assert history is not None
    assert before is not None
    assert history == before
    assert [ENTRIES.decode(each).start for each in history.entries] == [8, 12]


async def test_versions_are_restored_into_a_store_that_has_none(open_on: OpenStore) -> None:
    store, other = await open_on(), await open_on(namespace="other")
    records = {"probe": b'{"champion":"ab"}', "small": b'{"champion":"cd"}'}
    backup, _ = await backed_up(store, dataclasses.replace(ALL, models=records))
    info = BackupReader(io.BytesIO(backup)).info
    assert info.models == records
    assert await other.models.write(b"", "small", b"{}")
    assert await restore_versions(other, info.models) == {"probe": True, "small": False}
    assert await other.models.read(None) == (ANY, {**records, "small": b"{}"})
    # repeated, it changes nothing
    assert await restore_versions(other, info.models) == {"small": False}


ENTRIES = HistoryCodec(None, 2)


def four_rows(seed: int) -> Steps:
    rows = np.random.default_rng(seed).normal(size=(4, 2)).astype(np.float32)
    return Steps(Feed.INPUTS, 4, None, rows)


@pytest.mark.parametrize("history", [[[b"x"], []], [[], [b"x"]], [[]], [1, 2]])
def test_invalid_histories_are_rejected(history: list[Any]) -> None:
    state = encode_state(Streams().first())
    blocks = [1, "carry", None, "", None, {}], [["m", "s", state, *history]], 1
    file = b"CRRB\x03\0\0\0" + b"".join(framed(ormsgpack.packb(each)) for each in blocks)
    with pytest.raises(BackupError, match="a state after 0 streams is invalid"):
        list(BackupReader(io.BytesIO(file)))


async def test_deleted_and_damaged_streams_are_restored(
    open_on: OpenStore, streams: Streams, server: RealServer | Cluster
) -> None:
    store = await open_on()
    commits = [streams.creation(key(name)) for name in ("deleted", "damaged")]
    await committed(store, *commits)
    backup, _ = await backed_up(store)
    await store.delete(commits[0].key)
    name = store._keys.state(commits[1].key)  # type: ignore[attr-defined]
    with server.client() as client:
        client.set(name, client.get(name)[:-1] + b"?")
    _, progress = await backed_up(store)
    assert (progress.streams, progress.damaged) == (0, [commits[1].key])
    assert (await restored(store, backup)).streams == 2
    for state, commit in zip(await stored(store, *(c.key for c in commits)), commits, strict=True):
        assert same_stream(state, commit.new)


@pytest.fixture
async def backup() -> bytes:
    """A backup of three streams."""
    file = io.BytesIO()
    with real_server("valkey") as server:
        async with opened(server.url) as store:
            streams = Streams()
            await committed(store, *(streams.creation(key(f"s{i}")) for i in range(3)))
            await write_backup(store, file, ALL, lambda _: None)
    return file.getvalue()


async def test_incomplete_or_damaged_backup_is_rejected(backup: bytes) -> None:
    def read(data: bytes) -> int:
        return sum(len(block) for block in BackupReader(io.BytesIO(data)))

    assert read(backup) == 3
    for length in range(len(backup)):
        with pytest.raises(BackupError, match=r"expected a backup|incomplete"):
            read(backup[:length])
    for offset in range(len(backup)):
        flipped = bytearray(backup)
        flipped[offset] ^= 0x10
        with pytest.raises(BackupError):
            read(bytes(flipped))


async def test_missing_block_is_detected(backup: bytes) -> None:
    starts = [8]
    while starts[-1] < len(backup):
        starts.append(starts[-1] + 8 + int.from_bytes(backup[starts[-1] :][:4], "little"))
    assert len(starts) == 4
    file = io.BytesIO(backup[: starts[1]] + backup[starts[2] :])
    with pytest.raises(BackupError, match="expected 3 streams in the backup, got 0"):
        list(BackupReader(file))


@pytest.mark.parametrize(
    ("model", "stream"),
    [("", "s"), ("a:b", "s"), ("A", "s"), ("m\n", "s"), ("m", ""), ("m", ".."), ("m", "a/b"),
     ("m", "s\n"), ("m", "s" * 257)],
)  # fmt: skip
def test_names_outside_the_rule_are_rejected(model: str, stream: str) -> None:
    """Nothing could read or delete such a stream."""
    state = encode_state(Streams().first())
    for names, rejected in ((("m-1", "s:1"), False), ((model, stream), True)):
        blocks = [1, "carry", None, ""], [[*names, state]], 1
        file = b"CRRB\x01\0\0\0" + b"".join(framed(ormsgpack.packb(each)) for each in blocks)
        with pytest.raises(BackupError, match="the name of") if rejected else nullcontext():
            list(BackupReader(io.BytesIO(file)))


def framed(content: bytes) -> bytes:
    """A block of a backup."""
    return struct.pack("<II", len(content), zlib.crc32(content)) + content


async def test_large_states_are_written_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BLOCK_BYTES", 4_000)
    monkeypatch.setattr(module, "BLOCK_BYTES", 2_000, raising=False)
    streams = Streams()
    sizes = [24] * 40 + [900]
    new = [streams.begin(floats=size) for size in sizes]
    commits = [Commit(key(f"s{at}"), None, state, None) for at, state in enumerate(new)]
    with real_server("valkey") as server:
        async with opened(server.url) as store:
            await committed(store, *commits)
            backup, _ = await backed_up(store)
    found = {each: state for block in BackupReader(io.BytesIO(backup)) for each, state in block}
    assert found.keys() == {commit.key for commit in commits}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xc1", "is invalid"), (b"\x91\x93\x01\xa1s\xc4\x00", "expected the names")],
)
def test_blocks_with_other_content_are_rejected(content: bytes, message: str) -> None:
    info = ormsgpack.packb([1, "carry", None, ""])
    with pytest.raises(BackupError, match=message):
        list(BackupReader(io.BytesIO(b"CRRB\x01\0\0\0" + framed(info) + framed(content))))
