"""`carry backfill --version`: a new version of a model continues live streams exactly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import uvloop

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.writing import write_artifact
from models.spec.history import HistorySpec
from service.backfill.engines import ThisProcess
from service.backfill.heads import HeadCutter, load_heads, read_heads
from service.backfill.load import load_states
from service.backfill.load_versions import (
    ENDS_EARLIER,
    GONE,
    NO_HISTORY,
    OUT_OF_REACH,
    STARTED_OVER,
)
from service.backfill.plan import BackfillError, Job
from service.backfill.run import run_backfill
from service.core.values import StreamHead, StreamKey
from service.pipeline.served_model import ServedModel
from tests.service.transports.v1.harness import Harness, harness
from tests.service.transports.v1.test_versions import promote
from tests.support import command
from tests.support.backfill import job_of
from tests.support.consumers import consuming, until_count
from tests.support.hand_over import (
    STREAMS,
    backfill,
    body_of,
    events,
    lengths_of,
    outputs_in,
    packed,
    publish,
    small,
)
from tests.support.models import random_weights
from tests.support.numpy_runtime import numpy_served
from tests.support.servers import RealServer, becomes, emptied, opened, real_server
from tests.support.versions import Versions

__all__ = ["events", "small"]

FEW_EVENTS = HistorySpec(events=15)
CONFIG = {"model": "small", "from": "events"}
KEPT = {"history_events": "20"}


@pytest.fixture(scope="module")
def running() -> Iterator[RealServer]:
    with real_server("valkey") as running:
        yield running


@pytest.fixture
def server(running: RealServer) -> RealServer:
    """An empty one."""
    return emptied(running)


@pytest.fixture
def client(server: RealServer) -> Iterator[Any]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def new(small: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Another version of the model."""
    path = tmp_path_factory.mktemp("new") / "small"
    write_artifact(path, small.spec, random_weights(small.spec, 8))
    return load_artifact(path)


class KeepingVersions(Versions):
    """Loads versions that keep a history of a few events."""

    def __call__(self, model: str, path: str) -> ServedModel:
        return numpy_served(super().__call__(model, path).artifact, FEW_EVENTS)


