"""The generated messages, the table of errors, the port, and the window of a stream."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.core import errors
from service.core.errors import CarryError
from service.start_checks import CannotServeError, bind_port, reserve_port
from service.transports.v1.problems import STATUS
from service.transports.v2.grpc.errors import STATUS_CODES, status_code

PROTO = Path("service/transports/v2/grpc/v2.proto")


def test_generated_messages_are_those_of_the_proto_file(tmp_path: Path) -> None:
    outputs = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, PROTO], check=True)
    for suffix in (".py", ".pyi"):
        name = PROTO.with_name(f"v2_pb2{suffix}")
        assert (tmp_path / name).read_text() == name.read_text(), "run `make proto`"


@pytest.mark.parametrize("kind", STATUS, ids=lambda kind: kind.code)
def test_every_error_has_a_status_code(kind: type[CarryError]) -> None:
    assert status_code(kind("why")) is not None
    assert any(base in STATUS_CODES for base in kind.__mro__[:4])


def test_retryable_errors_have_codes_that_clients_retry() -> None:
    for kind in (errors.StoreUnavailable, errors.ShuttingDown):
        assert status_code(kind("why")).name == "UNAVAILABLE"
    assert status_code(errors.Overloaded("why")).name == "RESOURCE_EXHAUSTED"


def test_calls_bound_their_number_and_memory_and_survive_disconnects() -> None:
    """In another process; see `call_checks` and `call_admission_checks`."""
    files = [Path(__file__).with_name(f"{name}_checks.py") for name in ("call", "call_admission")]
    options = ["-q", "--noconftest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "26 passed" in done.stdout


def test_port_that_is_in_use_is_an_error() -> None:
    """Although two services could share it, if both set SO_REUSEPORT."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(CannotServeError, match=f"cannot listen on 127.0.0.1:{port}") as caught,
            reserve_port("127.0.0.1", port, "grpc"),
        ):
            pass
    assert f"carry serve --grpc-port {port + 1}`" in str(caught.value)


def test_port_of_http_is_an_error() -> None:
    """The service's own HTTP port is bound before, and listened on later."""
    with bind_port("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with (
            pytest.raises(CannotServeError, match=f"cannot listen on 127.0.0.1:{port}"),
            reserve_port("127.0.0.1", port, "grpc"),
        ):
            pass


@pytest.mark.parametrize(("stops", "answered"), [(False, 128), (True, 64)])
def test_stream_reads_no_more_than_its_window_and_answers_what_it_read(
    stops: bool, answered: int
) -> None:
    command = [sys.executable, "-m", "tests.service.transports.v2.grpc.full_window"]
    done = subprocess.run(
        [*command, *(["stop"] if stops else [])], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == {
        "unanswered": 64,
        "answered": list(range(answered)),
        "is_shut_down": stops,
    }
