"""Resets and dry runs by V2: a BOOL tensor, marked events, the parameter `dry_run`."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest

from tests.service.transports.v1.harness import EVENT, EVENT_MS, rows
from tests.service.transports.v2.v2 import HEADER, V2, error_of, json_body, reply_of
from tests.support.pipelines import oracle_outputs

ROWS = rows(6)
MARKS = [False, False, True, True, False, False]
SESSIONS = [(0, 2), (2, 3), (3, 6)]


def body_of(
    marks: Any = MARKS,
    *,
    shape: Any = None,
    datatype: str = "BOOL",
    binary: bool = False,
    **more: Any,
) -> tuple[Any, dict[str, str]]:
    """A request with rows and a tensor of marks."""
    shape = [len(marks)] if shape is None else shape
    reset = {"name": "reset", "datatype": datatype, "shape": shape}
    values = {"name": "inputs", "datatype": "FP32", "shape": list(ROWS.shape)}
    if not binary:
        inputs = [{**values, "data": ROWS.ravel().tolist()}, {**reset, "data": marks}]
        return {"inputs": inputs, "parameters": more}, {}
    data = [ROWS.astype("<f4").tobytes(), bytes(marks)]
    tensors = [
        {**tensor, "parameters": {"binary_data_size": len(own)}}
        for tensor, own in zip((values, reset), data, strict=True)
    ]
    text = orjson.dumps({"inputs": tensors, "parameters": {**more, "binary_data_output": True}})
    return text + b"".join(data), {HEADER: str(len(text))}


def expected_of(v2: V2) -> dict[str, Any]:
    artifact = v2.api.models["probe"]
    outputs = [oracle_outputs(artifact, ROWS[start:stop]) for start, stop in SESSIONS]
    named: dict[str, Any] = artifact.outputs.by_name(np.concatenate(outputs).astype(np.float32))
    return named


def near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
async def test_a_tensor_marks_the_steps_that_are_reset(v2: V2, *, binary: bool) -> None:
    body, headers = body_of(binary=binary, sequence_id=7, position=0)
    near(reply_of(await v2.post(body, headers)).outputs, expected_of(v2))
    again = reply_of(await v2.post(body, headers))
    assert again.parameters["replayed"]
    other, headers = body_of([False] * 6, binary=binary, sequence_id=7, position=0)
    error_of(await v2.post(other, headers), 409, "position_behind")
    alone, headers = body_of(binary=binary)
    near(reply_of(await v2.post(alone, headers)).outputs, expected_of(v2))
    body = json_body(np.stack([ROWS, ROWS]))
    both = {"name": "reset", "datatype": "BOOL", "shape": [2, 6], "data": [MARKS, [False] * 6]}
    body["inputs"].append(both)
    outputs = reply_of(await v2.post(body)).outputs
    near({name: values[0] for name, values in outputs.items()}, expected_of(v2))
    plain = reply_of(await v2.post(json_body(ROWS))).outputs
    near({name: values[1] for name, values in outputs.items()}, plain)


async def test_an_event_with_reset_marks_its_step(v2: V2) -> None:
    events = [{**EVENT, "load": at, "at": EVENT_MS + at} for at in range(4)]

    async def send(values: list[dict[str, Any]], **parameters: Any) -> dict[str, Any]:
        data = [orjson.dumps(value).decode() for value in values]
        tensor = {"name": "events", "datatype": "BYTES", "shape": [len(data)], "data": data}
        body = {"inputs": [tensor], "parameters": parameters}
        return reply_of(await v2.post(body, model="small")).outputs

    marked = [*events[:2], {**events[2], "reset": True}, events[3]]
    parts = [await send(events[:2]), await send(events[2:])]
    expected = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    near(await send(marked, sequence_id="events"), expected)
    near(await send(marked), expected)


async def test_wrong_resets_are_rejected(v2: V2) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"datatype": "FP32", "marks": [0.0] * 6}, "inputs[1].datatype: expected BOOL"),
        ({"shape": [1, 6]}, "inputs[1].shape: expected [6], a value for each step"),
        ({"marks": MARKS[:5]}, "inputs[1].shape: expected [6]"),
        ({"marks": MARKS[:5], "shape": [6]}, "inputs[1].data: expected 6 values"),
        ({"marks": [1] * 6}, "inputs[1].data[0]: expected a valid boolean"),
        ({"sequence_id": 0, "dry_run": True}, "expected one, since dry_run is set"),
    ]
    for change, message in changes:
        body, _ = body_of(**{"sequence_id": 9, **change})
        assert message in error_of(await v2.post(body), 422, "invalid_input")["detail"]
    assert v2.api.position("9") is None


async def test_other_bytes_than_0_and_1_and_more_tensors_are_rejected(v2: V2) -> None:
    body, headers = body_of([0, 0, 2, 0, 0, 0], binary=True, sequence_id=9)
    document = error_of(await v2.post(body, headers), 422, "invalid_input")
    assert "inputs[1].data: expected bytes that are 0 or 1" in document["detail"]
    body, _ = body_of(sequence_id=9)
    rows_, marks = body["inputs"]
    for inputs, message in (
        ([marks], "inputs[0].name: expected inputs, got 'reset'"),
        ([rows_, rows_], "inputs[1].name: expected reset, got 'inputs'"),
        ([rows_, marks, marks], "expected one tensor, inputs, optionally followed by reset, got 3"),
    ):
        document = error_of(await v2.post({**body, "inputs": inputs}), 422, "invalid_input")
        assert message in document["detail"]


async def test_marks_of_no_sequence_are_rejected_as_its_steps_are(v2: V2) -> None:
    body = json_body(np.zeros((0, *ROWS.shape), np.float32))
    without = error_of(await v2.post(body), 422, "invalid_input")
    body["inputs"].append({"name": "reset", "datatype": "BOOL", "shape": [0, 6], "data": []})
    document = error_of(await v2.post(body), 422, "invalid_input")
    assert document["detail"] == without["detail"]
