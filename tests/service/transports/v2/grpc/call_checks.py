"""Messages, streams and statuses of calls, without models.

`test_messages.py` runs these tests in a process of their own: Triton's client, which other tests
use, registers messages of the same names.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.access.caller import ANYONE
from service.core import errors
from service.core.errors import BadRequest, CarryError, Conflict, InvalidInput, ShuttingDown
from service.transports.v1.problems import STATUS
from service.transports.v2.grpc import messages
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.admission import MessageRoom
from service.transports.v2.grpc.infer_stream import WINDOW_BYTES, InferStream
from service.transports.v2.grpc.messages import STATUS_CODES, InferMessage, parse, status_code
from tests.support.servers import becomes

WINDOW = 64
UNLIMITED = MessageRoom(2**40, 2**20, 60.0)
LONG = 2**16


def request_of(size: int) -> pb.ModelInferRequest:
    """A request with as many bytes of values."""
    message = pb.ModelInferRequest(model_name="m")
    message.inputs.add(name="inputs", datatype="FP32", shape=[1])
    message.raw_input_contents.append(bytes(size))
    return message


class Call:
    """A stream of requests, of different sequences, that are applied once `is_released` is set.

    Attributes:
        requested: number of requests that were read.
        ids: of the responses.
    """

    def __init__(self, count: int, size: int):
        self.requested = 0
        self.ids: list[str] = []
        self.is_released = asyncio.Event()
        self.stream = InferStream(self, self._answer, UNLIMITED, WINDOW)
        self._count, self._size = count, size

    async def read(self) -> bytes | None:
        if self.requested == self._count:
            return None
        message = request_of(self._size)
        message.id = str(self.requested)
        self.requested += 1
        message.parameters["sequence_id"].int64_param = self.requested
        return message.SerializeToString()

    async def write(self, response: pb.ModelStreamInferResponse) -> None:
        self.ids.append(response.infer_response.id)

    async def _answer(self, message: InferMessage, error: CarryError | None) -> Any:
        await self.is_released.wait()
        response = pb.ModelStreamInferResponse()
        response.infer_response.id = message.head.id
        return response


@pytest.mark.parametrize(("size", "window"), [(1, WINDOW), (WINDOW_BYTES // 4, 4)])
async def test_no_more_is_read_than_a_window_of_requests_and_bytes(size: int, window: int) -> None:
    call = Call(3 * WINDOW, size)
    running = asyncio.create_task(call.stream.run())
    await becomes(lambda: call.requested == window, "a full window")
    for _ in range(100):
        await asyncio.sleep(0)
    assert call.requested == window
    call.is_released.set()
    await running
    assert call.ids == [str(at) for at in range(3 * WINDOW)]


async def test_every_request_of_a_full_window_is_answered_when_the_service_stops() -> None:
    call = Call(3 * WINDOW, 1)
    running = asyncio.create_task(call.stream.run())
    await becomes(lambda: call.requested == WINDOW, "a full window")
    call.stream.end(ShuttingDown("why"))
    for _ in range(10):
        await asyncio.sleep(0)
    call.is_released.set()
    with pytest.raises(ShuttingDown):
        await running
    assert call.ids == [str(at) for at in range(WINDOW)]


async def test_answered_request_that_waits_for_an_earlier_one_is_freed() -> None:
    received: list[InferMessage] = []
    first = asyncio.Event()

    async def answer(message: InferMessage, error: CarryError | None) -> Any:
        received.append(message)
        if len(received) == 1:
            await first.wait()
        return pb.ModelStreamInferResponse()

    call = Call(2, 4)
    stream = InferStream(call, answer, UNLIMITED, WINDOW)
    running = asyncio.create_task(stream.run())
    await becomes(lambda: len(received) == 2 and not received[1].head.inputs, "a freed request")
    assert received[0].head.inputs
    assert not call.ids
    first.set()
    await running
    assert len(call.ids) == 2


def varint(value: int) -> bytes:
    """A number in the wire format of messages."""
    low, value = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(value) if value else bytes([low])


def field(number: int, value: bytes) -> bytes:
    """A field in the wire format of messages."""
    return varint(number << 3 | 2) + varint(len(value)) + value


MANY: dict[str, tuple[bytes, str]] = {
    "tensors": (field(5, b"") * LONG, "at most 1000 fields"),
    "fields of a tensor": (field(5, field(4, b"") * LONG), "at most 1000 fields"),
    "parameters": (field(4, bytes(LONG)), "less than 65536 bytes besides the tensors"),
    "a truncated field": (field(7, bytes(LONG))[:-1], "cannot be parsed"),
    "a group": (field(7, bytes(LONG)) + b"\x0b", "cannot be parsed"),
    "an endless number": (field(7, bytes(LONG)) + b"\xff" * 11, "cannot be parsed"),
}


@pytest.mark.parametrize("name", MANY)
async def test_long_message_is_rejected_before_objects_are_made_of_its_fields(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, expected = MANY[name]
    parsed: list[int] = []

    def record(kind: type[Any], message: bytes) -> Any:
        parsed.append(len(message))
        return parse(kind, message)

    monkeypatch.setattr(messages, "parse", record)
    inference: Any = None
    with pytest.raises(BadRequest, match=expected):
        await InferMessage(data).read(inference, ANYONE, 0.0)
    assert sum(parsed) < LONG


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ([1] * 9, "shape: expected list of at most 8 values, got a list of 9"),
        ([-1, 1], r"shape\[0\]: expected greater than or equal to 0, got -1"),
        ([2**31, 1], r"shape\[0\]: expected less than or equal to 2147483647, got 2147483648"),
    ],
)
async def test_shape_of_a_tensor_is_rejected_as_over_http(axes: list[int], expected: str) -> None:
    message = request_of(4)
    message.inputs[0].shape[:] = axes
    inference: Any = None
    with pytest.raises(InvalidInput, match=rf"inputs\[0\].{expected}"):
        await InferMessage(message.SerializeToString()).read(inference, ANYONE, 0.0)


def test_head_of_a_long_message_has_all_but_its_tensors() -> None:
    message = request_of(LONG)
    message.id = "first"
    message.parameters["sequence_id"].int64_param = 7
    message.outputs.add(name="o")
    long = InferMessage(message.SerializeToString())
    assert long.stream == "m/7"
    del message.inputs[:], message.raw_input_contents[:]
    assert long.head == message


@pytest.mark.parametrize(("dry_run", "position"), [(True, None), (False, 3)])
def test_invalid_request_keeps_its_place_in_its_sequence(
    dry_run: bool, position: int | None
) -> None:
    """So that those after it are not applied in its place."""
    message = request_of(4)
    message.parameters["sequence_id"].string_param = "s"
    message.parameters["dry_run"].bool_param = dry_run
    message.parameters["misspelt"].bool_param = True
    if position is not None:
        message.parameters["position"].int64_param = position
    invalid = InferMessage(message.SerializeToString())
    assert (invalid.stream, invalid.is_dry_run, invalid.appends) == ("m/s", dry_run, True)


@pytest.mark.parametrize("kind", STATUS, ids=lambda kind: kind.code)
def test_every_error_has_a_status_code(kind: type[CarryError]) -> None:
    assert any(base in STATUS_CODES for base in kind.__mro__[:4])


def test_temporary_errors_have_codes_that_clients_retry() -> None:
    for kind in (errors.StoreUnavailable, errors.ShuttingDown):
        assert status_code(kind("why")).name == "UNAVAILABLE"
    assert status_code(errors.Overloaded("why")).name == "RESOURCE_EXHAUSTED"
    assert status_code(Conflict("why")).name == "ABORTED"
