"""Triton's own client, unmodified, over HTTP against a running service."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from tests.support.post_tables import INPUT, LSTM_OUTPUTS, PRINTED
from tests.support.service import Service

FLIGHT = {
    "departed": "2013-01-01T05:17:00-05:00",
    "dep_delay": 3.0,
    "scheduled": "06:00",
    "origin": "EWR",
    "carrier": "UA",
    "destination": "ATL",
    "distance": 1045.0,
}
LSTM = "post-lstm"


@pytest.fixture
def triton(service: Service) -> Iterator[tritonclient.http.InferenceServerClient]:
    """A client of the running service."""
    client = tritonclient.http.InferenceServerClient(service.url.removeprefix("http://"))
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def sequence() -> str:
    """A sequence id that no other test uses."""
    return f"triton-{uuid.uuid4().hex}"


def tensor(values: Any = INPUT, *, binary: bool = True) -> Any:
    """Values of the one feature as a tensor [1, T, 1]."""
    array = np.array(values, np.float32).reshape(1, -1, 1)
    given = tritonclient.http.InferInput("inputs", array.shape, "FP32")
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def outputs_of(result: Any) -> np.ndarray:
    """The outputs of one chunk, [T]."""
    found: np.ndarray = result.as_numpy("output")
    assert found.shape == (1, len(found[0]), 1)
    return found.ravel()


def parameters_of(result: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = result.get_response()["parameters"]
    return parameters


def test_server_and_models_describe_themselves(
    triton: tritonclient.http.InferenceServerClient,
) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready(LSTM)
    assert triton.is_model_ready(LSTM, "1")
    assert not triton.is_model_ready("nothing")
    assert "sequence" in triton.get_server_metadata()["extensions"]
    metadata = triton.get_model_metadata("flights")
    assert [each["name"] for each in metadata["inputs"]] == ["events", "inputs"]
    assert metadata["outputs"][1] == {"name": "delay", "datatype": "FP32", "shape": [-1, -1, 1, 3]}
    config = triton.get_model_config("flights")
    assert "sequence_batching" in config
    assert config["max_batch_size"] > 0
    index = triton.get_model_repository_index()
    assert {each["name"] for each in index} == {"flights", "post-lstm", "post-gru"}
    assert {each["state"] for each in index} == {"READY"}


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_sequence_gives_the_outputs_of_the_whole(
    triton: tritonclient.http.InferenceServerClient,
    sequence: str,
    binary: bool,
    compression: str | None,
) -> None:
    found = []
    wanted = [tritonclient.http.InferRequestedOutput("output", binary_data=binary)]
    for at, (first, last) in enumerate(((0, 2), (2, 3), (3, 5))):
        result = triton.infer(
            LSTM,
            [tensor(INPUT[first:last], binary=binary)],
            outputs=wanted,
            sequence_id=sequence,
            sequence_start=at == 0,
            sequence_end=at == 2,
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
            request_id=f"r{at}",
        )
        assert result.get_response()["id"] == f"r{at}"
        found.append(outputs_of(result))
    np.testing.assert_allclose(np.concatenate(found), LSTM_OUTPUTS, atol=PRINTED)


def test_rejection_names_the_code_and_the_position(
    triton: tritonclient.http.InferenceServerClient, sequence: str
) -> None:
    triton.infer(LSTM, [tensor()], sequence_id=sequence)
    with pytest.raises(InferenceServerException) as caught:
        triton.infer(LSTM, [tensor()], sequence_id=sequence, parameters={"position": 9})
    assert caught.value.status() == "409"
    assert caught.value.message().startswith("position_ahead: expected position 5 of stream")
    with pytest.raises(InferenceServerException, match="model_not_found"):
        triton.infer("nothing", [tensor()])
    with pytest.raises(InferenceServerException, match="not_found"):
        triton.unload_model(LSTM)


def test_events_are_texts_and_outputs_may_be_chosen(
    triton: tritonclient.http.InferenceServerClient, sequence: str
) -> None:
    events = np.array([[json.dumps(FLIGHT), json.dumps(FLIGHT)]], np.object_)
    for binary in (True, False):
        given = tritonclient.http.InferInput("events", events.shape, "BYTES")
        given.set_data_from_numpy(events, binary_data=binary)
        chosen = [tritonclient.http.InferRequestedOutput("delay")]
        result = triton.infer("flights", [given], outputs=chosen, sequence_id=sequence)
        assert result.as_numpy("delay").shape == (1, 2, 1, 3)
        assert result.as_numpy("late") is None
    assert parameters_of(result)["position"] == 4


def test_statistics_count_the_requests(
    triton: tritonclient.http.InferenceServerClient, sequence: str
) -> None:
    [before] = triton.get_inference_statistics(LSTM)["model_stats"]
    for _ in range(3):
        triton.infer(LSTM, [tensor()], sequence_id=sequence)
    [after] = triton.get_inference_statistics(LSTM, "1")["model_stats"]
    assert int(after["version"]) == 1
    assert after["inference_count"] - before["inference_count"] == 3
    successes = [each["inference_stats"]["success"] for each in (before, after)]
    assert successes[1]["count"] - successes[0]["count"] == 3
    assert successes[1]["ns"] > successes[0]["ns"]
    assert len(triton.get_inference_statistics()["model_stats"]) == 3
