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
import pytest

from models.artifact.artifact import write_artifact
from service.commands.replay.run import run_replay
from service.commands.replay.send import Pace
from tests.service.commands.replay.standin import SPEC
from tests.support.oracle import contracting_weights
from tests.support.servers import until
from tests.support.service import Service, running

EVENTS = 4_000


def write_events(path: Path) -> None:
    """Events of some forty streams, of very different lengths, mixed in time."""
    random = np.random.default_rng(11)
    moments = np.cumsum(random.integers(0, 60_000, EVENTS)) + 1_357_000_000_000
    events = [
        {
            "stream": f"s{int(random.exponential(8))}",
            "at": int(moment),
            "delay": float(random.normal(4, 20)),
            "kind": str(random.choice(["a", "b", "c"])),
            "wind": None if random.random() < 0.3 else float(random.normal()),
        }
        for moment in moments
    ]
    path.write_bytes(b"\n".join(orjson.dumps(event) for event in events))


@pytest.mark.timeout(600)
def test_replay_survives_a_sigkill_of_the_store(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "models" / "small", SPEC, contracting_weights(SPEC, 3))
    write_events(tmp_path / "events.jsonl")
    with running(tmp_path, tmp_path / "models") as service, ThreadPoolExecutor(1) as beside:

        def replay(pace: Pace, **options: Any) -> dict[str, Any]:
            report = tmp_path / "report.json"
            status = run_replay(
                [service.url],
                "small",
                pace,
                data=tmp_path / "events.jsonl",
                verify=True,
                artifact=artifact.path,
                report=report,
                **options,
            )
            assert status == 0
            found: dict[str, Any] = orjson.loads(report.read_bytes())
            return found

        first = replay(Pace(), limit=EVENTS // 4)
        assert first["events"] == EVENTS // 4
        killed = beside.submit(kill_store, service, 400)
        second = replay(Pace((1, 8)), encoding="msgpack")
        assert killed.result()
        assert second["resumed"] == first["streams"]
        assert second["events"] - second["sent_again"] == EVENTS - EVENTS // 4
        assert second["verification"]["compared"] == EVENTS - EVENTS // 4


def kill_store(service: Service, position: int) -> bool:
    """SIGKILL the embedded server once the longest stream is beyond a position."""
    with httpx.Client(base_url=service.url) as client:
        path = "/v1/models/small/streams/s0"
        until(lambda: client.get(path).json()["position"] > position, "the stream", 60)
    os.kill(service.valkey_pid(), signal.SIGKILL)
    return True
