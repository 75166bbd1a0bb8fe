"""Requests that do not fit are rejected with an error that names the place; nothing is applied."""

from __future__ import annotations

import gc
import gzip
import weakref
import zlib
from typing import Any

import orjson
import pytest

from service.core.errors import InvalidInput
from service.transports.v2 import http_routes
from service.transports.v2.tensors import InputTensor, byte_elements
from tests.service.transports.v1.harness import EVENT, LIMITS, rows
from tests.service.transports.v2.v2 import (
    HEADER,
    V2,
    binary_body,
    binary_texts,
    error_of,
    json_body,
    reply_of,
)

ROWS = rows(4)
SEQUENCE = {"sequence_id": 7}


def changed(**members: Any) -> dict[str, Any]:
    """A valid chunk with other members in its tensor."""
    body = json_body(ROWS, parameters=SEQUENCE)
    body["inputs"][0].update(members)
    return {**body, "inputs": [{k: v for k, v in body["inputs"][0].items() if v is not None}]}


def with_parameters(**parameters: Any) -> dict[str, Any]:
    """A valid chunk with other parameters."""
    return json_body(ROWS, parameters=SEQUENCE | parameters)


BODIES: dict[str, tuple[Any, str]] = {
    "an unknown tensor": (changed(name="x"), "inputs[0].name: expected inputs, got 'x'"),
    "events": (changed(datatype="BYTES"), "inputs[0].datatype: expected FP32, got 'BYTES'"),
    "strings": (changed(data=["a"] * 12), "inputs[0].data[0]: expected a valid number, got"),
    "another width": (changed(shape=[3, 4]), "inputs[0].shape: expected [T, 3] or [B, T, 3]"),
    "four axes": (changed(shape=[1, 1, 4, 3]), "inputs[0].shape: expected [T, 3]"),
    "a negative axis": (
        changed(shape=[-4, 3]),
        "inputs[0].shape[0]: expected greater than or equal to 0",
    ),
    "two streams": (changed(shape=[2, 2, 3]), "inputs[0].shape: expected 1 in front"),
    "too many sequences": (
        {"inputs": [changed(shape=[2**31 - 1, 0, 3], data=[])["inputs"][0]]},
        "inputs[0].shape: expected at most 5 sequences, got 2147483647",
    ),
    "too few values": (changed(data=[1.0] * 11), "inputs[0].data: expected 12 values"),
    "too many lists": (changed(data=[[1.0]] * 12), "inputs[0].data: expected at most 4 lists"),
    "no values": (changed(data=None), "inputs[0]: expected either data or"),
    "a decimal axis": (changed(shape=[4.5, 3]), "shape[0]: expected a valid integer, got 4.5"),
    "nine axes": (
        changed(shape=[1] * 9),
        "shape: expected list of at most 8 values, got a list of 9",
    ),
    "a list as a parameter": (with_parameters(a=[1]), "parameters.a: expected a valid boolean or"),
    "too many parameters": (
        with_parameters(**{f"p{at}": [] for at in range(300)}),
        "parameters: expected object of at most 256 members, got an object",
    ),
    "no steps": (changed(shape=[0, 3], data=[]), "inputs: expected at least one step"),
    "too many steps": (json_body(rows(21), parameters=SEQUENCE), "at most 20 steps"),
    "a ragged list": (
        changed(data=[[1.0, 2.0], 3.0]),
        "data[1]: expected a list, got 3.0",
    ),
    "an overflow": (changed(data=[1e39] * 12), "inputs[0][0] (feature_0): expected a finite"),
    "shared memory": (
        changed(parameters={"shared_memory_region": "r"}, data=None),
        'shared_memory_region: expected one of the members binary_data_size, got "r"',
    ),
    "no tensor": (
        {"inputs": []},
        "inputs: expected one tensor, inputs, optionally followed by reset, got 0",
    ),
    "an unknown member": (
        json_body(ROWS, input=1),
        "input: expected one of the members inputs, outputs, id, parameters, got 1",
    ),
    "an unknown output": (
        json_body(ROWS, outputs=[{"name": "x"}]),
        "outputs[0].name: expected each once of last, out, steep, state.lstm_1.hidden, ",
    ),
    "an output twice": (
        json_body(ROWS, outputs=[{"name": "out"}, {"name": "out"}]),
        "outputs[1].name: expected each once",
    ),
    "classification": (
        json_body(ROWS, outputs=[{"name": "out", "parameters": {"classification": 2}}]),
        "outputs[0].parameters.classification: expected one of the members binary_data, got 2",
    ),
    "a misspelt parameter": (
        with_parameters(postion=4),
        "parameters.postion: expected one of the members",
    ),
    "a negative id": (
        with_parameters(sequence_id=-1),
        f"sequence_id: expected a whole number up to {2**64 - 1}, or a string, got -1",
    ),
    "a number as a flag": (with_parameters(sequence_start=1), "expected a valid boolean, got 1"),
    "a start in the middle": (
        with_parameters(sequence_start=True, position=4),
        "parameters.position: expected 0, since the sequence starts, got 4",
    ),
    "a bad epoch": (with_parameters(epoch="xyz"), "parameters.epoch: expected 16 hex digits"),
    "a negative timeout": (with_parameters(timeout=-1), "parameters.timeout: expected greater"),
    "a string for binary outputs": (
        with_parameters(binary_data_output="yes"),
        "parameters.binary_data_output: expected a valid boolean",
    ),
    "a start without a sequence": (
        json_body(ROWS, parameters={"sequence_start": True}),
        "parameters.sequence_id: expected one, since sequence_start is set, got none",
    ),
    "a position without a sequence": (
        json_body(ROWS, parameters={"sequence_id": 0, "position": 0}),
        "parameters.sequence_id: expected one, since position is set",
    ),
}


