"""The tails of a stream are part of its state: restored, forked and reset with it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from service.engine.runtimes.loading import open_runtimes
from service.pipeline.served_model import ServedModel
from tests.service.transports.live.sockets import live_application
from tests.service.transports.v1 import harness as harness_module
from tests.service.transports.v1.harness import Harness
from tests.support.detection import sensor_model
from tests.support.servers import RealServer

Floats = NDArray[np.float32]
PLACE = "/v1/models/sensors/streams"
CHUNK = 7
PROBABILITY = "surprise.probability"


@pytest.fixture(scope="module")
def sensors(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("models") / "sensors"
    return sensor_model(folder, units=4, memory_events=100)


@pytest.fixture
async def api(
    pipeline_server: RealServer, sensors: Artifact, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Harness]:
    def serve(artifact: Artifact, history: None) -> ServedModel:
        return ServedModel(artifact, open_runtimes("onnxruntime", [artifact], 1)[0])

    monkeypatch.setattr(harness_module, "numpy_served", serve)
    async with live_application(pipeline_server, {"sensors": sensors}) as running:
        yield running


def computed(artifact: Artifact, rows: Floats) -> Floats:
    """The probabilities of the runtime alone, in one call."""
    runtime = open_runtimes("onnxruntime", [artifact], 1)[0]
    state = artifact.runtime_state.initial().floats[np.newaxis].copy()
    outputs, _ = runtime.step(rows[np.newaxis], np.array([len(rows)], np.int32), state)
    return artifact.outputs.by_name(outputs[0])[PROBABILITY]


async def send(api: Harness, rows: Floats, stream: str, resets: bool = False) -> list[float]:
    """The probabilities of events that are sent in chunks; the first may reset the stream."""
    values: list[float] = []
    for at in range(0, len(rows), CHUNK):
        body = {"inputs": rows[at : at + CHUNK].tolist()}
        body |= {"resets": [0]} if resets and at == 0 else {}
        reply = await api.chunk(body, model="sensors", stream=stream)
        assert reply.status_code == 200, reply.text
        values += reply.json()["outputs"][PROBABILITY]
    return values


async def test_tails_are_restored_forked_and_reset(api: Harness, sensors: Artifact) -> None:
    """Chunks end within blocks of the tails and beyond them."""
    random = np.random.default_rng(4)
    rows = random.standard_t(2, (120, sensors.spec.input_features)).astype(np.float32)
    expected = computed(sensors, rows)
    # a tail of its own: the same events are another probability in a new stream
    assert not np.allclose(expected[70:], computed(sensors, rows[70:]), rtol=1e-2)
    first = await send(api, rows[:70], "first")
    np.testing.assert_allclose(first, expected[:70], rtol=1e-3)
    stored = await api.client.get(f"{PLACE}/first/state")
    document = stored.json()
    members = {name: document[name] for name in ("fingerprint", "feed", "position", "state")}
    restored = await api.client.put(f"{PLACE}/restored/state", json=members)
    assert restored.status_code == 201, restored.text
    forked = await api.client.post(f"{PLACE}/first/fork", json={"to": "forked"})
    assert forked.status_code == 201, forked.text
    for stream in ("first", "restored", "forked"):
        rest = await send(api, rows[70:], stream)
        np.testing.assert_allclose(rest, expected[70:], rtol=1e-3)
    again = await send(api, rows, "first", resets=True)
    np.testing.assert_allclose(again, expected, rtol=1e-3)