def version_job(artifact: Artifact, history: pl.DataFrame, folder: Path, **changes: Any) -> Job:
    """The backfill of a history for a version of live streams."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "events.parquet"
    if not file.exists():
        history.write_parquet(file)
    return job_of(artifact, [file], folder / "out", version=True, **changes)


async def compute(server: RealServer, job: Job) -> Path:
    """Compute the states of a version; returns the output folder."""

    async def read() -> None:
        async with opened(server.url) as store:
            await read_heads(store, job.plan, job.out)

    await asyncio.to_thread(run_backfill, job, ThisProcess(job), prepare=lambda: uvloop.run(read()))
    return job.out


async def test_a_new_version_continues_live_streams_exactly(
    server: RealServer,
    client: Any,
    small: Artifact,
    new: Artifact,
    events: pl.DataFrame,
    tmp_path: Path,
) -> None:
    """They go on while the history is computed and loaded, and the history has later events too."""
    expected = outputs_in(backfill(new, events, tmp_path / "whole"))
    async with consuming(server.url, small, KEPT, **CONFIG), opened(server.url) as store:
        publish(client, events[:250])
        await until_count(client, "scores", 250)
        out = await compute(server, version_job(new, events, tmp_path / "new", piece_rows=31))
        publish(client, events[250:280])
        await until_count(client, "scores", 280)
        progress = await load_states(store, out, report=lambda _: None)
        assert (progress.total, progress.loaded, progress.kept) == (STREAMS, STREAMS, [])
        again = await load_states(store, out, report=lambda _: None)
        assert (again.loaded_before, again.kept) == (STREAMS, [])
        publish(client, events[280:300])
        await until_count(client, "scores", 300)
    async with consuming(server.url, new, KEPT, **CONFIG):
        publish(client, events[300:])
        await until_count(client, "scores", 420)
    entries = [fields for _, fields in client.xrange("scores")][300:]
    assert not [fields for fields in entries if b"warm" in fields]
    assert {fields[b"version"].decode() for fields in entries} == {new.version}
    starts = lengths_of(events[:300])
    found: dict[str, list[int]] = {}
    for fields in entries:
        name, position = fields[b"stream"].decode(), int(fields[b"position"])
        found.setdefault(name, []).append(position)
        row = packed(json.loads(fields[b"outputs"]))
        np.testing.assert_allclose(row, expected[name][position], rtol=1e-4, atol=1e-5)
    for name, count in lengths_of(events).items():
        assert found[name] == [*range(starts[name], count)]
    assert {name: len(rows) for name, rows in outputs_in(out).items()} == lengths_of(events[:250])


async def test_a_promotion_under_load_is_exact_once_the_states_are_loaded(
    server: RealServer, small: Artifact, events: pl.DataFrame, tmp_path: Path
) -> None:
    """Clients of all streams go on by HTTP; each reply equals the run of the version that it names
    over the whole history. They pause before the store would forget what follows the states."""
    new = write_artifact(tmp_path / "models" / "small-2", small.spec, random_weights(small.spec, 8))
    expected = {
        artifact.version: outputs_in(backfill(artifact, events, tmp_path / artifact.version))
        for artifact in (small, new)
    }
    positions = dict.fromkeys(lengths_of(events), 0)
    answered: dict[str, set[str]] = {name: set() for name in positions}
    limit = 25

    async def send_all(api: Harness, name: str) -> None:
        rows = events.filter(pl.col("stream") == name).iter_rows(named=True)
        bodies = list(map(body_of, rows))
        while (at := positions[name]) < len(bodies):
            await becomes(lambda: positions[name] < limit, "the next phase")
            chunk = {"position": at, "events": bodies[at : min(at + 1 + at % 3, limit)]}
            reply = await api.chunk(chunk, stream=name, model="small")
            assert reply.status_code == 200, reply.text
            document = reply.json()
            version = document["version"]
            assert "warm" not in document
            for index in range(len(chunk["events"])):
                row = packed({each: values[index] for each, values in document["outputs"].items()})
                wanted = expected[version][name][at + index]
                np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-5)
            answered[name].add(version)
            positions[name] = document["position"]

    async def reach(position: int) -> None:
        await becomes(lambda: min(positions.values()) >= position, "the positions")

    async with (
        harness(
            server,
            {"small": small},
            load_version=KeepingVersions(tmp_path / "models"),
            history=FEW_EVENTS,
            on_model_change="rewarm",
        ) as api,
        opened(server.url) as store,
        asyncio.TaskGroup() as clients,
    ):
        for name in positions:
            clients.create_task(send_all(api, name))
        await reach(20)
        limit = 26
        out = await compute(server, version_job(new, events, tmp_path / "new"))
        progress = await load_states(store, out, report=lambda _: None)
        assert (progress.loaded, progress.kept) == (STREAMS, [])
        limit = 27
        await promote(api, "small", "small-2")
        limit = 1000
    assert positions == lengths_of(events)
    assert all(each == {small.version, new.version} for each in answered.values())


async def test_streams_that_a_version_cannot_continue_are_listed(
    server: RealServer,
    client: Any,
    small: Artifact,
    new: Artifact,
    events: pl.DataFrame,
    tmp_path: Path,
) -> None:
    known = lengths_of(events[:250])
    history = events.filter(~((pl.col("stream") == "s2") & (pl.int_range(420) > 100)))
    history = history.filter(pl.col("stream") != "s3")
    async with consuming(server.url, small, KEPT, **CONFIG), opened(server.url) as store:
        publish(client, events[:250])
        await until_count(client, "scores", 250)
        out = await compute(server, version_job(new, history, tmp_path))
        await store.delete(StreamKey("small", "s0"))
        await store.delete(StreamKey("small", "s1"))
        publish(client, events[250:].filter(pl.col("stream") == "s1"))
        more = events.filter(pl.col("stream") == "s4").tail(25)
        ids = pl.format("{}-0", pl.int_range(len(more)) + 1000)
        publish(client, more.with_columns(entry=ids))
        done = 250 + len(events[250:].filter(pl.col("stream") == "s1")) + len(more)
        await until_count(client, "scores", done)
        progress = await load_states(store, out, report=lambda _: None)
    reasons = {each.stream: (each.reason, each.position) for each in progress.kept}
    assert reasons == {
        "s0": (GONE, known["s0"]),
        "s1": (STARTED_OVER, known["s1"]),
        "s2": (ENDS_EARLIER, known["s2"]),
        "s3": (ENDS_EARLIER, known["s3"]),
        "s4": (OUT_OF_REACH, known["s4"]),
    }
    assert (progress.loaded, progress.total) == (2, STREAMS)
    assert {line.split(",")[0] for line in (out / "kept.csv").read_text().splitlines()[1:]} == {
        *reasons
    }


async def test_streams_without_a_history_cannot_be_continued(
    server: RealServer,
    client: Any,
    small: Artifact,
    new: Artifact,
    events: pl.DataFrame,
    tmp_path: Path,
) -> None:
    async with consuming(server.url, small, **CONFIG), opened(server.url) as store:
        publish(client, events[:250])
        await until_count(client, "scores", 250)
        out = await compute(server, version_job(new, events, tmp_path))
        progress = await load_states(store, out, report=lambda _: None)
        assert [each.reason for each in progress.kept] == [NO_HISTORY] * STREAMS
        # no version continues its own streams
        with pytest.raises(BackfillError, match="another version computes, got none"):
            await compute(server, version_job(small, events, tmp_path / "own"))


async def test_heads_are_read_once(
    server: RealServer,
    client: Any,
    small: Artifact,
    new: Artifact,
    events: pl.DataFrame,
    tmp_path: Path,
) -> None:
    """A run that is continued ends at the positions that the first one has read."""
    async with consuming(server.url, small, KEPT, **CONFIG):
        publish(client, events[:100])
        await until_count(client, "scores", 100)
        out = await compute(server, version_job(new, events, tmp_path))
        before = load_heads(out, 0)
        publish(client, events[100:150])
        await until_count(client, "scores", 150)
        assert await compute(server, version_job(new, events, tmp_path)) == out
    assert load_heads(out, 0) == before
    assert {name: head.position for name, head in before.items()} == lengths_of(events[:100])


def test_rows_are_cut_at_the_positions_whatever_the_pieces() -> None:
    rows = pl.DataFrame({"stream": [*"aaaaabbbcccccc"], "row": range(14)})
    heads = {name: StreamHead(bytes(8), bytes(16), at) for name, at in (("a", 3), ("c", 6))}
    for size in range(1, 15):
        cutter = HeadCutter(heads)
        parts = [cutter.cut(piece) for piece in rows.iter_slices(size)]
        assert pl.concat(parts)["row"].to_list() == [0, 1, 2, 8, 9, 10, 11, 12, 13]
    assert cutter.find_head("a", 3) == heads["a"]
    assert [cutter.find_head(*each) for each in (("a", 2), ("b", 3))] == [None, None]


async def test_the_command_loads_at_its_end_and_asks_for_the_store_of_the_versions(
    server: RealServer,
    client: Any,
    small: Artifact,
    new: Artifact,
    events: pl.DataFrame,
    tmp_path: Path,
) -> None:
    events.write_parquet(tmp_path / "events.parquet")
    words = ("backfill", small.path, tmp_path / "events.parquet", tmp_path / "out")
    options = ("--stream", "stream", "--workers", "1")
    wrong = await asyncio.to_thread(command.carry, *words, *options, "--version")
    assert (wrong.exit_code, "expected --into with --version" in wrong.stderr) == (2, True)
    into = ("--into", server.url)
    done = await asyncio.to_thread(command.carry, *words, *options, *into)
    assert done.exit_code == 0, done.stderr
    assert "loaded 7 streams" in done.stderr
    words = ("backfill", new.path, tmp_path / "events.parquet", tmp_path / "new")
    done = await asyncio.to_thread(command.carry, *words, *options, *into, "--version")
    assert done.exit_code == 0, done.stderr
    assert "loaded 0 streams, kept 7 that the store has" in done.stderr
    assert NO_HISTORY in (tmp_path / "new" / "kept.csv").read_text()


async def test_a_version_without_heads_is_rejected(
    small: Artifact, events: pl.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(BackfillError, match="--into"):
        backfill(small, events, tmp_path, version=True)
