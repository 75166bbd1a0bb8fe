"""Every state that a restore accepts can be continued, to the ends of what its counts hold."""

from __future__ import annotations

from typing import Any

import orjson
import ormsgpack
import pytest

from tests.service.transports.v1.harness import (
    EVENT,
    JSON,
    LATER,
    MSGPACK,
    Harness,
    problem,
    rows,
)

ADDRESS = "/v1/models/probe/streams"


@pytest.mark.parametrize("seen", [2**61 + 1, 2**62, 2**63 - 1, -1])
async def test_restore_rejects_counts_that_cannot_be_continued(api: Harness, seen: int) -> None:
    await api.chunk({"events": [EVENT]}, model="small")
    address = "/v1/models/small/streams"
    kept = (await api.client.get(f"{address}/s/state")).json()
    kept["state"]["clock.seen"] = seen
    response = await api.client.put(f"{address}/t/state", json=kept)
    assert problem(response, 422, "invalid_input")["at"] == "state"


@pytest.mark.parametrize("feed", ["events", "inputs"])
@pytest.mark.parametrize(
    "clock",
    [
        {"clock.seen": 2**61},
        {"clock.seen": 2**61, "clock.out_of_order": 2**61 - 1},
        {"clock.last_ms": -2_208_988_800_000},
        {"clock.last_ms": 7_258_118_399_999},
    ],
)
async def test_every_restored_state_can_be_continued(
    api: Harness, feed: str, clock: dict[str, int]
) -> None:
    await api.chunk({"events": [EVENT, LATER]}, model="small")
    address = "/v1/models/small/streams"
    kept = (await api.client.get(f"{address}/s/state")).json()
    kept["state"].update(clock)
    restored = await api.client.put(f"{address}/t/state", json={**kept, "feed": feed})
    assert restored.status_code == 201, restored.text
    features = len((await api.client.get("/v1/models/small")).json()["columns"])
    steps: dict[str, Any] = {"inputs": [[0.0] * features]}
    if feed == "events":
        moments = ["1900-01-01T00:00:00Z", "2199-12-31T23:59:59.999Z"]
        steps = {"events": [{**EVENT, "at": moment} for moment in moments * 2]}
    for _ in range(2):
        response = await api.chunk(steps, model="small", stream="t")
        assert response.status_code == 200, response.text
    kept = (await api.client.get(f"{address}/t/state")).json()
    assert kept["state"]["clock.seen"] >= clock.get("clock.seen", 0)


@pytest.mark.parametrize("position", [2**62, 2**62 - 1])
async def test_the_last_restorable_position_can_be_continued(api: Harness, position: int) -> None:
    await api.chunk({"inputs": rows(2).tolist()})
    kept = (await api.client.get(f"{ADDRESS}/s/state")).json()
    kept["position"] = position
    response = await api.client.put(f"{ADDRESS}/t/state", json=kept)
    assert response.status_code == 201
    for _ in range(2):
        response = await api.chunk({"inputs": rows(2).tolist()}, stream="t")
        assert response.status_code == 200, response.text
    assert (await api.client.get(f"{ADDRESS}/t")).json()["position"] == position + 4


@pytest.mark.parametrize("depth", [30, 150, 400, 1000])
@pytest.mark.parametrize("packed", [False, True])
async def test_deeply_nested_states_are_rejected(api: Harness, depth: int, packed: bool) -> None:
    await api.chunk({"inputs": rows(2).tolist()})
    kept = (await api.client.get(f"{ADDRESS}/s/state")).json()
    kept["state"]["lstm_1.hidden"] = "deep"
    if packed:
        text = ormsgpack.packb(kept).replace(b"\xa4deep", b"\x91" * depth + b"\x01")
    else:
        text = orjson.dumps(kept).replace(b'"deep"', b"[" * depth + b"1" + b"]" * depth)
    headers = {**(MSGPACK if packed else JSON), "accept": "application/json"}
    response = await api.client.put(f"{ADDRESS}/t/state", content=text, headers=headers)
    assert response.status_code in (400, 422), response.text
