"""Signals: SIGTERM with and without a lame duck, SIGHUP to a single worker, a closed terminal; an
outage of the store."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import termios
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.sync.client import connect

from models.artifact.artifact import Artifact
from tests.support.feeders import feeding
from tests.support.servers import RealServer, until
from tests.support.service import POLL_S, READY_S, SLOW_WARM_UP, Service, customise, running

CHUNKS = "/v1/models/probe/streams/held/chunks"
LIVE = "/v1/models/probe/streams/live/live"
CHUNKED = "Transfer-Encoding: chunked"

FAILS_ON_DEMAND = """
import pathlib
from service.engine.runtimes.onnx import OnnxRuntime

warm = OnnxRuntime.warm

def fail(runtime):
    if pathlib.Path({folder!r}, "fail").exists():
        raise RuntimeError("planted")
    return warm(runtime)

OnnxRuntime.warm = fail
"""
"""A `sitecustomize` that makes the warm-up fail while there is a file."""

SIGNALLED_AS_IT_STARTS_VALKEY = """
import os, signal, subprocess

fork_exec = subprocess._fork_exec

def fork(arguments, *others):
    pid = fork_exec(arguments, *others)
    if os.fsencode(arguments[0]).endswith(b"valkey-server"):
        os.kill(os.getpid(), signal.SIGTERM)
    return pid

