"""Which version answers which stream, and what a switch does to a stream's chunks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.access.caller import ANYONE
from service.core.errors import InternalError
from service.core.values import FloatRows, Reply, StreamKey
from service.engine.runtimes.base import FloatBatch, Lengths
from service.pipeline.model_versions import ModelVersions, Route
from service.pipeline.pipeline import Pipeline
from service.pipeline.served_model import ServedModel
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import oracle_step
from tests.support.pipelines import (
    Counts,
    chunk_of,
    make_artifact,
    oracle_outputs,
    rows_of,
    send,
    worker,
)

STREAMS = [f"s{number}" for number in range(2_000)]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    folder: Path = tmp_path_factory.mktemp("versions")
    return make_artifact(folder, seed=1), make_artifact(folder, seed=2)


def serve(artifact: Artifact, history: HistorySpec | None = None) -> ServedModel:
    return ServedModel(artifact, NumpyRuntime(artifact), history=history)


def add_challenger(
    pipeline: Pipeline, artifact: Artifact, share: float, history: HistorySpec | None = None
) -> ModelVersions:
    """Load a second version, which answers a share of the streams."""
    versions, challenger = pipeline.versions["probe"], serve(artifact, history)
    versions.add(challenger)
    versions.route = Route(versions.route.champion, challenger, share)
    return versions


def test_canary_share_is_that_of_the_streams_and_grows_without_changes(
    artifacts: tuple[Artifact, Artifact],
) -> None:
    champion, challenger = map(serve, artifacts)
    before: set[str] = set()
    for share in (0.0, 0.02, 0.1, 0.5, 0.9, 1.0):
        route = Route(champion, challenger, share)
        canaries = {stream for stream in STREAMS if route.answering(stream) is challenger}
        deviation = np.sqrt(len(STREAMS) * share * (1 - share))
        assert abs(len(canaries) - share * len(STREAMS)) <= 5 * deviation
        assert before <= canaries
        before = canaries


async def test_each_version_answers_its_streams_in_one_batch(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    counts, random = Counts(), np.random.default_rng(1)
    rows = {stream: rows_of(random, 6) for stream in STREAMS[:40]}
    async with worker(store_url, artifacts[0], counts) as pipeline:
        route = add_challenger(pipeline, artifacts[1], 0.5).route
        replies: dict[str, list[Reply]] = {stream: [] for stream in rows}
        for at in (0, 3):
            parts = {stream: each[at : at + 3] for stream, each in rows.items()}
            results = await asyncio.gather(
                *(send(pipeline, stream, part, at) for stream, part in parts.items())
            )
            for reply in results:
                replies[reply.key.stream].append(reply)
    versions = set()
    for stream, parts_of in replies.items():
        answering = route.answering(stream)
        assert [reply.version for reply in parts_of] == [answering] * 2
        np.testing.assert_allclose(
            np.concatenate([reply.outputs for reply in parts_of]),
            oracle_outputs(answering.artifact, rows[stream]),
            rtol=1e-5,
            atol=1e-5,
        )
        versions.add(answering.version)
    assert versions == {artifact.version for artifact in artifacts}
    assert sum(counts.seen[version] for version in versions) == 80


class Narrow(NumpyRuntime):
    """A runtime that takes fewer streams in one call than the batches of the model have."""

    max_batch = 3

    def step(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        # with the row of padding
        assert len(rows) <= self.max_batch + 1
        return super().step(rows, lengths, states)


async def test_version_whose_runtime_takes_fewer_rows_answers_whole_batches(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    rows = {stream: rows_of(np.random.default_rng(4), 3) for stream in STREAMS[:40]}
    old, new = artifacts
    async with worker(store_url, old) as pipeline:
        versions, narrow = pipeline.versions["probe"], ServedModel(new, Narrow(new))
        versions.add(narrow)
        versions.route = Route(narrow, versions.route.champion)
        chunks = [chunk_of(stream, each, 0) for stream, each in rows.items()]
        replies = await pipeline.process_many(ANYONE, chunks)
    for reply in replies:
        assert isinstance(reply, Reply)
        expected = oracle_outputs(new, rows[reply.key.stream])
        np.testing.assert_allclose(reply.outputs, expected, rtol=1e-5, atol=1e-5)


async def test_failing_version_does_not_fail_the_other_one(
    store_url: str, artifacts: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(2)
    async with worker(store_url, artifacts[0]) as pipeline:
        route = add_challenger(pipeline, artifacts[1], 0.5).route
        assert route.challenger is not None

        def fail(*_: object) -> None:
            raise RuntimeError("planted")

        monkeypatch.setattr(route.challenger.runtime, "step", fail)
        results = await asyncio.gather(
            *(send(pipeline, stream, rows_of(random, 2), 0) for stream in STREAMS[:40]),
            return_exceptions=True,
        )
    for stream, result in zip(STREAMS, results, strict=False):
        if route.answering(stream) is route.challenger:
            assert isinstance(result, InternalError)
            assert result.detail == "the batch failed: RuntimeError"
        else:
            assert isinstance(result, Reply)


async def test_switch_between_batches_keeps_the_order_and_states_of_streams(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    """A stream whose cached state another version wrote is not continued from the cache."""
    rows = rows_of(np.random.default_rng(3), 8)
    async with worker(store_url, artifacts[0], on_model_change="reset") as pipeline:
        await send(pipeline, "s", rows[:4], 0)
        versions = add_challenger(pipeline, artifacts[1], 0.0)
        champion, challenger, _ = versions.route
        assert challenger is not None
        versions.route = Route(challenger, champion)
        first = await send(pipeline, "s", rows[:4], 0)
        second = await send(pipeline, "s", rows[4:], 4)
        assert first.created
        assert first.version is second.version is challenger
        np.testing.assert_allclose(
            np.concatenate([first.outputs, second.outputs]),
            oracle_outputs(artifacts[1], rows),
            rtol=1e-5,
            atol=1e-5,
        )


async def test_retry_across_a_switch_gets_the_stored_reply(
    store_url: str, artifacts: tuple[Artifact, Artifact]
) -> None:
    rows = rows_of(np.random.default_rng(4), 12)
    history = HistorySpec(events=64)
    async with worker(store_url, artifacts[0], history=history) as pipeline:
        first = await send(pipeline, "s", rows[:4], 0)
        second = await send(pipeline, "s", rows[4:8], 4)
        versions = add_challenger(pipeline, artifacts[1], 0.0, history)
        champion, challenger, _ = versions.route
        assert challenger is not None
        versions.route = Route(challenger, champion)
        again = await send(pipeline, "s", rows[4:8], 4)
        assert again.replayed
        assert (again.version, again.head) == (champion, second.head)
        np.testing.assert_array_equal(again.outputs, second.outputs)
        third = await send(pipeline, "s", rows[8:], 8)
        assert (third.version, third.head.epoch) == (challenger, first.head.epoch)
        np.testing.assert_allclose(
            third.outputs, oracle_outputs(artifacts[1], rows)[8:], rtol=1e-5, atol=1e-5
        )
        # either version's state can be read at the stream's position
        key = StreamKey("probe", "s")
        for version in (champion, challenger):
            state = await pipeline.streams.read_state(ANYONE, key, version=version)
            _, expected = oracle_step(
                version.spec, version.artifact.weights, rows, version.initial.floats
            )
            assert (state.fingerprint, state.head) == (version.fingerprint, third.head)
            np.testing.assert_allclose(state.state.floats, expected, rtol=1e-5, atol=1e-5)
