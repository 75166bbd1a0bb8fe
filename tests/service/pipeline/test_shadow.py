"""The shadow: the version that does not answer computes the same chunks, and disturbs nothing."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.events.columns import EventColumns
from models.spec.history import HistorySpec
from service.access.caller import ANYONE
from service.core.delivery import chunk_digest
from service.core.errors import InferenceTimeout
from service.core.values import Chunk, Feed, Steps, StreamKey, StreamState
from service.engine.runtimes.base import FloatBatch, Lengths
from service.pipeline import shadow
from service.pipeline.comparison import SIDES
from service.pipeline.model_versions import Route
from service.pipeline.pipeline import Pipeline
from service.pipeline.served_model import ServedModel
from service.store.codec import decode_stream
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.models import random_weights, small_spec
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import oracle_step
from tests.support.pipelines import Counts, make_artifact, oracle_outputs, rows_of, send, worker
from tests.support.servers import becomes

HISTORY = HistorySpec(events=32, snapshots=4)
Rows = NDArray[np.float32]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """Champion and challenger."""
    folder: Path = tmp_path_factory.mktemp("shadow")
    return make_artifact(folder, seed=1), make_artifact(folder, seed=2)


class Service:
    """A worker with a challenger.

    Attributes:
        served: champion and challenger.
        runtimes: of both.
    """

    def __init__(
        self, pipeline: Pipeline, store: RedisStore, counts: Counts, challenger: ServedModel
    ):
        self.pipeline = pipeline
        self.store = store
        self.counts = counts
        [self.versions] = pipeline.versions.values()
        self.champion, self.challenger = self.versions.route.champion, challenger
        self.versions.add(challenger)
        self.offered = 0
        self.route(self.champion, challenger)

    def route(
        self, champion: ServedModel, challenger: ServedModel | None, share: float = 0.0
    ) -> None:
        self.versions.route = Route(champion, challenger, share)

    async def send(self, stream: str, rows: Rows, position: int | None = None) -> Rows:
        """Send a chunk; returns its outputs."""
        self.offered += 1
        reply = await send(self.pipeline, stream, rows, position)
        assert reply.warm is None
        return reply.outputs

    def done(self) -> dict[str, int]:
        return {name: self.counts.seen[f"shadow_{name}"] for name in OUTCOMES}

    async def settled(self) -> dict[str, int]:
        """What became of all chunks, once it is known."""
        await becomes(lambda: sum(self.done().values()) >= self.offered, "the shadow's outcomes")
        return self.done()

    async def state(self, stream: str, served: ServedModel) -> StreamState | None:
        """The stored state of a stream for a version that did not answer."""
        key = StreamKey("probe", stream)
        stored = await self.store.histories.read(key, served.fingerprint)
        return None if stored.version_state is None else decode_stream(stored.version_state)


OUTCOMES = ("computed", "dropped", "failed")


@asynccontextmanager
async def shadowed(
    url: str,
    artifacts: tuple[Artifact, Artifact],
    *,
    history: HistorySpec | None = HISTORY,
    runtime: Callable[[Artifact], NumpyRuntime] = NumpyRuntime,
) -> AsyncIterator[Service]:
    counts, store = Counts(), RedisStore(StoreSettings(url, store_wait_s=60))
    old, new = artifacts
    challenger = ServedModel(new, runtime(new), history=history)
    async with worker(
        url,
        old,
        counts,
        store=store,
        history=history,
        shadow_budget=10,
    ) as pipeline:
        yield Service(pipeline, store, counts, challenger)


def state_after(artifact: Artifact, rows: Rows) -> NDArray[np.float64]:
    return oracle_step(artifact.spec, artifact.weights, rows, artifact.state.zero().floats)[1]


def assert_state(state: StreamState | None, artifact: Artifact, rows: Rows) -> None:
    """The state is exact, at the end of these events."""
    assert state is not None
    assert state.head.position == len(rows)
    assert state.since is None
    np.testing.assert_allclose(
        state.state.floats, state_after(artifact, rows), rtol=1e-5, atol=1e-5
    )


async def feed(service: Service, stream: str, rows: Rows, sizes: Sequence[int]) -> list[Rows]:
    """Send the rows in chunks of these sizes, from position 0."""
    outputs, at = [], 0
    for size in sizes:
        outputs.append(await service.send(stream, rows[at : at + size], at))
        at += size
    return outputs


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


async def test_stream_catches_up_exactly_after_dropped_chunks(
    store_url: str, artifacts: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(np.random.default_rng(3), 30)
    async with shadowed(store_url, artifacts) as service:
        await feed(service, "s", rows[:5], (5,))
        await service.settled()
        with monkeypatch.context() as patch:
            patch.setattr(shadow, "MAX_CHUNKS", 0)
            for at in range(5, 20, 3):
                await service.send("s", rows[at : at + 3], at)
        assert (await service.settled())["dropped"] == 5
        assert_state(await service.state("s", service.challenger), artifacts[1], rows[:5])
        await service.send("s", rows[20:], 20)
        assert await service.settled() == {"computed": 2, "dropped": 5, "failed": 0}
        assert_state(await service.state("s", service.challenger), artifacts[1], rows)
        assert sum(each.caught_up for each in service.counts.shadows) == 15


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
        await service.settled()
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


async def test_states_are_exact_with_two_workers_and_a_worker_that_ends_in_between(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    random = np.random.default_rng(7)
    streams = {f"s{n}": rows_of(random, 30) for n in range(6)}
    async with shadowed(store_url, artifacts) as one:
        async with shadowed(store_url, artifacts) as two:
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


class Unruly(NumpyRuntime):
    """A runtime that does, before each call, what it is told."""

    def __init__(self, artifact: Artifact):
        super().__init__(artifact)
        self.before: Callable[[], None] = lambda: None
        self.factor = 1.0

    def step(self, rows: FloatBatch, lengths: Lengths, states: Rows) -> tuple[FloatBatch, Rows]:
        self.before()
        outputs, after = super().step(rows, lengths, states)
        return outputs, (after * np.float32(self.factor)).astype(np.float32)


def unruly(service: Service) -> Unruly:
    runtime = service.challenger.runtime
    assert isinstance(runtime, Unruly)
    return runtime


@pytest.mark.parametrize("failure", ["raises", "times out", "gives NaN"])
async def test_failing_challenger_fails_nothing_and_catches_up(
    store_url: str, artifacts: tuple[Artifact, Artifact], failure: str
) -> None:
    rows = rows_of(np.random.default_rng(8), 20)

    def fail() -> None:
        if failure == "raises":
            raise ValueError("unruly")
        raise InferenceTimeout("unruly")

    async with shadowed(store_url, artifacts, runtime=Unruly) as service:
        await service.send("s", rows[:6], 0)
        await service.settled()
        if failure == "gives NaN":
            unruly(service).factor = np.nan
        else:
            unruly(service).before = fail
        outputs = await service.send("s", rows[6:9], 6)
        expected = oracle_outputs(artifacts[0], rows)[6:9]
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
        assert await service.settled() == {"computed": 1, "dropped": 0, "failed": 1}
        assert_state(await service.state("s", service.challenger), artifacts[1], rows[:6])
        unruly(service).factor, unruly(service).before = 1.0, lambda: None
        await service.send("s", rows[9:], 9)
        assert await service.settled() == {"computed": 2, "dropped": 0, "failed": 1}
        assert_state(await service.state("s", service.challenger), artifacts[1], rows)


async def test_slow_challenger_holds_up_no_chunk_and_may_be_retired_meanwhile(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    rows = rows_of(np.random.default_rng(9), 20)
    began, may_end = threading.Event(), threading.Event()

    def block() -> None:
        began.set()
        assert may_end.wait(60)

    async with shadowed(store_url, artifacts, runtime=Unruly) as service:
        try:
            unruly(service).before = block
            await service.send("s", rows[:4], 0)
            await becomes(began.is_set, "the challenger's call")
            for at in range(4, 16, 4):
                await service.send("s", rows[at : at + 4], at)
            assert sum(service.done().values()) == 0
            service.route(service.champion, None)
            await service.send("s", rows[16:], 16)
        finally:
            may_end.set()
    assert service.done()["computed"] == 0
    async with shadowed(store_url, artifacts) as again:
        assert await again.state("s", again.challenger) is None


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


async def test_chunks_that_wait_across_a_promotion_bring_the_states_to_the_head(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    """The challenger is behind when it is promoted; what it has yet to compute is not lost."""
    rows = rows_of(np.random.default_rng(10), 16)
    began, may_end = threading.Event(), threading.Event()

    def block() -> None:
        began.set()
        assert may_end.wait(60)

    async with shadowed(store_url, artifacts, runtime=Unruly) as service:
        try:
            unruly(service).before = block
            await service.send("s", rows[:4], 0)
            await becomes(began.is_set, "the challenger's call")
            await service.send("s", rows[4:8], 4)
            service.route(service.challenger, service.champion)
        finally:
            unruly(service).before = lambda: None
            may_end.set()
        assert await service.settled() == {"computed": 2, "dropped": 0, "failed": 0}
        assert_state(await service.state("s", service.challenger), artifacts[1], rows[:8])
        outputs = await service.send("s", rows[8:], 8)
        expected = oracle_outputs(artifacts[1], rows)[8:]
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


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
        # from the state in memory, which the other worker has replaced
        await one.send("s", rows[4:])
        assert one.counts.seen["conflicts"] == 1
        assert sum(each.events.get("champion", 0) for each in one.counts.shadows) == 7
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