async def test_bodies_that_do_not_fit_are_rejected(v2: V2) -> None:
    for name, (body, expected) in BODIES.items():
        too_long = name == "too many steps"
        status, code = (413, "chunk_too_long") if too_long else (422, "invalid_input")
        error = error_of(await v2.post(body), status, code)
        assert expected in error["error"], name
    assert v2.api.counts.seen["invalid_input"] == len(BODIES) - 1
    assert not v2.api.store.states


async def test_numbers_out_of_range_and_other_encodings_are_rejected(v2: V2) -> None:
    """JSON of one depth and of two."""
    rows_of = (b'{"name": "inputs", "datatype": "FP32", "shape": [1, 3], "data": %b}', "probe")
    events = (b'{"name": "events", "datatype": "BYTES", "shape": [1], "data": %b}', "small")
    finite = (422, "invalid_input", "inputs[0][0] (feature_0): expected a finite float32")
    malformed = (400, "malformed_body", "not valid UTF-8")
    for data, (tensor, model), (status, code, words) in (
        (b"[1e400, 0, 0]", rows_of, finite),
        (b"[[1e400, 0, NaN]]", rows_of, finite),
        (b'["\xff"]', events, malformed),
        (b'[["\xff"]]', events, malformed),
    ):
        body = b'{"inputs": [' + tensor % data + b"]}"
        error = error_of(await v2.post(body, model=model), status, code)["error"]
        assert words in error, data


async def test_too_many_steps_are_rejected_before_their_values_are_read(v2: V2) -> None:
    """By the shape alone: to separate millions of events would block other requests."""
    for parameters, most in ((SEQUENCE, 20), ({}, LIMITS.max_predict_steps)):
        tensor = {"name": "events", "datatype": "BYTES", "shape": [most + 1], "data": ["x"]}
        body = {"inputs": [tensor], "parameters": parameters}
        error = error_of(await v2.post(body, model="small"), 413, "chunk_too_long")
        assert f"at most {most} steps" in error["error"]
    count = LIMITS.max_predict_steps
    with pytest.raises(InvalidInput, match=f"{count} values for shape .*, got more values"):
        byte_elements(InputTensor("events", "BYTES", (count,), bytes(4) * (count + 2)), "x")


