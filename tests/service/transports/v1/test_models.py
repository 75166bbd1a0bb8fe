"""The served models, the OpenAPI document, health, metrics and documentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest
from pydantic import TypeAdapter

from service.core.errors import leaf_errors
from service.core.values import Check, ServerStatus
from service.settings import Settings
from service.transports.v1 import reply_types
from service.transports.v1.application import create_api
from tests.service.transports.v1.harness import ANY_HOST, EVENT, Harness, problem, rows


async def test_models_are_listed_by_name(api: Harness) -> None:
    response = await api.client.get("/v1/models")
    TypeAdapter(reply_types.ModelList).validate_json(response.content)
    found = response.json()["models"]
    assert [(model["name"], model["events"]) for model in found] == [
        ("probe", False),
        ("small", True),
    ]
    assert found[1]["description"] == "A small model."
    assert {model["runtime"] for model in found} == {"numpy"}


async def test_detail_describes_a_model_with_events(api: Harness) -> None:
    response = await api.client.get("/v1/models/small")
    TypeAdapter(reply_types.ModelDetail).validate_json(response.content)
    model, artifact = response.json(), api.models["small"]
    assert model["input_features"] == len(model["columns"]) == 13
    assert model["version"] == artifact.version
    assert model["fingerprint"] == artifact.fingerprint.hex()
    assert model["columns"][8] == {
        "name": "carrier",
        "field": "carrier",
        "codes": 5,
        "labels": ["<unknown>", "UA", "B6", "Österreich", "航空"],
    }
    assert model["outputs"]["range"] == {
        "shape": [2, 3],
        "per": "step",
        "labels": ["0.1", "0.5", "0.9"],
    }
    assert model["outputs"]["surprise"]["shape"] == []
    assert model["state"]["lstm_1.carry"] == {"shape": [3], "dtype": "float32"}
    assert model["state"]["clock.last_ms"] == {"shape": [], "dtype": "int64"}
    assert (model["chunking"], model["runtimes"]) == ("invisible", ["numpy"])
    assert model["metrics"] == {"held_out": {"auc": 0.75}}
    assert model["limits"]["max_chunk_steps"] == 20
    jsonschema.validate(EVENT, model["events"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**EVENT, "other": 1}, model["events"])


async def test_detail_describes_a_model_of_rows(api: Harness) -> None:
    response = await api.client.get("/v1/models/probe")
    TypeAdapter(reply_types.ModelDetail).validate_json(response.content)
    assert response.json()["events"] is None
    assert response.json()["columns"][0] == {"name": "feature_0", "field": None}
    document = problem(await api.client.get("/v1/models/other"), 404, "model_not_found")
    assert document["expected"] == ["probe", "small"]


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a document."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from objects(inner)


async def test_openapi_document_describes_each_model(api: Harness) -> None:
    document = (await api.client.get("/openapi.json")).json()
    components = document["components"]["schemas"]
    for each in objects(document):
        if isinstance(reference := each.get("$ref"), str):
            kind, name = reference.removeprefix("#/components/").split("/")
            assert name in document["components"][kind]
        if each.get("type") == "integer":
            assert {type(each.get(name, 0)) for name in ("minimum", "maximum")} == {int}, each
    assert "small-Event" in components
    events = components["small-Chunk"]["properties"]["events"]
    assert events["items"] == {"$ref": "#/components/schemas/small-Event"}
    assert "events" not in components["probe-Chunk"]["properties"]
    assert components["Chunk"]["anyOf"] == [
        {"$ref": "#/components/schemas/probe-Chunk"},
        {"$ref": "#/components/schemas/small-Chunk"},
    ]
    position = components["ChunkReply"]["properties"]["position"]
    assert (position["minimum"], position["maximum"]) == (0, 2**62)
    for component in components.values():
        jsonschema.Draft202012Validator.check_schema(component)


async def test_examples_of_the_document_are_accepted(api: Harness) -> None:
    document = (await api.client.get("/openapi.json")).json()
    sent = 0
    for path in ("streams/{stream}/chunks", "chunks", "predict"):
        operation = document["paths"][f"/v1/models/{{model}}/{path}"]["post"]
        content = operation["requestBody"]["content"]
        assert set(content) == {"application/json", "application/msgpack"}
        for title, example in content["application/json"]["examples"].items():
            model, feed = title.split(": ")
            component = {
                **content["application/json"]["schema"],
                "components": document["components"],
            }
            jsonschema.validate(example["value"], component)
            api.store.states.clear()
            address = f"/v1/models/{model}/{path}".replace("{stream}", feed)
            response = await api.client.post(address, json=example["value"])
            assert response.status_code == 200, response.text
            assert "error" not in response.text
            sent += 1
    assert sent == 9


async def test_every_operation_is_documented(api: Harness) -> None:
    document = (await api.client.get("/openapi.json")).json()
    seen: set[str] = set()
    operations = [
        (path, method, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]
    assert document["security"] == [{"access_key": []}, {}]
    assert document["components"]["securitySchemes"]["access_key"]["scheme"] == "bearer"
    for path, method, operation in operations:
        assert operation["summary"], (path, method)
        assert operation["description"], (path, method)
        names = {
            parameter["name"]
            for parameter in operation.get("parameters", [])
            if parameter["in"] == "path"
        }
        assert names == {part[1:-1] for part in path.split("/") if part.startswith("{")}
        is_open = operation.get("security") == []
        assert is_open == (path in ("/health/live", "/health/ready"))
        assert ({"4XX", "5XX"} <= operation["responses"].keys()) == path.startswith("/v1/")
    for response in document["components"]["responses"].values():
        seen.update(response["content"]["application/problem+json"]["examples"])
    assert seen == {kind.code for kind in leaf_errors()}


async def test_schema_and_service_agree_on_bodies(api: Harness) -> None:
    document = (await api.client.get("/openapi.json")).json()
    schema = {
        "$ref": "#/components/schemas/small-Chunk",
        "components": document["components"],
    }
    for body, good in (
        ({"position": 0, "events": [EVENT]}, True),
        ({"inputs": [[0.0] * 13]}, True),
        ({"inputs": [[0.0] * 12]}, False),
        ({"events": []}, False),
        ({"events": [EVENT], "inputs": [[0.0] * 13]}, False),
        ({"position": -1, "events": [EVENT]}, False),
        ({"position": 0}, False),
        ({"events": [{**EVENT, "load": "x"}]}, False),
        ({"events": [EVENT], "more": 1}, False),
    ):
        assert jsonschema.Draft202012Validator(schema).is_valid(body) == good, body
        response = await api.chunk(body, model="small", stream=f"s{len(str(body))}")
        assert (response.status_code == 200) == good, response.text


async def test_documentation_works_without_a_network(api: Harness) -> None:
    page = await api.client.get("/docs")
    assert page.status_code == 200
    assert "//" not in page.text.replace("<!--", "").replace("// ", "")
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert f"/docs/assets/{asset}" in page.text
        assert (await api.client.get(f"/docs/assets/{asset}")).status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/docs/errors"])
async def test_documentation_loads_and_runs_only_the_code_of_the_service(
    api: Harness, path: str
) -> None:
    headers = (await api.client.get(path)).headers
    directives = dict(each.split(" ", 1) for each in headers["content-security-policy"].split("; "))
    assert directives["default-src"] == directives["frame-ancestors"] == "'none'"
    sources = {source for each in directives.values() for source in each.split(" ")}
    hashes = {source for source in sources if source.startswith("'sha256-")}
    assert sources - hashes == {"'none'", "'self'", "data:"}
    assert len(hashes) == (2 if path == "/docs" else 1)
    assert headers["x-content-type-options"] == "nosniff"


async def test_an_application_without_documentation_and_metrics_has_none(api: Harness) -> None:
    app = create_api(
        api.pipeline, api.counts, api.keys, Settings(http=replace(ANY_HOST, docs=False))
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://carry") as client:
        for path in ("/docs", "/docs/errors", "/docs/assets/favicon.png", "/openapi.json"):
            found = problem(await client.get(path), 404, "not_found")
            assert found["detail"] == f"expected a known address, got '{path}'"
        problem(await client.get("/metrics"), 404, "not_found")
        assert (await client.get("/v1/models")).status_code == 200


async def test_live_does_not_depend_on_the_store(api: Harness) -> None:
    api.store.away = RuntimeError("gone")
    response = await api.client.get("/health/live")
    assert (response.status_code, response.json()) == (200, {"status": "live"})


async def test_a_store_without_one_server_is_ready_and_degraded(api: Harness) -> None:
    servers = (ServerStatus("redis://a", "up"), ServerStatus("redis://b", "down", "no answer"))
    api.store.check = Check("store", True, "no answer", degraded=True, servers=servers)
    response = await api.client.get("/health/ready")
    assert (response.status_code, response.json()["degraded"]) == (200, ["store"])
    response = await api.client.get("/health/store")
    report = TypeAdapter(reply_types.StoreReport).validate_json(response.content)
    assert (response.status_code, report["status"]) == (200, "degraded")
    assert [each["status"] for each in report["servers"]] == ["up", "down"]


async def test_ready_names_each_failing_check(api: Harness) -> None:
    response = await api.client.get("/health/ready")
    assert response.status_code == 200
    TypeAdapter(reply_types.Ready).validate_json(response.content)
    assert response.json()["status"] == "ready"
    assert {check["name"] for check in response.json()["checks"]} >= {"store", "runtime"}
    api.store.check = Check("store", False, "no answer")
    response = await api.client.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["failing"] == ["store"]
    assert {"name": "store", "ok": False, "detail": "no answer"} in response.json()["checks"]
    assert (await api.client.get("/health/store")).json()["status"] == "down"
    await api.pipeline.stop()
    failing = (await api.client.get("/health/ready")).json()["failing"]
    assert {"store", "accepting"} <= set(failing)


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
async def test_head_on_health_is_get_without_a_body(api: Harness, path: str) -> None:
    response = await api.client.head(path)
    expected = await api.client.get(path)
    assert response.status_code == 200
    assert response.content == b""
    assert response.headers["content-length"] == expected.headers["content-length"]


async def test_metrics_are_those_of_the_renderer(api: Harness) -> None:
    response = await api.client.get("/metrics")
    assert response.text == "carry_chunks_total 0\n"
    assert response.headers["content-type"] == "text/plain; version=1.0.0"


async def test_unknown_query_parameters_are_rejected(api: Harness) -> None:
    for address in ("/v1/models?x=1", "/v1/models/probe?x=1", "/v1/models/probe/streams/s?x=1"):
        document = problem(await api.client.get(address), 422, "invalid_input")
        assert (document["at"], "query" in document["title"]) == ("?x", True)
    assert (await api.chunk({"inputs": rows(1).tolist()})).status_code == 200
