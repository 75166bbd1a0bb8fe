"""Worker processes: forks, connections, failed starts, exits, hangs, and their replacement."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import redis

from carry_client import Carry, Progress
from models.artifact.artifact import Artifact
from service.server.worker import HEARTBEAT_TIMEOUT_S
from tests.support.feeders import feeding
from tests.support.servers import RealServer, real_server, until
from tests.support.service import POLL_S, READY_S, SLOW_WARM_UP, Service, customise, running

FILL = 4
ATTEMPTS = 10
"""More than a busy machine may spoil by suspending the test between its connections."""
UNUSED_S = 2.5
"""After which an unused connection does not count."""

FIRST_FAILS = """
import os, pathlib, time
from service.engine.runtimes.onnx import OnnxRuntime

warm = OnnxRuntime.warm

def fail_once(runtime):
    path = pathlib.Path({folder!r}, "first")
    try:
        path.symlink_to(f"/proc/{{os.getpid()}}")
    except FileExistsError:
        while path.exists():
            time.sleep(0.01)
        return warm(runtime)
    raise RuntimeError("planted")

OnnxRuntime.warm = fail_once
"""
"""A `sitecustomize` that makes the first warm-up fail, after which the others start."""

PATIENT = """
from service.server import connection_balance

connection_balance.DEFER_S = 10.0
"""
"""A `sitecustomize` with which a busy machine changes no worker's turn to accept."""

SIGNALLED = """
import os, pathlib, signal

def signal_itself():
    if pathlib.Path({folder!r}, "early").exists():
        os.kill(os.getpid(), signal.SIGTERM)

os.register_at_fork(after_in_child=signal_itself)
"""
"""A `sitecustomize` with which a fork gets SIGTERM as its first thing, while there is a file."""

SLOW_RESTART = """
from service.store import embedded

embedded.BACKOFF_BASE_S = 3.0
"""
"""A `sitecustomize` with which the embedded store restarts later than a worker is replaced."""

BACKOFF_S = 0.2
IMPATIENT = f"""
from service.server import worker, workers
workers.HEARTBEAT_TIMEOUT_S = worker.HEARTBEAT_TIMEOUT_S = 8
workers.BACKOFF_BASE_S = {BACKOFF_S}
"""
"""A `sitecustomize` that shortens the parent's heartbeat timeout, and the pause before restarts."""


@pytest.fixture(scope="module")
def two_workers(
    tmp_path_factory: pytest.TempPathFactory, probe: Artifact
) -> Iterator[tuple[Service, RealServer]]:
    """A service of two workers, both of them ready, and its store; tests replace the workers.

    A third one failed to start, before any was ready.
    """
    folder = tmp_path_factory.mktemp("two")
    customisation = PATIENT + IMPATIENT + FIRST_FAILS + SIGNALLED
    customise(folder, customisation.format(folder=str(folder)))
    environment = {"CARRY_ADMIN_PORT": "0", "PYTHONPATH": str(folder)}
    environment["CARRY_WORKER_FILL"] = str(FILL)
    command = (folder, probe.path, "--workers", "2")
    with (
        real_server("valkey") as store,
        running(*command, redis_url=store.url, **environment) as up,
    ):
        until(lambda: len(up.lines("worker_ready")) == 2, "both workers", READY_S)
        yield up, store


def test_only_the_admin_port_has_metrics_of_all_workers_and_documentation(
    two_workers: tuple[Service, RealServer],
) -> None:
    service, _ = two_workers
    (bound,) = service.lines("admin_port_bound")
    admin = f"http://{bound['host']}:{bound['port']}"
    streams = f"{service.url}/v1/models/probe/streams"
    for index in range(8):
        reply = httpx.post(f"{streams}/s{index}/chunks", json={"inputs": [[0.5] * 3]}, verify=False)
        assert reply.status_code == 200

    def are_counted() -> bool:
        # each on a connection of its own, which one of the workers accepts
        pages = [httpx.get(f"{admin}/metrics", verify=False).text for _ in range(8)]
        return all('carry_chunks_total{model="probe"} 8.0' in page for page in pages)

    # a worker that is not scraped itself adds its values once a second
    until(are_counted, "the chunks in every worker's answer", poll_s=POLL_S)
    for path in ("/metrics", "/docs", "/docs/errors", "/openapi.json"):
        assert httpx.get(service.url + path, verify=False).status_code == 404, path
        assert httpx.get(admin + path, verify=False).status_code == 200, path
        page = {"host": "evil.example"}
        for url in (service.url, admin):
            assert httpx.get(url + path, headers=page, verify=False).status_code == 421, path
    # by default beside the documentation and the API
    assert httpx.get(f"{service.url}/console/", verify=False).status_code == 404
    assert httpx.get(f"{admin}/health/ready", verify=False).status_code == 200
    assert "/v1/models" in httpx.get(f"{admin}/openapi.json", verify=False).json()["paths"]
    assert httpx.get(f"{admin}/v1/models", verify=False).json()["code"] == "not_found"


