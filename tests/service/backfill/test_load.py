"""`carry streams load`: the states of a backfill enter a store, created once and never overwritten
unless asked for."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.backfill.load import load_states
from service.backfill.load_progress import LoadProgress
from service.backfill.plan import BackfillError, Plan
from service.backfill.record import BucketRecord, file_checksum
from service.core.errors import NotDurable, OutcomeUnknown, StoreUnavailable
from service.core.values import SourceMark, StreamHead, StreamState
from service.store.backup import BackupInfo, BackupWriter
from service.store.base import CommitColumns, CommitResult, Store
from service.store.codec import encode_state, pack_head
from service.store.redis.redis_store import RedisStore
from tests.support import command
from tests.support.cluster import Cluster, shared_cluster
from tests.support.forks import COMMAND, Fork
from tests.support.servers import (
    KINDS,
    RealServer,
    becomes,
    emptied,
    opened,
    own_server,
    real_server,
)
from tests.support.streams import Streams, committed, key, load, same_stream

__all__ = ["own_server", "shared_cluster"]

FINGERPRINT = b"fingerprint-cdef"
MODEL = "flights"


@pytest.fixture(scope="module", params=[*KINDS, "cluster"])
def store_server(request: pytest.FixtureRequest) -> Any:
    """Each kind of store."""
    if request.param == "cluster":
        yield request.getfixturevalue("shared_cluster")
    else:
        with real_server(request.param) as running:
            yield running


@pytest.fixture
def server(store_server: RealServer | Cluster) -> RealServer | Cluster:
    """A store without streams."""
    return emptied(store_server)


def history(count: int, **marks: SourceMark) -> dict[str, StreamState]:
    """Streams as a backfill writes them."""
    streams = Streams()
    return {
        name: streams.begin(position=100 + number)._replace(
            fingerprint=FINGERPRINT,
            head=StreamHead(streams.bytes(8), streams.bytes(16), 100 + number),
            source=marks.get(name),
        )
        for number, name in enumerate(f"s{number}" for number in range(count))
    }


def write_out(out: Path, streams: Mapping[str, StreamState], buckets: int = 3) -> Path:
    """The folder of a backfill of streams."""
    for folder in ("states", "done"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    plan = Plan(
        model=MODEL,
        fingerprint=FINGERPRINT.hex(),
        sources=(),
        stream="stream",
        order=None,
        partitions=8,
        buckets=buckets,
    )
    (out / "backfill.json").write_bytes(msgspec.json.encode(plan))
    names = list(streams)
    for bucket in range(buckets):
        states = out / "states" / f"bucket-{bucket:05d}.backup"
        with states.open("wb") as file:
            writer = BackupWriter(file, BackupInfo(0, "backfill", MODEL, ""))
            records = [
                [MODEL, name, encode_state(streams[name])] for name in names[bucket::buckets]
            ]
            for at in range(0, len(records), 50):
                writer.write(records[at : at + 50])
            writer.finish()
        record = BucketRecord(
            bucket=bucket,
            streams=len(records),
            events=0,
            out_of_order=0,
            duplicates=0,
            halted_streams=0,
            moved_streams=0,
            outputs_bytes=0,
            states_bytes=states.stat().st_size,
            outputs_blake2b="",
            states_blake2b=file_checksum(states),
            seconds=0.0,
        )
        (out / "done" / f"bucket-{bucket:05d}.json").write_bytes(msgspec.json.encode(record))
    return out


async def loaded(store: Store, out: Path, **options: Any) -> LoadProgress:
    return await load_states(store, out, report=lambda _: None, **options)


async def stored(store: Store, names: Sequence[str]) -> dict[str, Any]:
    return dict(zip(names, await load(store, [key(name) for name in names]), strict=True))


def kept_of(out: Path) -> dict[str, dict[str, str]]:
    with (out / "kept.csv").open(newline="") as file:
        return {row["stream"]: row for row in csv.DictReader(file)}


async def test_states_are_written_as_they_are_and_a_repeat_changes_nothing(
    server: RealServer | Cluster, tmp_path: Path
) -> None:
    streams = history(
        700, s3=SourceMark("events", 9, 1), s4=SourceMark("events", 7), s5=SourceMark("events", 8)
    )
    out = write_out(tmp_path, streams)
    reports: list[int] = []
    async with opened(server.url, partitions=8) as store:
        progress = await load_states(store, out, report=lambda each: reports.append(each.done))
        assert (progress.total, progress.loaded, progress.kept) == (700, 700, [])
        assert reports == sorted(reports)
        assert reports[-1] == 700
        found = await stored(store, list(streams))
        assert all(same_stream(found[name], state) for name, state in streams.items())
        again = await loaded(store, out)
        assert (again.loaded, again.loaded_before, again.kept) == (0, 700, [])
    assert not (out / "kept.csv").exists()
    offsets = json.loads((out / "offsets.json").read_text())
    assert offsets == {"events": {"lowest": "7-0", "highest": "9-1"}}


async def test_a_stream_that_lives_is_kept_and_listed(
    server: RealServer | Cluster, tmp_path: Path
) -> None:
    streams, live = history(6), Streams(seed=5)
    out = write_out(tmp_path, streams)
    async with opened(server.url, partitions=8) as store:
        await loaded(store, write_out(tmp_path, {name: streams[name] for name in ("s2", "s3")}))
        out = write_out(tmp_path, streams)
        creation = live.creation(key("s0"))
        # s2 has gone on since it was loaded; s3 was deleted, so that only a tombstone is left
        advanced = live.after(streams["s2"])
        await committed(store, creation)
        columns = CommitColumns(
            [key("s2")], [pack_head(streams["s2"].head)], [encode_state(advanced)], [b""]
        )
        await store.commit(columns)
        await store.delete(key("s3"))
        progress = await loaded(store, out)
        assert (progress.loaded, progress.loaded_before, len(progress.kept)) == (4, 1, 1)
        head = creation.new.head
        assert kept_of(out) == {
            "s0": {
                "stream": "s0",
                "reason": "the stream lives in the store",
                "position": "100",
                "stored_position": str(head.position),
                "stored_epoch": head.epoch.hex(),
            }
        }
        expected = streams | {"s0": creation.new, "s2": advanced}
        found = await stored(store, list(streams))
        assert all(same_stream(found[name], state) for name, state in expected.items())

        progress = await loaded(store, out, overwrite=True)
        assert (progress.loaded, progress.loaded_before, progress.kept) == (1, 5, [])
        assert not (out / "kept.csv").exists()
        found = await stored(store, list(streams))
        expected["s0"] = streams["s0"]
        assert all(same_stream(found[name], state) for name, state in expected.items())


async def test_a_damaged_stream_is_kept_unless_it_is_overwritten(
    server: RealServer | Cluster, tmp_path: Path
) -> None:
    streams = history(2)
    out = write_out(tmp_path, streams)
    async with opened(server.url, partitions=8) as store:
        await loaded(store, out)
        with server.client() as client:
            (name,) = client.scan_iter("*:s:flights:s1")
            client.set(name, b"damaged")
        progress = await loaded(store, out)
        assert (progress.loaded_before, [each.stream for each in progress.kept]) == (1, ["s1"])
        assert "damaged" in kept_of(out)["s1"]["reason"]
        assert (await loaded(store, out, overwrite=True)).loaded == 1
        found = await stored(store, ["s1"])
        assert same_stream(found["s1"], streams["s1"])


class Flaky(RedisStore):
    """A store whose first commits fail: before or after they were executed."""

    failures: tuple[str, ...] = ()

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        if not self.failures:
            return await super().commit(commits, deadline_s)
        failure, *rest = self.failures
        self.failures = tuple(rest)
        if failure == "not sent":
            raise StoreUnavailable("no connection")
        results = await super().commit(commits, deadline_s)
        if failure == "lost":
            return [OutcomeUnknown("no reply")] * len(results)
        return [NotDurable("no replica")] * len(results)


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.backfill.load.RETRY_S", 0.001)
    monkeypatch.setattr("tests.support.servers.RedisStore", Flaky)


@pytest.mark.usefixtures("patched")
async def test_a_commit_without_a_reply_is_sent_again(
    server: RealServer | Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = history(600)
    async with opened(server.url, partitions=8) as store:
        monkeypatch.setattr(store, "failures", ("not sent", "lost", "lost", "not sent"))
        progress = await loaded(store, write_out(tmp_path, streams))
        assert progress.loaded + progress.loaded_before == 600
        assert progress.kept == []
        found = await stored(store, list(streams))
        assert all(same_stream(found[name], state) for name, state in streams.items())


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("failure", ["not sent", "not durable"])
async def test_a_store_that_does_not_recover_ends_the_load_which_can_be_repeated(
    server: RealServer | Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    out = write_out(tmp_path, history(20))
    async with opened(server.url, partitions=8) as store:
        monkeypatch.setattr(store, "failures", (failure,) * 100)
        with pytest.raises(BackfillError, match="run the command again"):
            await loaded(store, out)
        monkeypatch.setattr(store, "failures", ())
        progress = await loaded(store, out)
        assert progress.loaded + progress.loaded_before == 20


async def test_a_full_store_ends_the_load_and_a_repeat_goes_on(
    own_server: RealServer, tmp_path: Path
) -> None:
    streams = history(2000)
    out = write_out(tmp_path, streams, buckets=1)

    def fill(_: LoadProgress) -> None:
        own_server.configure("maxmemory", 1)

    async with opened(own_server.url) as store:
        with pytest.raises(BackfillError, match=r"of 2,000 streams .*maxmemory"):
            await load_states(store, out, report=fill)
        found = [each for each in (await stored(store, list(streams))).values() if each]
        assert 0 < len(found) < 2000
        own_server.configure("maxmemory", 0)
        progress = await loaded(store, out)
        assert (progress.loaded, progress.loaded_before) == (2000 - len(found), len(found))
        after = await stored(store, list(streams))
        assert all(same_stream(after[name], state) for name, state in streams.items())


async def test_streams_expire_as_those_of_chunks_do(own_server: RealServer, tmp_path: Path) -> None:
    async with opened(own_server.url, idle_ttl_s=3600) as store:
        await loaded(store, write_out(tmp_path, history(1)))
    with own_server.client() as client:
        (name,) = client.scan_iter("*:s:flights:*")
        assert 0 < client.pttl(name) <= 3_600_000


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda file: file.unlink(), "not complete.*bucket-00001.backup"),
        (lambda file: file.write_bytes(file.read_bytes()[:-20]), "bucket-00001.*incomplete"),
        (lambda file: file.write_bytes(b"x"), "bucket-00001.*another file"),
        (
            lambda file: file.write_bytes(
                file.read_bytes()[:200] + b"\\xff\\x00\\xff" + file.read_bytes()[203:]
            ),
            "bucket-00001.*damaged",
        ),
        (
            lambda file: file.write_bytes(file.with_stem("bucket-00002").read_bytes()),
            "bucket-00001.*not the file that the record",
        ),
        (
            lambda file: (file.parent.parent / "done" / "bucket-00001.json").unlink(),
            "bucket-00001.*not the file that the record",
        ),
        (
            lambda file: (file.parent.parent / "backfill.json").unlink(),
            "folder of `carry backfill`",
        ),
    ],
    ids=["missing", "cut", "foreign", "damaged", "of another bucket", "unfinished", "no plan"],
)
async def test_nothing_is_loaded_unless_every_file_is_valid(
    server: RealServer | Cluster, tmp_path: Path, spoil: Any, expected: str
) -> None:
    streams = history(30)
    out = write_out(tmp_path, streams)
    spoil(out / "states" / "bucket-00001.backup")
    async with opened(server.url, partitions=8) as store:
        with pytest.raises(BackfillError, match=expected):
            await loaded(store, out)
        assert {*(await stored(store, list(streams))).values()} == {None}


async def test_states_of_another_model_are_rejected(
    server: RealServer | Cluster, tmp_path: Path
) -> None:
    streams = history(3)
    streams["s1"] = streams["s1"]._replace(fingerprint=bytes(16))
    async with opened(server.url, partitions=8) as store:
        with pytest.raises(BackfillError, match="'s1' is of another model"):
            await loaded(store, write_out(tmp_path, streams))


async def test_a_rate_limits_the_streams_of_a_commit(
    server: RealServer | Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pauses between them are those that the rate asks for."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float, *_: Any) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr("service.backfill.loader.time.monotonic", lambda: 50.0)
    monkeypatch.setattr("service.backfill.loader.asyncio.sleep", note)
    async with opened(server.url, partitions=8) as store:
        out = write_out(tmp_path, history(100), buckets=1)
        assert (await loaded(store, out, rate_per_s=200)).loaded == 100
    # 10 streams at a time, every twentieth of a second
    assert [round(each, 9) for each in pauses if each < 9] == [
        round(0.05 * number, 9) for number in range(10)
    ]


async def test_the_command_loads_into_the_store_of_a_url(
    own_server: RealServer, tmp_path: Path
) -> None:
    out = write_out(tmp_path, history(2, s1=SourceMark("kafka:flights:3", 41)))
    words = ("streams", "load", out, "--redis-url", own_server.url)
    first = await asyncio.to_thread(command.carry, *words)
    assert (first.exit_code, first.stderr) == (
        0,
        "loaded 2 streams\nnew consumers of flights: start: {3: 42}\n",
    )
    again = await asyncio.to_thread(command.carry, *words)
    assert again.stderr.splitlines()[0] == "loaded 0 streams, 2 were loaded before"
    wrong = await asyncio.to_thread(command.carry, *words[:2], tmp_path / "x", *words[3:])
    assert wrong.exit_code == 1
    assert "expected a folder of `carry backfill`" in wrong.stderr


async def test_a_load_that_is_killed_goes_on(own_server: RealServer, tmp_path: Path) -> None:
    streams = history(1000)
    out = write_out(tmp_path, streams)
    words = ("streams", "load", str(out), "--redis-url", own_server.url)
    with own_server.client() as client, (tmp_path / "log").open("wb") as log:

        async def has_more(before: int) -> None:
            await becomes(lambda: client.dbsize() > before + 10, "some more streams")

        for _ in range(2):
            fork = Fork([COMMAND, *words, "--rate", "50"], os.environ, [log, log, log])
            try:
                await has_more(client.dbsize())
            finally:
                fork.kill()
                fork.wait(60)
    done = await asyncio.to_thread(command.carry, *words)
    assert done.exit_code == 0
    assert "were loaded before" in done.stderr
    async with opened(own_server.url) as store:
        found = await stored(store, list(streams))
        assert all(same_stream(found[name], state) for name, state in streams.items())
    assert not (out / "kept.csv").exists()
