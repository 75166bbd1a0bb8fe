"""A replay through `carry serve`, over a SIGKILL of its store, verified against Keras."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import polars as pl
import pytest

from models.artifact.writing import write_artifact
from service.commands.replay.command import replay
from tests.service.commands.replay.standin import SPEC
from tests.support.oracle import contracting_weights
from tests.support.servers import until
from tests.support.service import Service, running

EVENTS = 4_000


def write_events(path: Path) -> None:
    """Events of some forty streams, of very different lengths, mixed in time."""
    random = np.random.default_rng(11)
    frame = pl.DataFrame(
        {
            "stream": [f"s{int(number)}" for number in random.exponential(8, EVENTS)],
            "at": np.cumsum(random.integers(0, 60_000, EVENTS)) + 1_357_000_000_000,
            "delay": random.normal(4, 20, EVENTS),
            "kind": random.choice(["a", "b", "c"], EVENTS),
            "wind": [None if each < 0.3 else each for each in random.random(EVENTS)],
        }
    )
    frame.write_parquet(path)


@pytest.mark.timeout(600)
def test_replay_survives_a_sigkill_of_the_store(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "models" / "small", SPEC, contracting_weights(SPEC, 3))
    write_events(tmp_path / "events.parquet")
    with running(tmp_path, tmp_path / "models") as service, ThreadPoolExecutor(1) as beside:

        def run(**options: Any) -> dict[str, Any]:
            report = tmp_path / "report.json"
            replay(
                url=[service.url],
                model="small",
                data=tmp_path / "events.parquet",
                verify=True,
                artifact=artifact.path,
                report=report,
                **options,
            )
            found: dict[str, Any] = orjson.loads(report.read_bytes())
            return found

        first = run(events=EVENTS // 4)
        assert first["events"] == EVENTS // 4
        killed = beside.submit(kill_store, service, 400)
        second = run(chunk="1..8", encoding="msgpack")
        assert killed.result()
        assert second["resumed"] == first["streams"]
        assert second["events"] - second["sent_again"] == EVENTS - EVENTS // 4
        assert second["verification"]["compared"] == EVENTS - EVENTS // 4


def kill_store(service: Service, position: int) -> bool:
    """SIGKILL the embedded server once the longest stream is beyond a position."""
    with httpx.Client(base_url=service.url) as client:
        path = "/v1/models/small/streams/s0"
        until(lambda: client.get(path).json()["position"] > position, "the stream")
    os.kill(service.valkey_pid(), signal.SIGKILL)
    return True