def test_workers_are_forks_that_share_only_the_port(
    two_workers: tuple[Service, RealServer],
) -> None:
    service, _ = two_workers
    parent = psutil.Process(service.process.pid)
    for pid in _live_workers(service):
        assert psutil.Process(pid).cmdline() == parent.cmdline()
        ours, theirs = _files(parent.pid), _files(pid)
        (shared,) = ours & theirs
        assert shared[0].startswith("socket:")
        # heartbeats, and one end of a pipe in each by which it notices the end of the other
        assert len({name for name, _ in ours} & {name for name, _ in theirs}) == 1 + 3


def _files(pid: int) -> set[tuple[str, str]]:
    """The open files of a process but its standard streams, and how each is open, in which the ends
    of a pipe differ."""
    files = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if int(link.name) > 2:
            with suppress(FileNotFoundError):  # it was closed meanwhile
                flags = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().splitlines()[1]
                files.add((str(link.readlink()), flags[-1]))
    return files


def test_workers_start_their_request_ids_far_apart(
    two_workers: tuple[Service, RealServer],
) -> None:
    service, _ = two_workers
    ids = []
    with ExitStack() as stack:
        for _ in range(2 * FILL):
            connection = HTTPConnection(service.url.removeprefix("http://"))
            stack.callback(connection.close)
            connection.request("GET", "/health/live")
            response = connection.getresponse()
            response.read()
            ids.append(int(response.headers["x-request-id"], 16))
    assert max(ids) - min(ids) > 2**32


def test_sigterm_right_after_the_fork_ends_the_worker(
    two_workers: tuple[Service, RealServer],
) -> None:
    service, _ = two_workers
    before, ended, early = (
        service.ready_workers(),
        len(service.lines("worker_ended")),
        service.folder / "early",
    )
    early.touch()
    os.kill(before[-1], signal.SIGKILL)
    until(lambda: service.lines("worker_ended")[ended + 1 :], "its end", READY_S, POLL_S)
    early.unlink()
    until(
        lambda: len(service.ready_workers()) == len(before) + 1,
        "the worker in its place",
        READY_S,
        POLL_S,
    )
    killed, ended_early = service.lines("worker_ended")[ended : ended + 2]
    assert killed["reason"] == "the worker exited with signal 9"
    assert ended_early["reason"] == "the worker exited with status 0"
    assert not ended_early["was_ready"]


def test_a_worker_that_fails_to_start_is_restarted_while_others_serve(
    two_workers: tuple[Service, RealServer],
) -> None:
    service, store = two_workers
    before, ended = service.ready_workers(), len(service.lines("worker_ended"))
    store.configure("maxmemory-policy", "allkeys-lru")
    os.kill(before[-1], signal.SIGKILL)
    failed = until(lambda: service.lines("worker_ended")[ended + 1 :], "a failed start", READY_S)
    assert not service.ended()
    assert service.is_live()
    assert failed[0]["was_ready"] is False
    store.configure("maxmemory-policy", "noeviction")
    until(
        lambda: len(service.ready_workers()) == len(before) + 1, "the worker in its place", READY_S
    )
    pauses = [line["pause_s"] for line in service.lines("worker_ended")[ended:]]
    assert pauses == sorted(pauses)
    assert pauses[1] == 2 * pauses[0]


