"""Triton's own clients, unmodified, over HTTP and gRPC against a running service."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
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


class Client:
    """A client of one kind, and its answers as Python's values."""

    def __init__(self, kind: Any, address: str):
        self.kind = kind
        self.is_http = kind is tritonclient.http
        self.triton = kind.InferenceServerClient(address)
        self.as_json = {} if self.is_http else {"as_json": True}

    def tensor(self, values: Any = INPUT, **format: bool) -> Any:
        """Values of the one feature as a tensor [1, T, 1]."""
        array = np.array(values, np.float32).reshape(1, -1, 1)
        given = self.kind.InferInput("inputs", array.shape, "FP32")
        given.set_data_from_numpy(array, **format)
        return given

    def infer(self, values: Any, sequence: Any, model: str = LSTM, **options: Any) -> Any:
        """The result of these values for a sequence."""
        given = [self.tensor(values)]
        return self.triton.infer(model, given, sequence_id=sequence, **options)


def parameters_of(result: Any) -> dict[str, Any]:
    """The parameters of a reply, in JSON or in a message."""
    response = result.get_response()
    if isinstance(response, dict):
        parameters: dict[str, Any] = response["parameters"]
        return parameters
    return {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in response.parameters.items()
    }


@pytest.fixture(params=[tritonclient.http, tritonclient.grpc], ids=["HTTP", "gRPC"])
def client(request: pytest.FixtureRequest, service: Service) -> Iterator[Client]:
    """A client of the running service."""
    is_http = request.param is tritonclient.http
    address = service.url.removeprefix("http://") if is_http else service.grpc_address()
    client = Client(request.param, address)
    try:
        yield client
    finally:
        client.triton.close()


@pytest.fixture
def sequence() -> str:
    """A sequence id that no other test uses."""
    return f"triton-{uuid.uuid4().hex}"


def test_server_and_models_describe_themselves(client: Client) -> None:
    triton, as_json = client.triton, client.as_json
    assert "sequence(string_id)" in triton.get_server_metadata(**as_json)["extensions"]
    metadata = triton.get_model_metadata("flights", **as_json)
    assert [each["name"] for each in metadata["inputs"]] == ["events", "inputs"]
    output = metadata["outputs"][1]
    assert (output["name"], output["datatype"]) == ("delay", "FP32")
    assert list(map(int, output["shape"])) == [-1, -1, 1, 3]
    config = triton.get_model_config("flights", **as_json)
    config = config if client.is_http else config["config"]
    assert "sequence_batching" in config
    assert config["max_batch_size"] > 0
    assert [each["data_type"] for each in config["input"]] == ["TYPE_STRING", "TYPE_FP32"]
    index = triton.get_model_repository_index(**as_json)
    index = index if client.is_http else index["models"]
    assert {each["name"] for each in index} == {"flights", "post-lstm", "post-gru"}
    assert {each["state"] for each in index} == {"READY"}


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
def test_sequence_gives_the_outputs_of_the_whole(
    client: Client, sequence: str, binary: bool, compression: str | None
) -> None:
    form, options = (
        {"binary_data": binary},
        {
            "request_compression_algorithm": compression,
            "response_compression_algorithm": compression,
        },
    )
    if not client.is_http:
        # its messages have one form
        form, options = {}, {"compression_algorithm": compression}
    found = []
    for first, last in ((0, 2), (2, 3), (3, 5)):
        result = client.triton.infer(
            LSTM,
            [client.tensor(INPUT[first:last], **form)],
            outputs=[client.kind.InferRequestedOutput("output", **form)],
            sequence_id=sequence,
            sequence_start=first == 0,
            sequence_end=last == 5,
            request_id=f"r{first}",
            **options,
        )
        response = result.get_response()
        assert (response["id"] if client.is_http else response.id) == f"r{first}"
        outputs = result.as_numpy("output")
        assert outputs.shape == (1, last - first, 1)
        found.append(outputs.ravel())
    np.testing.assert_allclose(np.concatenate(found), LSTM_OUTPUTS, atol=PRINTED)


