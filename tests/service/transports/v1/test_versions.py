"""Versions over the HTTP API: what a promotion changes for requests and replies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import ModelSpec, parse_spec
from tests.service.transports.v1.harness import EVENT, Harness, harness, problem, rows
from tests.support.decoders import decoder_spec, future_of, hourly_events
from tests.support.models import random_weights, small_spec
from tests.support.oracle import contracting_weights
from tests.support.pipelines import SPEC, make_artifact, oracle_outputs
from tests.support.servers import RealServer
from tests.support.versions import Versions


def other_categories() -> ModelSpec:
    """The small model with one more category in a field that no head predicts."""
    data = small_spec().model_dump(mode="json")
    [gate] = [field for field in data["events"]["fields"] if field["name"] == "gate"]
    gate["vocabulary"].append("ZZ")
    return parse_spec(data)


@pytest.fixture
async def api(pipeline_server: RealServer, tmp_path: Path) -> AsyncIterator[Harness]:
    """Three models, each with another version in the folder."""
    spec, weather = small_spec(), decoder_spec()
    models = {
        "small": write_artifact(tmp_path / "small", spec, random_weights(spec)),
        "probe": make_artifact(tmp_path, seed=1),
        "weather": write_artifact(tmp_path / "weather", weather, contracting_weights(weather, 4)),
    }
    write_artifact(tmp_path / "weather-2", weather, contracting_weights(weather, 5))
    data = SPEC.model_dump(mode="json")
    data["layers"][0]["units"] += 1
    wide = parse_spec(data)
    write_artifact(tmp_path / "probe-wide", wide, contracting_weights(wide, 3))
    changed = other_categories()
    write_artifact(tmp_path / "small-2", changed, random_weights(changed, 8))
    make_artifact(tmp_path, seed=2)
    load = Versions(tmp_path)
    running = harness(pipeline_server, models, load_version=load, on_model_change="reset")
    async with running as up:
        yield up


async def promote(api: Harness, model: str, path: str) -> Artifact:
    """Load and promote a version; returns its artifact."""
    address = f"/v1/models/{model}"
    loaded = await api.client.post(f"{address}/versions", json={"path": path, "label": "new"})
    assert loaded.status_code == 200, loaded.text
    assert (loaded.json()["alias"], loaded.json()["loaded"]) == (None, 1)
    change = {"action": "promote", "version": "new"}
    changed = await api.client.post(f"{address}/aliases", json=change)
    assert changed.status_code == 200, changed.text
    return api.pipeline.models[model].artifact


async def test_promotion_changes_replies_states_and_the_model(api: Harness) -> None:
    old, given = api.models["probe"], rows(3)
    before = (await api.chunk({"inputs": given.tolist(), "position": 0})).json()
    assert before["version"] == old.version
    new = await promote(api, "probe", "probe-2")
    detail = (await api.client.get("/v1/models/probe")).json()
    assert detail["version"] == new.version
    retried = (await api.chunk({"inputs": given.tolist(), "position": 0}, stream="t")).json()
    after = await api.chunk({"inputs": given.tolist(), "position": 3}, stream="t")
    assert [retried["version"], after.json()["version"]] == [new.version] * 2
    expected = oracle_outputs(new, np.concatenate([given, given]))[3:, new.outputs.slices["out"]]
    np.testing.assert_allclose(after.json()["outputs"]["out"], expected, rtol=1e-5, atol=1e-5)
    # the states of both versions can still be read and restored while both are loaded
    for stream, version in (("s", old.version), ("t", new.version)):
        state: Any = (await api.client.get(f"/v1/models/probe/streams/{stream}/state")).json()
        assert state["version"] == version
        address = f"/v1/models/probe/streams/copy-{stream}/state"
        assert (await api.client.put(address, json=state)).status_code == 201
    retired = await api.client.delete(f"/v1/models/probe/versions/{old.version}")
    assert retired.status_code == 204
    gone = await api.client.get("/v1/models/probe/streams/s/state")
    assert (gone.status_code, gone.json()["code"]) == (409, "state_incompatible")


async def test_rows_with_categories_of_another_version_are_rejected(api: Harness) -> None:
    """Rows that the challenger accepts may have codes that the champion does not have."""
    old = api.models["small"]
    await promote(api, "small", "small-2")
    [column] = [each for each in old.spec.columns if each.field == "gate" and each.codes]
    at, codes = old.spec.columns.index(column), column.codes
    assert codes is not None
    row = [0.0] * old.spec.input_features
    row[at] = float(codes)  # the code of the new version's category, or of an absent one
    accepted = await api.chunk({"inputs": [row], "position": 0}, model="small")
    assert accepted.status_code == 200, accepted.text
    await api.client.post("/v1/models/small/aliases", json={"action": "rollback"})
    rejected = await api.chunk({"inputs": [row], "position": 0}, stream="b", model="small")
    assert (rejected.status_code, rejected.json()["code"]) == (422, "invalid_input")
    events = await api.chunk({"events": [EVENT], "position": 0}, stream="c", model="small")
    assert events.status_code == 200


async def test_token_of_another_version_is_continued_in_the_states_of_that_version(
    api: Harness,
) -> None:
    given = rows(6).tolist()

    async def predict(query: str, **sequence: Any) -> Any:
        address = f"/v1/models/probe/predict?{query}=true"
        response = await api.client.post(address, json={"sequences": [sequence]})
        assert response.status_code == 200, response.text
        return response.json()["predictions"][0]

    expected = (await predict("return_state", inputs=given))["state"]
    token = (await predict("return_state_token", inputs=given[:4]))["state_token"]
    new = await promote(api, "probe", "probe-wide")
    assert new.state.float_size > api.models["probe"].state.float_size
    state = (await predict("return_state", inputs=given[4:], state_token=token))["state"]
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(state[name], values, rtol=1e-5, atol=1e-6)


async def test_forecast_names_the_version_that_computed_it(api: Harness) -> None:
    asked = {"horizon": 3, "future": future_of(3)}

    async def forecast() -> Any:
        response = await api.client.post("/v1/models/weather/streams/s/forecast", json=asked)
        assert response.status_code == 200, response.text
        return response.json()

    await api.chunk({"events": hourly_events(9)}, model="weather")
    before = await forecast()
    await promote(api, "weather", "weather-2")
    assert await forecast() == before
    assert before["version"] == api.models["weather"].version


async def test_version_with_other_levels_of_forecasts_is_rejected(
    api: Harness, tmp_path: Path
) -> None:
    data = decoder_spec().model_dump(mode="json")
    data["decoder"]["head"]["quantiles"] = [0.2, 0.5, 0.8]
    spec = parse_spec(data)
    write_artifact(tmp_path / "weather-3", spec, contracting_weights(spec, 6))
    response = await api.client.post("/v1/models/weather/versions", json={"path": "weather-3"})
    assert problem(response, 422, "version_rejected")["at"] == "decoder"


async def test_bodies_are_checked(api: Harness) -> None:
    for path, body, at in (
        ("versions", {"path": ""}, "path"),
        ("versions", {"path": "probe-2", "label": "a b"}, "label"),
        ("aliases", {"action": "demote", "version": "new"}, "action"),
        ("aliases", {"action": "promote"}, "version"),
        ("aliases", {"action": "rollback", "version": "new"}, "version"),
        ("aliases", {"action": "canary", "version": "new"}, "share"),
        ("aliases", {"action": "canary", "version": "new", "share": 1.5}, "share"),
        ("aliases", {"action": "shadow", "version": "new", "share": 0.5}, "share"),
    ):
        response = await api.client.post(f"/v1/models/probe/{path}", json=body)
        rejected = problem(response, 422, "invalid_input")
        assert rejected["at"] == at
        assert "regex" not in rejected["detail"]
