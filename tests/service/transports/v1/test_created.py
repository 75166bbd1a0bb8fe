"""`created` is true in the reply, and in the replay, of the chunk that created its stream only."""

from __future__ import annotations

from typing import Any

import ormsgpack

from tests.service.transports.v1.harness import MSGPACK, Harness, rows

ADDRESS = "/v1/models/probe/streams"


def body(position: int, count: int = 2) -> dict[str, Any]:
    return {"position": position, "inputs": rows(count, seed=position).tolist()}


async def created(api: Harness, position: int, stream: str = "s") -> tuple[bool, bool]:
    """`created` of a chunk's reply and of its replay."""
    first = (await api.chunk(body(position), stream=stream)).json()
    again = (await api.chunk(body(position), stream=stream)).json()
    packed = await api.client.post(
        f"{ADDRESS}/{stream}/chunks",
        content=ormsgpack.packb({"position": position, "inputs": rows(2, seed=position).tobytes()}),
        headers=MSGPACK,
    )
    assert (first["replayed"], again["replayed"]) == (False, True)
    third = ormsgpack.unpackb(packed.content)
    assert third["replayed"]
    assert third.get("created", False) == again.get("created", False)
    return first.get("created", False), again.get("created", False)


async def test_created_is_true_for_the_chunk_that_creates_its_stream(api: Harness) -> None:
    assert await created(api, 0) == (True, True)
    assert await created(api, 2) == (False, False)


async def at_zero(api: Harness, stream: str) -> None:
    """A stream that exists at position 0, with a state that another one left."""
    await api.chunk(body(0), stream="source")
    kept = (await api.client.get(f"{ADDRESS}/source/state")).json()
    response = await api.client.put(f"{ADDRESS}/{stream}/state", json={**kept, "position": 0})
    assert response.status_code == 201


async def test_created_is_false_after_a_restore_at_position_0(api: Harness) -> None:
    await at_zero(api, "s")
    assert await created(api, 0) == (False, False)
    assert await created(api, 2) == (False, False)


async def test_created_is_false_after_a_fork_at_position_0(api: Harness) -> None:
    await at_zero(api, "origin")
    forked = await api.client.post(f"{ADDRESS}/origin/fork", json={"to": "s"})
    assert forked.json()["position"] == 0
    assert await created(api, 0) == (False, False)
    assert await created(api, 0, "origin") == (False, False)


async def test_created_is_false_for_an_item_after_a_restore_at_position_0(api: Harness) -> None:
    await at_zero(api, "s")
    items = [{"stream": name, **body(0)} for name in ("s", "new")]
    for _ in range(2):
        results = (await api.client.post("/v1/models/probe/chunks", json={"chunks": items})).json()
        replies = [result["reply"] for result in results["results"]]
        assert [reply.get("created") for reply in replies] == [None, True]


async def test_created_is_true_after_a_deletion(api: Harness) -> None:
    await at_zero(api, "s")
    await api.client.delete(f"{ADDRESS}/s")
    assert await created(api, 0) == (True, True)