def test_connections_fill_one_worker_and_then_the_next_one(
    two_workers: tuple[Service, RealServer],
) -> None:
    service, _ = two_workers
    with ExitStack() as stack:
        for _ in range(ATTEMPTS):
            # those of before, also of other tests, no longer count
            time.sleep(UNUSED_S)
            owners = _connect(service, stack, 2 * FILL)
            if owners == [owners[0]] * FILL + [owners[-1]] * FILL and owners[0] != owners[-1]:
                break
            stack.close()
        else:
            pytest.fail(f"expected {FILL} of one worker, then {FILL} of the other, got {owners}")

        def is_next() -> bool:
            with ExitStack() as probe:
                return _connect(service, probe) == owners[:1]

        # unused connections do not count for longer than two seconds
        until(is_next, "room for another connection", poll_s=POLL_S)


def test_connections_of_a_killed_worker_go_to_the_other_and_then_to_its_successor(
    two_workers: tuple[Service, RealServer],
) -> None:
    service, store = two_workers
    with ThreadPoolExecutor() as threads, ExitStack() as stack, store.client() as client:
        started, enough = threading.Barrier(3), threading.Event()
        stack.callback(enough.set)
        sending = [threads.submit(_send, service, f"k{n}", started, enough) for n in range(2)]
        started.wait(READY_S)
        serving = {pid for address, pid in _owners(service).items() if address}
        # the store answers no commit, so that each of these workers has a request to answer
        client.client_pause(60_000, all=False)
        stack.callback(client.client_unpause)
        until(lambda: _held_scripts(client) == len(serving), "requests in flight", poll_s=POLL_S)
        killed = serving.pop()
        (other,) = {*_live_workers(service)} - {killed}
        os.kill(killed, signal.SIGKILL)
        until(lambda: killed not in _live_workers(service), "its end", poll_s=POLL_S)
        client.client_unpause()
        assert _connect(service, stack) == [other]
        until(lambda: len(_live_workers(service)) == 2, "its successor", READY_S, POLL_S)
        (successor,) = {*_live_workers(service)} - {other}
        until(lambda: _accepting(service) == {other, successor}, "connections to both")
        enough.set()
        retries = sum(future.result() for future in sending)
    assert retries > 0, "no request was in flight"


def _held_scripts(client: redis.Redis) -> int:
    """How many connections wait for the reply to a script, since the store is paused."""
    blocked = [each for each in client.client_list() if "b" in each["flags"]]
    return [each["cmd"] for each in blocked].count("evalsha")


def _send(
    service: Service, stream: str, started: threading.Barrier, enough: threading.Event
) -> int:
    """Send chunks, which the client repeats until they are answered; returns how often.

    After the first one it waits for the others.
    """
    last: list[Progress] = []

    def chunks() -> Iterator[np.ndarray]:
        while not enough.is_set():
            yield np.full((2, 3), 0.5)

    with Carry(service.url) as carry:
        sent = carry.model("probe").stream(stream)
        for reply in sent.send_all(chunks(), chunk_events=2, progress=last.append):
            if reply.position == 2:
                started.wait(READY_S)
        assert sent.refresh().position == last[-1].position
    return last[-1].retries


def _live_workers(service: Service) -> list[int]:
    """The workers that are ready and run."""
    return [pid for pid in service.ready_workers() if psutil.pid_exists(pid)]


def _connect(service: Service, stack: ExitStack, count: int = 1) -> list[int]:
    """Open connections; returns the worker that accepted each of them."""
    host, _, port = service.url.removeprefix("http://").partition(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(count)]
    addresses = [stack.enter_context(each).getsockname() for each in sockets]

    def owners() -> list[int] | None:
        found = _owners(service)
        return [found[each] for each in addresses] if found.keys() >= {*addresses} else None

    return until(owners, "accepted connections", poll_s=POLL_S)


def _accepting(service: Service) -> set[int]:
    """The workers that accept one connection after the other, more than fill a worker. Where a busy
    machine suspends the test meanwhile, the first ones no longer count."""
    with ExitStack() as stack:
        return {*_connect(service, stack, 2 * FILL)}


def _owners(service: Service) -> dict[Any, int]:
    """The worker that accepted each open connection, by the client's address."""
    return {
        each.raddr: pid
        for pid in _live_workers(service)
        for each in psutil.Process(pid).net_connections("tcp")
    }


def test_a_failing_first_worker_does_not_stop_the_others(
    two_workers: tuple[Service, RealServer],
) -> None:
    service, _ = two_workers
    failed = service.lines("worker_ended")[0]
    assert (failed["was_ready"], failed["pause_s"]) == (False, BACKOFF_S)
    assert failed["pid"] not in service.ready_workers()


