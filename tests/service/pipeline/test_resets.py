"""Resets: outputs equal the oracle's on each session by itself, for any cut of the stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.artifact.fingerprint import compute_fingerprint
from models.artifact.writing import write_artifact
from models.errors import SpecError
from models.events.encode import Clock, encode
from models.spec.decoder import known_schema
from models.spec.model import parse_spec
from service.access.caller import ANYONE
from service.core.delivery import chunk_digest
from service.core.errors import InvalidInput, PositionBehind, StreamNotFound
from service.core.values import (
    NO_STREAM,
    Chunk,
    Feed,
    ForecastRequest,
    SequenceInput,
    Steps,
    StreamKey,
)
from service.engine.compute import Compute
from service.pipeline.inference import infer_segments
from service.pipeline.pipeline import Pipeline
from service.pipeline.settings import BatchingSettings
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.decoders import decoder_spec
from tests.support.models import SMALL
from tests.support.numpy_runtime import numpy_served
from tests.support.oracle import contracting_weights, oracle_in_blocks, oracle_step
from tests.support.pipelines import Counts
from tests.support.servers import RealServer
from tests.support.strict_events import columns_from_events

DENSE: list[dict[str, Any]] = [{"kind": "dense", "name": "out", "units": 2}]
STEPS = 16
START_MS = 1_700_000_000_000
GAP_S = 100.0

ROW_MODELS: dict[str, dict[str, Any]] = {
    "lstm": {"layers": [{"kind": "lstm", "units": 4}, {"kind": "lstm", "units": 3}]},
    "gru": {"layers": [{"kind": "gru", "units": 4}]},
    "peephole": {"layers": [{"kind": "lstm", "units": 4, "peepholes": True, "projection": 3}]},
    "attention": {
        "layers": [
            {"kind": "lstm", "units": 3},
            {"kind": "attention", "over": "stream", "units": 3},
        ]
    },
    "every": {"layers": [{"kind": "gru", "units": 4}], "reset_every": 5},
}
BOTH_WAYS = [{"kind": "bidirectional", "cell": "lstm", "units": 3}]


def _specs() -> list[dict[str, Any]]:
    rows = [
        {"name": name, "features": 3, "heads": DENSE, **model} for name, model in ROW_MODELS.items()
    ]
    return [
        *rows,
        {**SMALL, "name": "sessions", "session_gap_s": GAP_S},
        {**SMALL, "name": "both", "session_gap_s": GAP_S, "reset_every": 3},
        {**SMALL, "name": "events"},
        {
            "name": "per-chunk",
            "features": 3,
            "heads": DENSE,
            "layers": [
                {"kind": "lstm", "units": 3},
                {"kind": "attention", "over": "chunk", "units": 3},
            ],
        },
        {"name": "whole", "features": 3, "heads": DENSE, "layers": BOTH_WAYS, "reset_every": 6},
        {
            "name": "blocks",
            "features": 3,
            "heads": DENSE,
            "layers": BOTH_WAYS,
            "blocks": {"size": 3, "lookahead": 2},
        },
        decoder_spec().model_copy(update={"name": "decoder"}).model_dump(mode="json"),
    ]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """One model of each kind."""
    folder: Path = tmp_path_factory.mktemp("resets")
    specs = [parse_spec(data) for data in _specs()]
    return {
        spec.name: write_artifact(folder / spec.name, spec, contracting_weights(spec, 1))
        for spec in specs
    }


@pytest.fixture
async def workers(
    pipeline_server: RealServer, artifacts: dict[str, Artifact]
) -> AsyncIterator[list[Pipeline]]:
    """Two workers over one store; what one has in its cache goes stale when the other goes on."""
    running = []
    for _ in range(2):
        store = RedisStore(StoreSettings(pipeline_server.url, store_wait_s=60))
        pipeline = Pipeline(
            [numpy_served(artifact) for artifact in artifacts.values()],
            store,
            Counts(),
            settings=BatchingSettings(),
            now_ms=lambda: START_MS,
        )
        await store.start()
        await pipeline.start()
        running.append((pipeline, store))
    yield [pipeline for pipeline, _ in running]
    for pipeline, store in running:
        await pipeline.stop()
        await store.close()


def _event(random: np.random.Generator, at_ms: int) -> dict[str, Any]:
    return {
        "load": float(random.normal()),
        "at": at_ms,
        "carrier": str(random.choice(["UA", "B6", "nobody"])),
        "heavy": bool(random.integers(2)),
    }


def _weather(random: np.random.Generator, at_ms: int) -> dict[str, Any]:
    return {
        "warmth": float(random.normal(10)),
        "at": at_ms,
        "holiday": False,
        "tariff": "day",
        "wind": float(random.normal()),
    }


class Given:
    """The steps of one stream, made from a seed, with the sessions that they must have."""

    def __init__(self, artifact: Artifact, seed: int, resets: Sequence[int], gaps_s: Sequence[int]):
        self.artifact, self.spec = artifact, artifact.spec
        random = np.random.default_rng(seed)
        self.events: list[dict[str, Any]] = []
        self.rows: NDArray[np.float32] | None = None
        if self.spec.events is None:
            self.rows = random.normal(size=(STEPS, 3)).astype(np.float32)
        else:
            times_ms = START_MS + 1000 * np.cumsum(gaps_s)
            make = _weather if self.spec.decoder else _event
            self.events = [make(random, int(at_ms)) for at_ms in times_ms]
        self.resets = list(resets)
        self.sessions = self._sessions()

    def _sessions(self) -> list[tuple[int, int]]:
        """Written out event by event."""
        starts = [0]
        latest_ms = None
        for at in range(STEPS):
            new = at in self.resets
            if self.spec.reset_every is not None and at % self.spec.reset_every == 0:
                new = True
            if self.spec.session_gap_s is not None:
                now_ms = self.events[at]["at"]
                if latest_ms is not None and now_ms - latest_ms > 1000 * self.spec.session_gap_s:
                    new = True
                latest_ms = now_ms if new or latest_ms is None else max(latest_ms, now_ms)
            if new and at:
                starts.append(at)
        return list(zip(starts, [*starts[1:], STEPS], strict=True))

    def steps(self, start: int, stop: int, resets: Sequence[int] | None = None) -> Steps:
        chosen = self.resets if resets is None else resets
        own = tuple(at - start for at in chosen if start <= at < stop)
        if self.rows is not None:
            return Steps(Feed.INPUTS, stop - start, rows=self.rows[start:stop], resets=own)
        columns = columns_from_events(self.spec.events, self.events[start:stop])
        return Steps(Feed.EVENTS, stop - start, columns=columns, resets=own)

    def chunk(self, stream: str, start: int, stop: int, **changes: Any) -> Chunk:
        steps = self.steps(start, stop, changes.pop("resets", None))
        digest = chunk_digest(self.spec.events, steps)
        return Chunk(StreamKey(self.spec.name, stream), steps, digest, start, **changes)

    def expected(self) -> NDArray[np.float64]:
        parts = []
        for start, stop in self.sessions:
            if self.rows is not None:
                rows = self.rows[start:stop]
            else:
                columns = columns_from_events(self.spec.events, self.events[start:stop])
                rows = encode(self.spec.events, columns, Clock())[0]
            if self.spec.blocks is not None:
                parts.append(oracle_in_blocks(self.spec, self.artifact.weights, rows))
            else:
                zero = self.artifact.state.zero().floats
                parts.append(oracle_step(self.spec, self.artifact.weights, rows, zero)[0])
        return np.concatenate(parts)


indexes = st.lists(st.integers(0, STEPS - 1), unique=True, max_size=5).map(sorted)
# around the gap of a session, and back in time
gaps = st.lists(st.sampled_from([1, 60, 100, 101, 250, -30]), min_size=STEPS, max_size=STEPS)
counter = iter(range(10**9))


@pytest.mark.parametrize("name", [*ROW_MODELS, "events", "sessions", "both", "decoder"])
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 1000),
    resets=indexes,
    gaps_s=gaps,
    cuts=indexes,
    turns=st.lists(st.integers(0, 1), min_size=STEPS, max_size=STEPS),
)
async def test_outputs_are_those_of_each_session_for_any_cut(
    workers: list[Pipeline],
    artifacts: dict[str, Artifact],
    name: str,
    seed: int,
    resets: list[int],
    gaps_s: list[int],
    cuts: list[int],
    turns: list[int],
) -> None:
    stream = Given(artifacts[name], seed, resets, gaps_s)
    expected = stream.expected()
    key = f"{name}-{next(counter)}"
    inner = [cut for cut in cuts if cut]
    for turn, start, stop in zip(turns, [0, *inner], [*inner, STEPS], strict=False):
        reply = await workers[turn].process(ANYONE, stream.chunk(key, start, stop))
        np.testing.assert_allclose(reply.outputs, expected[start:stop], rtol=1e-4, atol=1e-5)
        assert reply.head.position == stop
    await workers[0].streams.delete(ANYONE, StreamKey(name, key))


@pytest.mark.parametrize("name", ["gru", "whole", "blocks"])
async def test_predicted_sessions_are_independent_sequences(
    workers: list[Pipeline], artifacts: dict[str, Artifact], name: str
) -> None:
    stream = Given(artifacts[name], 5, [0, 2, 3, 11], [1] * STEPS)
    plain = Given(artifacts[name], 6, [], [1] * STEPS)
    sequences = [SequenceInput(each.steps(0, STEPS)) for each in (stream, plain)]
    for each, found in zip(
        (stream, plain), await workers[0].predict(ANYONE, name, sequences), strict=True
    ):
        np.testing.assert_allclose(found.outputs, each.expected(), rtol=1e-4, atol=1e-5)


async def test_more_resets_than_a_call_has_rows(
    workers: list[Pipeline], artifacts: dict[str, Artifact]
) -> None:
    stream = Given(artifacts["lstm"], 3, list(range(STEPS)), [1] * STEPS)
    plain = Given(artifacts["lstm"], 4, [], [1] * STEPS)
    chunks: list[Any] = [stream.chunk("many", 0, STEPS), plain.chunk("none", 0, STEPS)]
    for each, reply in zip(
        (stream, plain), await workers[0].process_many(ANYONE, chunks), strict=True
    ):
        np.testing.assert_allclose(reply.outputs, each.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gru", "blocks"])
async def test_the_calls_of_many_segments_do_not_wait_for_each_other(
    artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    served = numpy_served(artifacts[name])
    stream = Given(artifacts[name], 3, list(range(STEPS)), [1] * STEPS)
    segments = served.encode_segments(stream.steps(0, STEPS), served.initial, range(STEPS))
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def recorded(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", recorded)
    compute = Compute()
    await infer_segments(compute, served, [segments], lambda *_: None)
    compute.close()
    assert pauses == [0] * (STEPS // served.runtime.max_batch - 1)


async def test_an_event_that_cannot_be_encoded_is_named_by_its_place_in_the_chunk(
    workers: list[Pipeline], artifacts: dict[str, Artifact]
) -> None:
    stream = Given(artifacts["events"], 8, [2], [1] * STEPS)
    stream.events[5]["load"] = 1e39
    with pytest.raises(InvalidInput) as error:
        await workers[0].process(ANYONE, stream.chunk("overflow", 0, 8))
    assert error.value.facts["at"] == "events[5].load"


@pytest.mark.parametrize("name", ["gru", "sessions", "blocks"])
async def test_a_dry_run_applies_nothing(
    workers: list[Pipeline], artifacts: dict[str, Artifact], name: str
) -> None:
    pipeline, other = workers
    key = StreamKey(name, "dry")
    stream = Given(artifacts[name], 9, [] if name == "blocks" else [6], [1] * STEPS)
    reply = await pipeline.process(ANYONE, stream.chunk("dry", 0, 5, dry_run=True))
    assert (reply.dry_run, reply.head, reply.created) == (True, NO_STREAM, False)
    with pytest.raises(StreamNotFound):
        await pipeline.streams.read(ANYONE, key)
    applied = await pipeline.process(ANYONE, stream.chunk("dry", 0, 5))
    np.testing.assert_array_equal(applied.outputs, reply.outputs)

    # the other worker goes on, so that what this one has in its cache is stale
    went_on = await other.process(ANYONE, stream.chunk("dry", 5, 8))
    with pytest.raises(PositionBehind):
        await pipeline.process(ANYONE, stream.chunk("dry", 5, 9, dry_run=True))
    first, second = [
        await pipeline.process(ANYONE, stream.chunk("dry", 8, STEPS, dry_run=True))
        for _ in range(2)
    ]
    assert (
        first.head == second.head == went_on.head == (await pipeline.streams.read(ANYONE, key)).head
    )
    applied = await other.process(ANYONE, stream.chunk("dry", 8, STEPS))
    np.testing.assert_array_equal(first.outputs, second.outputs)
    np.testing.assert_allclose(applied.outputs, first.outputs, rtol=1e-5, atol=1e-6)
    assert applied.head.position == STEPS
    again = await pipeline.process(ANYONE, stream.chunk("dry", 8, STEPS, dry_run=True))
    assert (again.replayed, again.dry_run, again.head) == (True, True, applied.head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"session_gap_s": 5}, "session_gap_s: expected a timestamp field"),
        ({"reset_every": 0}, "greater than or equal to 1"),
        ({"session_gap_s": 0}, "greater than 0"),
        (
            {"reset_every": 4, "layers": BOTH_WAYS, "blocks": {"size": 3, "lookahead": 2}},
            "reset_every: expected none in a network with `blocks`",
        ),
    ],
)
def test_impossible_resets_are_rejected_in_the_specification(
    change: dict[str, Any], message: str
) -> None:
    plain = {"name": "gru", "features": 3, "heads": DENSE, **ROW_MODELS["gru"]}
    with pytest.raises(SpecError, match=message):
        parse_spec({**plain, **change})


def test_resets_are_part_of_fingerprint_and_manifest_only_if_there_are_any(
    artifacts: dict[str, Artifact],
) -> None:
    """Older versions read the others."""
    plain, both = artifacts["gru"], artifacts["both"]
    prints = {compute_fingerprint(plain.spec, plain.weights)}
    for change in ({"reset_every": 5}, {"reset_every": 6}):
        spec = plain.spec.model_copy(update=change)
        prints.add(compute_fingerprint(spec, plain.weights))
    assert len(prints) == 3
    assert plain.fingerprint in prints
    assert not {"reset_every", "session_gap_s"} & plain.manifest["spec"].keys()
    dumped = both.manifest["spec"]
    assert (dumped["reset_every"], dumped["session_gap_s"]) == (3, GAP_S)
    assert parse_spec(dumped) == both.spec


async def test_a_model_on_whole_chunks_computes_each_segment_separately(
    workers: list[Pipeline], artifacts: dict[str, Artifact]
) -> None:
    artifact = artifacts["per-chunk"]
    stream = Given(artifact, 11, [3, 4], [1] * STEPS)
    assert stream.rows is not None
    zero = state = artifact.state.zero().floats
    found = []
    for start, stop in ((0, 9), (9, STEPS)):
        found.append((await workers[0].process(ANYONE, stream.chunk("seen", start, stop))).outputs)
    expected = []
    for start, stop in ((0, 3), (3, 4), (4, 9), (9, STEPS)):
        before = state if start == 9 else zero
        outputs, state = oracle_step(
            artifact.spec, artifact.weights, stream.rows[start:stop], before
        )
        expected.append(outputs)
    # the weights of attention are padded to the chunk
    np.testing.assert_allclose(
        np.concatenate(found)[:, :2], np.concatenate(expected)[:, :2], rtol=1e-4, atol=1e-5
    )


async def test_a_forecast_ignores_events_before_a_reset(
    workers: list[Pipeline], artifacts: dict[str, Artifact]
) -> None:
    pipeline = workers[0]
    gaps_s = [3600] * STEPS
    stream = Given(artifacts["decoder"], 12, [6], gaps_s)
    rest = Given(artifacts["decoder"], 12, [], gaps_s)
    await pipeline.process(ANYONE, stream.chunk("origin", 0, 10))
    await pipeline.process(ANYONE, stream.chunk("origin", 10, STEPS))
    alone = replace(rest.chunk("alone", 6, STEPS), position=0)
    await pipeline.process(ANYONE, alone)
    spec = artifacts["decoder"].spec
    known = known_schema(spec.events, spec.decoder, timed=False)
    future = columns_from_events(known, [{"holiday": False, "tariff": "day", "wind": 1.0}] * 3)
    request = ForecastRequest(3, future=future)
    first, second = [
        await pipeline.forecast(ANYONE, StreamKey("decoder", name), request)
        for name in ("origin", "alone")
    ]
    assert (first.head.position, second.head.position) == (STEPS, STEPS - 6)
    assert first.times_ms == second.times_ms
    np.testing.assert_array_equal(first.forecast.quantiles, second.forecast.quantiles)
