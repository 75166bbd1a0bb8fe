"""Many streams in one request, and whole sequences to predict."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import ormsgpack
from pydantic import TypeAdapter

from service.core.errors import StateDamaged
from service.core.values import StreamKey
from service.transports.v1.reply_types import ManyReply, PredictReply
from tests.service.transports.v1.harness import EVENT, LATER, MSGPACK, Harness, problem, rows
from tests.support.pipelines import oracle_outputs


async def send(api: Harness, chunks: Any, *, model: str = "probe", query: str = "") -> Any:
    """The results of a request for many streams."""
    content = json.dumps({"chunks": chunks})
    response = await api.client.post(
        f"/v1/models/{model}/chunks{query}",
        content=content,
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 200, response.text
    TypeAdapter(ManyReply).validate_json(response.content)
    document = response.json()
    assert document["model"] == model
    assert document["version"] == api.models[model].version
    return document["results"]


def codes(results: Any) -> list[str | int]:
    """The code of each item that failed, the position of each that did not."""
    return [
        found["error"]["code"] if "error" in found else found["reply"]["position"]
        for found in results
    ]


async def test_each_item_has_the_reply_it_would_have_alone(api: Harness) -> None:
    given = {name: rows(size, seed=size) for name, size in (("a", 2), ("b", 3))}
    chunks = [
        {"stream": name, "position": 0, "inputs": values.tolist()} for name, values in given.items()
    ]
    more = rows(2, seed=9)
    chunks.append({"stream": "a", "position": 2, "inputs": more.tolist()})
    results = await send(api, chunks)
    assert [found["reply"]["stream"] for found in results] == ["a", "b", "a"]
    assert [found["status"] for found in results] == [200, 200, 200]
    expected = oracle_outputs(api.models["probe"], np.concatenate((given["a"], more)))
    out = api.models["probe"].outputs.slices["out"]
    np.testing.assert_allclose(
        results[0]["reply"]["outputs"]["out"] + results[2]["reply"]["outputs"]["out"],
        expected[:, out],
        rtol=1e-5,
        atol=1e-6,
    )
    assert "tag" in results[1]["reply"]
    assert results[1]["reply"]["created"] is True


async def test_an_item_that_cannot_be_read_fails_alone(api: Harness) -> None:
    good = {"stream": "good", "inputs": rows(1).tolist()}
    results = await send(
        api,
        [
            {"stream": "bad", "inputs": [[1, 2]]},
            good,
            {"stream": "bad", "inputs": rows(1).tolist()},
            {"stream": "no good", "inputs": rows(1).tolist()},
            17,
        ],
    )
    assert codes(results) == [
        "invalid_input",
        1,
        "previous_failed",
        "invalid_name",
        "invalid_input",
    ]
    assert [found["status"] for found in results] == [422, 200, 424, 400, 422]
    assert [found["error"]["at"] for found in (results[0], *results[3:])] == [
        "chunks[0].inputs[0]",
        "chunks[3].stream",
        "chunks[4]",
    ]
    assert [results[at]["error"].get("stream") for at in (0, 2, 3)] == ["bad", "bad", None]
    assert api.position("bad") is None
    assert api.counts.seen["invalid_input"] == 2
    assert api.counts.seen["previous_failed"] == 1


async def test_events_of_many_streams_get_their_own_outputs(api: Harness) -> None:
    chunks = [
        {"stream": "a", "events": [EVENT]},
        {"stream": "b", "events": [{**EVENT, "load": 1e39}]},
    ]
    later = {"stream": "a", "events": [LATER]}
    for items, positions in ((chunks, [1]), ([*chunks, later], [2, 3])):
        results = await send(api, items, model="small")
        assert codes(results) == [positions[0], "invalid_input", *positions[1:]]
        error = results[1]["error"]
        assert (error["at"], error["stream"]) == ("chunks[1].events[0].load", "b")
        assert error["detail"].startswith("chunks[1].events[0].load: expected ")
    broken = [{"stream": "c", "events": [{"load": 1}]}, *chunks]
    results = await send(api, broken, model="small")
    assert results[0]["error"]["errors"][0]["at"] == "chunks[0].events[0].at"
    assert codes(results[1:]) == [4, "invalid_input"]


async def test_a_whole_request_can_be_retried(api: Harness) -> None:
    chunks = [
        {"stream": "a", "position": at, "inputs": rows(2, seed=at).tolist()} for at in (0, 2, 4)
    ]
    first = await send(api, chunks)
    again = await send(api, chunks)
    assert codes(first) == [2, 4, 6]
    assert codes(again) == ["position_behind", "position_behind", 6]
    assert again[2]["reply"]["replayed"] is True
    assert again[2]["reply"]["outputs"] == first[2]["reply"]["outputs"]


async def test_if_match_applies_to_its_item(api: Harness) -> None:
    one = rows(1).tolist()
    (first,) = await send(api, [{"stream": "a", "inputs": one}])
    etag = f"{first['reply']['epoch']}-{first['reply']['tag']}"
    results = await send(
        api,
        [
            {"stream": "a", "inputs": one, "if_match": etag},
            {"stream": "b", "inputs": one, "if_match": "*"},
            {"stream": "a", "inputs": one, "if_match": f'"{etag}"'},
            {"stream": "c", "inputs": one, "if_match": ""},
        ],
    )
    assert codes(results) == [2, "state_changed", "state_changed", "invalid_precondition"]
    response = await api.client.post(
        "/v1/models/probe/chunks", json={"chunks": []}, headers={"if-match": "*"}
    )
    problem(response, 400, "invalid_precondition")


async def test_an_invalid_request_is_rejected_as_a_whole(api: Harness) -> None:
    item = {"stream": "a", "inputs": [[1, 2, 3]]}
    for body, status, code in (
        ("{", 400, "malformed_body"),
        ("[]", 422, "invalid_input"),
        ("{}", 422, "invalid_input"),
        ('{"chunks":{}}', 422, "invalid_input"),
        ('{"chunks":[],"more":1}', 422, "invalid_input"),
        (json.dumps({"chunks": [{"stream": "a"}] * 6}), 422, "invalid_input"),
        (json.dumps({"chunks": [item] * 6}), 422, "invalid_input"),
    ):
        response = await api.client.post("/v1/models/probe/chunks", content=body)
        document = problem(response, status, code)
    assert (document["at"], document["expected"], document["got"]) == ("chunks", 5, 6)
    assert await send(api, []) == []
    assert not api.store.states


async def test_options_apply_to_every_item(api: Harness) -> None:
    chunks = [{"stream": name, "inputs": rows(3).tolist()} for name in "ab"]
    every = await send(api, chunks)
    last = await send(
        api,
        [{**chunk, "stream": chunk["stream"] * 2} for chunk in chunks],
        query="?return_sequences=false&return_state=1",
    )
    for one, other in zip(every, last, strict=True):
        assert other["reply"]["outputs"]["out"] == one["reply"]["outputs"]["out"][-1]
        assert set(other["reply"]["state"]) == {
            part.name for part in api.models["probe"].state.parts
        }


async def test_items_in_messagepack_equal_those_in_json(api: Harness) -> None:
    given = rows(2)
    body = {
        "chunks": [
            {"stream": "a", "position": 0, "inputs": given.tobytes()},
            {"stream": "b", "inputs": b"123"},
            {"stream": "b", "inputs": given.tobytes()},
        ]
    }
    response = await api.client.post(
        "/v1/models/probe/chunks", content=ormsgpack.packb(body), headers=MSGPACK
    )
    results = ormsgpack.unpackb(response.content)["results"]
    assert codes(results) == [2, "invalid_input", "previous_failed"]
    assert results[1]["error"]["at"] == "chunks[1].inputs"


async def test_a_damaged_stream_fails_alone(api: Harness) -> None:
    api.store.damaged[StreamKey("probe", "a")] = StateDamaged("checksum", stream="a")
    one = rows(1).tolist()
    results = await send(api, [{"stream": name, "inputs": one} for name in "ab"])
    assert codes(results) == ["state_damaged", 1]


async def predict(
    api: Harness, body: Any, *, model: str = "probe", query: str = ""
) -> httpx.Response:
    return await api.client.post(f"/v1/models/{model}/predict{query}", json=body)


async def test_predictions_start_from_zero_and_store_nothing(api: Harness) -> None:
    given = [rows(4, seed=1), rows(7, seed=2)]
    body = {"sequences": [{"inputs": values.tolist()} for values in given]}
    response = await predict(api, body, query="?return_state=true")
    TypeAdapter(PredictReply).validate_json(response.content)
    document = response.json()
    out = api.models["probe"].outputs.slices["out"]
    for values, found in zip(given, document["predictions"], strict=True):
        expected = oracle_outputs(api.models["probe"], values)[:, out]
        np.testing.assert_allclose(found["outputs"]["out"], expected, rtol=1e-5, atol=1e-6)
        assert len(found["state"]["lstm_1.hidden"]) == 5
    assert document["model"] == "probe"
    assert not api.store.states
    again = ormsgpack.unpackb(
        (
            await api.client.post(
                "/v1/models/probe/predict",
                content=ormsgpack.packb({"sequences": [{"inputs": v.tobytes()} for v in given]}),
                headers=MSGPACK,
            )
        ).content
    )
    for one, other in zip(document["predictions"], again["predictions"], strict=True):
        np.testing.assert_array_equal(
            np.float32(one["outputs"]["out"]), np.float32(other["outputs"]["out"])
        )


async def test_predictions_of_events_equal_a_stream(api: Harness) -> None:
    response = await predict(api, {"sequences": [{"events": [EVENT, LATER]}]}, model="small")
    alone = await api.chunk({"events": [EVENT, LATER]}, model="small")
    assert response.json()["predictions"][0]["outputs"] == alone.json()["outputs"]


async def test_predict_names_the_sequence_whose_event_cannot_be_encoded(api: Harness) -> None:
    overflow = {**LATER, "load": 1e39}
    sequences = [{"events": [EVENT]}, {"events": [EVENT, overflow]}]
    response = await predict(api, {"sequences": sequences}, model="small")
    document = problem(response, 422, "invalid_input")
    assert document["at"] == "sequences[1].events[1].load"
    assert document["detail"].startswith("sequences[1].events[1].load: expected ")


async def test_invalid_sequences_are_rejected_as_a_whole(api: Harness) -> None:
    good = {"inputs": rows(1).tolist()}
    for sequence, at in (
        ({"inputs": [[1, 2]]}, "sequences[1].inputs[0]"),
        ({"inputs": []}, "sequences[1].inputs"),
        ({}, "sequences[1]"),
        ({"inputs": [[1, 2, 1e39]]}, "sequences[1].inputs[0][2]"),
        ({**good, "position": 0}, "sequences[1].position"),
    ):
        response = await predict(api, {"sequences": [good, sequence]})
        document = problem(response, 422, "invalid_input")
        assert document["at"] == at
    members = "events, inputs, resets, false_alarms_per_day, state_token"
    assert document["expected"] == f"one of the members {members}"
    too_long = [{"inputs": rows(20).tolist()}] * 2
    document = problem(await predict(api, {"sequences": too_long}), 413, "chunk_too_long")
    assert (document["at"], document["expected"], document["got"]) == ("sequences", 30, 40)
    document = problem(await predict(api, {"sequences": [good] * 6}), 422, "invalid_input")
    assert document["expected"] == 5
    problem(await predict(api, {"sequences": []}), 422, "invalid_input")
