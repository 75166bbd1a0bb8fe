"""Streams that another version wrote: their memory is computed from their history."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.history import HistorySpec
from models.spec.model import parse_spec
from service.access.caller import ANYONE
from service.core.delivery import chunk_digest
from service.core.errors import (
    DeadlineExceeded,
    EpochMismatch,
    Overloaded,
    PositionBehind,
    StateIncompatible,
)
from service.core.values import Chunk, Feed, Reply, Steps, StreamKey, Warmth
from tests.support.cluster import Cluster, shared_cluster
from tests.support.events import NORMALISED
from tests.support.oracle import contracting_weights
from tests.support.pipelines import (
    Counts,
    chunk_of,
    make_artifact,
    oracle_outputs,
    rows_of,
    send,
    worker,
)
from tests.support.strict_events import columns_from_events

__all__ = ["shared_cluster"]

KEY = StreamKey("probe", "s")
ALL = HistorySpec(events=1000)
FEW = HistorySpec(events=6, snapshots=2)

Versions = tuple[Artifact, Artifact]


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    folder: Path = tmp_path_factory.mktemp("rewarmed")
    return make_artifact(folder, seed=1), make_artifact(folder, seed=2)


def assert_outputs(reply: Reply, expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(reply.outputs, expected, rtol=1e-4, atol=1e-5)


async def test_a_new_version_continues_with_an_exact_state(
    store_url: str, versions: Versions
) -> None:
    old, new = versions
    rows = rows_of(np.random.default_rng(1), 40)
    exact = oracle_outputs(new, rows)
    async with (
        worker(store_url, old, history=ALL) as before,
        worker(store_url, new, history=ALL) as after,
    ):
        first = await send(before, "s", rows[:1], 0)
        for start, stop in pairwise([1, 2, 3, 20, 30]):
            await send(before, "s", rows[start:stop], start)
        dry = await after.process(ANYONE, replace(chunk_of("s", rows[30:], 30), dry_run=True))
        assert_outputs(dry, exact[30:])
        reply = await send(after, "s", rows[30:35], 30, epoch=first.head.epoch)
        assert_outputs(reply, exact[30:35])
        assert (reply.created, reply.replayed, reply.warm) == (False, False, None)
        assert_outputs(await send(after, "s", rows[35:], 35), exact[35:])
        again = await send(after, "s", rows[35:], 35)
        assert again.replayed
        assert_outputs(again, exact[35:])


async def test_chunks_that_do_not_continue_the_stream_are_rejected_as_usual(
    store_url: str, versions: Versions
) -> None:
    old, new = versions
    rows = rows_of(np.random.default_rng(2), 8)
    async with (
        worker(store_url, old, history=ALL) as before,
        worker(store_url, new, history=ALL) as after,
    ):
        answered = await send(before, "s", rows[:4], 0)
        with pytest.raises(PositionBehind):
            await send(after, "s", rows[4:], 2)
        with pytest.raises(EpochMismatch):
            await send(after, "s", rows[4:], 4, epoch=bytes(8))
        again = await send(after, "s", rows[:4], 0)
        assert (again.replayed, again.created) == (True, True)
        assert again.version is not None
        assert again.version.version == old.version
        np.testing.assert_array_equal(again.outputs, answered.outputs)
        assert (await after.streams.read(ANYONE, KEY)).fingerprint == old.fingerprint


async def test_racing_versions_lose_and_double_nothing(store_url: str, versions: Versions) -> None:
    """Each append is applied once, and answered from the exact state of its version."""
    random = np.random.default_rng(4)
    chunks = [rows_of(random, int(random.integers(1, 4))) for _ in range(40)]
    async with (
        worker(store_url, versions[0], history=ALL) as one,
        worker(store_url, versions[1], history=ALL) as other,
    ):
        turns = random.integers(2, size=len(chunks)).tolist()
        replies = await asyncio.gather(
            *(send((one, other)[turn], "s", rows) for turn, rows in zip(turns, chunks, strict=True))
        )
    order = sorted(range(len(chunks)), key=lambda at: replies[at].head.position)
    applied = np.concatenate([chunks[at] for at in order])
    exact = [oracle_outputs(artifact, applied) for artifact in versions]
    position = 0
    for at in order:
        start, position = position, position + len(chunks[at])
        assert replies[at].head.position == position
        assert_outputs(replies[at], exact[turns[at]][start:position])


async def test_an_inexact_state_says_how_warm_it_is(store_url: str, versions: Versions) -> None:
    """Until as many events are behind as the history keeps."""
    old, new = versions
    rows = rows_of(np.random.default_rng(5), 40)
    async with worker(store_url, old) as without:
        await send(without, "s", rows[:10], 0)
    async with worker(store_url, old, history=FEW) as before:
        await send(before, "s", rows[10:12], 10)
    counts = Counts()
    async with (
        worker(store_url, new, counts, history=FEW) as one,
        worker(store_url, new, history=FEW) as other,
    ):
        dry = await one.process(ANYONE, replace(chunk_of("s", rows[12:14], 12), dry_run=True))
        assert dry.warm == Warmth(2, 6)
        seen = oracle_outputs(new, rows[10:])
        for turn, start in enumerate(range(12, 24, 2)):
            pipeline = (one, one, other)[turn % 3]
            reply = await send(pipeline, "s", rows[start : start + 2], start)
            assert_outputs(reply, seen[start - 10 : start - 8])
            assert reply.warm == (Warmth(start - 10, 6) if start < 16 else None)
            again = await send(other, "s", rows[start : start + 2], start)
            assert (again.replayed, again.warm) == (True, reply.warm)
        stored = await other.streams.read(ANYONE, KEY)
        assert stored.since is None
    # the dry run and the first chunk
    assert counts.seen["rewarmed_inexact"] == 2


async def test_a_history_that_is_long_enough_needs_no_mark(
    store_url: str, versions: Versions
) -> None:
    old, new = versions
    rows = rows_of(np.random.default_rng(6), 24)
    async with (
        worker(store_url, old, history=FEW) as before,
        worker(store_url, new, history=FEW) as after,
    ):
        for start in range(0, 20, 2):
            await send(before, "s", rows[start : start + 2], start)
        reply = await send(after, "s", rows[20:], 20)
        assert reply.warm is None
        # the last six events in whole chunks
        assert_outputs(reply, oracle_outputs(new, rows[14:])[6:])


async def test_a_reset_makes_a_state_exact(store_url: str, versions: Versions) -> None:
    old, new = versions
    rows = rows_of(np.random.default_rng(7), 30)
    async with worker(store_url, old) as without:
        await send(without, "s", rows[:10], 0)
        await send(without, "other", rows[:10], 0)
    async with (
        worker(store_url, old, history=FEW) as before,
        worker(store_url, new, history=FEW) as after,
    ):
        steps = Steps(Feed.INPUTS, 4, rows=rows[10:14], resets=(1,))
        await before.process(ANYONE, Chunk(KEY, steps, chunk_digest(None, steps), 10))
        reply = await send(after, "s", rows[14:20], 14)
        assert reply.warm is None
        assert_outputs(reply, oracle_outputs(new, rows[11:20])[3:])

        await send(before, "other", rows[10:12], 10)
        key = StreamKey("probe", "other")
        steps = Steps(Feed.INPUTS, 4, rows=rows[12:16], resets=(2,))
        reply = await after.process(ANYONE, Chunk(key, steps, chunk_digest(None, steps), 12))
        assert reply.warm == Warmth(2, 6)
        assert (await after.streams.read(ANYONE, key)).since is None
        reply = await send(after, "other", rows[16:20], 16)
        assert reply.warm is None
        assert_outputs(reply, oracle_outputs(new, rows[14:20])[2:])


async def test_kept_states_are_taken_as_they_are(store_url: str, versions: Versions) -> None:
    old, new = versions
    rows = rows_of(np.random.default_rng(8), 12)
    async with (
        worker(store_url, old) as before,
        worker(store_url, new, on_model_change="keep") as after,
    ):
        kept = (await send(before, "s", rows[:6], 0)).state
        reply = await send(after, "s", rows[6:], 6)
        assert_outputs(reply, oracle_outputs(new, rows[6:], kept))
        assert reply.warm is None


async def test_states_of_another_layout_are_not_kept(
    store_url: str, versions: Versions, tmp_path: Path
) -> None:
    wide = parse_spec(
        versions[0].spec.model_dump(mode="json")
        | {"layers": [{"kind": "lstm", "units": 6}, {"kind": "gru", "units": 4}]}
    )
    other = write_artifact(tmp_path / "wide", wide, contracting_weights(wide, 1))
    rows = rows_of(np.random.default_rng(9), 8)
    async with (
        worker(store_url, versions[0]) as before,
        worker(store_url, other, on_model_change="keep") as after,
    ):
        await send(before, "s", rows[:4], 0)
        with pytest.raises(StateIncompatible):
            await send(after, "s", rows[4:], 4)


@pytest.mark.parametrize("policy", ["refuse", "rewarm"])
async def test_streams_are_rejected_by_choice_or_without_a_history(
    store_url: str, versions: Versions, policy: Any
) -> None:
    rows = rows_of(np.random.default_rng(10), 8)
    history = ALL if policy == "refuse" else None
    async with (
        worker(store_url, versions[0], history=history) as before,
        worker(store_url, versions[1], on_model_change=policy, history=history) as after,
    ):
        await send(before, "s", rows[:4], 0)
        with pytest.raises(StateIncompatible):
            await send(after, "s", rows[4:], 4)


async def test_many_streams_of_a_batch_are_rewarmed_together_and_apart_from_others(
    store_url: str, versions: Versions
) -> None:
    old, new = versions
    random = np.random.default_rng(11)
    rows = {f"s{at}": rows_of(random, 12) for at in range(50)}
    async with worker(store_url, old, history=ALL) as before:
        for stop in (3, 8):
            start = {3: 0, 8: 3}[stop]
            await asyncio.gather(
                *(send(before, name, each[start:stop], start) for name, each in rows.items())
            )
    counts = Counts()
    async with worker(store_url, new, counts, history=ALL) as after:
        fresh = rows_of(random, 4)
        replies = await asyncio.gather(
            send(after, "fresh", fresh, 0),
            *(send(after, name, each[8:10], 8) for name, each in rows.items()),
            *(send(after, name, each[10:], 10) for name, each in rows.items()),
        )
    assert_outputs(replies[0], oracle_outputs(new, fresh))
    for at, each in enumerate(rows.values()):
        exact = oracle_outputs(new, each)
        assert_outputs(replies[1 + at], exact[8:10])
        assert_outputs(replies[51 + at], exact[10:])
    assert (counts.seen["conflicts"], counts.seen["rewarmed"]) == (0, 50)


async def test_versions_share_a_cluster(shared_cluster: Cluster, versions: Versions) -> None:
    """The streams of each node are rewarmed by themselves."""
    random = np.random.default_rng(16)
    rows = {f"rewarmed-{at}": rows_of(random, 9) for at in range(30)}
    exact = [
        {name: oracle_outputs(artifact, each) for name, each in rows.items()}
        for artifact in versions
    ]
    url = shared_cluster.url
    async with (
        worker(url, versions[0], history=FEW) as one,
        worker(url, versions[1], history=FEW) as other,
    ):
        for turn, start in enumerate(range(0, 9, 3)):
            replies = await asyncio.gather(
                *(
                    send((one, other)[turn % 2], name, each[start : start + 3], start)
                    for name, each in rows.items()
                )
            )
            for name, reply in zip(rows, replies, strict=True):
                assert_outputs(reply, exact[turn % 2][name][start : start + 3])
                assert reply.warm is None


async def test_more_streams_than_may_wait_are_overloaded(
    store_url: str, versions: Versions
) -> None:
    old, new = versions
    rows = rows_of(np.random.default_rng(12), 6)
    async with worker(store_url, old, history=ALL) as before:
        await asyncio.gather(*(send(before, f"s{at}", rows[:4], 0) for at in range(8)))
    async with worker(store_url, new, history=ALL, queue=5) as after:
        pipeline: Any = after
        pipeline._rewarming._max_waiting = 3
        chunks = [chunk_of(f"s{at}", rows[4:], 4) for at in range(5)]
        results = await after.process_many(ANYONE, chunks)
        kinds = [type(result) for result in results]
        assert kinds.count(Overloaded) == 2
        assert kinds.count(Reply) == 3
        assert (await after.process_many(ANYONE, [chunks[0]]))[0] is not None


async def test_a_read_that_waits_for_others_ends_at_its_deadline(
    store_url: str, versions: Versions
) -> None:
    old, new = versions
    rows = rows_of(np.random.default_rng(10), 4)
    async with (
        worker(store_url, old, history=ALL) as before,
        worker(store_url, new, history=ALL) as after,
    ):
        await send(before, "s", rows, 0)
        stored, served = await after.streams.load(KEY), after.versions["probe"]
        rewarming, champion = after._rewarming, served.route.champion
        async with rewarming.turn(KEY):
            soon_s = time.monotonic() + 0.01
            with pytest.raises(DeadlineExceeded):
                await rewarming.load_own_state(champion, served, KEY, stored, soon_s)
        computed = await rewarming.load_own_state(champion, served, KEY, stored)
        assert computed is not None
        assert computed.fingerprint == new.fingerprint


EVENTS: dict[str, Any] = {
    "name": "scales",
    "events": NORMALISED.model_dump(mode="json"),
    "layers": [{"kind": "gru", "units": 3}],
    "heads": [{"kind": "forecast", "name": "next", "targets": ["load", "delay", "heat"]}],
}


def events_of(count: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(count)
    return [
        {
            "load": float(random.normal(5)),
            **({} if at % 5 == 2 else {"delay": float(random.normal(0, 30))}),
            "at": 1_700_000_000_000 + 60_000 * at,
            "carrier": str(random.choice(["UA", "B6", "ZZ"])),
        }
        for at in range(count)
    ]


def events_chunk(artifact: Artifact, events: list[dict[str, Any]], start: int, stop: int) -> Chunk:
    schema = artifact.spec.events
    assert schema is not None
    columns = columns_from_events(schema, events[start:stop])
    steps = Steps(Feed.EVENTS, stop - start, columns=columns)
    return Chunk(StreamKey(artifact.spec.name, "s"), steps, chunk_digest(schema, steps), start)


def changed(spec: dict[str, Any], field: str, **change: Any) -> dict[str, Any]:
    """The specification with a changed field of the events."""
    fields = [
        {**each, **change} if each["name"] == field else each for each in spec["events"]["fields"]
    ]
    return {**spec, "events": {**spec["events"], "fields": fields}}


async def test_events_are_read_with_the_statistics_and_categories_of_the_new_version(
    store_url: str, tmp_path: Path
) -> None:
    """Neither those that the old version knew, nor codes."""
    [carrier] = [each for each in EVENTS["events"]["fields"] if each["name"] == "carrier"]
    others = {"vocabulary": ["ZZ", *carrier["vocabulary"][::-1]]}
    later = changed(changed(EVENTS, "carrier", **others), "delay", mean=-7.0, std=11.0)
    old, new = (
        write_artifact(tmp_path / str(seed), spec, contracting_weights(spec, seed))
        for seed, spec in enumerate(map(parse_spec, (EVENTS, later)))
    )
    events = events_of(30)
    async with (
        worker(store_url, old, history=ALL) as before,
        worker(store_url, new, history=ALL) as after,
    ):
        for start, stop in pairwise([0, 1, 12, 20]):
            await before.process(ANYONE, events_chunk(old, events, start, stop))
        reply = await after.process(ANYONE, events_chunk(new, events, 20, 30))
    async with worker(store_url, new) as alone:
        await alone.streams.delete(ANYONE, StreamKey("scales", "s"))
        exact = await alone.process(ANYONE, events_chunk(new, events, 0, 30))
    np.testing.assert_allclose(reply.outputs, exact.outputs[20:], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(reply.state.ints, exact.state.ints)


async def test_histories_with_other_fields_are_rejected(store_url: str, tmp_path: Path) -> None:
    fields = [*EVENTS["events"]["fields"], {"kind": "boolean", "name": "late", "optional": True}]
    later = {**EVENTS, "events": {**EVENTS["events"], "fields": fields}}
    old, new = (
        write_artifact(tmp_path / str(seed), spec, contracting_weights(spec, seed))
        for seed, spec in enumerate(map(parse_spec, (EVENTS, later)))
    )
    events = events_of(8)
    async with (
        worker(store_url, old, history=ALL) as before,
        worker(store_url, new, history=ALL) as after,
    ):
        await before.process(ANYONE, events_chunk(old, events, 0, 4))
        with pytest.raises(StateIncompatible, match="other fields"):
            await after.process(ANYONE, events_chunk(new, events, 4, 8))
        assert (await before.process(ANYONE, events_chunk(old, events, 4, 8))).head.position == 8


async def test_states_of_another_encoding_are_not_kept(store_url: str, tmp_path: Path) -> None:
    """If the version that wrote them is loaded, so that it is known."""
    later = changed(EVENTS, "delay", mean=-7.0, std=11.0)
    old, new = (
        write_artifact(tmp_path / str(seed), spec, contracting_weights(spec, seed))
        for seed, spec in enumerate(map(parse_spec, (EVENTS, later)))
    )
    events = events_of(8)
    async with (
        worker(store_url, old) as before,
        worker(store_url, new, on_model_change="keep") as after,
    ):
        await before.process(ANYONE, events_chunk(old, events, 0, 4))
        dry = replace(events_chunk(new, events, 4, 8), dry_run=True)
        assert (await after.process(ANYONE, dry)).head.position == 4
        after.versions["scales"].add(before.models["scales"])
        with pytest.raises(StateIncompatible):
            await after.process(ANYONE, dry)
        with pytest.raises(StateIncompatible):
            await after.streams.read_state(ANYONE, dry.key, None, after.models["scales"])
