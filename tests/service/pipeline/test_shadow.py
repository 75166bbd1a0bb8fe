"""The shadow: the version that does not answer computes the same chunks, and disturbs nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.events.columns import EventColumns
from models.spec.history import HistorySpec
from service.access.caller import ANYONE
from service.core.delivery import chunk_digest
from service.core.values import Chunk, Feed, Reply, Steps, StreamKey
from service.pipeline import shadow
from service.pipeline.comparison import SIDES
from service.pipeline.pipeline import Pipeline
from tests.support.cluster import shared_cluster
from tests.support.models import random_weights, small_spec
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.pipelines import (
    chunk_of,
    make_artifact,
    oracle_outputs,
    rows_of,
    send,
)
from tests.support.servers import becomes, emptied
from tests.support.shadows import (
    Rows,
    assert_state,
    feed,
    shadowed,
    state_after,
)

__all__ = ["shared_cluster"]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """Champion and challenger."""
    folder: Path = tmp_path_factory.mktemp("shadow")
    return make_artifact(folder, seed=1), make_artifact(folder, seed=2)


async def test_replies_are_the_same_bytes_with_and_without_a_challenger(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    rows = rows_of(np.random.default_rng(1), 40)
    sizes = (3, 1, 16, 20)
    async with shadowed(store_url, artifacts) as service:
        with_challenger = await feed(service, "a", rows, sizes)
        service.route(service.champion, None)
        without = await feed(service, "b", rows, sizes)
    assert [each.tobytes() for each in with_challenger] == [each.tobytes() for each in without]


async def test_states_are_those_of_a_run_over_all_events_and_outputs_are_compared(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    random = np.random.default_rng(2)
    streams = {f"s{n}": rows_of(random, 24) for n in range(12)}
    async with shadowed(store_url, artifacts) as service:
        await asyncio.gather(
            *(feed(service, name, rows, (5, 1, 10, 8)) for name, rows in streams.items())
        )
        assert await service.settled() == {"computed": 48, "dropped": 0, "failed": 0}
        for name, rows in streams.items():
            assert_state(await service.state(name, service.challenger), artifacts[1], rows)
        compared = [each.comparison for each in service.counts.shadows if each.comparison]
        counted = sum(sum(each.differences["last"].counts) for each in compared)
        total = sum(each.differences["last"].total for each in compared)
    assert counted == 12 * 24 * artifacts[0].outputs.by_name(np.zeros((1, 7)))["last"].size
    place = artifacts[0].outputs.slices["last"]
    expected = [
        np.abs(oracle_outputs(artifacts[0], rows) - oracle_outputs(artifacts[1], rows))[:, place]
        for rows in streams.values()
    ]
    assert total == pytest.approx(np.sum(expected), rel=1e-4)


async def test_stream_without_history_starts_again_and_says_so(
    store_url: str, artifacts: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(np.random.default_rng(4), 20)
    async with shadowed(store_url, artifacts, history=None) as service:
        await feed(service, "s", rows[:9], (4, 5))
        await service.settled()
        assert_state(await service.state("s", service.challenger), artifacts[1], rows[:9])
        with monkeypatch.context() as patch:
            patch.setattr(shadow, "MAX_CHUNKS", 0)
            await service.send("s", rows[9:12], 9)
        await service.send("s", rows[12:], 12)
        assert await service.settled() == {"computed": 3, "dropped": 1, "failed": 0}
        state = await service.state("s", service.challenger)
        assert state is not None
        assert (state.head.position, state.since) == (20, 12)
        expected = state_after(artifacts[1], rows[12:])
        np.testing.assert_allclose(state.state.floats, expected, rtol=1e-5, atol=1e-5)


async def test_promotion_and_rollback_continue_at_the_exact_state_without_rewarming(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    rows = rows_of(np.random.default_rng(5), 60)
    both = [oracle_outputs(each, rows) for each in artifacts]
    async with shadowed(store_url, artifacts) as service:
        pair = service.champion, service.challenger
        at = 0
        for turn in (0, 1, 0, 1):
            service.route(pair[turn], pair[1 - turn])
            for size in (1, 8, 6):
                answering = pair[turn].runtime
                assert isinstance(answering, NumpyRuntime)
                calls = len(answering.shapes)
                outputs = await service.send("s", rows[at : at + size], at)
                expected = both[turn][at : at + size]
                np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
                assert len(answering.shapes) == calls + 1
                at += size
                await service.settled()
        assert service.done() == {"computed": 12, "dropped": 0, "failed": 0}
        assert sum(each.caught_up for each in service.counts.shadows) == 0


async def test_states_that_a_shadow_computed_are_continued_after_the_other_version_is_retired(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    """Also without a history, and by a stream that sends its next chunk only afterwards."""
    rows = rows_of(np.random.default_rng(15), 8)
    async with shadowed(store_url, artifacts, history=None) as service:
        await service.send("s", rows[:4], 0)
        assert (await service.settled())["computed"] == 1
        service.route(service.challenger, None)
        outputs = await service.send("s", rows[4:], 4)
        expected = oracle_outputs(artifacts[1], rows)[4:]
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


async def test_champion_is_the_shadow_of_canaries(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    random = np.random.default_rng(6)
    streams = {f"s{n}": rows_of(random, 12) for n in range(20)}
    async with shadowed(store_url, artifacts) as service:
        service.route(service.champion, service.challenger, share=0.5)
        await asyncio.gather(*(feed(service, *each, (5, 7)) for each in streams.items()))
        assert await service.settled() == {"computed": 40, "dropped": 0, "failed": 0}
        turns = set()
        for name, rows in streams.items():
            is_canary = service.versions.route.answering(name) is service.challenger
            turns.add(is_canary)
            served = service.champion if is_canary else service.challenger
            artifact = artifacts[0] if is_canary else artifacts[1]
            assert_state(await service.state(name, served), artifact, rows)
        assert turns == {False, True}
        sides = {side for each in service.counts.shadows for side in each.events}
        assert sides == set(SIDES)


@pytest.fixture(params=["single", "cluster"])
def any_url(request: pytest.FixtureRequest) -> str:
    """An empty server or cluster."""
    if request.param == "single":
        url: str = request.getfixturevalue("store_url")
        return url
    return emptied(request.getfixturevalue("shared_cluster")).url


async def test_states_are_exact_with_two_workers_and_a_worker_that_ends_in_between(
    any_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    random = np.random.default_rng(7)
    streams = {f"s{n}": rows_of(random, 30) for n in range(6)}
    async with shadowed(any_url, artifacts) as one:
        async with shadowed(any_url, artifacts) as two:
            for at in range(0, 24, 4):
                for index, (name, rows) in enumerate(streams.items()):
                    service = (one, two)[(index + at // 4) % 2]
                    await service.send(name, rows[at : at + 4], at)
            # the second ends with chunks in its queue, if it is slow
        await one.settled()
        for name, rows in streams.items():
            await one.send(name, rows[24:], 24)
        await one.settled()
        for name, rows in streams.items():
            assert_state(await one.state(name, one.challenger), artifacts[1], rows)


async def test_time_of_the_champion_counts_once_for_each_batch(
    any_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    """Also if its chunks are committed to several shards."""
    rows = rows_of(np.random.default_rng(8), 3)
    chunks = [chunk_of(f"s{n}", rows, 0) for n in range(24)]
    async with shadowed(any_url, artifacts) as service:
        replies = await service.pipeline.process_many(ANYONE, chunks)
        batches = {each.timing.infer_s for each in replies if isinstance(each, Reply)}
        counted = [each.seconds.get("champion", 0.0) for each in service.counts.shadows]
        events = [each.events.get("champion", 0) for each in service.counts.shadows]
    assert sum(events) == 24 * 3
    assert sum(counted) == pytest.approx(sum(batches))


async def test_challenger_computes_nothing_while_chunks_of_the_champion_wait(
    store_url: str, artifacts: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(np.random.default_rng(12), 8)
    depth, asked = {"probe": 1}, []

    def queue_depths(_: Pipeline) -> dict[str, int]:
        asked.append(depth["probe"])
        return depth

    monkeypatch.setattr(Pipeline, "queue_depths", queue_depths)
    async with shadowed(store_url, artifacts) as service:
        await feed(service, "s", rows, (4, 4))
        await becomes(lambda: len(asked) > 3, "several looks at the queue")
        assert service.challenger.runtime.shapes == []  # type: ignore[attr-defined]
        depth["probe"] = 0
        assert await service.settled() == {"computed": 2, "dropped": 0, "failed": 0}


async def test_outputs_of_inexact_states_are_not_compared(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    rows = rows_of(np.random.default_rng(11), 20)
    async with shadowed(store_url, artifacts, history=None) as service:
        service.route(service.champion, None)
        await service.send("s", rows[:6], 0)
        service.route(service.champion, service.challenger)
        await service.send("s", rows[6:], 6)
        await service.send("t", rows[:3], 0)
        service.offered = 2
        assert await service.settled() == {"computed": 2, "dropped": 0, "failed": 0}
        compared = [each.comparison for each in service.counts.shadows if each.comparison]
        events = sum(sum(each.differences["steep"].counts) for each in compared)
    assert events == 3


@pytest.mark.parametrize("seed", range(4))
async def test_every_output_is_exact_under_random_drops_promotions_and_workers(
    store_url: str,
    artifacts: tuple[Artifact, Artifact],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two workers, whose routes may differ for a while, as after a switch; streams that start over.

    The history reaches back to the start of each stream: so every answer is the oracle's, of the
    version that answered, over all events of its stream.
    """
    random = np.random.default_rng(seed)
    history = HistorySpec(events=200, snapshots=4)
    streams: dict[str, Rows] = {f"s{n}": np.zeros((0, 3), np.float32) for n in range(8)}
    async with (
        shadowed(store_url, artifacts, history=history) as one,
        shadowed(store_url, artifacts, history=history) as two,
    ):
        workers = (one, two)

        async def step(name: str) -> None:
            service, size = workers[random.integers(2)], int(random.integers(1, 9))
            if len(streams[name]) and random.random() < 0.1:
                streams[name] = np.zeros((0, 3), np.float32)
                await service.pipeline.streams.delete(ANYONE, StreamKey("probe", name), None)
            seen, rows = streams[name], rows_of(random, size)
            streams[name] = np.concatenate([seen, rows])
            reply = await send(service.pipeline, name, rows, len(seen))
            assert reply.warm is None
            artifact = artifacts[reply.version.version == artifacts[1].version]  # type: ignore[union-attr]
            expected = oracle_outputs(artifact, streams[name])[len(seen) :]
            np.testing.assert_allclose(reply.outputs, expected, rtol=2e-5, atol=2e-5)

        for _ in range(40):
            service = workers[random.integers(2)]
            pair = (service.champion, service.challenger)[:: random.choice([1, -1])]
            service.route(*pair, share=random.choice([0.0, 0.0, 0.5]))
            if random.random() < 0.1:
                service.route(pair[0], None)
            most = 0 if random.random() < 0.3 else 100
            monkeypatch.setattr(shadow, "MAX_CHUNKS", most)
            await asyncio.gather(*map(step, random.permutation(list(streams))[:5].tolist()))
        for name, rows in streams.items():
            for at, served in enumerate((one.champion, one.challenger)):
                state = await one.state(name, served)
                if state is not None:
                    assert_state(state, artifacts[at], rows[: state.head.position])


