"""The history of a stream, and rewinding it, over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import numpy as np
import ormsgpack
import pytest
from pydantic import TypeAdapter

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.history import HistorySpec
from models.spec.model import parse_spec
from service.access.limits import KeyLimits
from service.transports.v1.reply_types import HistoryReply, StreamInfo
from tests.service.transports.v1.harness import EVENT, LATER, Harness, harness, problem, rows
from tests.support.oracle import contracting_weights
from tests.support.servers import RealServer

STREAM = "/v1/models/{}/streams/{}"
HISTORY = HistorySpec(events=8, snapshots=4)
ZERO_TAG = "0" * 32
TAGGER = parse_spec(
    {
        "name": "tagger",
        "features": 3,
        "layers": [{"kind": "bidirectional", "units": 3}],
        "heads": [{"kind": "dense", "name": "label", "units": 2}],
        "blocks": {"size": 3, "lookahead": 2},
    }
)
WHOLE = parse_spec(
    {
        "name": "attender",
        "features": 3,
        "layers": [
            {"kind": "lstm", "units": 3},
            {"kind": "attention", "over": "chunk", "units": 3},
        ],
        "heads": [{"kind": "dense", "name": "label", "units": 2}],
        "max_chunk_steps": 6,
    }
)


@pytest.fixture(scope="module")
def kinds(
    models: Mapping[str, Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Artifact]:
    folder = tmp_path_factory.mktemp("kinds")
    specs = [TAGGER, WHOLE]
    written = {
        spec.name: write_artifact(folder / spec.name, spec, contracting_weights(spec, 3))
        for spec in specs
    }
    return {**models, **written}


@pytest.fixture
async def api(pipeline_server: RealServer, kinds: Mapping[str, Artifact]) -> AsyncIterator[Harness]:
    async with harness(pipeline_server, kinds, history=HISTORY) as running:
        yield running


async def send(api: Harness, *counts: int, model: str = "probe", stream: str = "s") -> Any:
    """Send rows in chunks of these lengths, always the same rows; the last reply."""
    every, reply = rows(100), None
    for count in counts:
        start = reply["position"] if reply else 0
        body = {"inputs": every[start : start + count].tolist(), "position": start}
        response = await api.chunk(body, model=model, stream=stream)
        assert response.status_code == 200, response.text
        reply = response.json()
    return reply


async def rewind(
    api: Harness, position: int, etag: str | None = None, *, model: str = "probe", stream: str = "s"
) -> httpx.Response:
    headers = {} if etag is None else {"if-match": etag}
    path = f"{STREAM.format(model, stream)}/rewind"
    return await api.client.post(path, json={"position": position}, headers=headers)


async def history(api: Harness, query: str = "", model: str = "probe", stream: str = "s") -> Any:
    response = await api.client.get(f"{STREAM.format(model, stream)}/history{query}")
    assert response.status_code == 200, response.text
    TypeAdapter(HistoryReply).validate_json(response.content)
    return response.json()


async def state(api: Harness, model: str = "probe", stream: str = "s") -> Any:
    return (await api.client.get(f"{STREAM.format(model, stream)}/state")).json()["state"]


def etag(reply: Mapping[str, Any]) -> str:
    return f'"{reply["epoch"]}-{reply["tag"]}"'


async def test_events_are_kept_as_they_came(api: Harness) -> None:
    chunks = [
        {"events": [EVENT, LATER], "resets": [1], "position": 0},
        {"events": [LATER], "position": 2},
    ]
    for chunk in chunks:
        reply = (await api.chunk(chunk, model="small")).json()
    kept = await history(api, model="small")
    assert kept["model"] == "small"
    assert (kept["position"], kept["start"], kept["next"]) == (3, 0, None)
    assert (kept["epoch"], kept["tag"], kept["feed"]) == (reply["epoch"], reply["tag"], "events")
    at_ms = 1_357_035_420_000
    first = {**EVENT, "at": at_ms}
    later = {name: value for name, value in LATER.items() if value is not None}
    assert kept["chunks"] == [
        {"position": 0, "events": [first, later], "resets": [1]},
        {"position": 2, "events": [later]},
    ]
    # what is kept is what another stream can be fed with, to the same state
    for chunk in kept["chunks"]:
        assert (await api.chunk(chunk, model="small", stream="t")).status_code == 200
    assert await state(api, "small", "t") == await state(api, "small")
    packed = await api.client.get(
        f"{STREAM.format('small', 's')}/history", headers={"accept": "application/msgpack"}
    )
    assert ormsgpack.unpackb(packed.content) == kept
    assert packed.headers["etag"] == etag(reply)


async def test_history_is_read_in_parts(api: Harness) -> None:
    await send(api, 3, 4, 5)
    every = rows(100)
    whole = await history(api)
    assert (whole["start"], whole["next"]) == (3, None)
    assert [chunk["position"] for chunk in whole["chunks"]] == [3, 7]
    assert whole["chunks"][0]["inputs"] == every[3:7].tolist()
    part = await history(api, "?from=5&limit=4")
    assert [(each["position"], each["inputs"]) for each in part["chunks"]] == [
        (5, every[5:7].tolist()),
        (7, every[7:9].tolist()),
    ]
    assert part["next"] == 9
    rest = await history(api, f"?from={part['next']}&limit=3")
    assert ([each["position"] for each in rest["chunks"]], rest["next"]) == ([9], None)
    assert (await history(api, "?from=12"))["chunks"] == []
    for query in ("from=-1", "from=x", "limit=0", "limit=21", "to=3", f"from={2**63}"):
        response = await api.client.get(f"{STREAM.format('probe', 's')}/history?{query}")
        problem(response, 422, "invalid_input")
    problem(await api.client.get(f"{STREAM.format('probe', 't')}/history"), 404, "stream_not_found")


async def test_a_rewound_stream_is_the_stream_that_stopped_there(api: Harness) -> None:
    last = await send(api, 4, 3, 4)
    await send(api, 4, 2, stream="t")
    response = await rewind(api, 6, etag(last))
    assert response.status_code == 200, response.text
    TypeAdapter(StreamInfo).validate_json(response.content)
    rewound = response.json()
    assert (rewound["position"], rewound["tag"], rewound["feed"]) == (6, ZERO_TAG, "inputs")
    assert response.headers["etag"] == etag(rewound)
    assert rewound["epoch"] != last["epoch"]
    found, expected = await state(api), await state(api, stream="t")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-6)
    kept = await history(api)
    assert [(each["position"], len(each["inputs"])) for each in kept["chunks"]] == [(0, 4), (4, 2)]
    assert max(kept["snapshots"]) <= 6
    both = [
        (await api.chunk({"inputs": rows(3, seed=9).tolist(), "position": 6}, stream=each)).json()
        for each in "st"
    ]
    assert [each["position"] for each in both] == [9, 9]
    first, second = (each["outputs"]["out"] for each in both)
    np.testing.assert_allclose(first, second, atol=1e-6)


async def test_chunks_of_the_old_epoch_are_rejected(api: Harness) -> None:
    last = await send(api, 4, 4)
    assert (await rewind(api, 4)).status_code == 200
    inputs = rows(100)[4:8].tolist()
    old = {"inputs": inputs, "position": 4, "epoch": last["epoch"]}
    document = problem(await api.chunk(old), 409, "epoch_mismatch")
    assert document["position"] == 4
    stale = {"if-match": etag(last)}
    problem(await api.chunk({"inputs": inputs}, headers=stale), 412, "state_changed")
    problem(await api.chunk({"inputs": inputs, "position": 8}), 409, "position_ahead")
    problem(await api.chunk({"inputs": inputs, "position": 0}), 409, "position_behind")
    # a retry of the last chunk begins at the position of the stream, and is applied again
    again = await api.chunk({"inputs": inputs, "position": 4})
    assert (again.status_code, again.json()["replayed"]) == (200, False)


async def test_a_position_whose_state_is_not_kept_is_rejected_with_those_that_are(
    api: Harness,
) -> None:
    last = await send(api, 2, 9, 3, 2)
    kept = await history(api)
    available = kept["available"]
    assert available[-1][1] == last["position"] == 16
    for position in range(20):
        response = await rewind(api, position)
        if any(first <= position <= end for first, end in available):
            assert response.status_code == 200
            await api.client.delete(STREAM.format("probe", "s"))
            assert (await send(api, 2, 9, 3, 2))["position"] == 16
            continue
        document = problem(response, 409, "position_unavailable")
        assert document["available"] == available
        assert (document["got"], document["position"]) == (position, 16)
    assert (await api.client.get(STREAM.format("probe", "s"))).json()["position"] == 16
    problem(await rewind(api, 0, stream="t"), 404, "stream_not_found")
    path = f"{STREAM.format('probe', 's')}/rewind"
    for body in ({}, {"position": -1}, {"position": "4"}, {"position": 4, "epoch": "x"}):
        problem(await api.client.post(path, json=body), 422, "invalid_input")


async def test_rewinding_to_the_start_and_to_the_head(api: Harness) -> None:
    last = await send(api, 3, 2)
    at_head = (await rewind(api, 5)).json()
    assert (at_head["position"], at_head["tag"]) == (5, ZERO_TAG)
    assert at_head["epoch"] != last["epoch"]
    before = await state(api)
    assert (await rewind(api, 0)).json()["position"] == 0
    again = await send(api, 3, 2)
    assert ("created" in again, again["epoch"] != at_head["epoch"]) == (False, True)
    after = await state(api)
    assert all(after[name] == pytest.approx(values, abs=1e-6) for name, values in before.items())
    assert (await rewind(api, 0)).status_code == 200, "the start stays exact"


@pytest.mark.parametrize("damage", ["lost", "short", "flipped"])
async def test_a_snapshot_that_is_lost_or_damaged_is_not_used(
    pipeline_server: RealServer, api: Harness, damage: str
) -> None:
    await send(api, 5, 5, 5)
    position = (await history(api))["snapshots"][0]
    assert position > 0
    with pipeline_server.client() as client:
        [name] = client.keys("*:v:probe:s")
        for field in client.hkeys(name):
            if field.startswith(b"s") and damage == "lost":
                client.hdel(name, field)
            elif field.startswith(b"s"):
                value = client.hget(name, field)
                client.hset(name, field, value[:-1] + (b"" if damage == "short" else b"x"))
    problem(await rewind(api, position), 500, "state_damaged")
    assert (await api.client.get(STREAM.format("probe", "s"))).json()["position"] == 15


async def test_a_repeated_request_is_applied_once_under_if_match(api: Harness) -> None:
    last = await send(api, 4, 4)
    first = (await rewind(api, 4, etag(last))).json()
    document = problem(await rewind(api, 4, etag(last)), 412, "state_changed")
    assert (document["epoch"], document["position"]) == (first["epoch"], 4)
    assert document["tag"] == ZERO_TAG
    again = (await rewind(api, 4)).json()
    assert (again["position"], again["epoch"] != first["epoch"]) == (4, True)


async def test_a_model_without_history_offers_nothing(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    async with harness(pipeline_server, models) as api:
        await send(api, 4)
        kept = await history(api)
        assert (kept["available"], kept["snapshots"], kept["chunks"]) == ([], [], [])
        assert kept["start"] == 4
        document = problem(await rewind(api, 4), 409, "position_unavailable")
        assert document["available"] == []


async def test_a_closed_stream_is_open_again_before_its_end(api: Harness) -> None:
    await send(api, 4, model="tagger")
    final = {"inputs": rows(100)[4:7].tolist(), "position": 4, "final": True}
    assert (await api.chunk(final, model="tagger")).status_code == 200
    assert (await history(api, model="tagger"))["chunks"][-1]["final"] is True
    assert (await rewind(api, 7, model="tagger")).status_code == 200
    problem(await api.chunk({"inputs": rows(1).tolist()}, model="tagger"), 409, "stream_final")
    assert (await rewind(api, 5, model="tagger")).status_code == 200
    await send(api, 4, 1, model="tagger", stream="t")
    assert await state(api, "tagger") == await state(api, "tagger", "t")
    ends = [
        (
            await api.chunk(
                {"inputs": rows(100)[5:7].tolist(), "final": True}, model="tagger", stream=each
            )
        ).json()["outputs"]
        for each in "st"
    ]
    np.testing.assert_allclose(ends[0]["label"], ends[1]["label"], atol=1e-6)


async def test_a_model_that_sees_whole_chunks_is_rewound_between_them(api: Harness) -> None:
    await send(api, 3, 2, 4, model="attender")
    assert (await history(api, model="attender"))["available"] == [[0, 0], [3, 3], [5, 5], [9, 9]]
    problem(await rewind(api, 4, model="attender"), 409, "position_unavailable")
    assert (await rewind(api, 5, model="attender")).status_code == 200
    await send(api, 3, 2, model="attender", stream="t")
    assert await state(api, "attender") == await state(api, "attender", "t")


async def test_a_rewound_stream_counts_once_for_the_quota_of_its_key(
    pipeline_server: RealServer, kinds: Mapping[str, Artifact]
) -> None:
    async with harness(pipeline_server, kinds, history=HISTORY, requires_keys=True) as api:
        headers = {"authorization": await api.key(limits=KeyLimits(streams=1))}
        api.client.headers.update(headers)
        await send(api, 4, 4)
        assert (await rewind(api, 4)).status_code == 200
        response = await api.chunk({"inputs": rows(2).tolist()}, stream="t")
        assert problem(response, 429, "limit_exceeded")["limit"] == "streams"
        assert (await api.client.delete(STREAM.format("probe", "s"))).status_code == 204
        assert (await send(api, 2, stream="t"))["position"] == 2
