"""Open alarms through the API: listed by what the states say, acknowledged exactly once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.detection.alarms import CLOSED, CONTINUING, MUTED_EVENTS, NONE, OPENED
from models.spec.history import HistorySpec
from service.access.caller import Verb
from service.core.values import StreamKey
from tests.service.transports.v1 import harness as harness_module
from tests.service.transports.v1.harness import Harness, harness, problem
from tests.support.alarms import alarm_model, noise, raised, served_by_onnx
from tests.support.servers import RealServer

Floats = NDArray[np.float32]
MODEL = "/v1/models/sensors"
ALARM, PROBABILITY = "surprise.alarm", "surprise.probability"
QUIET = 60
HISTORY = HistorySpec(events=200, snapshots=4)
AUDITED: list[tuple[str, dict[str, Any]]] = []


@pytest.fixture(scope="module")
def sensors(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return alarm_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(params=[None, HISTORY], ids=["no history", "history"])
async def api(
    pipeline_server: RealServer,
    sensors: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> AsyncIterator[Harness]:
    monkeypatch.setattr(harness_module, "numpy_served", served_by_onnx)
    AUDITED.clear()
    async with harness(
        pipeline_server,
        {"sensors": sensors},
        history=request.param,
        audit=lambda event, **facts: AUDITED.append((event, facts)),
    ) as running:
        yield running


async def send(api: Harness, stream: str, rows: Floats, **body: Any) -> list[int]:
    """Send a chunk; returns the alarms of its events."""
    sent: list[int] = []
    for at in range(0, len(rows), 20):
        reply = await api.chunk(
            {"inputs": rows[at : at + 20].tolist(), **body}, model="sensors", stream=stream
        )
        assert reply.status_code == 200, reply.text
        sent += map(int, reply.json()["outputs"][ALARM])
    return sent


async def alarmed(api: Harness, stream: str, events: int = 5) -> None:
    """A stream with an open alarm."""
    api.clock[0] += 1000
    assert set(await send(api, stream, noise(QUIET))) == {NONE}
    assert (await send(api, stream, raised(events)))[-2:] == [CONTINUING] * 2


async def listed(api: Harness, **request: Any) -> list[dict[str, Any]]:
    """The open alarms of one page."""
    reply = await api.client.get(f"{MODEL}/alarms", **request)
    assert reply.status_code == 200, reply.text
    alarms: list[dict[str, Any]] = reply.json()["alarms"]
    return alarms


async def names(api: Harness) -> list[str]:
    return [each["stream"] for each in await listed(api)]


async def acknowledge(api: Harness, stream: str, body: Any = None, etag: str = "") -> Any:
    headers = {"if-match": etag} if etag else {}
    path = f"{MODEL}/streams/{stream}/acknowledge"
    return await api.client.post(path, json=body or {}, headers=headers)


async def test_an_open_alarm_is_listed_with_what_its_state_says_until_it_closes(
    api: Harness,
) -> None:
    assert await listed(api) == []
    await alarmed(api, "a")
    opened_ms = api.clock[0]
    api.clock[0] += 5000
    await send(api, "a", raised(3, seed=5))
    (alarm,) = await listed(api)
    reply = await api.chunk({"inputs": raised(1).tolist()}, model="sensors", stream="a")
    (after,) = await listed(api)
    assert (alarm["stream"], alarm["position"], alarm["opened_ms"]) == ("a", QUIET + 8, opened_ms)
    assert (alarm["opened"], alarm["events"], alarm["target"]) == (QUIET, 7, "value")
    assert (after["opened"], after["events"], after["position"]) == (QUIET, 8, QUIET + 9)
    assert after["probability"] == pytest.approx(reply.json()["outputs"][PROBABILITY][0], rel=1e-3)
    assert alarm["severity"] > 1
    assert alarm["target"] in alarm["cause"]
    codes = await send(api, "a", noise(20, seed=6))
    while CLOSED not in codes:
        codes = await send(api, "a", noise(20, seed=len(codes)))
    assert await api.store.alarms.page("sensors", None, 10) == []
    assert await listed(api) == []


async def test_alarms_are_listed_newest_first_and_by_prefix_in_pages(api: Harness) -> None:
    for stream in ("acme:1", "b:1", "acme:2", "acme:3"):
        await alarmed(api, stream)
    assert await names(api) == ["acme:3", "acme:2", "b:1", "acme:1"]
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        params = {"prefix": "acme:", "limit": 1, **({"cursor": cursor} if cursor else {})}
        page = (await api.client.get(f"{MODEL}/alarms", params=params)).json()
        found += [each["stream"] for each in page["alarms"]]
        cursor = page["cursor"]
    assert found == ["acme:3", "acme:2", "acme:1"]
    problem(await api.client.get(f"{MODEL}/alarms?cursor=x"), 422, "invalid_input")
    authorization = await api.key(verbs=[Verb.LIST], prefix="acme:")
    problem(
        await api.client.get(f"{MODEL}/alarms", headers={"authorization": authorization}),
        403,
        "forbidden",
    )
    own = {"headers": {"authorization": authorization}, "params": {"prefix": "acme:"}}
    assert len(await listed(api, **own)) == 3


async def test_a_stream_that_changed_otherwise_is_never_listed_wrongly(api: Harness) -> None:
    """Deleted, restored, expired, or written by a version that is not loaded."""
    for stream in ("deleted", "restored", "expired", "foreign", "kept"):
        await alarmed(api, stream)
    await send(api, "quiet", noise(QUIET))
    await api.client.delete(f"{MODEL}/streams/deleted")
    state = await api.client.get(f"{MODEL}/streams/quiet/state")
    document = {n: state.json()[n] for n in ("fingerprint", "feed", "position", "state")}
    restored = f"{MODEL}/streams/restored/state"
    assert (await api.client.put(restored, json=document, headers={"if-match": "*"})).is_success
    del api.store.states[StreamKey("sensors", "expired")]
    foreign = StreamKey("sensors", "foreign")
    stored = api.store.states[foreign]
    api.store.states[foreign] = stored._replace(fingerprint=bytes(16))
    assert await names(api) == ["kept"]
    # the entry of a version that may be loaded later stays
    api.store.states[foreign] = stored
    assert await names(api) == ["kept", "foreign"]


async def test_a_forked_or_restored_alarm_is_listed_from_its_next_chunk_on(api: Harness) -> None:
    await alarmed(api, "a")
    forked = await api.client.post(f"{MODEL}/streams/a/fork", json={"to": "b"})
    assert forked.status_code == 201
    state = (await api.client.get(f"{MODEL}/streams/a/state")).json()
    document = {name: state[name] for name in ("fingerprint", "feed", "position", "state")}
    assert (await api.client.put(f"{MODEL}/streams/c/state", json=document)).status_code == 201
    for stream in ("b", "c"):
        assert await send(api, stream, raised(1)) == [CONTINUING]
    alarms = {each["stream"]: each for each in await listed(api)}
    assert set(alarms) == {"a", "b", "c"}
    assert alarms["b"]["opened"] == alarms["c"]["opened"] == alarms["a"]["opened"]


async def test_an_acknowledged_alarm_is_closed_and_its_level_is_normal(api: Harness) -> None:
    await alarmed(api, "a")
    await alarmed(api, "control")
    before = api.store.states[StreamKey("sensors", "a")]
    reply = await acknowledge(api, "a", {"position": QUIET + 5})
    assert reply.status_code == 200, reply.text
    document = reply.json()
    assert (document["closed"], document["position"]) == (True, QUIET + 5)
    assert document["epoch"] == before.head.epoch.hex()
    assert document["tag"] != before.head.tag.hex()
    assert await names(api) == ["control"]
    after = api.store.states[StreamKey("sensors", "a")]
    layout = api.models["sensors"].state
    for name, columns in layout.slices.items():
        kept = after.state.floats[columns].tobytes() == before.state.floats[columns].tobytes()
        if not name.startswith("surprise.") or name == "surprise.forecast":
            assert kept, name
    assert CONTINUING in await send(api, "control", raised(10, seed=7))
    codes = await send(api, "a", raised(MUTED_EVENTS + 60, seed=7))
    assert set(codes) == {NONE}
    assert OPENED in await send(api, "a", raised(3, by=40.0))
    facts = {"model": "sensors", "stream": "a", "position": QUIET + 5}
    assert ("alarm_acknowledged", facts) in AUDITED


async def test_an_acknowledgement_needs_no_body(api: Harness) -> None:
    await alarmed(api, "a")
    path = f"{MODEL}/streams/a/acknowledge"
    malformed = await api.client.post(
        path, content=b"{", headers={"content-type": "application/json"}
    )
    assert malformed.json()["code"] == "malformed_body"
    reply = await api.client.post(path)
    assert reply.status_code == 200, reply.text
    assert reply.json()["closed"]


async def test_a_repeated_acknowledgement_changes_nothing(api: Harness) -> None:
    await alarmed(api, "a")
    before = api.store.states[StreamKey("sensors", "a")].head
    first = await acknowledge(api, "a", etag=f'"{before.etag}"')
    assert first.json()["closed"]
    for body, etag in (({}, f'"{before.etag}"'), ({"position": QUIET + 5}, ""), ({}, "")):
        again = await acknowledge(api, "a", body, etag)
        assert (again.status_code, again.json()["closed"]) == (200, False)
        assert again.headers["etag"] == first.headers["etag"]
    other = f'"{before.epoch.hex()}-{"ab" * 16}"'
    problem(await acknowledge(api, "a", etag=other), 412, "state_changed")
    problem(await acknowledge(api, "a", {"position": 3}), 409, "position_behind")
    problem(await acknowledge(api, "missing"), 404, "stream_not_found")
    await send(api, "a", noise(1))
    problem(await acknowledge(api, "a", etag=f'"{before.etag}"'), 412, "state_changed")


async def test_a_producer_does_not_notice_an_acknowledgement(api: Harness) -> None:
    """Its If-Match, and its retry of a chunk from before."""
    await alarmed(api, "a")
    last = {"inputs": raised(2, seed=9).tolist(), "position": QUIET + 5}
    sent = await api.chunk(last, model="sensors", stream="a")
    etag = sent.headers["etag"]
    assert (await acknowledge(api, "a")).json()["closed"]
    again = await api.chunk(last, model="sensors", stream="a", headers={"if-match": etag})
    assert again.status_code == 200, again.text
    assert again.json()["replayed"]
    assert again.json()["outputs"] == sent.json()["outputs"]
    following = {"inputs": raised(1).tolist(), "position": QUIET + 7}
    reply = await api.chunk(following, model="sensors", stream="a", headers={"if-match": etag})
    assert reply.status_code == 200, reply.text
    assert reply.json()["epoch"] == sent.json()["epoch"]
    # the same from the state that is stored as from the cached one
    assert reply.json()["position"] == QUIET + 8


@pytest.mark.parametrize("api", [HISTORY], indirect=True)
async def test_a_stream_cannot_be_rewound_to_before_an_acknowledgement(api: Harness) -> None:
    await alarmed(api, "a")
    assert (await acknowledge(api, "a")).json()["closed"]
    acknowledged = api.store.states[StreamKey("sensors", "a")].state.floats
    history = (await api.client.get(f"{MODEL}/streams/a/history")).json()
    assert history["available"] == [[QUIET + 5, QUIET + 5]]
    # all events, for other versions
    assert history["chunks"][0]["position"] == 0
    await send(api, "a", raised(30, seed=8))
    rewind = f"{MODEL}/streams/a/rewind"
    problem(await api.client.post(rewind, json={"position": QUIET}), 409, "position_unavailable")
    assert (await api.client.post(rewind, json={"position": QUIET + 5})).status_code == 200
    rewound = api.store.states[StreamKey("sensors", "a")].state.floats
    np.testing.assert_array_equal(rewound, acknowledged)
