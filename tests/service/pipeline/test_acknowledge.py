"""Open alarms through the pipeline: acknowledgements that race chunks of their stream, on two
workers with caches of their own; several alarms in one chunk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.detection.alarms import MUTED_EVENTS, NONE
from models.detection.causes import Causes
from service.access.caller import ANYONE
from service.consumers.alarms import AlarmFields
from service.core.delivery import acknowledged_head
from service.core.errors import Conflict, StateChanged
from service.core.values import FloatRows, Precondition, StreamHead, StreamKey
from service.pipeline.pipeline import Pipeline
from service.store.codec import encode_state
from tests.support.alarms import alarm_model, noise, raised, served_by_onnx
from tests.support.pipelines import chunk_of, worker

KEY = StreamKey("sensors", "s")
QUIET, OPENING, CHUNK, CHUNKS = 60, 5, 3, 12


async def send(pipeline: Pipeline, rows: np.ndarray, position: int) -> tuple[StreamHead, list[int]]:
    """Send a chunk; returns the head after it, and the alarms of its events."""
    reply = await pipeline.process(ANYONE, chunk_of("s", rows, position, model="sensors"))
    named = pipeline.models["sensors"].outputs.by_name(reply.outputs)
    return reply.head, named["surprise.alarm"].astype(int).tolist()


async def follow(pipeline: Pipeline, position: int) -> list[list[int]]:
    """Send the next chunks at another level, one after another."""
    return [
        (await send(pipeline, raised(CHUNK, seed=at), position + CHUNK * at))[1]
        for at in range(CHUNKS)
    ]


async def acknowledge(pipeline: Pipeline) -> bool:
    try:
        return (await pipeline.alarms.acknowledge(ANYONE, KEY))[1]
    except Conflict:
        return False


async def test_of_racing_acknowledgements_one_is_applied_and_no_event_is_lost(
    store_url: str, tmp_path: Path
) -> None:
    artifact: Artifact = alarm_model(tmp_path)
    served = served_by_onnx(artifact)
    async with (
        worker(store_url, artifact, runtime=served.runtime) as first,
        worker(store_url, artifact, runtime=served_by_onnx(artifact).runtime) as second,
    ):
        for at in range(0, QUIET, 10):
            await send(first, noise(10, seed=at), at)
        await send(first, raised(OPENING), QUIET)
        start = QUIET + OPENING
        codes, *applied = await asyncio.gather(
            follow(first, start), *(acknowledge(second) for _ in range(4))
        )
        # one that met chunks only may be left
        applied.append(await acknowledge(second))
        assert sum(applied) == 1
        stored = await first.streams.load(KEY)
        assert stored.head.position == start + CHUNK * CHUNKS
        flat = [code for each in codes for code in each]
        # in alarm up to one place between two chunks, then muted
        first_muted = flat.index(NONE) if NONE in flat else len(flat)
        assert first_muted % CHUNK == 0
        assert set(flat[first_muted:]) <= {NONE}
        assert len(flat) - first_muted < MUTED_EVENTS
        await send(first, raised(1), stored.head.position)


async def test_an_alarm_that_reopens_within_a_chunk_is_the_newest(
    store_url: str, tmp_path: Path
) -> None:
    artifact = alarm_model(tmp_path)
    runtime = served_by_onnx(artifact).runtime
    async with worker(store_url, artifact, runtime=runtime) as pipeline:

        async def send_to(stream: str, rows: FloatRows) -> FloatRows:
            chunk = chunk_of(stream, rows, model="sensors")
            return (await pipeline.process(ANYONE, chunk)).outputs

        opening = np.concatenate([noise(QUIET), raised(OPENING)])
        for stream in ("a", "b"):
            await send_to(stream, opening)
        between = [raised(1, by=4), raised(OPENING, seed=7), noise(80, seed=8)]
        again = np.concatenate([noise(300, seed=6), *between, raised(OPENING, by=40)])
        outputs = await send_to("a", again)
        page = await pipeline.alarms.page(ANYONE, "sensors", "", None, 10)
        assert [alarm.key.stream for alarm in page.alarms] == ["a", "b"]
        # the record in the state is of the latest alarm only; of the first one, the opening is
        # in an earlier chunk
        state = encode_state(await pipeline.streams.load(StreamKey("sensors", "a")))
        found = AlarmFields(artifact, "surprise").of_chunk(outputs, state)
        closing, *others = (
            dict(zip(each[::2], each[1::2], strict=True)) for each in found.values()
        )
        assert closing == {"alarm": "closed"}
        assert [each["alarm"] for each in others[-3:]] == ["opened", "closed", "opened"]
        rows, column = list(found)[1:], artifact.outputs.slices["surprise.probability"].start
        for at in range(0, len(others) - 1, 2):
            opened, closed = others[at : at + 2]
            assert opened == {**closed, "alarm": "opened"}
            least = float(np.min(outputs[rows[at] : rows[at + 1], column]))
            assert opened["severity"] == f"{Causes(artifact.spec).severity_of(least):.2f}"
            assert float(opened["severity"]) >= 1
        assert all("value" in each["cause"] for each in others)


async def test_a_worker_with_a_cached_state_continues_the_acknowledged_one(
    store_url: str, tmp_path: Path
) -> None:
    artifact = alarm_model(tmp_path)
    async with (
        worker(store_url, artifact, runtime=served_by_onnx(artifact).runtime) as first,
        worker(store_url, artifact, runtime=served_by_onnx(artifact).runtime) as second,
    ):
        for at in range(0, QUIET, 10):
            await send(first, noise(10, seed=at), at)
        before, _ = await send(first, raised(OPENING), QUIET)
        named = Precondition((before.etag,))
        stored, was_open = await second.alarms.acknowledge(ANYONE, KEY, before.position, named)
        assert was_open
        assert stored.head == acknowledged_head(before)
        _, codes = await send(first, raised(10), before.position)
        assert set(codes) == {NONE}
        # the one of before names the state no longer, once an event follows
        with pytest.raises(StateChanged):
            await second.alarms.acknowledge(ANYONE, KEY, None, named)
