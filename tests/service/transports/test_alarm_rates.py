"""The rate of false alarms that a chunk asks for, by every transport."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import orjson
import ormsgpack
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.errors import ArtifactError
from service.codec.media import Media
from service.codec.request_reader import RequestReader
from service.core.errors import InvalidInput
from service.engine.runtimes.loading import open_runtimes
from service.model_files import with_alarm_rates
from service.pipeline.served_model import ServedModel
from service.settings import Settings, SettingsError
from service.transports.v2.http_routes import add_kserve
from service.transports.v2.inference import Inference
from tests.service.transports.live.sockets import live, live_application, reply, text
from tests.service.transports.v1 import harness as harness_module
from tests.service.transports.v1.harness import LIMITS, MSGPACK, Harness, problem
from tests.service.transports.v2.v2 import V2, binary_body, error_of, json_body, reply_of
from tests.support.detection import sensor_model
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer

Floats = NDArray[np.float32]
ALARM, RATE = "surprise.alarm", 0.8


@pytest.fixture(scope="module")
def sensors(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    alarm = {"false_alarms_per_day": 0.05, "hold_events": 3}
    folder = tmp_path_factory.mktemp("models") / "sensors"
    return sensor_model(folder, units=4, prior_events=5, alarm=alarm)


@pytest.fixture(scope="module")
def rows(sensors: Artifact) -> Floats:
    """Rows with alarms at the rate, of which the last is open at the end of a chunk of 15."""
    random = np.random.default_rng(4)
    rows = random.normal(0, 1, (20, sensors.spec.input_features)).astype(np.float32)
    rows[[6, 13]] *= 2.5
    return rows


@pytest.fixture
async def api(
    pipeline_server: RealServer,
    sensors: Artifact,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Harness]:
    """An application with a model with detection, and one without."""
    probe = make_artifact(tmp_path_factory.mktemp("models"))

    def serve(artifact: Artifact, history: None) -> ServedModel:
        return ServedModel(artifact, open_runtimes("onnxruntime", [artifact], 1)[0])

    def add_v2(app: FastAPI) -> None:
        add_kserve(app, Inference(app.state.api), dict)

    monkeypatch.setattr(harness_module, "numpy_served", serve)
    models = {"sensors": sensors, "probe": probe}
    async with live_application(pipeline_server, models, extend=add_v2) as running:
        yield running


def computed(artifact: Artifact, rows: Floats, rates: list[float | None]) -> list[float]:
    """The alarms of the runtime alone, event by event, at a rate for each."""
    runtime = open_runtimes("onnxruntime", [artifact], 1)[0]
    state = artifact.runtime_state.initial().floats[np.newaxis].copy()
    at = artifact.runtime_state.slices["surprise.alarm_rate"]
    found = []
    for row, rate in zip(rows, rates, strict=True):
        state[:, at] = rate or 0.0
        outputs, state = runtime.step(row[np.newaxis, np.newaxis], np.ones(1, np.int32), state)
        found.append(outputs[0, 0])
    return artifact.outputs.by_name(np.stack(found))[ALARM].tolist()


def body(rows: Floats, **members: Any) -> dict[str, Any]:
    return {"inputs": rows.tolist(), **members}


async def test_alarms_follow_the_rate_of_their_chunk(
    api: Harness, sensors: Artifact, rows: Floats
) -> None:
    """An open alarm too, and also after a reset; without a rate it is the model's again."""
    found = []
    for part, rate in ((rows[:15], RATE), (rows[15:], None)):
        members = {} if rate is None else {"false_alarms_per_day": rate}
        document = (await api.chunk(body(part, **members), model="sensors")).json()
        found += document["outputs"][ALARM]
    expected = computed(sensors, rows, [RATE] * 15 + [None] * 5)
    assert found == expected
    assert 1 in found
    assert found[14] == 2
    usual = computed(sensors, rows, [None] * 20)
    assert usual != expected
    cut = body(rows, false_alarms_per_day=RATE, resets=[5])
    document = (await api.chunk(cut, model="sensors", stream="cut")).json()
    parts = [computed(sensors, part, [RATE] * len(part)) for part in (rows[:5], rows[5:])]
    assert document["outputs"][ALARM] == [*parts[0], *parts[1]]