async def test_text_that_is_no_stream_name_is_rejected(v2: V2) -> None:
    for identity in ("a b", ".", "x" * 257, "a/b"):
        response = await v2.post(with_parameters(sequence_id=identity))
        assert "parameters.sequence_id" in error_of(response, 400, "invalid_name")["error"]


async def test_damaged_binary_bodies_are_rejected(v2: V2) -> None:
    body, headers = binary_body(ROWS, SEQUENCE)
    json_bytes = int(headers[HEADER])
    for damaged, length, code, expected in (
        (body[:-1], json_bytes, "invalid_input", "expected 48 bytes after the JSON"),
        (body + b"\x00", json_bytes, "invalid_input", "expected 48 bytes after the JSON"),
        (body, None, "malformed_body", "expected one JSON document"),
        (body, len(body) + 1, "invalid_input", "Content-Length: expected at most"),
        (body, "many", "invalid_input", "Content-Length: expected a number"),
        (body, json_bytes - 3, "malformed_body", "expected one JSON document"),
        (
            body.replace(b'_size":48', b'_size":44'),
            json_bytes,
            "invalid_input",
            "expected 44 bytes after the JSON",
        ),
    ):
        response = await v2.post(damaged, {} if length is None else {HEADER: str(length)})
        error = error_of(response, 422 if code == "invalid_input" else 400, code)
        assert expected in error["error"], length
    assert not v2.api.store.states


async def test_last_of_duplicate_members_counts(v2: V2) -> None:
    text = orjson.dumps(with_parameters(position=1))
    twice = text.replace(b'"position":1', b'"position":"x","position":1')
    assert "position" in error_of(await v2.post(twice), 409, "position_ahead")["error"]
    body, headers = binary_body(ROWS, SEQUENCE | {"position": 0})
    end = int(headers[HEADER])
    twice = body[:end].replace(b'"shape"', b'"shape":[9,9],"shape"')
    response = await v2.post(twice + body[end:], {HEADER: str(len(twice))})
    assert response.status_code == 200, response.text


async def test_bytes_that_are_no_events_are_rejected(v2: V2) -> None:
    good = orjson.dumps(EVENT)

    async def send(data: bytes, count: int) -> str:
        tensor = {
            "name": "events",
            "datatype": "BYTES",
            "shape": [count],
            "parameters": {"binary_data_size": len(data)},
        }
        text = orjson.dumps({"inputs": [tensor], "parameters": SEQUENCE})
        response = await v2.post(text + data, {HEADER: str(len(text))}, model="small")
        error: str = error_of(response, 422, "invalid_input")["error"]
        return error

    assert "inputs[0].data: expected for each element" in await send(binary_texts(good)[:-1], 1)
    assert "which end in an element" in await send(b"\x01\x00", 1)
    assert "expected 2 values for shape [2], got 1" in await send(binary_texts(good), 2)
    assert "inputs[0].data[1]: expected an event" in await send(binary_texts(good, b"[]"), 2)
    assert "inputs[0].data[0]" in await send(binary_texts(good + b"," + good), 1)
    assert "inputs[0].data[0]" in await send(binary_texts(b'{"load":1,', b'"at":2}'), 2)
    unknown = orjson.dumps({**EVENT, "speed": 1})
    assert "events[1].speed" in await send(binary_texts(good, unknown), 2)
    assert not v2.api.store.states