async def test_chunk_that_is_retried_after_a_conflict_is_offered_once(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    rows = rows_of(np.random.default_rng(13), 9)
    async with (
        shadowed(store_url, artifacts) as one,
        shadowed(store_url, artifacts) as two,
    ):
        await one.send("s", rows[:2])
        await two.send("s", rows[2:4])
        # from the state in memory, which the other worker has replaced, in a batch with another
        chunks = [chunk_of("s", rows[4:]), chunk_of("t", rows)]
        await one.pipeline.process_many(ANYONE, chunks)
        one.offered += 2
        assert one.counts.seen["conflicts"] == 1
        assert sum(each.events.get("champion", 0) for each in one.counts.shadows) == 7 + 9
        await one.settled()
        assert_state(await one.state("s", one.challenger), artifacts[1], rows)


async def test_losses_belong_to_the_side_that_predicted_whichever_answered(
    store_url: str, tmp_path: Path
) -> None:
    """A canary of all streams gives the same losses as a shadow, of champion and challenger."""
    spec, random = small_spec(), np.random.default_rng(14)
    small = [write_artifact(tmp_path / str(n), spec, random_weights(spec, n)) for n in (1, 2)]
    steps = 24
    values = {
        "load": random.normal(15, 3, steps),
        "delay": random.normal(0, 2, steps),
        "at": 1_357_000_000_000 + 60_000 * np.arange(steps),
        "carrier": random.choice(np.array(["UA", "B6", "new"], object), steps),
        "gate": np.full(steps, "A", object),
        "heavy": random.random(steps) < 0.5,
        "late": random.random(steps) < 0.5,
    }
    present = dict.fromkeys(values, np.ones(steps, np.bool_))
    columns = EventColumns(steps, present, values)
    losses: dict[float, dict[tuple[str, ...], float]] = {}
    for share in (0.0, 1.0):
        async with shadowed(store_url, (small[0], small[1])) as service:
            service.route(service.champion, service.challenger, share)
            for at in range(0, steps, 8):
                part = Steps(Feed.EVENTS, 8, columns=columns[at : at + 8])
                digest = chunk_digest(spec.events, part, b"")
                chunk = Chunk(StreamKey("small", f"s{share}"), part, digest, at)
                await service.pipeline.process(ANYONE, chunk)
                service.offered += 1
            assert (await service.settled())["computed"] == 3
            totals: Counter[tuple[str, ...]] = Counter()
            for each in service.counts.shadows:
                for key, (total, _) in each.comparison.losses.items() if each.comparison else ():
                    totals[key] += total
            losses[share] = totals
    assert {side for side, _, _ in losses[0.0]} == set(SIDES)
    assert losses[1.0] == pytest.approx(losses[0.0], rel=1e-4)
    key = ("champion", "late_load", "log_loss")
    assert losses[0.0][key] != pytest.approx(losses[0.0]["challenger", *key[1:]], rel=1e-2)