subprocess._fork_exec = fork
"""
"""A `sitecustomize` that signals the process before it knows the server that it has started."""

THREADS_WARN = """
import warnings
warnings.filterwarnings("always", ".*fork", DeprecationWarning)
"""
"""A `sitecustomize` with which Python (3.12 or later) warns of a fork of several threads."""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_during_warm_up_stops_the_service(
    tmp_path: Path, probe: Artifact, workers: str
) -> None:
    customise(tmp_path, THREADS_WARN + SLOW_WARM_UP)
    service = Service(tmp_path, probe.path, "--workers", workers)
    service.launch(PYTHONPATH=str(tmp_path))
    until(lambda: service.log().count("compiling") == int(workers), "the warm-up", READY_S)
    valkey = service.valkey_pid()
    assert service.stop() == 0
    assert not Path(f"/proc/{valkey}").exists(), "stopped with the service"
    assert "DeprecationWarning" not in service.log(), "forked while it had several threads"
    for line in service.lines("worker_started"):
        assert not Path(f"/proc/{line['pid']}").exists()


def test_sigterm_while_valkey_starts_stops_both(tmp_path: Path, probe: Artifact) -> None:
    customise(tmp_path, SIGNALLED_AS_IT_STARTS_VALKEY)
    service = Service(tmp_path, probe.path)
    service.launch(PYTHONPATH=str(tmp_path))
    assert service.process.wait(60) == 0
    assert service.lines("valkey_stopped")
    assert not service.lines("valkey_killed"), "the server got no signal"


def test_sighup_replaces_a_single_worker_without_a_failed_request(
    tmp_path: Path, probe: Artifact
) -> None:
    customise(tmp_path, FAILS_ON_DEMAND.format(folder=str(tmp_path)))
    environment = {"PYTHONPATH": str(tmp_path), "CARRY_KEEP_ALIVE_S": "600"}
    with running(tmp_path, probe.path, **environment, CARRY_ADMIN_PORT="0") as service:
        parent, valkey = service.process, service.valkey_pid()
        with feeding(service.url, clients=1) as feeders:
            (tmp_path / "fail").touch()
            parent.send_signal(signal.SIGHUP)
            until(lambda: service.lines("replacement_failed"), "a failed start", READY_S, POLL_S)
            feeders.wait_for_more()
            (tmp_path / "fail").unlink()
            _replace_with_idle_connections(service)
            until(lambda: "Finished server process" in service.log(), "its end", poll_s=POLL_S)
            feeders.wait_for_more()
            _replace_with_idle_connections(service)
            first, second = service.ready_workers()
            until(lambda: not Path(f"/proc/{first}").exists(), "the end of the first successor")
        assert parent.poll() is None
        assert service.stop() == 0
        assert not service.lines("worker_killed")
        assert not Path(f"/proc/{valkey}").exists()
        assert not Path(f"/proc/{second}").exists()


def _replace_with_idle_connections(service: Service) -> None:
    """Replace the worker, which still answers what arrives on connections that were idle.

    One request is for the fast path. A live socket is closed at once.
    """
    retired = len(service.lines("worker_retiring"))
    worker = psutil.Process((service.ready_workers() or [service.process.pid])[-1])
    admin_port = service.lines("admin_port_bound")[0]["port"]
    chunk = json.dumps({"inputs": [[0.5] * 3]})
    requests = [
        ("GET", "/health/live", None, {}),
        ("POST", CHUNKS, chunk, {"Content-Type": "application/json"}),
    ]
    connections = [HTTPConnection(service.url.removeprefix("http://")) for _ in requests]
    for connection, request in zip(connections, requests, strict=True):
        assert _exchange(connection, request) is None
    with connect(service.url.replace("http", "ws") + LIVE) as live:
        service.process.send_signal(signal.SIGHUP)
        until(lambda: service.lines("worker_retiring")[retired:], "its end", READY_S, POLL_S)
        with pytest.raises(ConnectionClosed) as closed:
            list(live)
        until(lambda: not _listens(worker, admin_port), "its closed admin port", poll_s=POLL_S)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == CloseCode.SERVICE_RESTART
    for connection, request in zip(connections, requests, strict=True):
        assert _exchange(connection, request) == "close"


def _listens(process: psutil.Process, port: int) -> bool:
    return any(
        each.laddr.port == port and each.status == psutil.CONN_LISTEN
        for each in process.net_connections("tcp")
    )


def _exchange(connection: HTTPConnection, request: tuple[str, str, Any, Any]) -> str | None:
    """Send a request and return the `Connection` of its response."""
    connection.request(*request)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    response.read()
    return response.getheader("Connection")


def test_a_closed_terminal_stops_the_service(tmp_path: Path, probe: Artifact) -> None:
    terminal, device = os.openpty()

    def attach() -> None:
        fcntl.ioctl(device, termios.TIOCSCTTY, 0)

    with running(tmp_path, probe.path, prepare=attach) as service:
        os.close(device)
        os.close(terminal)
        assert service.process.wait(60) == 0
        assert service.lines("valkey_stopped")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_service_accepts_requests_while_it_is_a_lame_duck(
    tmp_path: Path, probe: Artifact, store: RealServer, workers: str
) -> None:
    options = ("--workers", workers)
    environment = {"CARRY_LAME_DUCK_S": "600"}
    with (
        running(tmp_path, probe.path, *options, redis_url=store.url, **environment) as service,
        httpx.Client(base_url=service.url) as client,
    ):
        until(
            lambda: len(service.ready_workers()) == int(workers) * (workers != "1"), "every worker"
        )
        service.process.send_signal(signal.SIGTERM)

        def is_failing() -> bool:
            # without keep-alive, so that each worker is asked
            ready = client.get("/health/ready", headers={"connection": "close"})
            return ready.status_code == 503 and ready.json()["failing"] == ["accepting"]

        until(lambda: len(service.lines("lame_duck")) == int(workers), "the log lines")
        until(is_failing, "the failing check", poll_s=POLL_S)
        assert service.is_live()
        answer = client.get("/v1/models")
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert not service.ended()
        host, _, port = service.url.removeprefix("http://").partition(":")
        address = (host, int(port))
        with socket.create_connection(address) as unfinished:
            unfinished.sendall(
                f"POST {CHUNKS} HTTP/1.1\r\nHost: localhost\r\n{CHUNKED}\r\n\r\n".encode()
            )
            service.process.send_signal(signal.SIGTERM)
            # while it drains, so that load balancers connect elsewhere
            until(lambda: _is_refused(address), "the closed port", poll_s=POLL_S)
            assert not service.ended()
        assert service.process.wait(60) == 0
        assert "worker_killed" not in service.log()


def _is_refused(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return True
    return False


def test_ignored_hangup_stays_ignored_and_more_signals_interrupt_no_shutdown(
    tmp_path: Path, probe: Artifact
) -> None:
    customise(tmp_path, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    with running(tmp_path, probe.path, PYTHONPATH=str(tmp_path)) as service:
        valkey = service.valkey_pid()
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        (ignored,) = [line.split()[1] for line in status.splitlines() if "SigIgn" in line]
        assert int(ignored, 16) & 1 << signal.SIGHUP - 1

        def ended() -> bool:
            service.process.send_signal(signal.SIGTERM)
            return service.ended()

        until(ended, "the end of the service")
        assert service.process.returncode == 0
        assert not psutil.pid_exists(valkey), "stopped with the service"


def test_outage_of_the_store_is_reported_and_survived(
    tmp_path: Path, probe: Artifact, store: RealServer
) -> None:
    body = {"position": 0, "inputs": [[1.0] * 3] * 2}
    second = {**body, "position": 2}
    path = "/v1/models/probe/streams/a"
    with (
        running(tmp_path, probe.path, redis_url=store.url, CARRY_STORE_WAIT_S="2") as service,
        httpx.Client(base_url=service.url, timeout=30) as client,
    ):
        until(lambda: answered(client.post(f"{path}/chunks", json=body)), "the first reply")
        store.kill()
        short = {"carry-timeout": "0.5"}

        def rejection() -> httpx.Response | None:
            """Unless a busy machine suspends the service until the deadline."""
            response = client.post(f"{path}/chunks", json=second, headers=short)
            return None if response.json()["code"] == "deadline_exceeded" else response

        for response in (until(rejection, "a rejection"), client.get(path)):
            assert (response.status_code, response.json()["code"]) == (503, "store_unavailable")
            assert int(response.headers["retry-after"]) >= 1
        assert client.get("/health/ready").json()["failing"] == ["store"]
        assert service.is_live()
        store.start()
        until(lambda: client.get(path).json().get("position") == 2, "the stream")
        reply = until(lambda: answered(client.post(f"{path}/chunks", json=second)), "a reply")
        assert reply["position"] == 4
        until(lambda: client.get("/health/ready").status_code == 200, "readiness")


def answered(response: httpx.Response) -> Any:
    """The reply to a chunk, if it was applied."""
    return response.json() if response.status_code == 200 else None