async def test_a_tiny_rate_is_not_the_models(api: Harness, sensors: Artifact, rows: Floats) -> None:
    rows = rows.copy()
    rows[13] *= 4
    assert 1 in computed(sensors, rows, [None] * 20)
    members = {"false_alarms_per_day": 1e-300}
    document = (await api.chunk(body(rows, **members), model="sensors", stream="tiny")).json()
    assert document["outputs"][ALARM] == [0.0] * 20


async def test_an_impossible_restored_alarm_fails_no_other_stream(
    api: Harness, sensors: Artifact, rows: Floats
) -> None:
    await api.chunk(body(rows[:1]), model="sensors", stream="odd")
    place = "/v1/models/sensors/streams/odd/state"
    found = await api.client.get(place)
    document = found.json()
    document["state"]["surprise.alarm"] = [-1e6]
    restored = {name: document[name] for name in ("fingerprint", "feed", "position", "state")}
    headers = {"If-Match": found.headers["ETag"]}
    answer = await api.client.put(place, json=restored, headers=headers)
    assert answer.status_code == 200, answer.text
    chunks = [{"stream": name, **body(rows[:5])} for name in ("odd", "other")]
    results = (await api.client.post("/v1/models/sensors/chunks", json={"chunks": chunks})).json()
    assert [result["status"] for result in results["results"]] == [200, 200], results


async def test_every_transport_accepts_the_rate(
    api: Harness, sensors: Artifact, rows: Floats
) -> None:
    expected = computed(sensors, rows, [RATE] * 20)
    option = {"false_alarms_per_day": RATE}
    packed = {"inputs": rows.tobytes(), **option}
    found = [(await api.packed(packed, stream="packed", model="sensors"))["outputs"]]
    many = {"chunks": [{"stream": "item", **body(rows, **option)}, {"stream": "b", **body(rows)}]}
    document = (await api.client.post("/v1/models/sensors/chunks", json=many)).json()
    found += [document["results"][0]["reply"]["outputs"]]
    assert document["results"][1]["reply"]["outputs"][ALARM] == computed(sensors, rows, [None] * 20)
    dry = await api.chunk(body(rows, dry_run=True, **option), model="sensors", stream="dry")
    found.append(dry.json()["outputs"])
    sequences = ormsgpack.packb({"sequences": [packed]})
    headers = {**MSGPACK, "accept": "application/json"}
    predicted = await api.client.post(
        "/v1/models/sensors/predict", content=sequences, headers=headers
    )
    found.append(predicted.json()["predictions"][0]["outputs"])
    v2 = V2(api)
    for parameters in ({"sequence_id": 7, **option}, option):
        request = {**json_body(rows), "parameters": parameters}
        found.append(reply_of(await v2.post(request, model="sensors")).outputs)
        content, headers = binary_body(rows, {**parameters, "sequence_id": 8})
        found.append(reply_of(await v2.post(content, headers, model="sensors")).outputs)
        await api.client.delete("/v1/models/sensors/streams/8")
    async with live(api) as sockets, sockets.open("sensors/streams/socket/live") as (client, _):
        await client.send(text(rows, 0, **option))
        found.append((await reply(client))["outputs"])
    for outputs in found:
        assert np.ravel(outputs[ALARM]).tolist() == expected


