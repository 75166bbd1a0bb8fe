"""Advancing over stored chunks gives the states that the same chunks give in the pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from models.spec.state import State
from service.access.caller import ANYONE
from service.core.delivery import chunk_digest
from service.core.errors import InvalidInput, NotFinite
from service.core.values import Chunk, Feed, Steps, StreamKey
from service.engine.compute import Compute
from service.engine.runtimes.loading import open_runtimes
from service.pipeline.history_run import (
    PIECE_STEPS,
    HistoryGap,
    HistoryRun,
    advance_many,
    decode_entries,
)
from service.pipeline.pipeline import Pipeline
from service.pipeline.served_model import ServedModel
from service.pipeline.settings import BatchingSettings
from service.store.history_codec import HistoryEntry
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.decoders import decoder_spec
from tests.support.detection import sensor_model
from tests.support.events import NORMALISED
from tests.support.models import SMALL
from tests.support.numpy_runtime import numpy_served
from tests.support.oracle import contracting_weights, joined, oracle_step
from tests.support.pipelines import Counts
from tests.support.servers import RealServer
from tests.support.strict_events import columns_from_events

START_MS = 1_700_000_000_000
LENGTH = 6 * PIECE_STEPS
DETECTION = {"prior_events": 5, "memory_events": 100}
DENSE: list[dict[str, Any]] = [{"kind": "dense", "name": "out", "units": 2}]
PER_CHUNK = [{"kind": "lstm", "units": 3}, {"kind": "attention", "over": "chunk", "units": 3}]
BOTH_WAYS = [{"kind": "bidirectional", "cell": "lstm", "units": 3}]
SPECS: dict[str, dict[str, Any]] = {
    "rows": {"layers": [{"kind": "lstm", "units": 4}, {"kind": "gru", "units": 3}]},
    "every": {"layers": [{"kind": "gru", "units": 4}], "reset_every": 50},
    "attention": {
        "layers": [
            {"kind": "lstm", "units": 3},
            {"kind": "attention", "over": "stream", "units": 3},
        ]
    },
    "per-chunk": {"layers": PER_CHUNK},
    "blocks": {"layers": BOTH_WAYS, "blocks": {"size": 5, "lookahead": 3}},
}
EVENT_SPECS: dict[str, dict[str, Any]] = {
    "sessions": {**SMALL, "session_gap_s": 100.0, "reset_every": 90},
    "scales": {
        "events": NORMALISED.model_dump(mode="json"),
        "layers": [{"kind": "gru", "units": 3}],
        "heads": [{"kind": "forecast", "name": "next", "targets": ["load", "delay", "heat"]}],
    },
    "decoder": decoder_spec().model_dump(mode="json"),
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """One model of each kind."""
    folder: Path = tmp_path_factory.mktemp("histories")
    data = {name: {"features": 3, "heads": DENSE, **spec} for name, spec in SPECS.items()}
    specs = [parse_spec({**spec, "name": name}) for name, spec in (data | EVENT_SPECS).items()]
    written = {
        spec.name: write_artifact(folder / spec.name, spec, contracting_weights(spec, 1))
        for spec in specs
    }
    return {**written, "sensors": sensor_model(folder / "sensors", 3, **DETECTION)}


@pytest.fixture
async def pipeline(
    pipeline_server: RealServer, artifacts: dict[str, Artifact]
) -> AsyncIterator[Pipeline]:
    store = RedisStore(StoreSettings(pipeline_server.url, store_wait_s=60))
    pipeline = Pipeline(
        [served_by(artifact) for artifact in artifacts.values()],
        store,
        Counts(),
        settings=BatchingSettings(),
        now_ms=lambda: START_MS,
    )
    await store.start()
    await pipeline.start()
    yield pipeline
    await pipeline.stop()
    await store.close()


def served_by(artifact: Artifact) -> ServedModel:
    """A model on the oracle; with detection, which the oracle does not compute, on ONNX Runtime."""
    if artifact.spec.detection is None:
        return numpy_served(artifact)
    [runtime] = open_runtimes("onnxruntime", [artifact], 1)
    return ServedModel(artifact, runtime)


@pytest.fixture
async def compute() -> AsyncIterator[Compute]:
    compute = Compute()
    yield compute
    compute.close()


def events_of(name: str, random: np.random.Generator) -> list[dict[str, Any]]:
    """Events with gaps longer than a session, times in no order, and categories not known."""
    times_ms = START_MS + 1000 * np.cumsum(random.choice([1, 60, 99, 101, -30], LENGTH))
    if name == "sensors":
        values = random.normal(size=LENGTH)
        return [
            {"time": int(at), "value": float(value)}
            for at, value in zip(times_ms, values, strict=True)
        ]
    return [
        {
            "load": float(random.normal()),
            "delay": None if random.integers(3) == 0 else float(random.normal(0, 30)),
            "at": int(at_ms),
            "heat": None if random.integers(3) == 0 else float(random.normal()),
            "warmth": float(random.normal(10)),
            "carrier": str(random.choice(["UA", "B6", "nobody"])),
            "heavy": bool(random.integers(2)),
            "holiday": False,
            "tariff": "day",
            "wind": float(random.normal()),
        }
        for at_ms in times_ms
    ]


def chunks_of(artifact: Artifact, seed: int, cuts: list[int]) -> list[HistoryEntry]:
    """A stream of LENGTH events in chunks, with resets of the client and rates of alarms."""
    spec, random = artifact.spec, np.random.default_rng(seed)
    columns = rows = None
    if spec.events is None:
        rows = random.normal(size=(LENGTH, 3)).astype(np.float32)
    else:
        names = [field.name for field in spec.events.fields]
        events = [
            {name: event[name] for name in names if event.get(name) is not None}
            for event in events_of(spec.name, random)
        ]
        columns = columns_from_events(spec.events, events)
    resets = [] if spec.blocks else sorted(random.choice(LENGTH // 2, 2, replace=False).tolist())
    rates = [None, 0.5, 20.0] if spec.detection else [None]
    return [
        HistoryEntry(
            start,
            Steps(
                Feed.INPUTS if columns is None else Feed.EVENTS,
                stop - start,
                None if columns is None else columns[start:stop],
                None if rows is None else rows[start:stop],
                tuple(at - start for at in resets if start <= at < stop),
                rates[start % len(rates)],
            ),
        )
        for start, stop in pairwise(cuts)
    ]


def cuts_of(random: np.random.Generator) -> list[int]:
    """Chunks of 1 to 200 events, most of them short."""
    cuts = [0]
    while cuts[-1] < LENGTH:
        cuts.append(min(LENGTH, cuts[-1] + int(random.choice([1, 1, 2, 5, 20, 200]))))
    return cuts


async def stored_states(
    pipeline: Pipeline, artifact: Artifact, stream: str, chunks: list[HistoryEntry]
) -> dict[int, State]:
    """The states that the service stores after the chunks, by position."""
    key = StreamKey(artifact.spec.name, stream)
    states = {0: pipeline.models[key.model].initial}
    for position, steps, final, _ in chunks:
        digest = chunk_digest(artifact.spec.events, steps, final=final)
        reply = await pipeline.process(ANYONE, Chunk(key, steps, digest, position, final=final))
        states[reply.head.position] = reply.state
    await pipeline.streams.delete(ANYONE, key)
    return states


def run_of(
    served: ServedModel, state: State, start: int, chunks: list[HistoryEntry], stop: int
) -> HistoryRun:
    """A run over entries as the store has them."""
    encode = served.history_codec.encode
    values = [encode(at, steps, final=final, starts=starts) for at, steps, final, starts in chunks]
    return HistoryRun(state, start, list(decode_entries(served, values)), stop)


async def advance(served: ServedModel, compute: Compute, run: HistoryRun) -> State:
    """The state at the end of one run; raises its error."""
    [result] = await advance_many(served, compute, [run])
    if isinstance(result, Exception):
        raise result
    return result.state


def assert_same(artifact: Artifact, actual: State, expected: State) -> None:
    np.testing.assert_allclose(
        joined(artifact.spec, actual.floats),
        joined(artifact.spec, expected.floats),
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_array_equal(actual.ints, expected.ints)


@pytest.mark.parametrize("name", [*SPECS, *EVENT_SPECS, "sensors"])
async def test_states_are_those_of_the_pipeline(
    pipeline: Pipeline, compute: Compute, artifacts: dict[str, Artifact], name: str
) -> None:
    artifact, served = artifacts[name], pipeline.models[name]
    random = np.random.default_rng(7)
    runs: list[HistoryRun] = []
    expected: list[State] = []
    for seed in range(3):
        chunks = chunks_of(artifact, seed, cuts_of(random))
        states = await stored_states(pipeline, artifact, f"advanced-{seed}", chunks)
        ends = [int(at) for at in random.choice(list(states), 3)]
        for start, stop in [(0, LENGTH), *pairwise(sorted({*ends, LENGTH}))]:
            runs.append(run_of(served, states[start], start, chunks, stop))
            expected.append(states[stop])
    for run, result, state in zip(
        runs, await advance_many(served, compute, runs), expected, strict=True
    ):
        assert not isinstance(result, Exception), result
        assert_same(artifact, result.state, state)
        assert_same(artifact, await advance(served, compute, run), state)


async def test_a_run_may_begin_and_end_within_chunks(
    pipeline: Pipeline, compute: Compute, artifacts: dict[str, Artifact]
) -> None:
    artifact, served = artifacts["sessions"], pipeline.models["sessions"]
    single = chunks_of(artifact, 5, list(range(LENGTH + 1)))
    states = await stored_states(pipeline, artifact, "single", single)
    long = chunks_of(artifact, 5, [0, 7, LENGTH])
    for start, stop in [(0, 5), (3, 11), (9, 200), (10, 10)]:
        state = await advance(served, compute, run_of(served, states[start], start, long, stop))
        assert_same(artifact, state, states[stop])


async def test_chunks_that_the_network_sees_whole_stay_as_they_came(
    pipeline: Pipeline, compute: Compute, artifacts: dict[str, Artifact]
) -> None:
    artifact, served = artifacts["per-chunk"], pipeline.models["per-chunk"]
    cuts = cuts_of(np.random.default_rng(3))
    chunks = [
        each._replace(steps=_without_resets(each.steps)) for each in chunks_of(artifact, 2, cuts)
    ]
    state = await advance(served, compute, run_of(served, served.initial, 0, chunks, LENGTH))
    exact: Any = served.initial.floats
    for chunk in chunks:
        rows: Any = chunk.steps.rows
        _, exact = oracle_step(artifact.spec, artifact.weights, rows, exact)
    np.testing.assert_allclose(state.floats, exact, rtol=1e-4, atol=1e-5)
    end = chunks[-1].start + 1
    with pytest.raises(HistoryGap):
        await advance(served, compute, run_of(served, served.initial, 0, chunks, end))


def _without_resets(steps: Steps) -> Steps:
    return Steps(steps.feed, steps.length, steps.columns, steps.rows)


async def test_a_final_chunk_without_events_closes_a_stream_with_blocks(
    pipeline: Pipeline, compute: Compute, artifacts: dict[str, Artifact]
) -> None:
    artifact, served = artifacts["blocks"], pipeline.models["blocks"]
    chunks = chunks_of(artifact, 4, [0, 3, 9, LENGTH])
    rows = np.zeros((0, 3), np.float32)
    chunks.append(HistoryEntry(LENGTH, Steps(Feed.INPUTS, 0, rows=rows), final=True))
    states = await stored_states(pipeline, artifact, "closed", chunks)
    state = await advance(served, compute, run_of(served, served.initial, 0, chunks, LENGTH))
    assert served.blocks is not None
    assert served.blocks.is_closed(state)
    assert_same(artifact, state, states[LENGTH])
    open_ = await advance(served, compute, run_of(served, served.initial, 0, chunks[:-1], LENGTH))
    assert not served.blocks.is_closed(open_)
    ended = await advance(served, compute, run_of(served, open_, LENGTH, chunks, LENGTH))
    assert_same(artifact, ended, states[LENGTH])


async def test_missing_chunks_are_an_error(
    compute: Compute, artifacts: dict[str, Artifact]
) -> None:
    served = numpy_served(artifacts["rows"])
    chunks = chunks_of(artifacts["rows"], 1, [0, 10, 20, 30, LENGTH])
    for gone in (chunks[1:], chunks[:1] + chunks[2:], chunks[:-1]):
        with pytest.raises(HistoryGap):
            await advance(served, compute, run_of(served, served.initial, 0, gone, LENGTH))


async def test_only_resets_that_are_certain_make_a_state_independent_of_its_start(
    compute: Compute, artifacts: dict[str, Artifact]
) -> None:
    """A session's gap is not: the clock may have missed the stream's latest time."""
    seen: dict[str, list[bool]] = {}
    for name, start in (("rows", 0), ("rows", LENGTH // 2), ("every", LENGTH // 2)):
        served, chunks = numpy_served(artifacts[name]), chunks_of(artifacts[name], 3, [0, LENGTH])
        run = run_of(served, served.initial, start, chunks, LENGTH)
        [result] = await advance_many(served, compute, [run])
        assert not isinstance(result, Exception)
        seen.setdefault(name, []).append(result.was_reset)
    sessions = numpy_served(artifacts["sessions"])
    chunks = chunks_of(artifacts["sessions"], 3, [0, LENGTH])
    run = run_of(sessions, sessions.initial, LENGTH - 20, chunks, LENGTH)
    [result] = await advance_many(sessions, compute, [run])
    assert not isinstance(result, Exception)
    assert seen == {"rows": [True, False], "every": [True]}
    assert not result.was_reset


async def test_streams_fail_alone(compute: Compute, artifacts: dict[str, Artifact]) -> None:
    served = numpy_served(artifacts["sessions"])
    good, bad, huge = (chunks_of(artifacts["sessions"], seed, [0, LENGTH]) for seed in range(3))
    columns = bad[0].steps.columns
    assert columns is not None
    load = columns.values["load"].copy()
    load[7] = 1e39
    broken = type(columns)(columns.steps, columns.present, {**columns.values, "load": load})
    bad = [HistoryEntry(0, Steps(Feed.EVENTS, LENGTH, broken))]
    state = served.initial._replace(floats=np.full_like(served.initial.floats, np.inf))
    runs = [
        run_of(served, served.initial, 0, good, LENGTH),
        run_of(served, served.initial, 0, bad, LENGTH),
        run_of(served, state, 91, huge, 92),
    ]
    results = await advance_many(served, compute, runs)
    assert isinstance(results[1], InvalidInput)
    assert isinstance(results[2], NotFinite)
    assert_same(
        artifacts["sessions"],
        await advance(served, compute, runs[0]),
        results[0].state,  # type: ignore[union-attr]
    )


async def test_long_histories_do_not_keep_others_waiting(
    compute: Compute, artifacts: dict[str, Artifact]
) -> None:
    """Short calls of other batches run between those of a history."""
    served = numpy_served(artifacts["rows"])
    chunks = chunks_of(artifacts["rows"], 1, [0, LENGTH])
    runs = [run_of(served, served.initial, 0, chunks, LENGTH)] * 24
    order: list[str] = []
    began = asyncio.Event()

    def note_call(*_: object) -> None:
        order.append("run")
        began.set()

    task = asyncio.create_task(advance_many(served, compute, runs, note_call))
    await began.wait()
    await _short_call(compute, served)
    order.append("short")
    await task
    assert order.index("short") < len(order) - 1


async def _short_call(compute: Compute, served: ServedModel) -> None:
    rows = [np.zeros((1, 3), np.float32)]
    states = served.runtime_state.pack(served.initial)[np.newaxis]
    await compute.infer(served.runtime, rows, states, lambda *_: None)
