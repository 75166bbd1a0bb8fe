"""Every route of HTTP asks for an access key that allows it; the routes are those of the
application, so that one without a check fails here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Route

from models.artifact.artifact import Artifact
from service.access.caller import Verb
from service.access.limits import KeyLimits
from service.core.errors import Overloaded
from service.telemetry.access_log import RequestLine, access_log
from service.transports.v1 import application
from service.transports.v1.openapi import openapi_document
from tests.service.transports.doors import add_all, send_chunk, send_tensor
from tests.service.transports.v1.harness import Harness, harness, problem, rows
from tests.support.access import revoke
from tests.support.servers import RealServer, becomes

STREAM = "/v1/models/{model}/streams/{stream}"
MODELS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
NEEDED: Mapping[tuple[str, str], set[Verb]] = {
    ("POST", f"{STREAM}/chunks"): {Verb.PREDICT},
    ("POST", "/v1/models/{model}/chunks"): {Verb.PREDICT},
    ("POST", "/v1/models/{model}/predict"): {Verb.PREDICT},
    ("POST", f"{STREAM}/forecast"): {Verb.PREDICT},
    ("GET", STREAM): {Verb.PREDICT, Verb.LIST},
    ("DELETE", STREAM): {Verb.DELETE},
    ("GET", f"{STREAM}/state"): {Verb.READ_STATE},
    ("PUT", f"{STREAM}/state"): {Verb.WRITE_STATE},
    ("POST", f"{STREAM}/fork"): {Verb.FORK},
    ("GET", f"{STREAM}/history"): {Verb.READ_STATE},
    ("POST", f"{STREAM}/rewind"): {Verb.WRITE_STATE},
    ("GET", f"{STREAM}/outputs"): {Verb.WATCH},
    ("GET", f"{STREAM}/live"): set(Verb),
    ("GET", "/v1/models/{model}/live"): set(Verb),
    ("POST", f"{STREAM}/acknowledge"): {Verb.WRITE_STATE},
    ("GET", "/v1/models/{model}/alarms"): {Verb.LIST},
    ("GET", "/v1/models/{model}/streams"): {Verb.LIST},
    ("DELETE", "/v1/models/{model}/streams"): {Verb.DELETE},
    ("GET", "/v1/models"): {Verb.MODELS},
    ("GET", "/v1/models/{model}"): {Verb.MODELS},
    ("GET", "/v1/models/{model}/versions"): {Verb.MODELS, Verb.MANAGE_MODELS},
    ("POST", "/v1/models/{model}/versions"): {Verb.MANAGE_MODELS},
    ("DELETE", "/v1/models/{model}/versions/{version}"): {Verb.MANAGE_MODELS},
    ("GET", "/v1/models/{model}/versions/{version}/report"): {Verb.MODELS, Verb.MANAGE_MODELS},
    ("POST", "/v1/models/{model}/aliases"): {Verb.MANAGE_MODELS},
    ("GET", "/v1/topics"): {Verb.METRICS},
    ("GET", "/v1/topics/outputs"): {Verb.WATCH},
    ("GET", "/openapi.json"): {Verb.MODELS},
    ("GET", "/metrics"): {Verb.METRICS},
    ("GET", "/health/store"): {Verb.METRICS},
    ("GET", "/v2"): {Verb.MODELS},
    ("GET", "/v2/"): {Verb.MODELS},
    ("GET", "/v2/models/stats"): {Verb.MODELS},
    ("POST", "/v2/repository/index"): {Verb.MODELS},
    **{("GET", path): {Verb.MODELS} for path in MODELS},
    **{("GET", f"{path}/ready"): {Verb.MODELS} for path in MODELS},
    **{("GET", f"{path}/config"): {Verb.MODELS} for path in MODELS},
    **{("GET", f"{path}/stats"): {Verb.MODELS} for path in MODELS},
    **{("POST", f"{path}/infer"): {Verb.PREDICT} for path in MODELS},
}
"""The verbs of which a route needs one; the live sockets' addresses answer 426 to any key."""

LISTS = {("GET", "/v1/models/{model}/streams"), ("GET", "/v1/models/{model}/alarms")}
"""Routes that a key with a prefix must narrow itself."""

OPEN = {
    "/health/live",
    "/health/ready",
    "/v2/health/live",
    "/v2/health/ready",
    "/docs",
    "/docs/errors",
    "/console",
    "/console/",
    "/console/{asset}",
}
"""Routes for everybody: they say nothing of models and streams."""

CHECKS = ["store", "runtime", "accepting"]
STATE = [{"name": "state.lstm_1.hidden"}]


once = pytest.mark.parametrize("api", [True], ids=["fast path"], indirect=True)
"""For requests that never take the fast path."""


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[RequestLine]:
    """The lines of requests."""
    taken: list[Any] = []
    monkeypatch.setattr(access_log, "level", logging.WARNING)
    monkeypatch.setattr(access_log, "render", lambda line: line)
    monkeypatch.setattr(access_log, "write", taken.append)
    return taken


