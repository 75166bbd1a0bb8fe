"""How warm an inexact state is, in the replies of every transport."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.core.values import Feed, StreamHead, StreamKey, StreamState
from service.transports.v2.http_routes import add_kserve
from service.transports.v2.inference import Inference
from tests.service.transports.live.sockets import live, live_application, reply, text
from tests.service.transports.v1.harness import Harness, problem
from tests.service.transports.v2.v2 import V2, binary_body, json_body
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer

WARM = {"events": 0, "of": 6}
ROWS = rows_of(np.random.default_rng(1), 2)


@pytest.fixture
async def api(pipeline_server: RealServer, artifact: Artifact) -> AsyncIterator[Harness]:
    """An application with a model that keeps six events of each stream."""

    def add_v2(app: FastAPI) -> None:
        add_kserve(app, Inference(app.state.api), dict)

    models, history = {"probe": artifact}, HistorySpec(events=6)
    async with live_application(pipeline_server, models, extend=add_v2, history=history) as running:
        yield running


def write_other_version(api: Harness, *streams: str) -> None:
    """Store streams that another version has written, without their history."""
    initial = api.models["probe"].state.zero()
    for stream in streams:
        head = StreamHead(b"epoch-89", b"tag-0123456789ab", 4)
        state = StreamState(head, Feed.INPUTS, b"another version.", None, 1, initial)
        api.store.states[StreamKey("probe", stream)] = state


async def test_replies_of_every_transport_say_how_warm_the_state_is(api: Harness) -> None:
    write_other_version(api, "fast", "packed", "item", "dry", "socket", "7", "8")
    body: dict[str, Any] = {"inputs": ROWS.tolist(), "position": 4}
    found = [(await api.chunk(body, stream="fast")).json()]
    found.append(await api.packed({"inputs": ROWS.tobytes(), "position": 4}, stream="packed"))
    items = {"chunks": [{"stream": "item", **body}]}
    many = (await api.client.post("/v1/models/probe/chunks", json=items)).json()
    found.append(many["results"][0]["reply"])
    found.append((await api.chunk({**body, "dry_run": True}, stream="dry")).json())
    async with live(api) as sockets, sockets.open("probe/streams/socket/live") as (client, _):
        await client.send(text(ROWS, 4))
        found.append(await reply(client))
    assert [each["warm"] for each in found] == [WARM] * 5
    v2 = V2(api)
    request = {**json_body(ROWS), "parameters": {"sequence_id": 7}}
    content, headers = binary_body(ROWS, {"sequence_id": 8})
    for response in (await v2.post(request), await v2.post(content, headers)):
        assert response.status_code == 200
        assert b'"carry_warm":"0/6"' in response.content.replace(b" ", b"")


async def test_a_state_is_restored_with_the_position_since_which_it_is_computed(
    api: Harness,
) -> None:
    write_other_version(api, "s")
    await api.chunk({"inputs": ROWS.tolist()})
    state = (await api.client.get("/v1/models/probe/streams/s/state")).json()
    assert state["since"] == 4
    await api.client.put("/v1/models/probe/streams/copy/state", json=state)
    await api.client.post("/v1/models/probe/streams/s/fork", json={"to": "fork"})
    for stream in ("copy", "fork"):
        document = (await api.chunk({"inputs": ROWS.tolist()}, stream=stream)).json()
        assert document["warm"] == {"events": 2, "of": 6}
    for events in (2, 4):
        document = (await api.chunk({"inputs": ROWS.tolist()})).json()
        assert document["warm"] == {"events": events, "of": 6}
    assert "warm" not in (await api.chunk({"inputs": ROWS.tolist()})).json()
    assert "since" not in (await api.client.get("/v1/models/probe/streams/s")).json()


async def test_a_state_is_not_restored_as_computed_since_a_later_position(api: Harness) -> None:
    write_other_version(api, "s")
    await api.chunk({"inputs": ROWS.tolist()})
    state = (await api.client.get("/v1/models/probe/streams/s/state")).json()
    later = {**state, "since": state["position"] + 1}
    response = await api.client.put("/v1/models/probe/streams/copy/state", json=later)
    assert problem(response, 422, "invalid_input")["at"] == "since"
    at_its_end = {**state, "since": state["position"]}
    response = await api.client.put("/v1/models/probe/streams/copy/state", json=at_its_end)
    assert response.status_code == 201
