"""Messages, streams and statuses of gRPC, by Triton's client and its stub, on a running service."""

from __future__ import annotations

import json
import queue
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.service.transports.v2.test_tritonclient import FLIGHT
from tests.support.post_tables import INPUT, LSTM_OUTPUTS, PRINTED
from tests.support.service import Service, running

LSTM = "post-lstm"
SERVICE = "inference.GRPCInferenceService"
WAIT_S = 60.0


@pytest.fixture(scope="module")
def channel(service: Service) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.grpc_address()) as up:
        yield up


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> service_pb2_grpc.GRPCInferenceServiceStub:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(service.grpc_address()) as up:
        yield up


@pytest.fixture
def sequence() -> str:
    """A sequence id that no other test uses."""
    return f"grpc-{uuid.uuid4().hex}"


def tensor(values: Any = INPUT) -> triton.InferInput:
    """Values of the one feature as a tensor [1, T, 1]."""
    array = np.array(values, np.float32).reshape(1, -1, 1)
    given = triton.InferInput("inputs", array.shape, "FP32")
    given.set_data_from_numpy(array)
    return given


def parameters_of(response: Any) -> dict[str, Any]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in response.parameters.items()
    }


def request_of(sequence: str = "", raw: bytes | None = None, **parameters: int) -> Any:
    """A request with the rows of INPUT."""
    rows = np.array(INPUT, "<f4")
    message = service_pb2.ModelInferRequest(model_name=LSTM)
    message.inputs.add(name="inputs", datatype="FP32", shape=[len(rows), 1])
    message.raw_input_contents.append(rows.tobytes() if raw is None else raw)
    if sequence:
        message.parameters["sequence_id"].string_param = sequence
    for name, value in parameters.items():
        message.parameters[name].int64_param = value
    return message


def test_unsigned_sequence_id_is_that_of_its_digits(stub: Any) -> None:
    identity = uuid.uuid4().int % 2**63 + 2**63
    number, digits = request_of(), request_of(str(identity))
    number.parameters["sequence_id"].uint64_param = identity
    assert parameters_of(stub.ModelInfer(number))["position"] == 5
    assert parameters_of(stub.ModelInfer(digits))["position"] == 10


def test_values_are_accepted_as_contents(stub: Any) -> None:
    message = request_of()
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend(INPUT)
    outputs = np.frombuffer(stub.ModelInfer(message).raw_output_contents[0], "<f4")
    np.testing.assert_allclose(outputs, LSTM_OUTPUTS, atol=PRINTED)


def test_long_request_has_the_outputs_of_short_ones(
    client: triton.InferenceServerClient, stub: Any, sequence: str
) -> None:
    """In each form; long requests are read in small steps."""
    count = 600
    events = [json.dumps(FLIGHT).encode()] * count
    long = service_pb2.ModelInferRequest(model_name="flights")
    long.inputs.add(name="events", datatype="BYTES", shape=[count])
    long.inputs[0].contents.bytes_contents.extend(events)
    raw = service_pb2.ModelInferRequest(model_name="flights")
    raw.inputs.add(name="events", datatype="BYTES", shape=[count])
    raw.raw_input_contents.append(b"".join(len(e).to_bytes(4, "little") + e for e in events))
    outputs = [list(stub.ModelInfer(each).raw_output_contents) for each in (long, raw)]
    replies = []
    for at in range(0, count, 200):
        given = triton.InferInput("events", [200], "BYTES")
        given.set_data_from_numpy(np.array(events[:200], object))
        result = client.infer("flights", [given], sequence_id=sequence, parameters={"position": at})
        replies.append(list(result.get_response().raw_output_contents))
    assert outputs[0] == outputs[1]
    for whole, parts in zip(outputs[0], zip(*replies, strict=True), strict=True):
        values = np.frombuffer(b"".join(parts), np.float32)
        np.testing.assert_allclose(np.frombuffer(whole, np.float32), values, rtol=1e-4, atol=1e-5)


def test_message_that_cannot_be_parsed_is_rejected(channel: grpc.Channel, stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE}/ModelInfer")(b"\xff\xff")
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("malformed_body: message: expected inference.ModelInfer")
    good = request_of()
    calls = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
    answers = [
        service_pb2.ModelStreamInferResponse.FromString(each)
        for each in calls(iter([b"\xff\xff", good.SerializeToString()]))
    ]
    assert answers[0].error_message.startswith("malformed_body: ")
    assert not answers[1].error_message


@pytest.fixture
def calls(
    client: triton.InferenceServerClient,
) -> Iterator[queue.Queue[tuple[Any, InferenceServerException | None]]]:
    """The responses of a ModelStreamInfer call."""
    responses: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
    client.start_stream(lambda result, error: responses.put((result, error)))
    yield responses
    client.stop_stream()