async def written(lines: list[RequestLine], count: int) -> list[tuple[str | None, str | None]]:
    """Key and reason of so many lines, which may be written after their responses."""
    await becomes(lambda: len(lines) >= count, f"{count} lines")
    found = [(line.key, line.reason) for line in lines]
    lines.clear()
    return found


def id_of(authorization: str) -> str:
    """The id of a key."""
    return authorization.split("_")[1]


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of every route that is not for everybody; HEAD is GET without a body."""
    found = []
    for route in app.routes:
        if getattr(route, "path", None) == "/docs/assets":
            continue
        assert isinstance(route, Route), route
        if route.path not in OPEN:
            assert route.methods is not None
            found += [(method, route.path) for method in sorted(route.methods - {"HEAD"})]
    return found


async def status(api: Harness, method: str, path: str, authorization: str | None) -> int:
    """Send a request without a body to a route; the status of the answer."""
    address = path.format(model="probe", stream="acme:1", version="1")
    headers = {} if authorization is None else {"authorization": authorization}
    async with api.client.stream(method, address, headers=headers) as response:
        if response.status_code in (401, 403):
            await response.aread()
            code = "unauthenticated" if response.status_code == 401 else "forbidden"
            assert response.json()["code"] == code
            challenge = response.headers.get("www-authenticate")
            assert challenge == ('Bearer realm="carry"' if code == "unauthenticated" else None)
        return response.status_code


async def test_every_route_needs_a_valid_key(api: Harness, lines: list[RequestLine]) -> None:
    api.clock[0] = 5000
    good = await api.key()
    expired = await api.key(expires_ms=5000)
    revoked = await api.key()
    await revoke(api.store.keys, revoked)
    await api.refresh_keys()
    wrong = good[:-8] + "00000000"
    unknown = f"Bearer carry_{'0' * 12}_{'0' * 64}"
    keys = (None, "Basic Y2Fycnk6eA==", "Bearer carry", unknown, wrong, expired, revoked)
    named = [
        *[(None, "no_key"), (None, "malformed"), (None, "malformed")],
        *[("0" * 12, "unknown_key"), (id_of(good), "wrong_secret")],
        *[(id_of(expired), "expired"), (id_of(revoked), "revoked")],
    ]
    found = routes(api.app)
    assert set(found) == set(NEEDED)
    for method, path in found:
        statuses = [await status(api, method, path, key) for key in keys]
        assert statuses == [401] * len(keys), (method, path)
        assert await written(lines, len(keys)) == named, (method, path)
        assert api.counts.rejected[-len(keys) :] == named, (method, path)
        assert await status(api, method, path, good) not in (401, 403), (method, path)
        lines.clear()


async def shed(*_: Any) -> None:
    """Shed a chunk on the slow path."""
    raise Overloaded("full")


async def test_lines_of_rejected_chunks_name_key_and_reason(
    api: Harness, lines: list[RequestLine], monkeypatch: pytest.MonkeyPatch
) -> None:
    for door in (send_chunk, send_tensor):
        limited = await api.key(limits=KeyLimits(requests_per_s=0.001))
        narrow = await api.key(prefix="acme:", models=("probe",), verbs=(Verb.PREDICT,))
        quota, stream = await api.key(limits=KeyLimits(streams=1)), door.__name__
        assert [await door(api, limited, stream) for _ in range(3)] == [200, 429, 429]
        assert await written(lines, 2) == [(id_of(limited), "requests_per_s")] * 2
        assert [await door(api, narrow, name) for name in (f"acme:{stream}", "b")] == [200, 403]
        assert await written(lines, 1) == [(id_of(narrow), "stream")]
        assert [await door(api, quota, name) for name in (f"q:{stream}", "q")] == [200, 429]
        assert await written(lines, 1) == [(id_of(quota), "streams")]
        with monkeypatch.context() as patch:
            patch.setattr(api.pipeline, "check_admission", lambda *_: Overloaded("full"))
            patch.setattr(api.pipeline, "process", shed)
            assert await door(api, quota, f"q:{stream}") == 429
        assert await written(lines, 1) == [(id_of(quota), None)]
    listing = await api.client.get("/v1/models/probe/streams", headers={"authorization": narrow})
    assert listing.status_code == 403
    assert await written(lines, 1) == [(id_of(narrow), "verb list")]


@once
async def test_every_route_needs_its_verb(api: Harness) -> None:
    keys = {verb: await api.key(verbs=(verb,)) for verb in Verb}
    for (method, path), needed in NEEDED.items():
        allowed = {v for v, key in keys.items() if await status(api, method, path, key) != 403}
        if path.endswith("/live"):
            assert allowed == set(Verb)
        else:
            assert allowed == needed, (method, path)
    headers = {"authorization": await api.key()}
    document = (await api.client.get("/openapi.json", headers=headers)).json()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            named = {verb for each in operation["security"] for verb in each.get("access_key", ())}
            assert named == NEEDED.get((method.upper(), path), set()), (method, path)


@once
async def test_details_of_readiness_need_the_right_to_read_metrics(api: Harness) -> None:
    others = await api.key(verbs=tuple(set(Verb) - {Verb.METRICS}))
    for key, is_shown in ((None, False), (others, False), (await api.key(), True)):
        headers = {} if key is None else {"authorization": key}
        reply = await api.client.get("/health/ready", headers=headers)
        assert ("accepts commits" in reply.text) == is_shown
        assert [check["name"] for check in reply.json()["checks"]] == CHECKS


@once
async def test_every_route_is_limited_to_the_models_and_streams_of_its_key(api: Harness) -> None:
    of_model = await api.key(models=("sm*",))
    of_prefix = await api.key(prefix="acme2:")
    within = await api.key(models=("pro*",), prefix="acme:")
    for method, path in NEEDED:
        if path.endswith("/live"):
            continue
        if "{model}" in path:
            assert await status(api, method, path, of_model) == 403, (method, path)
        if "{stream}" in path:
            assert await status(api, method, path, of_prefix) == 403, (method, path)
        if (method, path) not in LISTS:
            assert await status(api, method, path, within) != 403, (method, path)


@once
async def test_descriptions_show_the_models_of_a_key_only(api: Harness) -> None:
    headers = {"authorization": await api.key(models=("small",))}
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/v2/models/stats"),
        ("POST", "/v2/repository/index"),
        ("GET", "/openapi.json"),
    ):
        response = await api.client.request(method, path, headers=headers)
        assert response.status_code == 200
        assert "small" in response.text
        assert "probe" not in response.text, path
    missing = await api.client.get(
        "/v1/models/smaller", headers={"authorization": await api.key(models=("small*",))}
    )
    assert problem(missing, 404, "model_not_found")["expected"] == ["small"]


@once
async def test_the_openapi_document_of_a_key_is_built_once(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making one blocks the event loop for long: with a key anybody could stop the service."""
    made: list[frozenset[str]] = []

    def counted(routes: Any, context: Any, models: Mapping[str, Any]) -> dict[str, Any]:
        made.append(frozenset(models))
        return openapi_document(routes, context, models)

    monkeypatch.setattr(application, "openapi_document", counted)
    for models in (("small",), ("*",), ("small", "none"), ("small",), ("*",)):
        headers = {"authorization": await api.key(models=models, prefix="once:")}
        response = await api.client.get("/openapi.json", headers=headers)
        assert ("probe-Chunk" in response.text) == (models == ("*",))
    assert len(made) == len(set(made)) <= 2


