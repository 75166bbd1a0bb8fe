"""The audit log: what changes streams and keys, by which key, and how it names streams."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.access.caller import Verb
from service.access.keys import parse_key
from service.access.tokens import TokenClaims, sign_token
from service.core.errors import NotDurable, StoreUnavailable
from service.telemetry.access_log import access_log, audit
from service.telemetry.logs import json_line
from tests.service.transports.v1.harness import Harness, harness, rows
from tests.support.access import revoke
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer
from tests.support.versions import Versions

STREAMS = "/v1/models/probe/streams"
HISTORY = HistorySpec(events=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    return {"probe": make_artifact(tmp_path_factory.mktemp("audit"))}


@pytest.fixture(scope="module")
def new(models: Mapping[str, Artifact]) -> Artifact:
    """Another version of the model."""
    return make_artifact(models["probe"].path.parent, seed=2)


@pytest.fixture(params=[True, False], ids=["keys", "open"])
async def api(
    request: pytest.FixtureRequest, pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> AsyncIterator[Harness]:
    running = harness(
        pipeline_server,
        models,
        requires_keys=request.param,
        audit=audit,
        history=HISTORY,
        load_version=Versions(models["probe"].path.parent),
    )
    async with running as up:
        yield up


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The lines of the audit log, at the level that omits most lines."""
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(access_log, "level", 100)
    monkeypatch.setattr(access_log, "render", json_line)
    monkeypatch.setattr(access_log, "write", lambda text: lines.append(json.loads(text)))
    monkeypatch.setattr(access_log, "name_stream", str)
    return lines


async def test_every_change_of_a_stream_except_by_chunks_is_audited(
    api: Harness, written: list[dict[str, Any]]
) -> None:
    headers, key_id, subject = {}, None, None
    if api.keys.open_caller is None:
        key = parse_key((await api.key()).removeprefix("Bearer "))
        assert key is not None
        key_id, subject = key.key_id, "tenant 7"
        token = sign_token(key, TokenClaims(exp=time.time() + 600, sub=subject))
        headers = {"authorization": f"Bearer {token}"}
    written.clear()

    async def ask(method: str, path: str, status: int, **request: Any) -> Any:
        response = await api.client.request(method, STREAMS + path, headers=headers, **request)
        assert response.status_code == status, response.text
        return response.json() if response.content else None

    await ask("POST", "/a/chunks", 200, json={"inputs": rows(2).tolist()})
    state = await ask("GET", "/a/state", 200)
    await ask("GET", "/a", 200)
    await ask("GET", "", 200)
    assert written == []
    await ask("POST", "/a/fork", 201, json={"to": "b"})
    await ask("POST", "/a/fork", 409, json={"to": "b"})
    await ask("PUT", "/c/state", 201, json=state)
    await ask("POST", "/a/rewind", 200, json={"position": 1})
    await ask("POST", "/a/rewind", 409, json={"position": 9})
    await ask("GET", "/a/history", 200)
    await ask("DELETE", "/a", 204)
    await ask("DELETE", "/a", 404)
    await ask("DELETE", "?prefix=", 200)
    await ask("DELETE", "?prefix=nothing", 200)
    for line in written:
        assert line.pop("logger") == "service.audit"
        assert line.pop("level") == "info"
        assert line.pop("timestamp")
        assert line.pop("request_id")
        assert line.pop("model") == "probe"
        assert line.pop("key", None) == key_id
        assert line.pop("subject", None) == subject
    assert written == [
        {"message": "stream_forked", "stream": "b", "position": 2},
        {"message": "state_written", "stream": "c", "position": 2},
        {"message": "stream_rewound", "stream": "a", "position": 1},
        {"message": "stream_deleted", "stream": "a"},
        {"message": "streams_deleted", "stream": "", "deleted": 2},
    ]


async def test_every_change_of_versions_is_audited(
    api: Harness, written: list[dict[str, Any]], new: Artifact
) -> None:
    headers, key_id = {}, None
    if api.keys.open_caller is None:
        headers = {"authorization": await api.key()}
        key_id = headers["authorization"].split("_")[1]
    written.clear()
    for method, path, body in (
        ("POST", "versions", {"path": new.path.name, "label": "new"}),
        ("POST", "versions", {"path": "missing"}),
        ("POST", "aliases", {"action": "canary", "version": "new", "share": 0.5}),
        ("POST", "aliases", {"action": "promote", "version": "old"}),
        ("GET", "versions", None),
        ("DELETE", "versions/new", None),
    ):
        await api.client.request(method, f"/v1/models/probe/{path}", json=body, headers=headers)
    changes = [line for line in written if line["logger"] == "service.audit"]
    assert {line["model"] for line in changes} == {"probe"}
    assert {line.get("key") for line in changes} == {key_id}
    facts = ("message", "action", "version", "share")
    assert [tuple(line.get(fact) for fact in facts) for line in changes] == [
        ("model_version_loaded", None, new.version, None),
        ("model_alias_changed", "canary", "new", 0.5),
        ("model_version_retired", None, "new", None),
    ]


async def test_change_with_uncertain_outcome_is_audited(
    api: Harness, written: list[dict[str, Any]]
) -> None:
    headers = {}
    if api.keys.open_caller is None:
        headers = {"authorization": await api.key()}
    written.clear()
    for error, expected in (
        (NotDurable("planted"), [("stream_deleted", "not_durable")]),
        (StoreUnavailable("planted"), []),
    ):
        api.store.on_delete = lambda _, error=error: error  # type: ignore[misc]
        await api.client.delete(f"{STREAMS}/a", headers=headers)
        assert [(line["message"], line["outcome"]) for line in written] == expected
        written.clear()


async def test_created_and_revoked_keys_are_audited_without_secrets(
    api: Harness, written: list[dict[str, Any]]
) -> None:
    authorization = await api.key(verbs=(Verb.LIST,), name="shop")
    await api.refresh_keys()
    await revoke(api.store.keys, authorization)
    await api.refresh_keys()
    key_id, secret = authorization.split("_")[1:]
    assert [(line["message"], line["key"], line["name"]) for line in written] == [
        ("access_key_created", key_id, "shop"),
        ("access_key_revoked", key_id, "shop"),
    ]
    assert secret not in str(written)


async def test_audit_log_names_streams_as_the_access_log_does(
    written: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "name_stream", None)
    audit("stream_deleted", model="probe", stream="a person")
    access_log.name_streams("hashed", b"secret")
    audit("stream_deleted", model="probe", stream="a person")
    assert "stream" not in written[0]
    assert len(written[1]["stream"]) == 16
    assert "a person" not in str(written)