async def test_oversized_bodies_are_rejected(v2: V2) -> None:
    most = LIMITS.max_body_bytes
    response = await v2.post(b"x" * (most + 1))
    error_of(response, 413, "body_too_large")
    bomb = {"content-encoding": "gzip"}
    error = error_of(await v2.post(gzip.compress(bytes(10 * most)), bomb), 413, "body_too_large")
    assert "after decompression" in error["error"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_compressed_body_is_read_to_its_exact_end(v2: V2, encoding: str) -> None:
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    content = compress(orjson.dumps(with_parameters()))
    headers = {"content-encoding": encoding}
    assert reply_of(await v2.post(content, headers)).parameters["position"] == 4
    for damaged in (content[:-1], content + b"x", b"x" + content, b""):
        error_of(await v2.post(damaged, headers), 400, "malformed_body")
    error = error_of(
        await v2.post(content, {"content-encoding": "br"}), 415, "unsupported_media_type"
    )
    assert "expected gzip, deflate or none" in error["error"]
    assert v2.api.position("7") == 4


async def test_other_addresses_have_errors_in_the_form_of_v2(v2: V2) -> None:
    for method, address, status, code in (
        ("GET", "/v2/models/nothing", 404, "model_not_found"),
        ("GET", "/v2/models/probe/versions/2", 404, "model_not_found"),
        ("POST", "/v2/models/probe/versions/2/infer", 404, "model_not_found"),
        ("GET", "/v2/models/probe/infer", 405, "method_not_allowed"),
        ("POST", "/v2/models/probe", 405, "method_not_allowed"),
        ("POST", "/v2/repository/models/probe/load", 404, "not_found"),
        ("GET", "/v2/systemsharedmemory/status", 404, "not_found"),
        ("GET", "/v2/models/probe?x=1", 422, "invalid_input"),
    ):
        response = await v2.api.client.request(method, address)
        error_of(response, status, code)
        assert ("allow" in response.headers) == (status == 405)


async def test_unexpected_failure_is_an_internal_error(
    v2: V2, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no secret of the service")

    monkeypatch.setattr("service.transports.v2.http_routes.reply_document", fail)
    error = error_of(await v2.post(json_body(ROWS)), 500, "internal_error")
    assert "secret" not in error["error"]


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
async def test_deadline_in_microseconds_is_kept(v2: V2, binary: bool) -> None:
    parameters = {**SEQUENCE, "timeout": 1, "binary_data_output": binary}
    body, headers = binary_body(ROWS, parameters)
    if not binary:
        body, headers = orjson.dumps(json_body(ROWS, parameters=parameters)), {}
    error_of(await v2.post(body, headers), 504, "deadline_exceeded")
    assert not v2.api.store.states
    reply = await v2.infer(ROWS, binary=binary, timeout=10**9, **SEQUENCE)
    assert reply.parameters["position"] == 4


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
async def test_the_parameter_timeout_does_not_extend_the_deadline(v2: V2, binary: bool) -> None:
    parameters = {**SEQUENCE, "timeout": 10**9, "binary_data_output": binary}
    body, headers = binary_body(ROWS, parameters)
    if not binary:
        body, headers = orjson.dumps(json_body(ROWS, parameters=parameters)), {}
    response = await v2.post(body, {**headers, "carry-timeout": "0.000001"})
    error_of(response, 504, "deadline_exceeded")
    assert not v2.api.store.states


async def test_the_body_of_a_rejected_request_is_freed_without_the_garbage_collector(
    v2: V2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else bodies of many MiB accumulate until the next collection, which counts objects."""

    class Body:
        """What was read."""

    freed: list[weakref.ref[Body]] = []

    def reject(*arguments: object) -> None:
        body = Body()
        freed.append(weakref.ref(body))
        try:
            raise ValueError
        except ValueError as cause:
            raise InvalidInput("why") from cause

    monkeypatch.setattr(http_routes, "decode_request", reject)
    gc.disable()
    try:
        error_of(await v2.post(json_body(ROWS)), 422, "invalid_input")
        assert freed[0]() is None
    finally:
        gc.enable()
