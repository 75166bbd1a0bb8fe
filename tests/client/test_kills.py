"""Service and store are killed while `send_all` runs over one stream of departures.

The stream is that of all departures from New York in the order of their time, sent as a Polars
DataFrame. Both are killed at half of it, and the service starts again while the client retries.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np

from carry_client import Carry, Progress
from models.artifact.artifact import load_artifact
from models.events.encode import Clock, encode
from models.events.frame import columns_from_frame
from models.pretrained.departures import EVENT_COLUMNS, flight_events
from tests.support.models import PRETRAINED
from tests.support.oracle import oracle_step
from tests.support.servers import free_port
from tests.support.service import Service, running

EVENTS = 1500


def test_killed_service_and_store_lose_and_double_nothing(tmp_path: Path, model_dir: Path) -> None:
    artifact = load_artifact(PRETRAINED / "flights")
    departures = flight_events().sort("departed", maintain_order=True)
    frame = departures.head(EVENTS).select(EVENT_COLUMNS)
    restarts: list[threading.Thread] = []
    progress: list[Progress] = []
    # the client knows one address
    with running(tmp_path, model_dir, "--port", str(free_port())) as service:

        def kill(latest: Progress) -> None:
            progress.append(latest)
            if not restarts and latest.position >= EVENTS // 2:
                store = service.valkey_pid()
                service.kill()
                os.kill(store, signal.SIGKILL)
                restarts.append(threading.Thread(target=Service.start, args=(service,)))
                restarts[-1].start()

        with Carry(service.url) as carry:
            stream = carry.model("flights").stream("departures")
            sent = stream.send_all(frame, chunk_events=16, progress=kill)
            columns = [reply.to_columns() for reply in sent]
            assert stream.refresh().position == EVENTS
        restarts[0].join()
    whole = {name: np.concatenate([each[name] for each in columns]) for name in columns[0]}
    assert whole.pop("position").tolist() == list(range(EVENTS))
    assert progress[-1].skipped == 0
    assert progress[-1].retries >= 1
    assert artifact.spec.events is not None
    rows, _ = encode(artifact.spec.events, columns_from_frame(artifact.spec.events, frame), Clock())
    zero = artifact.state.zero().floats
    expected, _ = oracle_step(artifact.spec, artifact.weights, rows, zero)
    np.testing.assert_allclose(np.column_stack([*whole.values()]), expected, rtol=1e-5, atol=1e-5)