def test_a_worker_that_does_not_drain_in_time_is_killed(
    tmp_path: Path, probe: Artifact, store: RealServer
) -> None:
    command = (tmp_path, probe.path, "--workers", "2")
    with running(*command, redis_url=store.url, CARRY_DRAIN_S="0") as service:
        hung = until(lambda: service.ready_workers()[1:], "both workers", READY_S)[0]
        os.kill(hung, signal.SIGSTOP)
        assert service.stop() == 0
        assert not Path(f"/proc/{hung}").exists()


def test_a_worker_that_exits_during_start_is_restarted_immediately(
    tmp_path: Path, probe: Artifact
) -> None:
    customise(tmp_path, SLOW_WARM_UP)
    with real_server("valkey") as store:
        service = Service(tmp_path, probe.path, "--workers", "2", redis_url=store.url)
        service.launch(PYTHONPATH=str(tmp_path))
        until(lambda: service.log().count("compiling") == 2, "the warm-up", READY_S)
        for line in service.lines("worker_started"):
            os.kill(line["pid"], signal.SIGKILL)
        killed_s = time.monotonic()
        assert service.process.wait(60) == 1
        assert time.monotonic() - killed_s < HEARTBEAT_TIMEOUT_S
        assert "carry: no worker could be started: " in service.log().splitlines()[-1]


def test_a_worker_is_replaced_during_a_restart_of_the_store_and_ends_after_its_parent(
    tmp_path: Path, probe: Artifact
) -> None:
    customise(tmp_path, SLOW_RESTART)
    with running(tmp_path, probe.path, "--workers", "2", PYTHONPATH=str(tmp_path)) as service:
        until(lambda: len(service.ready_workers()) == 2, "both workers", READY_S, POLL_S)
        os.kill(service.valkey_pid(), signal.SIGKILL)
        until(lambda: service.lines("valkey_exited"), "the restart", READY_S, POLL_S)
        os.kill(service.ready_workers()[0], signal.SIGKILL)
        until(lambda: len(service.ready_workers()) == 3, "the worker in its place", READY_S, POLL_S)
        workers = _live_workers(service)
        service.kill()
        until(lambda: not any(map(psutil.pid_exists, workers)), "the end of the workers", READY_S)


def test_a_hung_worker_is_replaced(two_workers: tuple[Service, RealServer]) -> None:
    service, _ = two_workers
    ready, hung = len(service.ready_workers()), _live_workers(service)[0]
    os.kill(hung, signal.SIGSTOP)
    until(
        lambda: len(service.ready_workers()) == ready + 1, "the worker in its place", READY_S, 0.2
    )
    assert [line["pid"] for line in service.lines("worker_hangs")] == [hung]
    assert not Path(f"/proc/{hung}").exists()


def test_worker_logs_each_request_once(two_workers: tuple[Service, RealServer]) -> None:
    service, _ = two_workers
    headers = {"X-Request-ID": "only-one"}
    httpx.get(f"{service.url}/v1/models", headers=headers, verify=False)
    until(lambda: "only-one" in str(service.lines("request")), "the line of the request")
    assert service.log().count("only-one") == 1


def test_sighup_replaces_one_worker_after_another_without_a_failed_request(
    two_workers: tuple[Service, RealServer],
) -> None:
    service, _ = two_workers
    before, ended = service.ready_workers(), len(service.lines("worker_ended"))
    started = len(service.lines("worker_started"))
    with feeding(service.url, clients=1):
        service.process.send_signal(signal.SIGHUP)
        most = 0

        def are_replaced() -> bool:
            nonlocal most
            pids_now = [line["pid"] for line in service.lines("worker_started")]
            most = max(most, sum(Path(f"/proc/{pid}").exists() for pid in pids_now))
            return len(service.ready_workers()) == len(before) + 2 and not any(
                Path(f"/proc/{pid}").exists() for pid in before
            )

        until(are_replaced, "the new workers", READY_S, POLL_S)
    # the old ones, and one that starts; fewer if the test was suspended meanwhile
    assert most <= 3
    assert len(service.lines("worker_started")) == started + 2
    assert len(service.lines("worker_ended")) == ended