async def test_chunks_of_both_protocols_are_limited_to_the_scope_until_the_key_is_revoked(
    api: Harness,
) -> None:
    key = await api.key(verbs=(Verb.PREDICT,), models=("probe",), prefix="acme:")
    reader = await api.key(verbs=(Verb.LIST,))
    for number in range(3):
        # from the second request on, the fast path knows the key
        assert await send_chunk(api, key, "acme:1", 2 * number) == 200
        assert await send_tensor(api, key, "acme:2") == 200
        assert await send_chunk(api, key, "acme2:1") == 403
        assert await send_tensor(api, key, "acme2:1") == 403
        assert await send_tensor(api, key, "acme:2", outputs=STATE) == 403
        assert await send_chunk(api, reader, "acme:1", 6) == 403
        assert await send_tensor(api, reader, "acme:2") == 403
        assert await send_chunk(api, key[:-1] + "-", "acme:1", 6) == 401
    assert api.position("acme:1") == api.position("acme:2") == 6
    assert api.position("acme2:1") is None
    both = await api.key(verbs=(Verb.PREDICT, Verb.READ_STATE))
    for _ in range(2):
        assert await send_tensor(api, both, "s", outputs=STATE) == 200
    assert await send_tensor(api, key, "acme:2", outputs=STATE) == 403
    await revoke(api.store.keys, key)
    await api.refresh_keys()
    assert await send_chunk(api, key, "acme:1", 6) == 401
    assert await send_tensor(api, key, "acme:2") == 401
    assert api.position("acme:1") == api.position("acme:2") == 6


