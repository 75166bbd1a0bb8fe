"""The generated messages, the port, and the checks of calls, which run in another process."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.start_checks import CannotServeError, bind_port, reserve_port

PROTO = Path("service/transports/v2/grpc/v2.proto")


def test_generated_messages_are_those_of_the_proto_file(tmp_path: Path) -> None:
    outputs = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, PROTO], check=True)
    for suffix in (".py", ".pyi"):
        name = PROTO.with_name(f"v2_pb2{suffix}")
        assert (tmp_path / name).read_text() == name.read_text(), "run `make proto`"


def test_calls_pass_their_checks() -> None:
    """In another process; see `call_checks`."""
    files = sorted(Path(__file__).parent.glob("*_checks.py"))
    options = ["-q", "--noconftest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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
