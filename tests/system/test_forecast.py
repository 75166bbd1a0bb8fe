"""A forecast depends on the stored state only, and so is the same after a kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.artifact.artifact import write_artifact
from service.engine.runtimes.loading import RUNTIMES
from tests.support.decoders import decoder_spec, future_of, hourly_events
from tests.support.oracle import contracting_weights
from tests.support.service import running, runtime_environment

ASKED: dict[str, Any] = {"horizon": 6, "samples": 5, "seed": 2, "future": future_of(6)}
STREAM = "/v1/models/weather/streams/EWR"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_forecast_is_the_same_after_a_kill(tmp_path: Path, runtime: str) -> None:
    spec = decoder_spec()
    write_artifact(tmp_path / "models" / "weather", spec, contracting_weights(spec, 3))
    environment = runtime_environment(runtime, tmp_path)
    with running(tmp_path, tmp_path / "models", **environment) as service:
        with httpx.Client(base_url=service.url, timeout=60) as client:
            for first in (0, 7):
                body = {"position": first, "events": hourly_events(7, first=first)}
                client.post(f"{STREAM}/chunks", json=body).raise_for_status()
            before = client.post(f"{STREAM}/forecast", json=ASKED).raise_for_status().json()
        valkey = service.valkey_pid()
        service.kill()
        os.kill(valkey, signal.SIGKILL)
        service.start(**environment)
        with httpx.Client(base_url=service.url, timeout=60) as client:
            after = client.post(f"{STREAM}/forecast", json=ASKED).raise_for_status().json()
            assert after == before
            body = {"position": 14, "events": hourly_events(1, first=14)}
            client.post(f"{STREAM}/chunks", json=body).raise_for_status()
            moved = client.post(f"{STREAM}/forecast", json=ASKED).raise_for_status().json()
            assert moved["forecast"] != before["forecast"]
