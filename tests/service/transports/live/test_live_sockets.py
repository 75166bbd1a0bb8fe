"""Chunks over live sockets: outcomes, order, window, resumes."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orjson
import pytest

from models.artifact.artifact import Artifact
from service.pipeline.turns import Turns
from service.store.base import CommitColumns, CommitResult
from service.store.redis.redis_store import RedisStore
from service.telemetry.access_log import access_log
from service.telemetry.logs import json_line
from service.transports.common import stream_order
from service.transports.common.long_bodies import LONG_BYTES
from tests.service.transports.live.sockets import (
    binary,
    error,
    live,
    live_application,
    outcome,
    reply,
    text,
)
from tests.service.transports.v1.harness import Harness, rows
from tests.support.servers import RealServer, becomes

OUTPUT = "last"


async def test_a_reply_is_that_of_http_in_the_media_type_of_its_frame(api: Harness) -> None:
    inputs = rows(5)
    expected = (await api.chunk({"position": 0, "inputs": inputs.tolist()}, stream="other")).json()
    packed = await api.packed({"position": 0, "inputs": inputs.tobytes()}, stream="packed")
    async with live(api) as sockets:
        async with sockets.open() as (client, hello):
            assert hello["position"] == 0
            assert "epoch" not in hello
            await client.send(text(inputs, 0, id="first"))
            document = await outcome(client)
        async with sockets.open("probe/streams/t/live") as (client, _):
            await client.send(binary(inputs, 0, id=2**63 - 1))
            document_packed = await outcome(client)
        async with sockets.open("probe/streams/other/live") as (_, hello):
            head = ("position", "epoch", "tag", "version")
            assert {name: hello[name] for name in head} == {name: expected[name] for name in head}
            assert (hello["window"], hello["max_frame_bytes"]) == (8, 20_000)
    assert document["id"] == "first"
    assert document_packed["id"] == 2**63 - 1
    for each, other in ((document, expected), (document_packed, packed)):
        got = each["reply"]
        assert got["outputs"] == other["outputs"]
        assert got.keys() == other.keys()
        assert got["position"] == 5


async def test_pipelined_chunks_are_answered_in_order_and_equal_the_whole(api: Harness) -> None:
    inputs = rows(20)
    whole = (await api.chunk({"inputs": inputs.tolist()}, stream="whole")).json()
    async with live(api) as sockets, sockets.open() as (client, _):
        for at in range(20):
            await client.send(text(inputs[at : at + 1], at, id=at))
        outcomes = [await outcome(client) for _ in range(20)]
    assert [each["id"] for each in outcomes] == list(range(20))
    outputs = np.concatenate([each["reply"]["outputs"][OUTPUT] for each in outcomes])
    np.testing.assert_allclose(outputs, whole["outputs"][OUTPUT], atol=1e-6)


async def test_one_socket_serves_many_streams_which_fail_independently(api: Harness) -> None:
    async with live(api) as sockets, sockets.open("probe/live") as (client, hello):
        assert "stream" not in hello
        assert api.counts.seen["websockets"] == 1
        for at in range(3):
            for stream in ("a", "b"):
                width = 2 if (at, stream) == (1, "a") else 3
                await client.send(text(rows(2, features=width), 2 * at, stream=stream, id=at))
        outcomes = [await outcome(client) for _ in range(6)]
        await client.send(text(rows(2), 0))
        nameless = await error(client, "invalid_input")
        await client.send(text(rows(2), 0, stream="no/name", id="x"))
        misnamed = await error(client, "invalid_name")
    of_stream = {
        stream: [
            (each["id"], each.get("error", {}).get("code"))
            for each in outcomes
            if stream == (each.get("reply") or each.get("error"))["stream"]
        ]
        for stream in ("a", "b")
    }
    assert of_stream["b"] == [(0, None), (1, None), (2, None)]
    assert of_stream["a"] == [(0, None), (1, "invalid_input"), (2, "position_ahead")]
    assert nameless["at"] == "stream"
    assert misnamed["id"] == "x"
    assert (api.position("a"), api.position("b")) == (2, 6)
    assert api.counts.seen["websockets"] == 0


async def test_outcomes_of_a_stream_keep_its_order_when_a_later_frame_fails_at_once(
    api: Harness, held_back: Callable[[], None]
) -> None:
    async with live(api) as sockets, sockets.open() as (client, _):
        await client.send(text(rows(2), 0, id=0))
        await client.send("{")
        await client.send(text(rows(2), 2, id=2))
        await becomes(lambda: sockets.served()[0].session.unanswered == 3, "three chunks")
        held_back()
        assert (await outcome(client))["id"] == 0
        await error(client, "malformed_body")
        assert (await outcome(client))["id"] == 2


SEQUENCES: dict[str, list[tuple[dict[str, Any], int | str]]] = {
    "a failed chunk": [
        ({}, 2),
        ({"features": 2}, "invalid_input"),
        ({}, "previous_failed"),
        ({}, "previous_failed"),
        ({"position": 2}, 4),
        ({}, 6),
    ],
    "dry runs": [
        ({"position": 0}, 2),
        ({"position": 7, "dry_run": True}, "position_ahead"),
        ({}, 4),
        ({"position": 7}, "position_ahead"),
        ({"position": 4, "dry_run": True}, 4),
        ({}, "previous_failed"),
    ],
}


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES)
async def test_a_chunk_without_a_position_is_not_applied_in_place_of_a_failed_one(
    api: Harness, sequence: list[tuple[dict[str, Any], int | str]]
) -> None:
    """Also if all are sent at once; dry runs neither block nor admit it."""
    async with live(api) as sockets, sockets.open() as (client, _):
        for members, _ in sequence:
            inputs = rows(2, features=members.get("features", 3))
            await client.send(text(inputs, **{k: v for k, v in members.items() if k != "features"}))
        for members, expected in sequence:
            if isinstance(expected, str):
                await error(client, expected)
            else:
                assert (await reply(client))["position"] == expected, members


async def test_a_full_window_stops_reading_until_chunks_are_answered(
    api: Harness, held_back: Callable[[], None]
) -> None:
    async with live(api) as sockets, sockets.open() as (client, hello):
        window = hello["window"]
        for at in range(4 * window):
            await client.send(text(rows(1), at, id=at))
        [socket] = sockets.served()
        await becomes(lambda: socket.session.unanswered == window, "a full window")
        for _ in range(20):
            await asyncio.sleep(0)
        assert socket.session.chunks == window
        held_back()
        assert [(await outcome(client))["id"] for _ in range(4 * window)] == [*range(4 * window)]
    assert api.position() == 4 * window


async def test_a_client_resumes_at_the_position_of_the_hello(
    api: Harness, held_back: Callable[[], None]
) -> None:
    inputs = rows(12)
    async with live(api) as sockets:
        async with sockets.open() as (client, _):
            for at in range(0, 8, 2):
                await client.send(text(inputs[at : at + 2], at))
            await becomes(lambda: sockets.served()[0].session.unanswered == 4, "its chunks")
            client.transport.abort()
            held_back()
        await sockets.ended()
        async with sockets.open() as (client, hello):
            # the last chunk may be sent again: its stored reply is returned
            for at in range(max(0, hello["position"] - 2), 12, 2):
                await client.send(text(inputs[at : at + 2], at))
                last = await reply(client)
    assert api.position() == 12
    whole = (await api.chunk({"inputs": inputs.tolist()}, stream="whole")).json()
    expected = whole["outputs"][OUTPUT][-2:]
    np.testing.assert_allclose(last["outputs"][OUTPUT], expected, atol=1e-6)


async def test_parameters_of_the_address_select_the_parts_of_replies(api: Harness) -> None:
    path = "probe/streams/s/live?return_sequences=false&return_state=true&timeout_s=2.5"
    async with live(api) as sockets, sockets.open(path) as (client, _):
        await client.send(text(rows(3), 0))
        got = await reply(client)
    assert np.shape(got["outputs"][OUTPUT]) == (4,)
    assert (
        got["state"].keys()
        == (await api.client.get("/v1/models/probe/streams/s/state")).json()["state"].keys()
    )


async def test_a_precondition_in_a_frame_is_checked(api: Harness) -> None:
    async with live(api) as sockets, sockets.open() as (client, _):
        await client.send(text(rows(3), 0))
        head = await reply(client)
        await client.send(text(rows(3), 3, if_match=f"{head['epoch']}-{'0' * 32}"))
        await error(client, "state_changed")
        await client.send(text(rows(3), 3, if_match=f"{head['epoch']}-{head['tag']}"))
        assert (await reply(client))["position"] == 6
        await client.send(text(rows(3), 6, if_match="W/nonsense"))
        await error(client, "invalid_precondition")


async def test_rejections_of_admission_control_are_frames_to_send_again(api: Harness) -> None:
    async with live(api) as sockets, sockets.open() as (client, _):
        path = "probe/streams/s/live?timeout_s=0.000001"
        async with sockets.open(path) as (hurried, _):
            await hurried.send(text(rows(3), 0, id=1))
            late = await error(hurried, "deadline_exceeded")
        await client.send(text(rows(3), 0))
        await reply(client)
    assert late["retryable"]
    assert late["id"] == 1
    assert api.position() == 3


async def test_a_chunk_that_waited_for_its_turn_is_rejected_if_the_queue_is_full_by_then(
    pipeline_server: RealServer, models: Mapping[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of other streams were queued while the one before it was applied."""
    commit, committing = RedisStore.commit, set[str]()
    gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def held(
        store: RedisStore, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        stream = commits.keys[0].stream
        committing.add(stream)
        await gates[stream].wait()
        return await commit(store, commits, deadline_s)

    monkeypatch.setattr(RedisStore, "commit", held)
    async with (
        live_application(pipeline_server, models, max_queue=1, batches_in_flight=2) as api,
        live(api) as sockets,
        sockets.open() as (client, _),
        sockets.open("probe/live") as (others, _),
    ):
        await client.send(text(rows(2)))
        await becomes(lambda: "s" in committing, "its commit")
        await client.send(text(rows(2)))
        await becomes(lambda: any(s.session.unanswered == 2 for s in sockets.served()), "both")
        await others.send(text(rows(1), 0, stream="running"))
        await becomes(lambda: "running" in committing, "its commit")
        await others.send(text(rows(1), 0, stream="queued"))
        await becomes(lambda: api.pipeline.queue_depths()["probe"] == 1, "a full queue")
        gates["s"].set()
        await reply(client)
        await error(client, "overloaded")
        for stream in ("running", "queued"):
            gates[stream].set()
            await reply(others)
    assert api.position() == 2


async def test_many_failed_streams_leave_only_chunks_with_a_position(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_order, "MAX_FAILED_STREAMS", 2)
    async with live(api) as sockets, sockets.open("probe/live") as (client, _):
        for stream in ("a", "b", "c"):
            await client.send(text(rows(1), 5, stream=stream))
            await error(client, "position_ahead")
        await client.send(text(rows(1), stream="d"))
        await error(client, "previous_failed")
        await client.send(text(rows(1), 0, stream="d"))
        await reply(client)
    assert api.position("d") == 1


@pytest.mark.parametrize("frame", [text, binary], ids=["JSON", "MessagePack"])
async def test_long_frames_and_replies_keep_the_order(
    large_api: Harness, frame: Callable[..., str | bytes]
) -> None:
    steps = 7_000
    inputs = rows(steps + 2)
    async with live(large_api) as sockets, sockets.open() as (client, _):
        await client.send(frame(inputs[:1], 0, id=0))
        await client.send(frame(inputs[1 : steps + 1], 1, id=1))
        await client.send(frame(inputs[steps + 1 :], steps + 1, id=2))
        outcomes = [await outcome(client) for _ in range(3)]
        assert len(inputs[1 : steps + 1].tobytes()) >= LONG_BYTES
        assert [each["id"] for each in outcomes] == [0, 1, 2]
        assert np.shape(outcomes[1]["reply"]["outputs"][OUTPUT]) == (steps, 4)
        await client.send(frame(rows(steps, features=4), 0, id=3))
        assert (await error(client, "invalid_input"))["id"] == 3
        await client.send(frame(rows(1), steps + 2, id=4))
        assert (await reply(client))["position"] == steps + 3


async def test_disconnect_during_a_long_frame_cancels_its_reading(
    large_api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[asyncio.Future[None]] = []
    async with live(large_api) as sockets:
        # its frame is not read before it disconnects
        with monkeypatch.context() as patch:
            patch.setattr(Turns, "request", lambda _, turn: waiting.append(turn))
            async with sockets.open() as (client, _):
                await client.send(text(rows(4_000), 0))
                await becomes(lambda: len(waiting) == 1, "a long frame")
                client.transport.abort()
                await sockets.ended()
                await becomes(lambda: waiting[0].cancelled(), "the end of the reading")
        async with sockets.open("probe/streams/t/live") as (client, _):
            await client.send(text(rows(2_000), 0))
            await reply(client)
    assert large_api.position() is None


async def test_chunks_are_counted_and_only_errors_have_a_line(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any]] = []
    counted: list[tuple[str, str | None, int]] = []
    monkeypatch.setattr(access_log, "level", logging.DEBUG)
    monkeypatch.setattr(access_log, "render", lambda line: orjson.loads(json_line(line)))
    monkeypatch.setattr(access_log, "write", lines.append)
    monkeypatch.setattr(access_log, "observe", lambda *request: counted.append(request[:3]))
    async with live(api) as sockets, sockets.open() as (client, _):
        await client.send(text(rows(4), 0))
        await reply(client)
        wrong = text(rows(4), 99)
        await client.send(wrong)
        await error(client, "position_ahead")
    route = "/v1/models/{model}/streams/{stream}/live"
    await becomes(lambda: len(counted) == 3, "the requests")
    assert counted == [("GET", route, 101), ("WEBSOCKET", route, 200), ("WEBSOCKET", route, 409)]
    opened, failed = lines
    assert (opened["level"], opened["status"]) == ("info", 101)
    assert (failed["level"], failed["status"], failed["code"]) == (
        "warning",
        409,
        "position_ahead",
    )
    assert (failed["model"], failed["received_bytes"]) == ("probe", len(wrong))
