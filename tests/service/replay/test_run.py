"""A replay against the stand-in: order, resuming, faults, duplicates, many streams at once."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from service.replay.client import connect
from service.replay.options import ReplayError, ReplayOptions
from service.replay.run import Replay
from service.replay.source import StreamEvents
from tests.service.replay.conftest import LENGTHS, NoProgress, Replayed, start
from tests.service.replay.standin import Standin

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
    for stream_progress in replay.progress.values():
        assert np.isfinite(stream_progress.outputs).all()


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("per_request", [1, 3])
async def test_every_event_is_sent_once_and_in_order(
    replayed: Replayed, standin: Standin, encoding: str, per_request: int
) -> None:
    replay = await replayed(format=encoding, per_request=per_request)
    assert_all_received(replay, standin)
    ends: dict[str, int] = defaultdict(int)
    for name, position, steps in standin.seen:
        assert position == ends[name]
        assert 1 <= steps <= 9
        ends[name] += steps
    assert replay.tally.events == EVENTS
    assert replay.tally.chunks == len(standin.seen)
    assert replay.tally.retries == 0
    requests = replay.tally.requests
    assert requests == len(standin.seen) if per_request == 1 else requests < len(standin.seen)


async def test_streams_are_sent_concurrently(replayed: Replayed, standin: Standin) -> None:
    await replayed(chunk_max=2)
    names = [name for name, _, _ in standin.seen]
    assert names.index("s2") < len(names) - 1 - names[::-1].index("s1")


FAULTS = ["drop", "drop_after", "store_unavailable", "outcome_unknown", "conflict"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("per_request", [1, 4])
async def test_chunk_without_an_answer_is_repeated_unchanged(
    replayed: Replayed, standin: Standin, fault: str, per_request: int
) -> None:
    standin.fault = every(3, fault)
    replay = await replayed(per_request=per_request)
    assert_all_received(replay, standin)
    assert replay.tally.retries > 0
    assert replay.tally.chunks == standin.counts["chunks"]
    assert (replay.tally.replayed > 0) == (fault in ("drop_after", "outcome_unknown"))


async def test_failed_item_is_repeated_alone(replayed: Replayed, standin: Standin) -> None:
    standin.fault = every(2, "one_fails")
    replay = await replayed(per_request=4)
    assert_all_received(replay, standin)
    assert replay.tally.problems["overloaded"] > 0
    assert replay.tally.chunks == standin.counts["chunks"]


async def test_second_replay_resumes_where_the_first_was_rejected(
    replayed: Replayed, standin: Standin
) -> None:
    standin.fault = every(12, "refuse")
    with pytest.raises(ReplayError, match="invalid_input"):
        await replayed(streams_in_flight=1)
    stood = {name: stream.position for name, stream in standin.streams.items()}
    assert 0 < sum(stood.values()) < EVENTS
    standin.fault = lambda request: None
    standin.seen.clear()
    replay = await replayed()
    assert replay.tally.faults == []
    assert replay.tally.events == EVENTS - sum(stood.values())
    assert min(position for name, position, _ in standin.seen if name == "s:3") == stood["s:3"]
    for name, stream_progress in replay.progress.items():
        assert stream_progress.start == stood.get(name, 0)
        assert np.isnan(stream_progress.outputs[: stream_progress.start]).all()
        assert np.isfinite(stream_progress.outputs[stream_progress.start :]).all()


async def test_position_request_is_repeated(replayed: Replayed, standin: Standin) -> None:
    await replayed()
    standin.deaf = 3
    replay = await replayed()
    assert replay.tally.faults == []
    assert replay.tally.problems == {"store_unavailable": 3}
    assert replay.tally.events == 0


async def test_rolled_back_stream_is_sent_again_from_its_position(
    replayed: Replayed, standin: Standin
) -> None:
    def lose(request: web.Request) -> None:
        if len(standin.history.get("s:3", ())) == 4 and len(standin.seen) > 0:
            standin.fault = lambda request: None
            standin.roll_back("s:3", 4)

    standin.fault = lose
    replay = await replayed()
    assert_all_received(replay, standin)
    assert replay.tally.fell_back == 1
    assert replay.tally.lost > 0
    assert replay.tally.events == EVENTS + replay.tally.lost


async def test_different_outputs_of_repeated_events_are_a_fault(
    replayed: Replayed, standin: Standin
) -> None:
    def lose(request: web.Request) -> None:
        if len(standin.history.get("s:3", ())) == 4:
            standin.fault = lambda request: None
            standin.roll_back("s:3", 4)
            standin.wrong_by = 1e-3

    standin.fault = lose
    replay = await replayed(streams_in_flight=1)
    (fault,) = (fault for fault in replay.tally.faults if "'s:3'" in fault)
    assert "other outputs than before" in fault


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
    missing = np.isnan(replay.progress[name].outputs).any(axis=1)
    assert np.flatnonzero(missing).tolist() == list(range(position, position + steps))


async def test_duplicates_go_to_different_urls_and_one_is_replayed(
    replayed: Replayed, standin: Standin, url: str
) -> None:
    other = TestServer(standin.app())
    await other.start_server()
    ports = sorted([port_of(url), port_of(str(other.make_url("/")))])
    try:
        replay = await replayed(duplicates=1.0, urls=(url, str(other.make_url("/"))))
    finally:
        await other.close()
    assert_all_received(replay, standin)
    tally = replay.tally
    assert tally.duplicates == tally.replayed == tally.chunks
    assert len(standin.seen) == 2 * tally.chunks
    assert sorted(set(standin.port_of)) == ports
    assert standin.port_of.count(ports[0]) == tally.chunks


def port_of(url: str) -> int:
    return int(url.rstrip("/").rpartition(":")[2])


async def test_duplicate_that_is_applied_twice_is_a_fault(
    replayed: Replayed, standin: Standin
) -> None:
    apply = standin._apply

    def forgetful(item: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, reply = apply(item)
        return status, {**reply, "replayed": False} if status == 200 else reply

    standin._apply = forgetful  # type: ignore[method-assign]
    replay = await replayed(duplicates=1.0)
    assert replay.tally.fault_count == replay.tally.chunks
    assert "both were processed" in replay.tally.faults[0]


async def test_wrong_position_and_wrong_stream_are_faults(
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


async def test_position_beyond_the_events_is_a_fault(replayed: Replayed, standin: Standin) -> None:
    await replayed()
    standin.streams["s4"] = standin.streams["s:3"]
    replay = await replayed()
    assert replay.tally.faults == ["stream 's4': expected position 1, got 61"]


async def test_replay_gives_up_after_patience_s(
    url: str, server: TestServer, streams: list[StreamEvents]
) -> None:
    options = ReplayOptions(urls=(url,), model="small", patience_s=0.2)
    async with connect(options) as service:
        replay = await start(service, streams, options)
        await server.close()
        with pytest.raises(ReplayError, match=r"gave up after 0\.2 s: no_answer"):
            await replay.run(NoProgress())


async def test_replay_waits_for_a_restarted_service(
    standin: Standin, url: str, server: TestServer, streams: list[StreamEvents]
) -> None:
    back = TestServer(standin.app(), port=port_of(url))
    options = ReplayOptions(urls=(url,), model="small", chunk_max=4, streams_in_flight=2)

    async def restart() -> None:
        await server.close()
        await back.start_server()

    task: list[asyncio.Task[None]] = []

    def kill(request: web.Request) -> str | None:
        if len(standin.seen) == 10 and not task:
            task.append(asyncio.create_task(restart()))
        return "drop" if task and not task[0].done() else None

    standin.fault = kill
    async with connect(options, timeout_s=1) as service:
        replay = await start(service, streams, options)
        await replay.run(NoProgress())
        await replay.check_positions()
    await back.close()
    assert_all_received(replay, standin)
    assert replay.tally.problems["no_answer"] > 0
    assert 0 < replay.tally.silence_s < replay.tally.wall_s


async def test_unknown_model_is_rejected_at_once(replayed: Replayed) -> None:
    with pytest.raises(ReplayError, match="model_not_found"):
        await replayed(model="other")
