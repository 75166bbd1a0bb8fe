"""Messages, streams and statuses of calls, without models.

`test_messages.py` runs these tests in a process of their own: Triton's client, which other tests
use, registers messages of the same names.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from msgspec.structs import replace

from models.spec.layout import Output
from service.access.caller import ANYONE
from service.core import errors
from service.core.errors import (
    BadRequest,
    CarryError,
    Conflict,
    InvalidInput,
    ShuttingDown,
    leaf_errors,
)
from service.core.values import StreamHead, Warmth
from service.transports.v2.grpc import messages
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.admission import MessageRoom
from service.transports.v2.grpc.infer_stream import WINDOW_BYTES, InferStream, OnResponse
from service.transports.v2.grpc.messages import (
    InferMessage,
    RequestScanner,
    parse,
    scan_request,
)
from service.transports.v2.grpc.replies import ReplyEncoder, encode_reply
from service.transports.v2.grpc.status import STATUS_CODES, status_code
from service.transports.v2.replies import reply_to_chunk
from service.transports.v2.request import InferCall, SelectedOutput, Signature

WINDOW = 64
UNLIMITED = MessageRoom(2**40, 60.0)
LONG = 2**16


def request_of(size: int) -> pb.ModelInferRequest:
    """A request with as many bytes of values."""
    message = pb.ModelInferRequest(model_name="m")
    message.inputs.add(name="inputs", datatype="FP32", shape=[1])
    message.raw_input_contents.append(bytes(size))
    return message


class Client:
    """A stream of requests, of different sequences, that are applied once they are released.

    Attributes:
        sent: number of requests that the stream has received.
        ids: of the responses.
        ended: how the call ended: an error, or None for OK.
    """

    def __init__(self, count: int, size: int):
        self.sent = 0
        self.ids: list[str] = []
        self.ended: list[CarryError | None] = []
        self.can_write = True
        self.waiting: list[tuple[InferMessage, OnResponse]] = []
        self.stream = InferStream(cast(Any, self), self._answer, UNLIMITED, WINDOW, lambda _: None)
        self._count, self._size = count, size
        self.reads = True

    def start_reading(self) -> None:
        self.reads = True
        while self.reads and self.sent < self._count:
            message = request_of(self._size)
            message.id = str(self.sent)
            self.sent += 1
            message.parameters["sequence_id"].int64_param = self.sent
            self.stream.receive(message.SerializeToString())
        if self.reads:
            self.stream.receive_end()

    def stop_reading(self) -> None:
        self.reads = False

    def respond(self, message: bytes) -> None:
        response = pb.ModelStreamInferResponse.FromString(message)
        self.ids.append(response.infer_response.id)

    def end(self) -> None:
        self.ended.append(None)

    def fail(self, error: CarryError) -> None:
        self.ended.append(error)

    def release(self, count: int) -> None:
        """Answer as many requests, the oldest first."""
        for _ in range(count):
            message, on_response = self.waiting.pop(0)
            response = pb.ModelStreamInferResponse()
            response.infer_response.id = message.id
            on_response(response.SerializeToString())

    def _answer(
        self, message: InferMessage, error: CarryError | None, on_response: OnResponse
    ) -> Callable[[], object]:
        self.waiting.append((message, on_response))
        return lambda: None


@pytest.mark.parametrize(("size", "window"), [(1, WINDOW), (WINDOW_BYTES // 4, 4)])
def test_no_more_is_read_than_a_window_of_requests_and_bytes(size: int, window: int) -> None:
    client = Client(3 * WINDOW, size)
    client.start_reading()
    assert client.sent == window
    while client.waiting:
        client.release(1)
        assert client.sent <= len(client.ids) + window
    assert client.ids == [str(at) for at in range(3 * WINDOW)]
    assert client.ended == [None]


def test_no_more_is_answered_or_read_while_the_client_does_not_read() -> None:
    client = Client(3 * WINDOW, 1)
    client.start_reading()
    client.can_write = False
    client.release(WINDOW)
    assert (client.sent, client.ids) == (WINDOW, [])
    client.can_write = True
    client.stream.resume()
    assert len(client.ids) == WINDOW
    assert client.sent == 2 * WINDOW


def test_no_further_request_is_read_while_the_client_does_not_read_responses() -> None:
    """Their responses may be of any size."""
    client = Client(WINDOW // 2, 1)
    client.start_reading()
    client.can_write = False
    client.release(1)
    assert not client.reads
    client.can_write = True
    client.stream.resume()
    assert (client.reads, client.ids) == (True, ["0"])
    client.release(WINDOW // 2 - 1)
    assert client.ended == [None]


def test_every_request_of_a_full_window_is_answered_when_the_service_stops() -> None:
    client = Client(3 * WINDOW, 1)
    client.start_reading()
    error = ShuttingDown("why")
    client.stream.fail(error)
    client.release(WINDOW)
    assert client.ids == [str(at) for at in range(WINDOW)]
    assert client.ended == [error]
    assert client.sent == WINDOW


def test_answered_request_that_waits_for_an_earlier_one_is_freed() -> None:
    client = Client(2, 4)
    client.start_reading()
    (first, on_first), (second, on_second) = client.waiting
    on_second(b"")
    assert not isinstance(second.request, CarryError)
    assert not second.request.inputs
    assert not isinstance(first.request, CarryError)
    assert first.request.inputs
    assert not client.ids
    on_first(b"")
    assert len(client.ids) == 2


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
    assert (long.stream, long.model, long.id) == ("m/7", "m", "first")
    assert not isinstance(long.request, CarryError)
    assert [output.name for output in long.request.outputs] == ["o"]
    assert not long.request.inputs


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


@pytest.mark.parametrize("kind", list(leaf_errors()), ids=lambda kind: kind.code)
def test_every_error_has_a_status_code(kind: type[CarryError]) -> None:
    assert any(base in STATUS_CODES for base in kind.__mro__[:4])


def test_temporary_errors_have_codes_that_clients_retry() -> None:
    for kind in (errors.StoreUnavailable, errors.ShuttingDown):
        assert status_code(kind("why")).name == "UNAVAILABLE"
    assert status_code(errors.Overloaded("why")).name == "RESOURCE_EXHAUSTED"
    assert status_code(Conflict("why")).name == "ABORTED"


def messages_of_clients() -> Iterator[tuple[str, pb.ModelInferRequest]]:
    """Messages as clients write them, and others that differ in one thing."""
    for name, parameters, identity, version in [
        ("plain", {}, "", ""),
        ("of a sequence", {"sequence_id": 7, "sequence_start": True}, "id-1", "1"),
        ("with a long sequence id", {"sequence_id": 2**62}, "x" * 127, ""),
        ("with a position", {"sequence_id": 7, "position": 2**40, "epoch": "0" * 16}, "é", ""),
        (
            "with a position of a new sequence",
            {"sequence_id": 7, "position": 0, "sequence_start": True},
            "",
            "",
        ),
        (
            "with a later position of a new sequence",
            {"sequence_id": 7, "position": 3, "sequence_start": True},
            "",
            "",
        ),
        ("with a position of no sequence", {"position": 1}, "", ""),
        ("with a negative position", {"sequence_id": 7, "position": -1}, "", ""),
        ("with a position that is a string", {"sequence_id": 7, "position": "1"}, "", ""),
        ("with the last position", {"sequence_id": 7, "position": 2**63 - 1}, "", ""),
        ("with a position in a string", {"sequence_id": "\n\x08position\x12\x02\x10\x01"}, "", ""),
        ("with an empty sequence", {"sequence_id": 0}, "", "1"),
        ("with a long id", {}, "x" * 128, ""),
        ("with a long parameter", {"sequence_id": "s" * 200}, "", ""),
        ("with many parameters", {f"triton_{at}": at for at in range(99)}, "", ""),
        ("with an unknown parameter", {"misspelt": True}, "", ""),
    ]:
        message = request_of(40)
        message.inputs[0].shape[:] = [5, 2]
        message.id, message.model_version = identity, version
        for key, value in parameters.items():
            kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
            setattr(message.parameters[key], kind, value)
        yield name, message
        message.outputs.add(name="o")
        yield f"{name}, and an output", message
    for name, change in {
        "two tensors": lambda m: (m.inputs.add(name="reset"), m.raw_input_contents.append(b"")),
        "one of two contents": lambda m: m.inputs.add(name="reset"),
        "two contents": lambda m: m.raw_input_contents.append(b""),
        "no contents": lambda m: m.ClearField("raw_input_contents"),
        "contents twice": lambda m: m.inputs[0].contents.fp32_contents.append(1),
        "no tensor": lambda m: m.ClearField("inputs"),
        "no model": lambda m: m.ClearField("model_name"),
        "shared memory": lambda m: m.inputs[0].parameters["a"].MergeFrom(pb.InferParameter()),
        "an output with parameters": lambda m: m.outputs.add().parameters["a"].SetInParent(),
        "empty contents": lambda m: m.raw_input_contents.__setitem__(0, b""),
        "a position that is no number": lambda m: (
            m.parameters["sequence_id"].MergeFrom(pb.InferParameter(int64_param=7)),
            m.parameters["position"].SetInParent(),
        ),
        "an unsigned position": lambda m: (
            m.parameters["sequence_id"].MergeFrom(pb.InferParameter(int64_param=7)),
            m.parameters["position"].MergeFrom(pb.InferParameter(uint64_param=2**64 - 1)),
        ),
        "no axis": lambda m: m.inputs[0].ClearField("shape"),
        "a negative axis": lambda m: m.inputs[0].shape.append(-1),
        "a long shape": lambda m: m.inputs[0].shape.extend([1] * 200),
    }.items():
        message = request_of(4)
        change(message)
        yield name, message


CLIENTS = list(messages_of_clients())


@pytest.mark.parametrize("name", [name for name, _ in CLIENTS])
def test_message_read_without_protobuf_has_the_same_value(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in two parts, and with its fields in another order."""
    message = dict(CLIENTS)[name]
    data = message.SerializeToString(deterministic=True)
    parts = [data, data + b"\x0a\x01n", b"\x3a\x00" + data, data[2:], data[:-1], data + b"\x07"]
    scanned = [InferMessage(each).request for _ in range(2) for each in parts]
    monkeypatch.setattr(messages, "scan_request", lambda data: (None, None))
    for at, each in enumerate(parts):
        expected = InferMessage(each).request
        for got in (scanned[at], scanned[len(parts) + at]):
            if isinstance(expected, CarryError):
                assert type(got) is type(expected)
                assert isinstance(got, CarryError)
                assert got.detail == expected.detail
            else:
                assert not isinstance(got, CarryError)
                assert replace(got, inputs=list(got.inputs)) == expected


