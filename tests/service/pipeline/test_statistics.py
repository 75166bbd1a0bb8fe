"""Statistics of a stream's values: the same bits for any cuts, workers, forks and restores."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.events.encode import Clock, encode
from models.spec.model import parse_spec
from models.spec.state import State
from service.access.caller import ANYONE
from service.core.delivery import chunk_digest
from service.core.values import Chunk, Feed, Steps, StreamKey
from service.pipeline.pipeline import Pipeline
from tests.support.events import NORMALISED
from tests.support.oracle import contracting_weights, oracle_step
from tests.support.pipelines import worker
from tests.support.servers import RealServer
from tests.support.strict_events import columns_from_events

SPEC = parse_spec(
    {
        "name": "scales",
        "events": NORMALISED.model_dump(mode="json"),
        "layers": [{"kind": "gru", "units": 3}],
        "heads": [{"kind": "forecast", "name": "next", "targets": ["load", "delay", "heat"]}],
    }
)
STEPS = 24
CUTS = ([0, 24], [0, 1, 2, 3, 10, 11, 24], [0, 7, 8, 16, 24])


def events_of(level: float) -> list[dict[str, Any]]:
    random = np.random.default_rng(int(level))
    return [
        {
            "load": level + float(random.normal()),
            "delay": None if at % 5 == 2 else float(random.normal(0, 30)),
            "at": 1_700_000_000_000 + 60_000 * at,
            "heat": None if at % 7 == 1 else float(random.normal()),
            "carrier": "UA",
        }
        for at in range(STEPS)
    ]


def chunk_of(stream: str, events: list[dict[str, Any]], start: int, stop: int) -> Chunk:
    columns = columns_from_events(NORMALISED, events[start:stop])
    steps = Steps(Feed.EVENTS, stop - start, columns=columns)
    return Chunk(StreamKey(SPEC.name, stream), steps, chunk_digest(NORMALISED, steps), start)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder: Path = tmp_path_factory.mktemp("statistics")
    return write_artifact(folder / SPEC.name, SPEC, contracting_weights(SPEC, 1))


@pytest.fixture
async def workers(
    pipeline_server: RealServer, artifact: Artifact
) -> AsyncIterator[tuple[Pipeline, Pipeline]]:
    """Two workers, the second of which caches no states: it reads each from the store."""
    async with (
        worker(pipeline_server.url, artifact) as first,
        worker(pipeline_server.url, artifact, cache_bytes=0) as second,
    ):
        yield first, second


async def test_statistics_are_the_same_bits_for_any_cuts_forks_and_restores(
    workers: tuple[Pipeline, Pipeline], artifact: Artifact
) -> None:
    events = {"low": events_of(2.0), "high": events_of(1e9)}
    states: dict[str, list[State]] = {name: [] for name in events}
    for number, cuts in enumerate(CUTS):
        outputs: dict[str, list[Any]] = {name: [] for name in events}
        keys = {name: f"{name}-{number}" for name in events}
        for turn, (start, stop) in enumerate(pairwise(cuts)):
            pipeline = workers[turn % 2]
            for name in events:
                reply = await pipeline.process(
                    ANYONE, chunk_of(keys[name], events[name], start, stop)
                )
                outputs[name].append(reply.outputs)
            if number == 1 and turn == 2:
                keys = {name: await forked(pipeline, key) for name, key in keys.items()}
            if number == 2 and turn == 1:
                keys = {name: await restored(pipeline, artifact, key) for name, key in keys.items()}
        for name, parts in outputs.items():
            rows, _ = encode(NORMALISED, columns_from_events(NORMALISED, events[name]), Clock())
            initial = artifact.state.zero().floats
            expected, _ = oracle_step(SPEC, artifact.weights, rows, initial)
            np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5, atol=1e-5)
            stored = await workers[1].streams.read(ANYONE, StreamKey(SPEC.name, keys[name]))
            states[name].append(stored.state)
    for same in states.values():
        assert {state.ints.tobytes() for state in same} == {same[0].ints.tobytes()}
    low, high = (artifact.state.by_name(states[name][0]) for name in events)
    assert high["events.load.mean"] == pytest.approx(1e9, rel=1e-8)
    assert high["events.load.count"] == low["events.load.count"] == STEPS


async def forked(pipeline: Pipeline, stream: str) -> str:
    """The name of a fork, which continues in the stream's place."""
    await pipeline.streams.fork(ANYONE, StreamKey(SPEC.name, stream), f"{stream}-fork", None)
    return f"{stream}-fork"


async def restored(pipeline: Pipeline, artifact: Artifact, stream: str) -> str:
    """The name of a stream that is restored from a snapshot in JSON."""
    stored = await pipeline.streams.read(ANYONE, StreamKey(SPEC.name, stream))
    parts = {name: part.tolist() for name, part in artifact.state.by_name(stored.state).items()}
    state = artifact.state.from_names(json.loads(json.dumps(parts)))
    await pipeline.streams.restore(
        ANYONE,
        StreamKey(SPEC.name, f"{stream}-restored"),
        feed=stored.feed,
        position=stored.head.position,
        fingerprint=stored.fingerprint,
        state=state,
        precondition=None,
    )
    return f"{stream}-restored"
