"""A replay against the stand-in: order, pace, resuming, faults, many streams at once."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from carry_client import AsyncCarry
from service.commands.replay.send import Replay, ReplayError, StreamEvents
from tests.service.commands.replay.conftest import LENGTHS, Replayed, replay
from tests.service.commands.replay.standin import Standin

EVENTS = sum(LENGTHS.values())


def every(step: int, fault: str) -> Any:
    """The fault at every `step`-th request, the first of them at `step`."""
    count = 0

    def decide(request: web.Request) -> str | None:
        nonlocal count
        count += 1
        return fault if count % step == 0 else None

    return decide


def assert_all_received(replay: Replay, standin: Standin) -> None:
    assert replay.tally.faults == []
    assert {name: stream.position for name, stream in standin.streams.items()} == LENGTHS
    for stream in replay.streams:
        assert np.isfinite(stream.outputs).all()


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_every_event_is_sent_once_and_in_order(
    replayed: Replayed, standin: Standin, encoding: str
) -> None:
    replay = await replayed({"encoding": encoding})
    assert_all_received(replay, standin)
    ends: dict[str, int] = defaultdict(int)
    for name, position, steps in standin.seen:
        assert position == ends[name]
        assert 1 <= steps <= 9
        ends[name] += steps
    assert replay.tally.events == EVENTS
    assert replay.tally.chunks == len(standin.seen)
    assert not replay.tally.retries
    names = [name for name, _, _ in standin.seen]
    assert names.index("s2") < len(names) - 1 - names[::-1].index("s1"), "streams take turns"
    assert len(set(map(id, standin.connections))) > 1, "streams are sent concurrently"


async def test_chunks_depend_on_seed_and_stream_alone(replayed: Replayed, standin: Standin) -> None:
    async def chunks(seed: int) -> dict[str, list[int]]:
        standin.streams.clear()
        standin.seen.clear()
        await replayed(chunk=(2, 6), seed=seed)
        sizes: dict[str, list[int]] = defaultdict(list)
        for name, _, steps in standin.seen:
            sizes[name].append(steps)
        return sizes

    first = await chunks(1)
    assert set(first["s:3"][:-1]) == {2, 3, 4, 5, 6}
    assert await chunks(1) == first
    assert await chunks(2) != first


async def test_no_chunk_is_sent_before_the_time_of_its_last_event(
    replayed: Replayed, standin: Standin, streams: list[StreamEvents]
) -> None:
    times_ms = np.sort(np.concatenate([stream.times_ms for stream in streams]))
    sent_s: list[tuple[float, int]] = []
    standin.fault = lambda request: sent_s.append((time.monotonic(), len(standin.seen)))
    start_s = time.monotonic()
    await replayed(chunk=(2, 2), speed=float(np.ptp(times_ms)) / 1000)
    ends = {stream.name: stream.times_ms for stream in streams}
    for (received_s, _), (name, position, steps) in zip(sent_s, standin.seen, strict=True):
        due_s = (ends[name][position + steps - 1] - times_ms[0]) / np.ptp(times_ms)
        assert received_s - start_s >= due_s


@pytest.mark.parametrize(
    "fault", ["drop", "drop_after", "store_unavailable", "outcome_unknown", "conflict"]
)
async def test_chunk_without_an_answer_is_repeated_unchanged(
    replayed: Replayed, standin: Standin, fault: str
) -> None:
    standin.fault = every(3, fault)
    replay = await replayed()
    assert_all_received(replay, standin)
    assert replay.tally.retries.total() > 1
    assert replay.tally.chunks == standin.counts["chunks"]
    assert (replay.tally.replayed > 0) == (fault in ("drop_after", "outcome_unknown"))


async def test_second_replay_resumes_where_the_first_was_rejected(
    replayed: Replayed, standin: Standin
) -> None:
    standin.fault = every(12, "refuse")
    with pytest.raises(ReplayError, match=r"the service rejected it: invalid_input"):
        await replayed(streams_in_flight=1)
    stood = {name: stream.position for name, stream in standin.streams.items()}
    assert 0 < sum(stood.values()) < EVENTS
    standin.fault = lambda request: None
    standin.seen.clear()
    standin.deaf = 3
    replay = await replayed()
    assert replay.tally.faults == []
    assert replay.tally.retries == {"store_unavailable": 3}, "requests for positions are repeated"
    assert replay.tally.events == EVENTS - sum(stood.values())
    assert min(position for name, position, _ in standin.seen if name == "s:3") == stood["s:3"]
    for stream in replay.streams:
        assert stream.start == stood.get(stream.events.name, 0)
        assert np.isnan(stream.outputs[: stream.start]).all()
        assert np.isfinite(stream.outputs[stream.start :]).all()


@pytest.mark.parametrize("wrong_by", [0.0, 1e-3])
async def test_rolled_back_stream_is_sent_again_and_gives_the_same_outputs(
    replayed: Replayed, standin: Standin, wrong_by: float
) -> None:
    def lose(request: web.Request) -> None:
        if len(standin.history.get("s:3", ())) == 4:
            standin.fault = lambda request: None
            standin.roll_back("s:3", 4)
            standin.wrong_by = wrong_by

    standin.fault = lose
    replay = await replayed(streams_in_flight=1)
    assert replay.tally.sent_again > 0
    if wrong_by:
        (fault,) = (fault for fault in replay.tally.faults if "'s:3'" in fault)
        assert "other outputs than before" in fault
    else:
        assert_all_received(replay, standin)
        assert replay.tally.events == EVENTS + replay.tally.sent_again


async def test_expired_reply_is_skipped_and_counted(replayed: Replayed, standin: Standin) -> None:
    replies = 0

    def forget(request: web.Request) -> str | None:
        nonlocal replies
        replies += 1
        if replies == 5:
            return "drop_after"
        if replies == 6:
            standin.forget_reply(standin.seen[-1][0])
        return None

    standin.fault = forget
    replay = await replayed(streams_in_flight=1)
    name, position, steps = standin.seen[4]
    assert replay.tally.faults == []
    assert replay.tally.skipped == steps
    (stream,) = (stream for stream in replay.streams if stream.events.name == name)
    missing = np.isnan(stream.outputs).any(axis=1)
    assert np.flatnonzero(missing).tolist() == list(range(position, position + steps))


async def test_impossible_replies_and_positions_are_faults(
    replayed: Replayed, standin: Standin
) -> None:
    apply = standin._apply

    def confused(item: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, reply = apply(item)
        if item["stream"] == "s4":
            return status, {**reply, "position": 7}
        return status, {**reply, "stream": "s1"} if item["stream"] == "s2" else reply

    standin._apply = confused  # type: ignore[method-assign]
    faults = "\n".join((await replayed()).tally.faults)
    assert "expected stream 's4' at position 1, got stream 's4' at 7" in faults
    assert re.search(r"expected stream 's2' at position \d+, got stream 's1' at ", faults)
    standin._apply = apply  # type: ignore[method-assign]
    standin.streams["s4"] = standin.streams["s:3"]
    replay = await replayed()
    assert replay.tally.faults == ["stream 's4': expected position 1, got 61"]
    standin.streams.clear()
    standin.wrong_by = float("inf")
    faults_of_outputs = (await replayed({"encoding": "msgpack"})).tally.faults
    assert len(faults_of_outputs) == 3
    assert all(fault.endswith("expected finite outputs") for fault in faults_of_outputs)


async def test_replay_waits_for_the_service_until_its_deadline(
    standin: Standin, url: str, server: TestServer, streams: list[StreamEvents]
) -> None:
    back = TestServer(standin.app(), port=int(url.rstrip("/").rpartition(":")[2]))

    async def restart() -> None:
        await server.close()
        await back.start_server()

    task: list[asyncio.Task[None]] = []

    def kill(request: web.Request) -> str | None:
        if len(standin.seen) == 10 and not task:
            task.append(asyncio.create_task(restart()))
        return "drop" if task and not task[0].done() else None

    standin.fault = kill
    # the next address is used when one does not answer
    async with AsyncCarry(["http://127.0.0.1:1", url], timeout_s=1) as carry:
        replayed = await replay(carry, streams, chunk=(1, 4), streams_in_flight=2)
        served = await carry.model("small").describe()
    assert_all_received(replayed, standin)
    assert replayed.tally.retries["no_answer"] > 0
    await back.close()
    async with AsyncCarry(url, deadline_s=0.2) as carry:
        with pytest.raises(ReplayError, match=r"no_answer.*start again to resume"):
            await Replay(carry.model("small"), served, streams).run()