def changed(data: bytes, seed: random.Random) -> bytes:
    """A message with some bytes replaced, inserted or removed, often near a field."""
    at = seed.choice([seed.randrange(len(data)), seed.randrange(min(len(data), 80))])
    removed, added = (
        seed.randrange(3),
        seed.choice([b"", b"\x22", b"\x1a\x01a", b"\x12", b"2", b"\0"]),
    )
    if seed.random() < 0.2:
        added = b"\x22\x0e\n\x08position\x12\x02\x10\x05"
    return data[:at] + added + data[at + removed :]


def test_scanner_that_knows_other_messages_reads_the_same_as_protobuf(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In any order, with other positions, ids and numbers of values, and with changed bytes."""
    seed, scanner = random.Random(7), RequestScanner()
    sent = []
    for _, message in messages_of_clients():
        for position, identity, rows in ((1, "a", 5), (300, "", 5), (2**40, "b" * 90, 3)):
            if "position" in message.parameters:
                message.parameters["position"].int64_param = position
            message.id = identity
            if len(message.raw_input_contents) == 1:
                message.raw_input_contents[0] = bytes(8 * rows)
            data = message.SerializeToString(deterministic=True)
            sent += [data, data, changed(data, seed), changed(data, seed), changed(data, seed)]
    seed.shuffle(sent)
    monkeypatch.setattr(messages, "scan_request", lambda data: (None, None))
    read = 0
    for data in sent * 2:
        request, shape = scanner.scan(data)
        if request is not None:
            read += 1
            expected = InferMessage(data).request
            assert replace(request, inputs=list(request.inputs)) == expected
            assert shape
            assert shape in data
    assert read > len(sent) / 4


POSITION_5 = b"\x22\x0e\n\x08position\x12\x02\x10\x05"
SEQUENCE = b'"\x18\n\x0bsequence_id\x12\x09\x1a\x07abcdefg'
TENSOR = b"\x2a\x0e\n\x01x\x12\x04FP32\x1a\x03\x05\x02\x01"
VALUES = b"\x3a\x28" + bytes(40)
CONFUSING = {
    "as many values as the last message, not as it says": b"%b%b\x3a\x18%b"
    % (SEQUENCE, TENSOR, bytes(40)),
    "a position within another parameter": SEQUENCE[:-4]
    + POSITION_5
    + SEQUENCE[-4:]
    + TENSOR
    + VALUES,
    "a tensor in place of the position": b"\x2a" + POSITION_5[1:] + SEQUENCE + TENSOR + VALUES,
    "an output after the name": b"2-e1234" + b"x0" * 20 + SEQUENCE + TENSOR + VALUES,
}
"""What follows the model's name, and by which a scanner could take a message for a known one."""


@pytest.mark.parametrize("name", CONFUSING)
def test_scanner_does_not_take_another_message_for_a_known_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanner, data = RequestScanner(), b"\n\x01m" + CONFUSING[name]
    known = [SEQUENCE + TENSOR + b"\x3a\x18" + bytes(24)]
    known += [POSITION_5 + SEQUENCE + TENSOR + VALUES, SEQUENCE + TENSOR + VALUES]
    for each in known:
        assert scanner.scan(b"\n\x01m" + each)[0] is not None
    request, _ = scanner.scan(data)
    monkeypatch.setattr(messages, "scan_request", lambda data: (None, None))
    expected = InferMessage(data).request
    assert request is None or replace(request, inputs=list(request.inputs)) == expected


def test_usual_messages_are_read_without_protobuf() -> None:
    names = dict(CLIENTS)
    for name in ("plain", "of a sequence, and an output", "with a position"):
        assert scan_request(names[name].SerializeToString(deterministic=True))[0] is not None


def call_of(**selected: Any) -> InferCall:
    """A call of a model with the outputs `o`, and other ones."""
    output, other = Output("o", (2,)), Output("p", ())
    layout = SimpleNamespace(size=2 if selected.pop("has_one", True) else 3, attention=())
    served = SimpleNamespace(name="m", outputs=layout, blocks=selected.pop("blocks", None))
    outputs = [SelectedOutput("o", False, output, slice(0, 2))]
    if layout.size == 3:
        outputs.append(SelectedOutput("p", True, other, slice(2, 3)))
    signature = Signature(
        cast(Any, SimpleNamespace(served=served)),
        outputs,
        3,
        selected.pop("batch", None),
        False,
        True,
    )
    return InferCall(signature, selected.pop("id", ""), cast(Any, None), 0.0, False)


CALLS = [{}, {"id": "x" * 200}, {"batch": 1}, {"has_one": False}, {"blocks": object()}]


@pytest.mark.parametrize("at", range(len(CALLS)))
@pytest.mark.parametrize("position", [0, 1, 127, 128, 2**62])
def test_reply_written_without_protobuf_is_the_same_message(at: int, position: int) -> None:
    call = call_of(**CALLS[at])
    width = call.signature.codec.served.outputs.size
    values = np.arange(3 * width, dtype=np.float32).reshape(3, width)
    for created, replayed in ((False, True), (True, False)):
        head = StreamHead(b"e" * 8, b"t" * 16, position)
        reply: Any = SimpleNamespace(
            head=head, outputs=values, created=created, replayed=replayed,
            dry_run=False, output_position=5 if position == 1 else None,
            version=SimpleNamespace(version="0123456789ab") if position == 1 else None,
            warm=Warmth(7, 64) if position == 127 else None,
        )  # fmt: skip
        expected = encode_reply(reply_to_chunk(call, reply), pb.ModelInferResponse())
        data = ReplyEncoder().encode(call, reply, in_stream=False)
        assert pb.ModelInferResponse.FromString(data) == expected
        data = ReplyEncoder().encode(call, reply, in_stream=True)
        assert pb.ModelStreamInferResponse.FromString(data).infer_response == expected
