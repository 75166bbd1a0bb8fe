"""Restarts of service and store: every stream continues from its last commit."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from tests.support.pipelines import oracle_outputs, rows_of
from tests.support.sender import LONG_S, Sender, send_all
from tests.support.servers import real_server, until
from tests.support.service import Service, running

SESSIONS = "/v1/models/probe/streams/sessions"
PREDICT = "/v1/models/probe/predict"
ENVIRONMENT = {"CARRY_RUNTIME_THREADS": "1", "CARRY_DURABILITY": "fsync"}


@pytest.fixture
def own_service(tmp_path: Path, probe: Artifact) -> Iterator[Service]:
    """A service that the test may kill with its store, which then loses nothing."""
    with running(tmp_path, probe.path, **ENVIRONMENT) as up:
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
    rows = rows_of(np.random.default_rng(7), 6)
    before, token = _send_session(own_service.url, rows[:4])
    own_service.kill()
    own_service.start(**ENVIRONMENT)
    assert own_service.valkey_pid() == valkey, "left behind, and adopted"
    again, _ = _send_session(own_service.url, rows[:4])
    assert again == {**before, "replayed": True}
    _continue_session(own_service.url, probe, rows, token)
    await send_all(own_service.url, senders, 50)

    # Requests wait while the store comes back.
    await asyncio.gather(send_all(own_service.url, senders, 90), _kill(valkey))
    assert own_service.valkey_pid() != valkey

    own_service.kill()
    await _kill(own_service.valkey_pid())
    own_service.start(**ENVIRONMENT)
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
    own_service.start(**ENVIRONMENT)
    with httpx.Client(base_url=own_service.url) as client:
        for sender in senders:
            position = client.get(sender.path.removesuffix("/chunks")).json()["position"]
            assert position >= sender.position
    await send_all(own_service.url, senders, 150)
    for sender in senders:
        expected = oracle_outputs(probe, sender.rows)
        np.testing.assert_allclose(sender.outputs, expected, rtol=1e-5, atol=1e-5)


def _send_session(url: str, rows: NDArray[np.float32]) -> tuple[Any, str]:
    """The reply to a chunk with a reset, and the token of the same rows as a sequence."""
    with httpx.Client(base_url=url, timeout=60) as client:
        body = {"position": 0, "inputs": rows.tolist(), "resets": [2]}
        reply = client.post(f"{SESSIONS}/chunks", json=body).raise_for_status().json()
        body = {"sequences": [{"inputs": rows.tolist()}]}
        predicted = client.post(f"{PREDICT}?return_state_token=true", json=body).raise_for_status()
        return reply, predicted.json()["predictions"][0]["state_token"]


def _continue_session(url: str, probe: Artifact, rows: NDArray[np.float32], token: str) -> None:
    """Send the rest of both, which equals the oracle from the reset, and on the whole sequence."""
    rest = {"inputs": rows[4:].tolist()}
    sequence = {**rest, "state_token": token}
    with httpx.Client(base_url=url, timeout=60) as client:
        reply = client.post(f"{SESSIONS}/chunks", json={**rest, "position": 4}).raise_for_status()
        predicted = client.post(PREDICT, json={"sequences": [sequence]}).raise_for_status()
    for found, first in ((reply.json(), 2), (predicted.json()["predictions"][0], 0)):
        expected = probe.outputs.by_name(oracle_outputs(probe, rows[first:]).astype(np.float32))
        np.testing.assert_allclose(
            found["outputs"]["out"], expected["out"][4 - first :], rtol=1e-5, atol=1e-5
        )


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
