"""The protocol's cases, which run against any server, against a running service."""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

from carry_client.conformance import cases
from carry_client.conformance import server as server_module
from carry_client.conformance.__main__ import main
from carry_client.conformance.cases import CASES, FAIL, PASS, UNSUPPORTED, Case, expect
from carry_client.conformance.server import Failure, Server
from tests.support.post_tables import INPUT
from tests.support.service import Service, running

MODEL, ROWS = "post-lstm", {"inputs": (1, len(INPUT), 1)}


@pytest.fixture(scope="module", params=["fast path", "slow path"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_dir: Path
) -> Iterator[Server]:
    folder, fast = tmp_path_factory.mktemp("service"), str(request.param == "fast path").lower()
    options = ("--grpc-port", "0")
    with (
        running(folder, model_dir, *options, CARRY_HTTP_FAST_PATH=fast) as service,
        closing(Server(service.url, MODEL, service.grpc_address(), ROWS)) as server,
    ):
        yield server


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_service_conforms(server: Server, case: Case) -> None:
    assert case.run(server) == (PASS, "")


def test_command_prints_each_outcome(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of gRPC are not supported without its address."""
    arguments = [service.url, "--model", MODEL, "--shape", "inputs:1,5,1"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    grpc = [each["case"] for each in found["cases"] if each["outcome"] == UNSUPPORTED]
    assert grpc == [case.name for case in CASES if case.name.startswith("gRPC")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"{found['counts'][PASS]} pass, {len(grpc)} not supported"
    assert main([service.url, "--model", "nothing"]) == 2


def test_a_reason_of_the_server_is_one_printable_line(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case("a case", "a section", "", lambda _: expect(False, "<p>\x1b[31m\npass\r</p>"))
    monkeypatch.setattr(cases, "CASES", [case])
    assert main([service.url, "--model", MODEL]) == 1
    line, counts = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert line.split()[:3] == ["fail", "a", "case"]
    assert counts == "1 fail"


@pytest.mark.timeout(60)
def test_calls_that_are_not_answered_fail(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    class Silent(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda *_: ended.wait())

    silent = grpc.server(ThreadPoolExecutor(1), handlers=[Silent()])
    port = silent.add_insecure_port("127.0.0.1:0")
    silent.start()
    try:
        with closing(Server(service.url, MODEL, f"127.0.0.1:{port}", ROWS)) as server:
            monkeypatch.setattr(server_module, "TIMEOUT_S", 1.0)
            (case,) = [each for each in CASES if each.name == "gRPC: server metadata"]
            outcome, reason = case.run(server)
    finally:
        ended.set()
        silent.stop(None).wait()
    assert outcome == FAIL
    assert "Deadline Exceeded" in reason


@pytest.mark.timeout(60)
@pytest.mark.parametrize("slow", ["/v2", "/v2/models/m/config"])
def test_a_reply_that_comes_byte_by_byte_has_a_limit(
    monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """Each byte is in time; as a head, and without an end."""
    ended = threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != slow:
                document: dict[str, Any] = {"name": "m", "extensions": [], "inputs": []}
                body = json.dumps({**document, "outputs": []}).encode()
                self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
                self.wfile.write(body)
                return
            with suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
                while not ended.wait(0.1):
                    self.wfile.write(b"x")

        def log_message(self, *_: object) -> None:
            """Nothing."""

    monkeypatch.setattr(server_module, "TIMEOUT_S", 1.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as slow_server:
        thread = threading.Thread(target=slow_server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with pytest.raises(Failure, match=r"expected a whole reply within 1 s"):
                Server(f"http://127.0.0.1:{slow_server.server_port}", "m")
        finally:
            ended.set()
            slow_server.shutdown()
            thread.join()


def test_command_names_wrong_options(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """It also closes its connections: an open one is a warning when garbage is collected."""
    arguments = [service.url, "--model", MODEL]
    assert main([*arguments, "--shape", "rows:1,5,1"]) == 2
    assert "expected --shape of the inputs ['inputs'], got 'rows'" in capsys.readouterr().err
    gc.collect()
    for option, value in (("--shape", "inputs:1,x"), ("--shape", "1,5"), ("--header", "KEY")):
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, option, value])
        assert f"{option}: expected " in capsys.readouterr().err


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "carry_client.conformance.cases", None)
    assert main(["http://127.0.0.1:1", "--model", MODEL]) == 2
    assert "pip install 'carry-client[conformance]'" in capsys.readouterr().err