def test_rate_is_read_with_rows_and_events(sensors: Artifact, rows: Floats) -> None:
    reader = RequestReader(sensors, LIMITS)
    event = {"time": 1_700_000_000_000, "value": 1.5}
    detection = sensors.spec.detection
    assert detection is not None
    assert detection.fit is not None
    most = detection.fit.rates[-1]
    for rate, is_valid in ((RATE, True), (1, most >= 1), (most, True), (None, True), (2e3, False)):
        for members in (body(rows), {"events": [event] * 3, "resets": [1]}):
            content = orjson.dumps({**members, "false_alarms_per_day": rate})
            try:
                chunk = reader.chunk(content, Media.JSON, reader.key("s"))
            except InvalidInput:
                assert not is_valid
            else:
                assert is_valid
                assert chunk.steps.false_alarms_per_day == rate
    for wrong in (float("nan"), True, "0.1"):
        packed = ormsgpack.packb({"inputs": rows.tobytes()})
        packed = b"\x82" + packed[1:] + ormsgpack.packb("false_alarms_per_day")
        with pytest.raises(InvalidInput, match="false_alarms_per_day"):
            reader.chunk(packed + ormsgpack.packb(wrong), Media.MSGPACK, reader.key("s"))


async def test_a_chunk_with_another_rate_is_not_a_replay(api: Harness, rows: Floats) -> None:
    chunk = body(rows, position=0, false_alarms_per_day=RATE)
    first = (await api.chunk(chunk, model="sensors")).json()
    assert (await api.chunk(chunk, model="sensors")).json() == {**first, "replayed": True}
    for other in ({"false_alarms_per_day": RATE / 2}, {"false_alarms_per_day": None}):
        problem(await api.chunk({**chunk, **other}, model="sensors"), 409, "position_behind")


@pytest.mark.parametrize("wrong", [0, -1, 1001, "0.1", True, [0.1]])
async def test_a_wrong_rate_is_rejected(api: Harness, rows: Floats, wrong: Any) -> None:
    option = {"false_alarms_per_day": wrong}
    document = problem(await api.chunk(body(rows, **option), model="sensors"), 422, "invalid_input")
    assert document["at"] == "false_alarms_per_day"
    request = {**json_body(rows), "parameters": {"sequence_id": 1, **option}}
    found = error_of(await V2(api).post(request, model="sensors"), 422, "invalid_input")
    assert "false_alarms_per_day" in found["error"] or isinstance(wrong, list)


async def test_rates_that_no_alarm_can_have_are_rejected(api: Harness, rows: Floats) -> None:
    alarms = (await api.client.get("/v1/models/sensors")).json()["alarms"]
    assert alarms["output"] == ALARM
    assert alarms["false_alarms_per_day"] == 0.05
    most = alarms["max_false_alarms_per_day"]
    assert (await api.chunk(body(rows, false_alarms_per_day=most), model="sensors")).is_success
    beyond = body(rows, false_alarms_per_day=most * 1.1)
    document = problem(await api.chunk(beyond, model="sensors"), 422, "invalid_input")
    assert document["expected"] == most
    assert (await api.client.get("/v1/models/probe")).json()["alarms"] is None
    other = body(rows[:, [0, 0, 0]], false_alarms_per_day=0.1)
    assert "no `detection`" in problem(await api.chunk(other), 422, "invalid_input")["detail"]


def test_a_deployment_sets_the_rate_of_a_model(sensors: Artifact, rows: Floats) -> None:
    settings = Settings.load({"false_alarms_per_day": f"sensors={RATE}"})
    (changed,) = with_alarm_rates([sensors], settings.models.alarm_rates())
    assert changed.fingerprint == sensors.fingerprint
    assert computed(changed, rows, [None] * 20) == computed(sensors, rows, [RATE] * 20)
    assert with_alarm_rates([sensors], {}) == [sensors]
    with pytest.raises(ArtifactError, match=r"FALSE_ALARMS_PER_DAY: .* got 'pump'"):
        with_alarm_rates([sensors], {"pump": 0.1})
    with pytest.raises(ArtifactError, match=r"FALSE_ALARMS_PER_DAY: .* at most .* got 999\.0"):
        with_alarm_rates([sensors], {"sensors": 999.0})


@pytest.mark.parametrize("wrong", ["sensors", "sensors=0", "=1", "a=1,a=2", "a=nan", "a=1e9"])
def test_a_wrong_setting_is_rejected_at_start_up(wrong: str) -> None:
    with pytest.raises(SettingsError, match="expected MODEL=RATE"):
        Settings.load({"false_alarms_per_day": wrong})