def test_stream_answers_pipelined_sequences_in_order(
    client: triton.InferenceServerClient, sequence: str, calls: queue.Queue[Any]
) -> None:
    for at in range(200):
        client.async_stream_infer(
            LSTM,
            [tensor([INPUT[at // 40]])],
            sequence_id=f"{sequence}-{at % 40}",
            request_id=str(at),
        )
    outputs = np.zeros((5, 40))
    for at in range(200):
        result, error = calls.get(timeout=WAIT_S)
        assert error is None
        assert result.get_response().id == str(at)
        outputs[at // 40, at % 40] = result.as_numpy("output").item()
    np.testing.assert_allclose(outputs, np.repeat(LSTM_OUTPUTS, 40).reshape(5, 40), atol=PRINTED)


def test_stream_continues_after_an_error(
    client: triton.InferenceServerClient, sequence: str, calls: queue.Queue[Any]
) -> None:
    """A request without a position is not applied in place of one that failed."""
    steps: list[tuple[dict[str, int], str]] = [
        ({}, ""),
        ({"position": 9, "dry_run": True}, "position_ahead"),
        ({}, ""),
        ({"position": 7}, "position_ahead"),
        ({}, "previous_failed"),
        ({"position": 2}, ""),
        ({}, ""),
    ]
    for parameters, _ in steps:
        client.async_stream_infer(
            LSTM, [tensor([1.0])], sequence_id=sequence, parameters=parameters or None
        )
    for _, code in steps:
        result, error = calls.get(timeout=WAIT_S)
        assert (error is None) == (code == "")
        assert code in str(error)
    assert parameters_of(result.get_response())["position"] == 4


def test_rejection_has_a_status_and_the_problem_document(stub: Any, sequence: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request_of(sequence, position=3))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.details().startswith("position_ahead: ")
    metadata = dict(error.trailing_metadata())
    assert metadata["carry-error"] == "position_ahead"
    problem = json.loads(metadata["carry-problem-bin"])
    assert (problem["code"], problem["position"]) == ("position_ahead", 0)


def test_id_of_a_call_is_that_of_its_requests(stub: Any, sequence: str) -> None:
    """A new one, if the client's is no token."""
    sent = (("x-request-id", "call-7"),)
    _, call = stub.ModelInfer.with_call(request_of(), metadata=sent)
    assert dict(call.trailing_metadata())["x-request-id"] == "call-7"
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request_of(sequence, position=3), metadata=(("x-request-id", "not one"),))
    rejected: Any = caught.value
    metadata = dict(rejected.trailing_metadata())
    assert len(metadata["x-request-id"]) == 16
    assert json.loads(metadata["carry-problem-bin"])["request_id"] == metadata["x-request-id"]
    wrong = request_of(sequence, position=3)
    for response in stub.ModelStreamInfer(iter([wrong, wrong]), metadata=sent):
        problem = json.loads(parameters_of(response.infer_response)["carry_problem"])
        assert problem["request_id"] == "call-7"


def wrong_requests() -> Iterator[tuple[str, Any, str]]:
    yield "truncated", request_of(raw=b"\0" * 19), "inputs[0].data: expected 20 bytes"
    message = request_of()
    message.inputs[0].contents.fp32_contents.append(1)
    yield "values twice", message, "inputs[0].contents: expected none"
    message = request_of()
    message.raw_input_contents.append(b"")
    yield "more values", message, "raw_input_contents: expected one element for each of 1 inputs"
    message = request_of()
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    yield "shared memory", message, "inputs[0].parameters: expected none"
    message = request_of()
    message.outputs.add(name="output").parameters["classification"].int64_param = 3
    yield "classification", message, "outputs[0].parameters: expected none"
    message = request_of()
    message.parameters["position"].SetInParent()
    yield "no value", message, "parameters.position: expected a value"
    expected = f"sequence_id: expected a whole number up to {2**64 - 1}, or a string, got -1"
    yield "negative id", request_of(sequence_id=-1), expected
    message = request_of("s")
    message.parameters["position"].uint64_param = 2**64 - 1
    yield "too large a position", message, "parameters.position: expected less than or equal to"


WRONG = {name: (message, expected) for name, message, expected in wrong_requests()}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_request_is_rejected_with_what_was_expected(stub: Any, name: str) -> None:
    message, expected = WRONG[name]
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(message)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert expected in error.details()


def test_message_above_the_limit_is_rejected(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request_of(raw=bytes(17 * 2**20)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    stub.ModelInfer(request_of())


def test_health_service_and_reflection_answer(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE):
        assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    [response] = reflection.ServerReflectionInfo(iter([request]))
    assert SERVICE in {each.name for each in response.list_services_response.service}


def test_workers_share_the_port_and_drain(tmp_path: Path, model_dir: Path, sequence: str) -> None:
    """A call that is in progress when the service stops gets its answers, then UNAVAILABLE."""
    options = ("--workers", "2", "--grpc-port", "0", "--host", "localhost")
    with running(tmp_path, model_dir, *options, CARRY_DRAIN_S="20") as service:
        # the address that was checked to be the machine's own, and no other one of the name
        port = int(service.grpc_address().rpartition(":")[2])
        with pytest.raises(OSError, match=r"refused|unreachable|assign"):
            socket.create_connection(("::1", port))
        sent: queue.Queue[Any] = queue.Queue()
        # a channel of its own for each: otherwise all calls share one connection
        options_of_channel = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            grpc.insecure_channel(service.grpc_address(), options_of_channel) for _ in range(8)
        ]
        stubs = [service_pb2_grpc.GRPCInferenceServiceStub(each) for each in channels]
        for at, stub in enumerate(stubs):
            reply = stub.ModelInfer(request_of(sequence, position=5 * at))
            assert parameters_of(reply)["position"] == 5 * at + 5
        responses = stubs[0].ModelStreamInfer(iter(sent.get, None))
        sent.put(request_of(sequence))
        assert parameters_of(next(responses).infer_response)["position"] == 45
        assert service.stop() == 0
        with pytest.raises(grpc.RpcError) as caught:
            next(responses)
        sent.put(None)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        for each in channels:
            each.close()
