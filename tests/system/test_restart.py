"""Restarts of service and store: every stream continues from its last commit."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from models.artifact.artifact import Artifact
from tests.support.pipelines import make_artifact, oracle_outputs, rows_of
from tests.support.sender import LONG_S, Sender, send_all
from tests.support.servers import real_server, until
from tests.support.service import Service, running


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small model with contracting weights, in a directory of its own."""
    return make_artifact(tmp_path_factory.mktemp("models"))


@pytest.fixture
def own_service(tmp_path: Path, probe: Artifact) -> Iterator[Service]:
    """A service that the test may kill."""
    with running(tmp_path, probe.path, CARRY_RUNTIME_THREADS="1") as up:
        yield up


def test_a_graceful_shutdown_is_not_interrupted_by_more_signals(own_service: Service) -> None:
    valkey = own_service.valkey_pid()

    def ended() -> bool:
        own_service.process.send_signal(signal.SIGTERM)
        return own_service.ended()

    until(ended, "the end of the service")
    assert own_service.process.returncode == 0
    assert not _alive(valkey), "stopped with the service"


async def test_kills_and_a_graceful_shutdown_lose_nothing(
    own_service: Service, probe: Artifact
) -> None:
    """One service through it all: it is killed, its store is killed, both are, it is stopped."""
    senders = [Sender(f"s{index}", index, events=150) for index in range(12)]
    await send_all(own_service.url, senders, 30)

    valkey = own_service.valkey_pid()
    own_service.kill()
    own_service.start()
    assert own_service.valkey_pid() == valkey, "left behind, and adopted"
    await send_all(own_service.url, senders, 50)

    # Requests wait while the store comes back.
    await asyncio.gather(send_all(own_service.url, senders, 90), _kill(valkey))
    assert own_service.valkey_pid() != valkey

    own_service.kill()
    await _kill(own_service.valkey_pid())
    own_service.start()
    await send_all(own_service.url, senders, 110)

    # What was accepted before SIGTERM is answered and stored.
    valkey = own_service.valkey_pid()
    halfway = asyncio.Event()
    async with httpx.AsyncClient(base_url=own_service.url, timeout=30) as client:
        sending = [asyncio.create_task(one.send(client, 150, halfway)) for one in senders]
        await halfway.wait()
        assert await asyncio.to_thread(own_service.stop) == 0
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
    assert not _alive(valkey), "stopped with the service"
    own_service.start()
    with httpx.Client(base_url=own_service.url) as client:
        for sender in senders:
            position = client.get(sender.path.removesuffix("/chunks")).json()["position"]
            assert position >= sender.position
    await send_all(own_service.url, senders, 150)
    for sender in senders:
        expected = oracle_outputs(probe, sender.rows)
        np.testing.assert_allclose(sender.outputs, expected, rtol=1e-5, atol=1e-5)


async def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


async def test_two_workers_race_on_a_shared_redis(tmp_path: Path, probe: Artifact) -> None:
    with (
        real_server("valkey") as server,
        running(tmp_path, probe.path, "--workers", "2", redis_url=server.url) as service,
    ):
        rows = rows_of(np.random.default_rng(1), 3)
        body = {"inputs": rows.tolist()}
        path = "/v1/models/probe/streams/race/chunks"
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            replies = await asyncio.gather(*(client.post(path, json=body) for _ in range(16)))
            assert {reply.status_code for reply in replies} == {200}
            positions = sorted(reply.json()["position"] for reply in replies)
            assert positions == list(range(3, 51, 3))
            same = {"position": 48, "inputs": rows.tolist()}
            answers = await asyncio.gather(*(client.post(path, json=same) for _ in range(8)))
            bodies = [answer.json() for answer in answers]
            assert sorted(answer.pop("replayed") for answer in bodies) == [False] + [True] * 7
            assert all(answer == bodies[0] for answer in bodies)
            metrics = (await client.get("/metrics")).text
        assert 'carry_chunks_total{model="probe"} 17.0' in metrics
        workers = _children(service.process.pid)
        assert len(workers) >= 2
        service.kill()
        until(lambda: not any(_alive(pid) for pid in workers), "the workers' end", LONG_S)


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"
