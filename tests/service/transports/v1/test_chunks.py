"""One chunk over HTTP: what comes out, what is rejected, and that a rejection changes nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import ormsgpack
import pytest
from pydantic import TypeAdapter

from models.events.encode import Clock, encode
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
from tests.support.oracle import oracle_step
from tests.support.pipelines import oracle_outputs
from tests.support.strict_events import columns_from_events


async def test_outputs_do_not_depend_on_how_the_sequence_is_cut(api: Harness) -> None:
    given = rows(12)
    expected = api.models["probe"].outputs.by_name(
        oracle_outputs(api.models["probe"], given).astype(np.float32)
    )
    at = 0
    for size in (1, 4, 7):
        response = await api.chunk({"position": at, "inputs": given[at : at + size].tolist()})
        assert response.status_code == 200, response.text
        reply = response.json()
        TypeAdapter(ChunkReply).validate_json(response.content)
        for name, values in expected.items():
            np.testing.assert_allclose(
                reply["outputs"][name], values[at : at + size], rtol=1e-5, atol=1e-6
            )
        at += size
        assert reply["position"] == at
        assert reply.get("created") == (True if at == 1 else None)
        assert response.headers["etag"] == f'"{reply["epoch"]}-{reply["tag"]}"'
    assert api.counts.seen["events"] == 12


async def test_events_are_encoded_as_in_training(api: Harness) -> None:
    artifact = api.models["small"]
    schema = artifact.spec.events
    assert schema is not None
    events = [{**EVENT, "at": EVENT_MS}, LATER]
    encoded, _ = encode(schema, columns_from_events(schema, events), Clock())
    outputs, _ = oracle_step(artifact.spec, artifact.weights, encoded, artifact.state.zero().floats)
    expected = artifact.outputs.by_name(outputs.astype(np.float32))

    first = (await api.chunk({"position": 0, "events": [EVENT]}, model="small")).json()
    second = (await api.chunk({"position": 1, "events": [LATER]}, model="small")).json()

    for name, values in expected.items():
        got = [*first["outputs"][name], *second["outputs"][name]]
        np.testing.assert_allclose(got, values, rtol=1e-4, atol=1e-5)


async def test_json_and_messagepack_replies_are_equal(api: Harness) -> None:
    given = rows(5)
    for query in ("", "?return_state=true", "?return_sequences=false&return_state=true"):
        plain = await api.client.post(
            f"/v1/models/probe/streams/json/chunks{query}", json={"inputs": given.tolist()}
        )
        packed = await api.client.post(
            f"/v1/models/probe/streams/packed/chunks{query}",
            content=ormsgpack.packb({"inputs": given.tobytes()}),
            headers=MSGPACK,
        )
        one, other = plain.json(), ormsgpack.unpackb(packed.content)
        assert one.keys() == other.keys()
        for name in ("model", "version", "position", "replayed"):
            assert one[name] == other[name]
        for part in ("outputs", "state"):
            assert one.get(part, {}).keys() == other.get(part, {}).keys()
            for name, values in one.get(part, {}).items():
                # JSON rounds to the shortest text of the same float32
                np.testing.assert_array_equal(
                    np.array(values, np.float32), np.array(other[part][name], np.float32)
                )


async def test_accept_header_chooses_the_media_type_of_the_reply(api: Harness) -> None:
    body = {"inputs": rows(2).tolist()}
    packed = await api.chunk(body, headers={"accept": "application/msgpack, */*;q=0.1"})
    assert packed.headers["content-type"] == "application/msgpack"
    assert ormsgpack.unpackb(packed.content)["position"] == 2
    refused = await api.chunk({"inputs": [[1, 2]]}, headers={"accept": "application/vnd.msgpack"})
    assert refused.headers["content-type"] == "application/msgpack"
    assert ormsgpack.unpackb(refused.content)["code"] == "invalid_input"


async def test_the_last_step_alone_has_no_time_axis(api: Harness) -> None:
    given = {"position": 0, "events": [EVENT, LATER]}
    every = (await api.chunk(given, model="small", stream="a")).json()["outputs"]
    last = (
        await api.client.post(
            "/v1/models/small/streams/b/chunks?return_sequences=false", json=given
        )
    ).json()["outputs"]
    assert {name: values[-1] for name, values in every.items()} == last
    assert isinstance(last["surprise"], float)


async def test_returned_state_is_the_state_after_the_chunk(api: Harness) -> None:
    reply = (
        await api.client.post(
            "/v1/models/small/streams/s/chunks?return_state=true", json={"events": [EVENT, LATER]}
        )
    ).json()
    stored = (await api.client.get("/v1/models/small/streams/s/state")).json()
    assert reply["state"] == stored["state"]
    assert reply["state"]["clock.seen"] == 2
    assert reply["state"]["clock.last_ms"] == EVENT_MS
    assert reply["state"]["clock.out_of_order"] == 1


async def test_a_retry_gets_the_stored_reply(api: Harness) -> None:
    body = {"position": 0, "inputs": rows(3).tolist()}
    first = await api.chunk(body)
    # a reply derives from what is stored, so the time of the retry does not change it
    api.clock[0] += 5000
    again = await api.chunk(body)
    one, other = first.json(), again.json()
    assert other.pop("replayed") is True
    assert one.pop("replayed") is False
    assert one == other
    assert first.headers["etag"] == again.headers["etag"]
    assert api.position() == 3


async def test_appends_continue_at_the_current_position(api: Harness) -> None:
    body = {"inputs": rows(2).tolist()}
    replies = [(await api.chunk(body)).json() for _ in range(3)]
    assert [reply["position"] for reply in replies] == [2, 4, 6]
    assert len({reply["tag"] for reply in replies}) == 3
    equal = [(await api.chunk(body, stream=name)).json()["tag"] for name in ("x", "y")]
    assert equal[0] != equal[1]


async def test_server_timing_is_in_milliseconds(api: Harness) -> None:
    response = await api.chunk({"inputs": rows(2).tolist()})
    stages = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert list(stages) == ["queue", "load", "infer", "commit"]
    assert all(float(value) >= 0 for value in stages.values())
    assert float(stages["infer"]) > 0


@pytest.mark.parametrize(
    ("body", "at", "words"),
    [
        ('{"inputs":[[1,2,3],[4,5]]}', "inputs[1]", "rows of 3 values (feature_0, "),
        ('{"inputs":[[1,2,NaN]]}', "inputs[0][2]", "got NaN"),
        ('{"inputs":[[1,2,"3"]]}', "inputs[0][2]", 'got "3"'),
        ('{"position":0}', "body", "expected `inputs`"),
        ('{"events":[{}]}', "events", "model probe has no event schema"),
        (
            '{"inputs":[[1,2,3]],"step":1}',
            "step",
            "events, inputs, resets, false_alarms_per_day, position, epoch",
        ),
        ('{"inputs":[[1,2,3]],"position":-1}', "position", "got -1"),
        ('{"inputs":[[1,2,3]],"epoch":"12"}', "epoch", "^[0-9a-f]{16}$"),
        ("[]", "body", "an object"),
    ],
)
async def test_invalid_rows_are_rejected_with_their_place(
    api: Harness, body: str, at: str, words: str
) -> None:
    await api.chunk({"inputs": rows(2).tolist()})
    document = problem(await api.chunk(body), 422, "invalid_input")
    assert document["at"] == at
    assert words in document["detail"]
    assert document["stream"] == "s"
    assert api.position() == 2
    assert api.counts.seen["invalid_input"] == 1


@pytest.mark.parametrize(
    ("change", "at", "words"),
    [
        ({"load": 1e39}, "events[1].load", "finite as a float32"),
        ({"at": "2013-01-01T05:17:00"}, "events[1].at", "offset"),
        ({"arrival": 3}, "events[1].arrival", "load, delay, at, carrier, gate, heavy, late"),
    ],
)
async def test_invalid_events_are_rejected_with_their_place(
    api: Harness, change: dict[str, Any], at: str, words: str
) -> None:
    body = json.dumps({"events": [EVENT, {**LATER, **change}, LATER]})
    document = problem(await api.chunk(body, model="small"), 422, "invalid_input")
    assert document["at"] == at
    assert words in document["detail"]
    assert document["stream"] == "s"
    assert api.position(model="small") is None


ROW = ormsgpack.packb({"inputs": rows(1).tobytes()})


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        *[
            (JSON, body)
            for body in (b"", b"{", b"{} x", b"\xff", b'{"inputs":[[1,2,3]]', b'{"a":"\\ud800"}')
        ],
        *[
            (MSGPACK, body)
            for body in (
                b"",
                b"\xc1",
                b"\x81",
                b"\x81\x01\x02",
                ROW + b"\xc0",
                ROW * 2,
                b"\xd4\x01\x02",
            )
        ],
    ],
)
async def test_malformed_body_is_rejected(
    api: Harness, headers: dict[str, str], body: bytes
) -> None:
    response = await api.chunk(body, headers=headers | {"accept": "application/json"})
    kind = "JSON" if headers is JSON else "MessagePack"
    assert problem(response, 400, "malformed_body")["expected"] == f"one {kind} document"
    assert api.position() is None


@pytest.mark.parametrize(
    ("inputs", "at"),
    [
        (b"", "inputs"),
        (b"\x00" * 10, "inputs"),
        (np.array([[1, 2, np.inf]], np.float32).tobytes(), "inputs[0][2]"),
        ([[1.0, 2.0, 3.0]], "inputs"),
        ("text", "inputs"),
    ],
)
async def test_packed_rows_are_one_binary_string(api: Harness, inputs: Any, at: str) -> None:
    document = await api.packed({"inputs": inputs})
    assert (document["code"], document["at"]) == ("invalid_input", at)


async def test_long_chunks_and_large_bodies_are_rejected(api: Harness) -> None:
    document = problem(await api.chunk({"inputs": rows(21).tolist()}), 413, "chunk_too_long")
    assert (document["expected"], document["got"]) == (20, 21)
    document = await api.packed({"inputs": rows(21).tobytes()})
    assert document["code"] == "chunk_too_long"
    assert (await api.chunk({"inputs": rows(20).tolist()})).status_code == 200

    document = problem(await api.chunk(b" " * 20_001), 413, "body_too_large")
    assert document["expected"] == 20_000

    async def parts() -> Any:
        for _ in range(30):
            yield b" " * 1000

    response = await api.client.post("/v1/models/probe/streams/s/chunks", content=parts())
    assert "content-length" not in response.request.headers
    problem(response, 413, "body_too_large")


async def test_other_media_types_are_rejected(api: Harness) -> None:
    form = await api.client.post("/v1/models/probe/streams/s/chunks", data={"inputs": "1"})
    document = problem(form, 415, "unsupported_media_type")
    assert document["expected"] == ["application/json", "application/msgpack"]
    body = json.dumps({"inputs": rows(1).tolist()})
    gzipped = {"content-type": "application/json", "content-encoding": "gzip"}
    problem(await api.chunk(body, headers=gzipped), 415, "unsupported_media_type")
    latin = await api.chunk(body, headers={"content-type": "application/json; charset=latin-1"})
    document = problem(latin, 415, "unsupported_media_type")
    assert document["expected"][0] == "application/json; charset=utf-8"
    problem(await api.chunk(body, headers={"accept": "text/html"}), 406, "not_acceptable")
    fine = await api.chunk(body, headers={"content-type": "Application/JSON; charset=UTF-8"})
    assert fine.status_code == 200
    bare = await api.client.post("/v1/models/probe/streams/t/chunks", content=body)
    assert "content-type" not in bare.request.headers
    assert bare.status_code == 200


async def test_invalid_stream_names_are_rejected(api: Harness) -> None:
    body = {"inputs": rows(1).tolist()}
    document = problem(await api.chunk(body, model="nothing"), 404, "model_not_found")
    assert document["expected"] == ["probe", "small"]
    for name in ("a b", "ü", "a" * 257, "a+b", "x%0A", "%2E", "%2e%2E"):
        problem(await api.chunk(body, stream=name), 400, "invalid_name")
    for name in ("a" * 256, "A9._:@-", "plane:N725MQ@home", "...", ".a", "a.", "a", "ab"):
        assert (await api.chunk(body, stream=name)).json()["stream"] == name


async def test_positions_follow_the_table_of_the_protocol(api: Harness) -> None:
    given = rows(3).tolist()
    ahead = problem(await api.chunk({"position": 2, "inputs": given}), 409, "position_ahead")
    assert (ahead["expected"], ahead["got"], ahead["epoch"]) == (0, 2, None)
    reply = (await api.chunk({"position": 0, "inputs": given})).json()

    refused = await api.chunk({"position": 7, "inputs": given})
    ahead = problem(refused, 409, "position_ahead")
    assert {name: ahead[name] for name in ("position", "epoch", "tag")} == {
        name: reply[name] for name in ("position", "epoch", "tag")
    }
    assert refused.headers["etag"] == f'"{reply["epoch"]}-{reply["tag"]}"'
    behind = await api.chunk({"position": 1, "inputs": given})
    assert problem(behind, 409, "position_behind")["expected"] == 3
    other = {"position": 3, "epoch": "0" * 16, "inputs": given}
    problem(await api.chunk(other), 409, "epoch_mismatch")
    mine = {"position": 3, "epoch": reply["epoch"], "inputs": given}
    assert (await api.chunk(mine)).json()["position"] == 6

    api.store.states.forget_replies()
    problem(await api.chunk(mine), 409, "already_applied")
    await api.chunk({"events": [EVENT]}, model="small")
    kind = await api.chunk({"inputs": [[0.0] * 13]}, model="small")
    assert problem(kind, 409, "input_kind_mismatch")["expected"] == "events"
    assert api.counts.seen["position_ahead"] == 2


async def test_if_match_is_compared_with_the_current_state(api: Harness) -> None:
    body = {"inputs": rows(1).tolist()}
    problem(await api.chunk(body, headers={"if-match": "*"}), 412, "state_changed")
    first = (await api.chunk(body)).headers["etag"]
    second = await api.chunk(body, headers={"if-match": f'"x", {first}'})
    assert second.json()["position"] == 2
    stale = await api.chunk(body, headers={"if-match": first})
    document = problem(stale, 412, "state_changed")
    assert document["position"] == 2
    assert stale.headers["etag"] == second.headers["etag"]
    assert (await api.chunk(body, headers={"if-match": "*"})).json()["position"] == 3
    for text in ("", "x", f"W/{first}", '"a" "b"', '"a",', '"a'):
        response = await api.chunk(body, headers={"if-match": text})
        problem(response, 400, "invalid_precondition")
    assert api.position() == 3


async def test_final_is_rejected_for_a_model_without_blocks(api: Harness) -> None:
    body = {"position": 0, "inputs": rows(2).tolist()}
    refused = problem(await api.chunk({**body, "final": True}), 422, "final_unsupported")
    assert (refused["at"], refused["stream"]) == ("final", "s")
    assert api.position() is None
    assert (await api.chunk({**body, "final": False})).status_code == 200


@pytest.mark.parametrize(
    ("method", "address", "at"),
    [
        ("POST", "streams/s/chunks?return_stat=true", "?return_stat"),
        ("POST", "streams/s/chunks?return_state=maybe", "?return_state"),
        ("POST", "streams/s/chunks?return_sequences=", "?return_sequences"),
        ("POST", "streams/s/chunks?return_state=1&return_state=0", "?return_state"),
        ("POST", "predict?return_state=1&return_state=1", "?return_state"),
        ("GET", "streams?limit=1&prefix=a&limit=2", "?limit"),
        ("DELETE", "streams?prefix=s&prefix=", "?prefix"),
    ],
)
async def test_query_parameters_are_validated(
    api: Harness, method: str, address: str, at: str
) -> None:
    """Of a duplicate one the service does not guess which value was meant."""
    await api.chunk({"inputs": rows(1).tolist()})
    body = {"inputs": rows(1).tolist()}
    response = await api.client.request(method, f"/v1/models/probe/{address}", json=body)
    is_duplicate = address.count(at[1:]) > 1
    expected = (400, "duplicate_field") if is_duplicate else (422, "invalid_input")
    assert problem(response, *expected)["at"] == at
    assert api.position() == 1


async def test_a_query_with_too_many_parameters_is_rejected_unparsed(api: Harness) -> None:
    address = "/v1/models/probe/streams?" + "&" * 100
    problem(await api.client.get(address), 422, "invalid_input")
    # FastAPI would parse them before any route
    for count in (200, 60_000):
        answer = await api.client.get("/v1/models/probe/streams?" + "&" * count)
        problem(answer, 431, "head_too_large")


async def test_several_accept_headers_are_combined(api: Harness) -> None:
    lines = [("accept", "text/html"), ("accept", "application/msgpack")]
    response = await api.client.get("/v1/models", headers=lines)
    assert response.headers["content-type"] == "application/msgpack"
