"""A bidirectional network on streams, through the API and the store: cuts, ends, retries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import ormsgpack
import pytest

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from tests.service.transports.v1.harness import MSGPACK, Harness, harness, problem
from tests.support.events import FULL_SCHEMA
from tests.support.oracle import contracting_weights, oracle_in_blocks
from tests.support.servers import RealServer

NETWORK: dict[str, Any] = {
    "layers": [{"kind": "bidirectional", "units": 3}, {"kind": "gru", "units": 2}],
    "heads": [
        {"kind": "dense", "name": "label", "units": 2},
        {"kind": "sequence", "name": "last"},
    ],
    "blocks": {"size": 3, "lookahead": 2},
}
TAGGER = parse_spec({"name": "tagger", "features": 2, **NETWORK})
READER = parse_spec({"name": "reader", "events": FULL_SCHEMA.model_dump(mode="json"), **NETWORK})
ROWS = np.random.default_rng(1).normal(size=(14, 2)).astype(np.float32)
URL = "/v1/models/tagger/streams/{}"
EVENT = {"load": 12.5, "carrier": "UA", "heavy": True}


@pytest.fixture(scope="session")
def taggers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    folder = tmp_path_factory.mktemp("models")
    return {
        spec.name: write_artifact(folder / spec.name, spec, contracting_weights(spec, 2))
        for spec in (TAGGER, READER)
    }


@pytest.fixture
async def api(
    pipeline_server: RealServer, taggers: Mapping[str, Artifact]
) -> AsyncIterator[Harness]:
    async with harness(pipeline_server, taggers) as running:
        yield running


def wanted(taggers: Mapping[str, Artifact], rows: np.ndarray = ROWS) -> np.ndarray:
    return oracle_in_blocks(TAGGER, taggers["tagger"].weights, rows)


def packed(reply: Mapping[str, Any]) -> np.ndarray:
    parts = reply["outputs"]
    return np.concatenate(
        [np.reshape(parts["label"], (-1, 2)), np.reshape(parts["last"], (-1, 2))], axis=1
    )


def near(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


async def send(api: Harness, rows: np.ndarray, *, stream: str = "s", **more: Any) -> Any:
    response = await api.chunk({"inputs": rows.tolist(), **more}, stream=stream, model="tagger")
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("cuts", [[14], [1] * 14, [2, 5, 1, 6], [4, 4, 4, 2]], ids=str)
async def test_replies_have_the_outputs_of_completed_blocks(
    api: Harness, taggers: Mapping[str, Artifact], cuts: list[int]
) -> None:
    at, given = 0, 0
    for count in cuts:
        reply = await send(api, ROWS[at : at + count], position=at)
        at += count
        assert (reply["position"], reply["output_position"]) == (at, given)
        found = packed(reply)
        near(found, wanted(taggers)[given : given + len(found)])
        given += len(found)
        assert given == max(0, at - 2) // 3 * 3
    reply = await send(api, ROWS[:0], position=14, final=True)
    assert (reply["position"], reply["output_position"]) == (14, 12)
    near(packed(reply), wanted(taggers)[12:])


async def test_a_final_chunk_closes_the_stream(
    api: Harness, taggers: Mapping[str, Artifact]
) -> None:
    await send(api, ROWS[:4], position=0)
    last = await send(api, ROWS[4:7], position=4, final=True)
    near(packed(last), wanted(taggers, ROWS[:7]))
    again = await send(api, ROWS[4:7], position=4, final=True)
    assert again.pop("replayed")
    assert not last.pop("replayed")
    assert again == last, "judged before the end is"
    for body in (
        {"position": 7, "inputs": [[0, 0]]},
        {"inputs": [[0, 0]]},
        {"position": 4, "inputs": ROWS[4:7].tolist()},
        {"position": 9, "inputs": [], "final": True},
    ):
        refused = problem(await api.chunk(body, model="tagger"), 409, "stream_final")
        assert (refused["position"], refused["tag"]) == (7, last["tag"])
    assert (await api.client.delete(URL.format("s"))).status_code == 204
    assert (await send(api, ROWS[:3], position=0))["created"]


async def test_an_empty_final_chunk_has_its_own_digest(api: Harness) -> None:
    """Its retry is its own; the same events without `final` are another chunk."""
    await send(api, ROWS[:4], position=0)
    refused = await api.chunk({"position": 4, "inputs": []}, model="tagger")
    problem(refused, 422, "invalid_input")
    last = await send(api, ROWS[:0], position=4, final=True)
    assert (await send(api, ROWS[:0], position=4, final=True))["replayed"]
    assert (last["position"], len(last["outputs"]["label"])) == (4, 4)
    never = await send(api, ROWS[:0], stream="never", position=0, final=True)
    assert (never["created"], never["position"], never["outputs"]["last"]) == (True, 0, [])


async def test_a_retry_of_a_chunk_without_outputs_is_a_replay(api: Harness) -> None:
    first = await send(api, ROWS[:2], position=0)
    again = await send(api, ROWS[:2], position=0)
    assert (first["outputs"], again["replayed"]) == ({"label": [], "last": []}, True)
    assert {**again, "replayed": False} == first
    short = await api.client.post(
        URL.format("t") + "/chunks?return_sequences=false", json={"inputs": ROWS[:2].tolist()}
    )
    assert short.json()["outputs"] == {"label": None, "last": None}


@pytest.mark.parametrize("at", [2, 4, 7])
async def test_waiting_events_are_restored_and_forked(
    api: Harness, taggers: Mapping[str, Artifact], at: int
) -> None:
    response = await api.client.post(
        URL.format("s") + "/chunks?return_state=true", json={"inputs": ROWS[:at].tolist()}
    )
    state = (await api.client.get(URL.format("s") + "/state")).json()
    assert state["state"] == response.json()["state"]
    assert state["state"]["blocks.count"] == at - max(0, at - 2) // 3 * 3
    await api.client.post(URL.format("s") + "/fork", json={"to": "fork"})
    restored = await api.client.put(URL.format("copy") + "/state", json=state)
    assert restored.status_code == 201, restored.text
    for stream in ("s", "fork", "copy"):
        reply = await send(api, ROWS[at:], stream=stream, position=at, final=True)
        near(packed(reply), wanted(taggers)[reply["output_position"] :])
    wrong = {**state, "position": at + 1}
    refused = await api.client.put(URL.format("wrong") + "/state", json=wrong)
    assert "blocks.count" in problem(refused, 422, "invalid_input")["detail"]


async def test_a_whole_sequence_equals_a_finished_stream(
    api: Harness, taggers: Mapping[str, Artifact]
) -> None:
    body = {"sequences": [{"inputs": ROWS.tolist()}, {"inputs": ROWS[:2].tolist()}]}
    response = await api.client.post("/v1/models/tagger/predict", json=body)
    long, short = response.json()["predictions"]
    near(packed(long), wanted(taggers))
    near(packed(short), wanted(taggers, ROWS[:2]))


async def test_many_streams_are_closed_in_one_request(
    api: Harness, taggers: Mapping[str, Artifact]
) -> None:
    items = [
        {"stream": "a", "position": 0, "inputs": ROWS[:5].tobytes()},
        {"stream": "b", "position": 0, "inputs": ROWS.tobytes(), "final": True},
        {"stream": "a", "position": 5, "inputs": b"", "final": True},
        {"stream": "a", "position": 5, "inputs": ROWS[5:6].tobytes()},
    ]
    response = await api.client.post(
        "/v1/models/tagger/chunks", content=ormsgpack.packb({"chunks": items}), headers=MSGPACK
    )
    results = ormsgpack.unpackb(response.content)["results"]
    near(packed(results[1]["reply"]), wanted(taggers))
    found = np.concatenate([packed(results[0]["reply"]), packed(results[2]["reply"])])
    near(found, wanted(taggers, ROWS[:5]))
    assert (results[3]["status"], results[3]["error"]["code"]) == (409, "stream_final")


async def test_waiting_events_are_stored_encoded(api: Harness) -> None:
    """Gaps between events and codes are what they were when the events came, in any cuts."""
    events = [
        {**EVENT, "at": 1_357_035_420_000 + 60_000 * step * step, "heavy": step % 3 == 0}
        for step in range(8)
    ]
    found = []
    for stream, cuts in (("one", [8]), ("many", [1, 2, 1, 4])):
        outputs, at = [], 0
        for count in cuts:
            body = {"position": at, "events": events[at : at + count]}
            reply = (await api.chunk(body, stream=stream, model="reader")).json()
            outputs.append(packed(reply))
            at += count
        body = {"position": at, "events": [], "final": True}
        reply = (await api.chunk(body, stream=stream, model="reader")).json()
        found.append(np.concatenate([*outputs, packed(reply)]))
    assert found[0].shape == (8, 4)
    np.testing.assert_array_equal(found[0], found[1])
    sent = {"sequences": [{"events": events}]}
    whole = (await api.client.post("/v1/models/reader/predict", json=sent)).json()
    np.testing.assert_array_equal(packed(whole["predictions"][0]), found[0])


async def test_codes_of_waiting_events_are_checked(api: Harness) -> None:
    body = {"position": 0, "events": [{**EVENT, "at": 1_357_035_420_000}] * 2}
    assert (await api.chunk(body, model="reader")).status_code == 200
    url = "/v1/models/reader/streams/{}/state"
    state = (await api.client.get(url.format("s"))).json()
    names = [column.name for column in READER.columns]
    state["state"]["blocks.waiting"][1][names.index("carrier")] = 99
    refused = await api.client.put(url.format("copy"), json=state)
    assert "row 1, carrier" in problem(refused, 422, "invalid_input")["detail"]


async def test_the_model_detail_describes_its_blocks(api: Harness) -> None:
    model = (await api.client.get("/v1/models/tagger")).json()
    assert model["chunking"] == "invisible"
    assert model["blocks"] == {"size": 3, "lookahead": 2}


async def test_resets_of_a_stream_are_rejected(api: Harness) -> None:
    body = {"inputs": ROWS.tolist(), "resets": [2]}
    document = problem(await api.chunk(body, model="tagger"), 422, "resets_unsupported")
    assert document["at"] == "resets"
    assert api.position(model="tagger") is None
    predicted = await api.client.post("/v1/models/tagger/predict", json={"sequences": [body]})
    parts = [{"inputs": ROWS[:2].tolist()}, {"inputs": ROWS[2:].tolist()}]
    alone = await api.client.post("/v1/models/tagger/predict", json={"sequences": parts})
    outputs = [packed(each) for each in alone.json()["predictions"]]
    near(packed(predicted.json()["predictions"][0]), np.concatenate(outputs))