def test_retried_duplicates_with_a_position_are_applied_once(client: Client, sequence: str) -> None:
    """Also those of the start, and with numbers as ids."""
    for chosen in (sequence, uuid.uuid4().int % 2**63):
        found = []
        for first, last in ((0, 2), (2, 5)):
            options = {"sequence_start": first == 0, "parameters": {"position": first}}
            replies = [client.infer(INPUT[first:last], chosen, **options) for _ in range(3)]
            assert [parameters_of(each)["replayed"] for each in replies] == [False, True, True]
            assert {parameters_of(each)["position"] for each in replies} == {last}
            assert len({each.as_numpy("output").tobytes() for each in replies}) == 1
            found.append(replies[-1].as_numpy("output").ravel())
        np.testing.assert_allclose(np.concatenate(found), LSTM_OUTPUTS, atol=PRINTED)


def test_rejection_names_the_code_and_the_position(client: Client, sequence: str) -> None:
    client.infer(INPUT, sequence)
    with pytest.raises(InferenceServerException) as caught:
        client.infer(INPUT, sequence, parameters={"position": 9})
    assert caught.value.status() == ("409" if client.is_http else "StatusCode.FAILED_PRECONDITION")
    assert caught.value.message().startswith("position_ahead: expected position 5 of stream")
    with pytest.raises(InferenceServerException, match="model_not_found"):
        client.infer(INPUT, sequence, model="nothing")


def test_events_are_texts_and_outputs_may_be_chosen(client: Client, sequence: str) -> None:
    events = np.array([[json.dumps(FLIGHT), json.dumps(FLIGHT)]], np.object_)
    for form in ({"binary_data": True}, {"binary_data": False}) if client.is_http else ({}, {}):
        given = client.kind.InferInput("events", events.shape, "BYTES")
        given.set_data_from_numpy(events, **form)
        chosen = [client.kind.InferRequestedOutput("delay")]
        result = client.triton.infer("flights", [given], outputs=chosen, sequence_id=sequence)
        assert result.as_numpy("delay").shape == (1, 2, 1, 3)
        assert result.as_numpy("late") is None
    assert parameters_of(result)["position"] == 4


def test_statistics_count_the_requests(client: Client, sequence: str) -> None:
    def statistics(*of: str) -> Any:
        return client.triton.get_inference_statistics(*of, **client.as_json)["model_stats"]

    [before] = statistics(LSTM)
    for _ in range(3):
        client.infer(INPUT, sequence)
    [after] = statistics(LSTM, "1")
    assert int(after["version"]) == 1
    assert int(after["inference_count"]) - int(before["inference_count"]) == 3
    successes = [each["inference_stats"]["success"] for each in (before, after)]
    assert int(successes[1]["count"]) - int(successes[0]["count"]) == 3
    assert int(successes[1]["ns"]) > int(successes[0]["ns"])
    assert len(statistics()) == 3


def test_resets_and_dry_runs(client: Client, sequence: str) -> None:
    marks = np.zeros((1, len(INPUT)), np.bool_)
    marks[0, 2] = True
    reset = client.kind.InferInput("reset", marks.shape, "BOOL")
    reset.set_data_from_numpy(marks)
    parts = [client.triton.infer(LSTM, [client.tensor(each)]) for each in (INPUT[:2], INPUT[2:])]
    expected = np.concatenate([part.as_numpy("output") for part in parts], axis=1)
    inputs, dry_run = [client.tensor(), reset], {"dry_run": True}
    dry = client.triton.infer(LSTM, inputs, sequence_id=sequence, parameters=dry_run)
    assert parameters_of(dry) == {"dry_run": True, "position": 0, "replayed": False}
    applied = client.triton.infer(LSTM, inputs, sequence_id=sequence)
    head = parameters_of(applied)
    assert head.pop("created")
    again = client.triton.infer(LSTM, inputs, sequence_id=sequence, parameters=dry_run)
    assert parameters_of(again) == {**head, "dry_run": True}
    for each in (dry, applied):
        np.testing.assert_allclose(each.as_numpy("output"), expected, rtol=1e-5, atol=1e-6)