async def test_state_in_a_reply_needs_a_verb_of_its_own(api: Harness) -> None:
    predict = {"authorization": await api.key(verbs=(Verb.PREDICT,), prefix="acme:")}
    both = {"authorization": await api.key(verbs=(Verb.PREDICT, Verb.READ_STATE))}
    item = {"inputs": rows(1).tolist(), "dry_run": True}
    many = {"chunks": [{**item, "stream": "acme:1"}]}
    sequences = {"sequences": [{"inputs": rows(1).tolist()}]}
    url = "/v1/models/probe"
    for path, body in ((f"{url}/streams/acme:1/chunks", item), (f"{url}/chunks", many)):
        for flag in ("true", "1"):
            address = f"{path}?return_state={flag}"
            problem(await api.client.post(address, json=body, headers=predict), 403, "forbidden")
            response = await api.client.post(address, json=body, headers=both)
            assert "lstm_1.hidden" in response.text
        plain = await api.client.post(f"{path}?return_state=0", json=body, headers=predict)
        assert plain.status_code == 200
        assert "lstm_1.hidden" not in plain.text
    # the state of a sequence that the caller has sent as a whole is no stream's
    response = await api.client.post(
        f"{url}/predict?return_state=true", json=sequences, headers=predict
    )
    assert "lstm_1.hidden" in response.text


async def test_items_listings_and_forks_stay_within_the_prefix(api: Harness) -> None:
    everything = {"authorization": await api.key()}
    headers = {"authorization": await api.key(models=("probe",), prefix="acme:")}
    body = {"chunks": [{"stream": s, "inputs": rows(2).tolist()} for s in ("acme:1", "b:1")]}
    many = (await api.client.post("/v1/models/probe/chunks", json=body, headers=headers)).json()
    assert [item["status"] for item in many["results"]] == [200, 403]
    assert many["results"][1]["error"]["code"] == "forbidden"
    assert api.position("b:1") is None
    other = {"chunks": body["chunks"][1:]}
    await api.client.post("/v1/models/probe/chunks", json=other, headers=everything)

    async def ask(method: str, path: str, **request: Any) -> httpx.Response:
        return await api.client.request(
            method, f"/v1/models/probe/streams{path}", headers=headers, **request
        )

    for prefix in ("", "?prefix=", "?prefix=a", "?prefix=ACME:"):
        document = problem(await ask("GET", prefix), 403, "forbidden")
        assert document["allowed"]["prefix"] == "acme:"
        if prefix:
            problem(await ask("DELETE", prefix), 403, "forbidden")
    for prefix in ("acme:", "acme:1"):
        assert (await ask("GET", f"?prefix={prefix}")).json()["streams"] == ["acme:1"]
    problem(await ask("POST", "/acme:1/fork", json={"to": "b:2"}), 403, "forbidden")
    problem(await ask("POST", "/b:1/fork", json={"to": "acme:2"}), 403, "forbidden")
    assert (await ask("POST", "/acme:1/fork", json={"to": "acme:2"})).status_code == 201
    assert (await ask("DELETE", "?prefix=acme:")).json()["deleted"] == 2
    assert api.position("b:1") == 2


@once
async def test_rejection_is_the_same_whether_the_stream_exists(api: Harness) -> None:
    await api.client.post(
        "/v1/models/probe/streams/b:1/chunks",
        json={"inputs": rows(1).tolist()},
        headers={"authorization": await api.key()},
    )
    headers = {"authorization": await api.key(prefix="acme:")}
    answers = []
    for stream in ("b:1", "b:2"):
        document = (
            await api.client.get(f"/v1/models/probe/streams/{stream}", headers=headers)
        ).json()
        del document["request_id"]
        answers.append(str(document).replace(stream, "b"))
    assert answers[0] == answers[1]


@once
async def test_two_keys_in_one_request_are_rejected(api: Harness) -> None:
    key = await api.key()
    headers = [("authorization", key), ("authorization", key)]
    problem(await api.client.get("/v1/models", headers=headers), 400, "duplicate_field")


async def test_open_service_asks_for_a_key_once_there_is_one(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    async with harness(pipeline_server, models, requires_keys=False, extend=add_all) as api:
        ignored = "Basic Y2Fycnk6eA=="
        assert await send_chunk(api, ignored, "s") == 200
        key = await api.key(prefix="acme:")
        assert await send_chunk(api, ignored, "s", 2) == 401
        assert await send_chunk(api, key, "s", 2) == 403
        assert await send_chunk(api, key, "acme:s") == 200


@once
async def test_watch_ends_when_its_key_is_revoked(api: Harness) -> None:
    key = await api.key(verbs=(Verb.WATCH,))
    url = "/v1/models/probe/streams/s/outputs"
    async with api.client.stream("GET", url, headers={"authorization": key}) as response:
        lines = response.aiter_lines()
        async with asyncio.timeout(60):
            assert "event: stream" in [await anext(lines) for _ in range(3)]
            await revoke(api.store.keys, key)
            await api.refresh_keys()
            rest = [line async for line in lines]
    assert "event: end" in rest
    assert 'data: {"reason":"unauthenticated"}' in rest
