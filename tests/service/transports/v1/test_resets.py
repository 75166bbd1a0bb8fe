"""Resets and dry runs over HTTP: each form of request, and what is rejected."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import ormsgpack
import pytest
from pydantic import TypeAdapter

from service.codec.reply_types import ChunkReply
from tests.service.transports.v1.harness import (
    EVENT,
    EVENT_MS,
    JSON,
    LATER,
    MSGPACK,
    Harness,
    problem,
    rows,
)

ROWS = rows(7)
EVENTS = [{**EVENT, "load": at, "at": EVENT_MS + 1000 * at} for at in range(7)]
RESETS = [2, 3]
SESSIONS = [(0, 2), (2, 3), (3, 7)]


def marked(events: list[dict[str, Any]], resets: list[int]) -> list[dict[str, Any]]:
    return [{**event, "reset": True} if at in resets else event for at, event in enumerate(events)]


async def sessions(api: Harness, model: str, name: str, values: list[Any]) -> dict[str, Any]:
    """The outputs of each session as a sequence of its own."""
    parts = [{name: values[start:stop]} for start, stop in SESSIONS]
    response = await api.client.post(f"/v1/models/{model}/predict", json={"sequences": parts})
    found = [each["outputs"] for each in response.json()["predictions"]]
    return {output: np.concatenate([part[output] for part in found]) for output in found[0]}


def near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        {"events": marked(EVENTS, RESETS)},
        {"events": EVENTS, "resets": RESETS},
        {"events": [{"reset": False, **event} for event in marked(EVENTS, [3])], "resets": [2]},
    ],
    ids=["marked", "listed", "both"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["JSON", "MessagePack"])
async def test_an_event_with_reset_starts_from_the_initial_state(
    api: Harness, body: dict[str, Any], *, packed: bool
) -> None:
    expected = await sessions(api, "small", "events", EVENTS)
    content = ormsgpack.packb(body) if packed else orjson.dumps(body)
    headers = {**(MSGPACK if packed else JSON), "accept": "application/json"}
    for stream in ("whole", "again"):
        reply = (await api.chunk(content, model="small", stream=stream, headers=headers)).json()
        near(reply["outputs"], expected)
        assert reply["position"] == 7
    chunks = [{"stream": "item", **body}, {"stream": "other", "events": EVENTS}]
    content = ormsgpack.packb({"chunks": chunks}) if packed else orjson.dumps({"chunks": chunks})
    many = await api.client.post("/v1/models/small/chunks", content=content, headers=headers)
    near(many.json()["results"][0]["reply"]["outputs"], expected)
    sequences = {"sequences": [body]}
    content = ormsgpack.packb(sequences) if packed else orjson.dumps(sequences)
    found = await api.client.post("/v1/models/small/predict", content=content, headers=headers)
    near(found.json()["predictions"][0]["outputs"], expected)


async def test_rows_named_in_resets_start_from_the_initial_state(api: Harness) -> None:
    expected = await sessions(api, "probe", "inputs", ROWS.tolist())
    body = {"position": 0, "inputs": ROWS.tolist(), "resets": RESETS}
    first = (await api.chunk(body)).json()
    near(first["outputs"], expected)
    packed = await api.packed(
        {"position": 0, "inputs": ROWS.tobytes(), "resets": RESETS}, stream="packed"
    )
    near(packed["outputs"], expected)

    again = (await api.chunk(body)).json()
    assert again == {**first, "replayed": True}
    for other in ([], [2], [2, 3, 4]):
        document = problem(await api.chunk({**body, "resets": other}), 409, "position_behind")
        assert document["position"] == 7
    in_two = [
        await api.chunk({"inputs": ROWS[:3].tolist(), "resets": [2]}, stream="cut"),
        await api.chunk({"inputs": ROWS[3:].tolist(), "resets": [0]}, stream="cut"),
    ]
    found = [response.json()["outputs"] for response in in_two]
    near({name: np.concatenate([part[name] for part in found]) for name in found[0]}, expected)


@pytest.mark.parametrize(
    ("body", "at", "expected"),
    [
        ({"inputs": ROWS.tolist(), "resets": [7]}, "resets[0]", "ascending indexes from 0 to 6"),
        ({"inputs": ROWS.tolist(), "resets": [1, 1]}, "resets[1]", "ascending indexes"),
        ({"inputs": ROWS.tolist(), "resets": [2, 1]}, "resets[1]", "ascending indexes"),
        ({"inputs": ROWS.tolist(), "resets": [-1]}, "resets[0]", "greater than or equal to 0"),
        ({"inputs": ROWS.tolist(), "resets": [1.5]}, "resets[0]", "integer"),
        ({"inputs": ROWS.tolist(), "resets": [True]}, "resets[0]", "integer"),
        ({"inputs": ROWS.tolist(), "resets": 2}, "resets", "a list"),
        ({"inputs": ROWS.tolist(), "resets": "2"}, "resets", "a list"),
        ({"inputs": ROWS.tolist(), "reset": [2]}, "reset", "one of the members"),
        ({"inputs": ROWS.tolist(), "dry_run": 1}, "dry_run", "boolean"),
    ],
)
async def test_wrong_resets_of_rows_are_rejected(
    api: Harness, body: dict[str, Any], at: str, expected: str
) -> None:
    document = problem(await api.chunk(body), 422, "invalid_input")
    assert document["at"] == at
    assert expected in document["expected"]
    assert api.position() is None


@pytest.mark.parametrize("value", [1, "true", None, [True]])
async def test_wrong_marks_of_events_are_rejected(api: Harness, value: Any) -> None:
    events = [EVENT, {**LATER, "reset": value}]
    document = problem(await api.chunk({"events": events}, model="small"), 422, "invalid_input")
    assert document["at"] == "events[1].reset"
    assert "boolean" in document["expected"]
    unknown = {"events": [{**EVENT, "resets": True}]}
    document = problem(await api.chunk(unknown, model="small"), 422, "invalid_input")
    assert document["at"] == "events[0].resets"
    assert document["expected"].endswith("late, reset")


async def test_a_dry_run_answers_and_applies_nothing(api: Harness) -> None:
    body = {"position": 0, "inputs": ROWS.tolist(), "resets": [3]}
    response = await api.chunk({**body, "dry_run": True})
    assert response.status_code == 200
    TypeAdapter(ChunkReply).validate_json(response.content)
    dry = response.json()
    assert "etag" not in response.headers
    assert (dry["dry_run"], dry["epoch"], dry["tag"], dry["position"]) == (True, None, None, 0)
    assert api.position() is None

    applied = (await api.chunk(body)).json()
    assert applied["outputs"] == dry["outputs"]
    assert "dry_run" not in applied
    more = {"position": 7, "inputs": ROWS[:2].tolist(), "dry_run": True}
    response = await api.chunk(more)
    dry = response.json()
    facts = ("epoch", "position", "tag")
    assert [dry[name] for name in facts] == [applied[name] for name in facts]
    assert response.headers["etag"] == f'"{applied["epoch"]}-{applied["tag"]}"'
    assert api.position() == 7
    problem(await api.chunk({**more, "position": 8}), 409, "position_ahead")
    problem(await api.chunk({**more, "epoch": "0" * 16}), 409, "epoch_mismatch")
    problem(await api.chunk({**more, "inputs": [[1, 2]]}), 422, "invalid_input")
    items = [{"stream": "s", **more}, {"stream": "s", "inputs": ROWS[:2].tolist()}]
    many = await api.client.post("/v1/models/probe/chunks", json={"chunks": items})
    first, second = (each["reply"] for each in many.json()["results"])
    assert (first["dry_run"], first["position"], second["position"]) == (True, 7, 9)
    near(second["outputs"], first["outputs"])
