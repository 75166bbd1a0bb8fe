"""The end of a service by signals, and an outage of its store."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import numpy as np
import psutil

from models.artifact.artifact import Artifact
from tests.support.servers import real_server, until
from tests.support.service import customise, running

SESSIONS = "/v1/models/probe/streams/sessions"
PREDICT = "/v1/models/probe/predict"
ENVIRONMENT = {"CARRY_RUNTIME_THREADS": "1", "CARRY_DURABILITY": "fsync"}


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


def test_outage_of_the_store_is_reported_and_survived(tmp_path: Path, probe: Artifact) -> None:
    body = {"position": 0, "inputs": np.ones((2, 3)).tolist()}
    second = {**body, "position": 2}
    path = "/v1/models/probe/streams/a"
    with (
        real_server("valkey") as server,
        running(tmp_path, probe.path, redis_url=server.url, CARRY_STORE_WAIT_S="0.5") as service,
        httpx.Client(base_url=service.url, timeout=30) as client,
    ):
        client.post(f"{path}/chunks", json=body).raise_for_status()
        server.kill()
        short = {"carry-timeout": "0.5"}
        for response in (
            client.post(f"{path}/chunks", json=second, headers=short),
            client.get(path),
        ):
            assert (response.status_code, response.json()["code"]) == (503, "store_unavailable")
            assert int(response.headers["retry-after"]) >= 1
        assert client.get("/health/ready").json()["failing"] == ["store"]
        assert service.is_live()
        server.start()
        assert client.get(path).json()["position"] == 2
        assert client.post(f"{path}/chunks", json=second).json()["position"] == 4
        assert client.get("/health/ready").status_code == 200
