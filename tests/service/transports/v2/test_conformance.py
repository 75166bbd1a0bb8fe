"""The protocol's cases, which run against any server, against a running service."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from carry_client.conformance.__main__ import main
from carry_client.conformance.cases import CASES, PASS, UNSUPPORTED, Case
from carry_client.conformance.server import Server
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


def test_command_names_wrong_options(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """And closes its connections: what stays open is reported when garbage is collected."""
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
