"""Inference over HTTP: chunks of sequences and stateless predictions, in JSON and binary."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from models.artifact.artifact import Artifact
from tests.service.transports.v1.harness import EVENT, LATER, rows
from tests.service.transports.v2.v2 import (
    V2,
    V2Reply,
    binary_body,
    binary_texts,
    error_of,
    json_body,
    reply_of,
)
from tests.support.pipelines import oracle_outputs

ROWS = rows(12)


def packed(reply: V2Reply) -> np.ndarray:
    """The outputs of the probe model as packed rows."""
    return np.concatenate([reply.outputs[name] for name in ("last", "out", "steep")], axis=-1)


@pytest.fixture
def expected(models: dict[str, Artifact]) -> np.ndarray:
    """The oracle's outputs of all rows."""
    return oracle_outputs(models["probe"], ROWS)


async def test_request_without_a_sequence_is_a_stateless_prediction(
    v2: V2, expected: np.ndarray, models: dict[str, Artifact]
) -> None:
    other = rows(12, seed=9)
    reply = await v2.infer(np.stack([ROWS, other]))
    assert reply.parameters == {}
    np.testing.assert_allclose(packed(reply)[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        packed(reply)[1], oracle_outputs(models["probe"], other), rtol=1e-4, atol=1e-5
    )
    assert not v2.api.store.states
    alone = await v2.infer(ROWS, sequence_id=0, sequence_start=False)
    np.testing.assert_allclose(packed(alone), expected, rtol=1e-4, atol=1e-5)


async def test_start_resets_to_the_zero_state(v2: V2, expected: np.ndarray) -> None:
    before = await v2.infer(rows(4, seed=2), sequence_id=1)
    again = await v2.infer(ROWS, sequence_id=1, sequence_start=True)
    np.testing.assert_allclose(packed(again), expected, rtol=1e-4, atol=1e-5)
    assert again.parameters["position"] == 12
    assert again.parameters["epoch"] != before.parameters["epoch"]


async def test_late_start_with_the_old_epoch_is_rejected(v2: V2) -> None:
    old = (await v2.infer(rows(2, seed=5), sequence_id=3)).parameters["epoch"]
    start = {"sequence_id": 3, "sequence_start": True, "position": 0, "epoch": old}
    first = await v2.infer(ROWS[:4], **start)
    assert (await v2.infer(ROWS[:4], **start)).parameters["replayed"]
    await v2.infer(ROWS[4:], sequence_id=3, position=4, epoch=first.parameters["epoch"])
    error = error_of(await v2.post(json_body(ROWS[:4], parameters=start)), 409, "epoch_mismatch")
    assert error["position"] == 12
    assert v2.api.position("3") == 12


@pytest.mark.parametrize("identity", ["EWR-UA", 2**64 - 1, 1])
async def test_sequence_ids_name_streams(v2: V2, identity: int | str) -> None:
    await v2.infer(ROWS[:2], sequence_id=identity)
    assert v2.api.position(str(identity)) == 2


async def test_selected_outputs_come_in_their_order_and_form(v2: V2) -> None:
    outputs = [
        {"name": "steep", "parameters": {"binary_data": True}},
        {"name": "last", "parameters": {"binary_data": False}},
    ]
    reply = reply_of(await v2.post(json_body(ROWS, outputs=outputs, id="a7")))
    assert list(reply.outputs) == ["steep", "last"]
    assert [("data" in output) for output in reply.document["outputs"]] == [False, True]
    assert reply.document["id"] == "a7"
    assert reply.document["model_name"] == "probe"
    assert reply.document["model_version"] == "1"


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
async def test_events_are_one_tensor_of_texts(v2: V2, binary: bool) -> None:
    texts = [orjson.dumps(EVENT), orjson.dumps(LATER)]
    tensor = {"name": "events", "datatype": "BYTES", "shape": [1, 2]}
    parameters = {"sequence_id": "s", "position": 0}
    if binary:
        data = binary_texts(*texts)
        tensor["parameters"] = {"binary_data_size": len(data)}
        text = orjson.dumps({"inputs": [tensor], "parameters": parameters})
        response = await v2.post(
            text + data, {"inference-header-content-length": str(len(text))}, model="small"
        )
    else:
        tensor["data"] = [[text.decode() for text in texts]]
        response = await v2.post({"inputs": [tensor], "parameters": parameters}, model="small")
    reply = reply_of(response)
    chunk = await v2.api.chunk({"events": [EVENT, LATER], "position": 0}, stream="t", model="small")
    for name, values in chunk.json()["outputs"].items():
        np.testing.assert_array_equal(reply.outputs[name][0], np.array(values, np.float32))
    assert reply.parameters["tag"] == chunk.json()["tag"]


async def test_binary_and_json_requests_have_one_digest(v2: V2) -> None:
    await v2.infer(ROWS, sequence_id=5, position=0)
    body, headers = binary_body(ROWS, {"sequence_id": 5, "position": 0})
    assert reply_of(await v2.post(body, headers)).parameters["replayed"]
    retried = await v2.api.chunk({"inputs": ROWS.tolist(), "position": 0}, stream="5")
    assert retried.json()["replayed"]
