"""Forecasts over HTTP: the numbers, what is left unchanged, and what is rejected."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ormsgpack
import pytest
from numpy.typing import NDArray
from pydantic import TypeAdapter

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.decoding.forecasts import Distribution, encode_covariates
from models.events.encode import Clock, encode
from models.spec.decoder import known_schema
from service.access.caller import ANYONE
from service.codec.reply_types import ForecastReply
from service.core.errors import DeadlineExceeded
from service.core.values import ForecastRequest, StreamKey
from service.transports.v1 import reply_types
from tests.service.transports.v1.harness import LIMITS, MSGPACK, Harness, harness, problem
from tests.support.decoder_oracle import oracle_decode
from tests.support.decoders import HOUR_MS, START_MS, decoder_spec, future_of, hourly_events
from tests.support.oracle import contracting_weights, oracle_step
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer
from tests.support.strict_events import columns_from_events

EVENTS = hourly_events(9)
ASKED: dict[str, Any] = {"horizon": 4, "samples": 9, "seed": 3, "future": future_of(4)}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def weather(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    spec = decoder_spec()
    folder = tmp_path_factory.mktemp("models")
    return write_artifact(folder / "weather", spec, contracting_weights(spec, 4))


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("models"))


@pytest.fixture
async def api(
    pipeline_server: RealServer, weather: Artifact, probe: Artifact
) -> AsyncIterator[Harness]:
    limits = replace(LIMITS, max_forecast_samples=20)
    models = {"weather": weather, "probe": probe}
    async with harness(pipeline_server, models, limits=limits) as running:
        yield running


async def send(api: Harness, events: list[dict[str, Any]], stream: str = "s") -> dict[str, Any]:
    response = await api.chunk({"events": events}, model="weather", stream=stream)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def look(
    api: Harness, body: Any, *, stream: str = "s", model: str = "weather", **request: Any
) -> httpx.Response:
    address = f"/v1/models/{model}/streams/{stream}/forecast"
    return await api.client.post(address, **{"json": body, **request})


def encoded_future(artifact: Artifact, events: int, told: list[dict[str, Any]]) -> NDArray[Any]:
    spec = artifact.spec
    assert spec.events is not None
    assert spec.decoder is not None
    schema = known_schema(spec.events, spec.decoder, timed=False)
    assert schema is not None
    clock = Clock(START_MS + (events - 1) * HOUR_MS, events, 0)
    return encode_covariates(spec, clock, len(told), columns_from_events(schema, told)).rows


async def test_forecast_equals_the_oracle_and_does_not_change_the_stream(
    api: Harness, weather: Artifact
) -> None:
    spec = weather.spec
    assert spec.events is not None
    for cut in (slice(0, 4), slice(4, 5), slice(5, 9)):
        sent = await send(api, EVENTS[cut])
    response = await look(api, {**ASKED, "position": 9})
    assert response.status_code == 200, response.text
    TypeAdapter(ForecastReply).validate_json(response.content)
    found = response.json()
    assert [found[name] for name in ("epoch", "position", "tag")] == [
        sent[name] for name in ("epoch", "position", "tag")
    ]
    assert response.headers["etag"] == f'"{sent["epoch"]}-{sent["tag"]}"'
    assert found["times_ms"] == [START_MS + HOUR_MS * hour for hour in range(9, 13)]
    assert found["levels"] == [0.1, 0.5, 0.8, 0.95]

    rows, _ = encode(spec.events, columns_from_events(spec.events, EVENTS), Clock())
    _, state = oracle_step(spec, weather.weights, rows, weather.state.zero().floats)
    known = encoded_future(weather, 9, ASKED["future"])
    point, quantiles = oracle_decode(spec, weather.weights, state, known)
    noise = Distribution(spec).noise(3, 4, 9)
    paths = [oracle_decode(spec, weather.weights, state, known, noise[:, k])[0] for k in range(9)]
    for at, name in enumerate(["warmth", "rain"]):
        seen = found["forecast"][name]
        np.testing.assert_allclose(seen["point"], point[:, at], **CLOSE)
        np.testing.assert_allclose(seen["quantiles"], quantiles[:, at], **CLOSE)
        np.testing.assert_allclose(seen["paths"], np.array(paths)[..., at], **CLOSE)

    again = await look(api, ASKED)
    assert again.json() == found
    stands = await api.client.get("/v1/models/weather/streams/s")
    assert (stands.json()["tag"], stands.json()["position"]) == (sent["tag"], 9)
    assert (await send(api, hourly_events(1, first=9)))["position"] == 10
    assert (await look(api, ASKED)).json()["forecast"] != found["forecast"]


async def test_forecast_in_messagepack_equals_that_in_json(api: Harness) -> None:
    await send(api, EVENTS)
    plain = (await look(api, {**ASKED, "samples": 0})).json()
    assert "paths" not in plain["forecast"]["warmth"]
    body = ormsgpack.packb({**ASKED, "samples": 0})
    address = "/v1/models/weather/streams/s/forecast"
    packed = await api.client.post(address, content=body, headers=MSGPACK)
    assert packed.headers["content-type"] == "application/msgpack"
    found = ormsgpack.unpackb(packed.content)
    assert found["tag"] == plain["tag"]
    point = found["forecast"]["rain"]["point"]
    np.testing.assert_allclose(point, plain["forecast"]["rain"]["point"], rtol=1e-6)


async def test_forecast_reads_the_state_from_the_store(api: Harness) -> None:
    await send(api, EVENTS)
    del api.store.states[StreamKey("weather", "s")]
    problem(await look(api, ASKED), 404, "stream_not_found")


@pytest.mark.parametrize(
    ("position", "code"), [(10, "position_ahead"), (8, "position_behind"), (0, "position_behind")]
)
async def test_another_position_is_rejected_with_the_current_state(
    api: Harness, position: int, code: str
) -> None:
    sent = await send(api, EVENTS)
    found = problem(await look(api, {**ASKED, "position": position}), 409, code)
    assert (found["expected"], found["got"], found["tag"]) == (9, position, sent["tag"])


async def test_a_model_without_a_decoder_rejects_forecasts(api: Harness) -> None:
    found = problem(await look(api, {"nothing": 1}, model="probe"), 422, "forecast_unsupported")
    assert "'probe'" in found["detail"]
    detail = (await api.client.get("/v1/models/weather")).json()
    TypeAdapter(reply_types.ModelDetail).validate_python(detail)
    assert detail["forecast"]["known"] == ["holiday", "tariff", "wind"]
    assert detail["forecast"]["max_horizon"] == 12
    assert detail["limits"]["max_forecast_samples"] == 20
    assert (await api.client.get("/v1/models/probe")).json()["forecast"] is None
    schemas = (await api.client.get("/openapi.json")).json()["components"]["schemas"]
    assert schemas["Forecast"]["anyOf"] == [{"$ref": "#/components/schemas/weather-Forecast"}]
    members = schemas["weather-Forecast"]["properties"]
    assert [members[name]["maximum"] for name in ("horizon", "samples")] == [12, 20]
    assert members["future"]["items"] == {"$ref": "#/components/schemas/weather-Coming"}
    assert schemas["weather-Coming"]["properties"].keys() == {"holiday", "tariff", "wind", "at"}


def changed(**members: Any) -> dict[str, Any]:
    found = {**ASKED, **members}
    return {name: value for name, value in found.items() if value is not None}


def without_holiday() -> list[dict[str, Any]]:
    told = future_of(4)
    del told[1]["holiday"]
    return told


@pytest.mark.parametrize(
    ("body", "at", "message"),
    [
        (changed(horizon=None), "horizon", "horizon"),
        (changed(horizon=0), "horizon", "greater than or equal to 1"),
        (changed(horizon=13, future=future_of(13)), "future", "at most 12 items"),
        (changed(horizon=2.5), "horizon", "integer"),
        (changed(horizon=10**30), "horizon", "integer"),
        (changed(samples=21), "samples", "at most 20"),
        (changed(samples=10**30), "samples", "integer"),
        (changed(samples=-1), "samples", "greater than or equal to 0"),
        (changed(seed=-1), "seed", "greater than or equal to 0"),
        (changed(future=None), "future[0].holiday", "what is known of the step"),
        (changed(future=future_of(3)), "future", "expected 4 steps"),
        (changed(future=without_holiday()), "future[1].holiday", "holiday"),
        (changed(future=[{**e, "warmth": 1.0} for e in future_of(4)]), "future[0].warmth", ""),
        (
            changed(future=[{**e, "at": START_MS + 9 * HOUR_MS} for e in future_of(4)]),
            "future[1].at",
            "3600.0 s after the one before",
        ),
        (changed(horizons=4), "horizons", "horizon"),
    ],
)
async def test_invalid_forecasts_are_rejected_with_their_place(
    api: Harness, body: dict[str, Any], at: str, message: str
) -> None:
    await send(api, EVENTS)
    found = problem(await look(api, body), 422, "invalid_input")
    assert found["at"] == at
    assert message in found["detail"]
    assert api.position(model="weather") == 9


async def test_a_stream_without_timestamps_requires_timestamps_in_future(
    api: Harness, weather: Artifact
) -> None:
    rows = [[0.0] * weather.spec.input_features]
    assert (await api.chunk({"inputs": rows}, model="weather")).status_code == 200
    found = problem(await look(api, ASKED), 422, "invalid_input")
    assert found["at"] == "future[0].at"
    told = [{**e, "at": START_MS + k * HOUR_MS} for k, e in enumerate(future_of(4))]
    assert (await look(api, changed(future=told))).status_code == 200


async def test_forecasts_and_chunks_alternate(api: Harness) -> None:
    await send(api, EVENTS, "still")
    alone = (await look(api, ASKED, stream="still")).json()

    async def chunks() -> None:
        for first in range(12):
            await send(api, hourly_events(1, first=first), "moving")

    *found, _ = await asyncio.gather(
        *(look(api, ASKED, stream="still") for _ in range(6)), chunks()
    )
    assert [response.json() for response in found] == [alone] * 6
    assert api.position("moving", "weather") == 12


async def test_expired_and_invalid_deadlines_are_rejected(api: Harness) -> None:
    await send(api, EVENTS)
    request = ForecastRequest(1, future=None)
    key = StreamKey("weather", "s")
    with pytest.raises(DeadlineExceeded):
        await api.pipeline.forecast(ANYONE, key, _told(api, request), time.monotonic() - 1)
    response = await look(api, ASKED, headers={"Carry-Timeout": "soon"})
    assert problem(response, 422, "invalid_input")["at"] == "Carry-Timeout"


def _told(api: Harness, request: ForecastRequest) -> ForecastRequest:
    spec = api.models["weather"].spec
    assert spec.events is not None
    assert spec.decoder is not None
    schema = known_schema(spec.events, spec.decoder, timed=False)
    assert schema is not None
    future = columns_from_events(schema, future_of(request.horizon))
    return request._replace(future=future)


async def test_a_state_of_another_version_is_rejected(
    pipeline_server: RealServer, weather: Artifact, tmp_path: Path
) -> None:
    other = write_artifact(tmp_path / "w", weather.spec, contracting_weights(weather.spec, 5))
    async with harness(pipeline_server, {"weather": weather}) as api:
        await send(api, EVENTS)
        stored = dict(api.store.states)
    async with harness(pipeline_server, {"weather": other}) as api:
        api.store.states.update(stored)
        problem(await look(api, ASKED), 409, "state_incompatible")


async def test_if_match_is_compared_with_the_state_of_the_forecast(api: Harness) -> None:
    await send(api, EVENTS[:4])
    before = (await look(api, ASKED)).headers["etag"]
    assert (await look(api, ASKED, headers={"if-match": before})).status_code == 200
    await send(api, EVENTS[4:5])
    changed = problem(await look(api, ASKED, headers={"if-match": before}), 412, "state_changed")
    assert (changed["stream"], changed["position"]) == ("s", 5)
    assert (await look(api, ASKED, headers={"if-match": "*"})).status_code == 200
    missing = await look(api, ASKED, stream="t", headers={"if-match": "*"})
    problem(missing, 412, "state_changed")
    weak = await look(api, ASKED, headers={"if-match": 'W/"a"'})
    problem(weak, 400, "invalid_precondition")
