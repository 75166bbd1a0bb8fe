"""Streams over HTTP: read, list, forget, restore, fork."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ormsgpack
import pytest
from pydantic import TypeAdapter

from models.artifact.artifact import Artifact
from service.core.errors import OutcomeUnknown, StoreUnavailable
from service.core.values import StreamKey
from service.transports.v1.reply_types import Deleted, StateReply, StreamInfo, StreamList
from tests.service.transports.v1.harness import (
    EVENT,
    JSON,
    LATER,
    MSGPACK,
    NOW_MS,
    Harness,
    harness,
    problem,
    rows,
)
from tests.support.servers import RealServer

ADDRESS = "/v1/models/probe/streams"


async def test_a_stream_is_read_with_its_current_state(api: Harness) -> None:
    reply = (await api.chunk({"inputs": rows(3).tolist()})).json()
    api.clock[0] += 2500
    response = await api.client.get(f"{ADDRESS}/s")
    TypeAdapter(StreamInfo).validate_json(response.content)
    artifact = api.models["probe"]
    assert response.json() == {
        "model": "probe",
        "version": artifact.version,
        "fingerprint": artifact.fingerprint.hex(),
        "stream": "s",
        "feed": "inputs",
        "epoch": reply["epoch"],
        "position": 3,
        "tag": reply["tag"],
        "updated_ms": NOW_MS,
        "age_s": 2.5,
        "state_bytes": 4 * artifact.state.float_size,
    }
    assert response.headers["etag"] == f'"{reply["epoch"]}-{reply["tag"]}"'
    packed = await api.client.get(f"{ADDRESS}/s", headers={"accept": "application/msgpack"})
    assert ormsgpack.unpackb(packed.content) == response.json()
    document = problem(await api.client.get(f"{ADDRESS}/t"), 404, "stream_not_found")
    assert (document["stream"], document["position"]) == ("t", 0)
    for name in ("a b", "%2E", "%2E%2E"):
        problem(await api.client.get(f"{ADDRESS}/{name}"), 400, "invalid_name")
        problem(await api.client.delete(f"{ADDRESS}/{name}"), 400, "invalid_name")
        for part in ("state", "forecast"):
            wanted = api.client.put if part == "state" else api.client.post
            response = await wanted(f"{ADDRESS}/{name}/{part}", json={"horizon": 1})
            problem(response, 400, "invalid_name")
    problem(await api.client.get("/v1/models/x/streams/s"), 404, "model_not_found")


async def test_a_deleted_stream_starts_again_at_zero(api: Harness) -> None:
    first = await api.chunk({"inputs": rows(1).tolist()})
    stale = {"if-match": f'"{"0" * 16}-{"0" * 32}"'}
    response = await api.client.delete(f"{ADDRESS}/s", headers=stale)
    problem(response, 412, "state_changed")
    assert response.headers["etag"] == first.headers["etag"]
    response = await api.client.delete(f"{ADDRESS}/s", headers={"if-match": first.headers["etag"]})
    assert (response.status_code, response.content) == (204, b"")
    problem(await api.client.delete(f"{ADDRESS}/s"), 404, "stream_not_found")
    again = (await api.chunk({"inputs": rows(1).tolist()})).json()
    assert (again["position"], again["created"]) == (1, True)
    assert again["epoch"] != first.json()["epoch"]


async def test_streams_are_listed_page_by_page(api: Harness) -> None:
    names = {f"a:{index}" for index in range(40)}
    for name in (*names, "b:1"):
        await api.chunk({"inputs": rows(1).tolist()}, stream=name)
    response = await api.client.get(f"{ADDRESS}?prefix=b")
    TypeAdapter(StreamList).validate_json(response.content)
    assert response.json() == {"model": "probe", "streams": ["b:1"], "cursor": None}
    listed: list[str] = []
    cursor, pages = "", 0
    while cursor is not None:
        more = f"&cursor={cursor}" if cursor else ""
        page = (await api.client.get(f"{ADDRESS}?prefix=a:&limit=5{more}")).json()
        assert len(page["streams"]) < 20, "about as many as were asked for"
        listed += page["streams"]
        cursor, pages = page["cursor"], pages + 1
    assert set(listed) == names
    assert pages > 2
    assert (await api.client.get("/v1/models/small/streams")).json()["streams"] == []
    for query, code in (
        ("limit=0", "invalid_input"),
        ("limit=6", "invalid_input"),
        ("limit=x", "invalid_input"),
        ("order=name", "invalid_input"),
        (f"cursor={'9' * 5000}", "invalid_input"),
        ("prefix=a%20b", "invalid_name"),
    ):
        response = await api.client.get(f"{ADDRESS}?{query}")
        assert response.json()["code"] == code


async def test_deleting_many_streams_requires_a_prefix(api: Harness) -> None:
    for name in ("a:1", "a:2", "b:1"):
        await api.chunk({"inputs": rows(1).tolist()}, stream=name)
    document = problem(await api.client.delete(ADDRESS), 422, "invalid_input")
    assert document["at"] == "?prefix"
    assert document["detail"] == (
        "?prefix: expected this parameter, which selects the streams to delete "
        "(?prefix= for all), got nothing"
    )
    assert len(api.store.states) == 3
    response = await api.client.delete(f"{ADDRESS}?prefix=a:")
    TypeAdapter(Deleted).validate_json(response.content)
    assert response.json() == {"model": "probe", "deleted": 2, "cursor": None}
    assert (await api.client.delete(f"{ADDRESS}?prefix=")).json()["deleted"] == 1
    assert not api.store.states


async def test_a_deletion_with_a_limit_continues_with_its_cursor(api: Harness) -> None:
    for number in range(30):
        await api.chunk({"inputs": rows(1).tolist()}, stream=f"s{number}")
    problem(await api.client.delete(f"{ADDRESS}?prefix=&limit=0"), 422, "invalid_input")
    counts, cursor = [], ""
    while cursor is not None:
        query = f"prefix=s&limit=10&cursor={cursor}"
        document = (await api.client.delete(f"{ADDRESS}?{query}")).json()
        counts.append(document["deleted"])
        cursor = document["cursor"]
    assert sum(counts) == 30
    assert max(counts) <= 20
    assert not api.store.states


async def test_deleting_many_streams_reports_an_unknown_outcome(api: Harness) -> None:
    for name in ("a:1", "a:2", "a:3"):
        await api.chunk({"inputs": rows(1).tolist()}, stream=name)
    unknown = OutcomeUnknown("the reply was lost", stream="a:2")
    api.store.on_delete = lambda key: unknown if key.stream == "a:2" else None
    document = problem(await api.client.delete(f"{ADDRESS}?prefix=a"), 503, "outcome_unknown")
    assert document["stream"] == "a:2"
    api.store.on_delete = lambda _: None
    await api.client.delete(f"{ADDRESS}?prefix=a")
    assert not api.store.states


@pytest.mark.parametrize("media", ["json", "msgpack"])
async def test_put_accepts_what_get_returned(api: Harness, media: str) -> None:
    headers = {"accept": f"application/{media}", "content-type": f"application/{media}"}
    await api.chunk({"events": [EVENT, LATER]}, model="small")
    address = "/v1/models/small/streams"
    kept = await api.client.get(f"{address}/s/state", headers=headers)
    if media == "json":
        TypeAdapter(StateReply).validate_json(kept.content)

    response = await api.client.put(f"{address}/copy/state", content=kept.content, headers=headers)
    assert response.status_code == 201, response.content
    assert response.headers["location"] == f"{address}/copy"
    source, copy = (api.store.states[StreamKey("small", name)] for name in ("s", "copy"))
    np.testing.assert_array_equal(source.state.floats, copy.state.floats)
    np.testing.assert_array_equal(source.state.ints, copy.state.ints)
    assert (copy.head.position, copy.feed, copy.last) == (2, source.feed, None)
    assert copy.head.epoch != source.head.epoch
    assert copy.head.tag == bytes(16)
    assert response.headers["etag"] == f'"{copy.head.etag}"'

    one, other = [
        (await api.chunk({"position": 2, "events": [EVENT]}, model="small", stream=name)).json()
        for name in ("s", "copy")
    ]
    assert one["outputs"] == other["outputs"]


async def test_restoring_over_a_stream_requires_its_etag(api: Harness) -> None:
    await api.chunk({"inputs": rows(2).tolist()})
    kept = (await api.client.get(f"{ADDRESS}/s/state")).json()
    now = await api.chunk({"inputs": rows(1).tolist()})
    exists = await api.client.put(f"{ADDRESS}/s/state", json=kept)
    assert problem(exists, 409, "stream_exists")["position"] == 3
    stale = {"if-match": f'"{kept["epoch"]}-{kept["tag"]}"'}
    changed = await api.client.put(f"{ADDRESS}/s/state", json=kept, headers=stale)
    problem(changed, 412, "state_changed")
    assert api.position() == 3
    restored = await api.client.put(
        f"{ADDRESS}/s/state", json=kept, headers={"if-match": now.headers["etag"]}
    )
    assert restored.status_code == 200
    assert "location" not in restored.headers
    TypeAdapter(StreamInfo).validate_json(restored.content)
    assert (restored.json()["position"], api.position()) == (2, 2)
    assert restored.json()["epoch"] not in (kept["epoch"], now.json()["epoch"])
    missing = await api.client.put(f"{ADDRESS}/new/state", json=kept, headers={"if-match": "*"})
    problem(missing, 412, "state_changed")


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "status", "at"),
    [
        ({"fingerprint": "0" * 32}, 409, "fingerprint"),
        ({"fingerprint": "abc"}, 422, "fingerprint"),
        ({"fingerprint": None}, 422, "fingerprint"),
        ({"position": -1}, 422, "position"),
        ({"position": 2.0}, 422, "position"),
        ({"feed": "rows"}, 422, "feed"),
        ({"feed": "events"}, 422, "feed"),
        ({"state": {}}, 422, "state"),
        ({"state": []}, 422, "state"),
        ({"age": 3}, 422, "age"),
    ],
)
async def test_invalid_states_are_rejected(
    api: Harness, change: dict[str, Any], status: int, at: str
) -> None:
    await api.chunk({"inputs": rows(2).tolist()})
    kept = (await api.client.get(f"{ADDRESS}/s/state")).json()
    response = await api.client.put(f"{ADDRESS}/new/state", json={**kept, **change})
    code = "state_incompatible" if status == 409 else "invalid_input"
    assert problem(response, status, code)["at"] == at
    assert api.position("new") is None


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *[("lstm_1.hidden", wrong) for wrong in ([0.0] * 2, 0.5, [[0.0] * 3, [0.0]])],
        *[("lstm_1.hidden", [0, 0, wrong]) for wrong in ("x", 1e39, NAN, True)],
        ("lstm_1.other", [0.0]),
        ("clock.out_of_order", 9),
        *[("clock.seen", wrong) for wrong in (2**61 + 1, 2**62, 2**63 - 1, -1)],
    ],
)
async def test_invalid_parts_of_a_state_are_rejected(api: Harness, part: str, value: Any) -> None:
    """Also counts that no stream reaches, or that could not be continued."""
    await api.chunk({"events": [EVENT]}, model="small")
    address = "/v1/models/small/streams"
    kept = (await api.client.get(f"{address}/s/state")).json()
    kept["state"][part] = value
    content, headers = json.dumps(kept), {"content-type": "application/json"}
    response = await api.client.put(f"{address}/new/state", content=content, headers=headers)
    document = problem(response, 422, "invalid_input")
    assert document["at"] == "state"
    assert part.startswith("clock.") or part in document["detail"]
    assert api.position("new", "small") is None


async def test_a_fork_is_independent_of_its_source(api: Harness) -> None:
    await api.chunk({"inputs": rows(3).tolist()})
    response = await api.client.post(f"{ADDRESS}/s/fork", json={"to": "s:what-if"})
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"{ADDRESS}/s%3Awhat-if"
    TypeAdapter(StreamInfo).validate_json(response.content)
    fork = response.json()
    assert (fork["stream"], fork["position"], fork["tag"]) == ("s:what-if", 3, "0" * 32)
    body = {"position": 3, "inputs": rows(1, seed=5).tolist()}
    one, other = [(await api.chunk(body, stream=name)).json() for name in ("s", "s:what-if")]
    assert one["outputs"] == other["outputs"]
    await api.chunk({"inputs": rows(1, seed=6).tolist()}, stream="s:what-if")
    assert (api.position(), api.position("s:what-if")) == (4, 5)

    exists = await api.client.post(f"{ADDRESS}/s/fork", json={"to": "s:what-if"})
    document = problem(exists, 409, "stream_exists")
    assert (document["stream"], document["position"]) == ("s:what-if", 5)
    over = await api.client.post(
        f"{ADDRESS}/s/fork",
        content=ormsgpack.packb({"to": "s:what-if"}),
        headers={"if-match": exists.headers["etag"], **MSGPACK},
    )
    assert over.status_code == 200
    assert ormsgpack.unpackb(over.content)["position"] == 4


async def test_invalid_forks_are_rejected(api: Harness) -> None:
    missing = await api.client.post(f"{ADDRESS}/s/fork", json={"to": "t"})
    assert problem(missing, 404, "stream_not_found")["stream"] == "s"
    for body, status, code in (
        ({"to": "a b"}, 400, "invalid_name"),
        ({"to": "."}, 400, "invalid_name"),
        ({"to": ".."}, 400, "invalid_name"),
        ({"to": 3}, 422, "invalid_input"),
        ({}, 422, "invalid_input"),
        ({"to": "t", "at": 3}, 422, "invalid_input"),
    ):
        problem(await api.client.post(f"{ADDRESS}/s/fork", json=body), status, code)
    assert not api.store.states


async def test_a_state_of_another_version_is_not_returned(api: Harness) -> None:
    await api.chunk({"inputs": rows(2).tolist()})
    key = StreamKey("probe", "s")
    found = api.store.states[key]
    api.store.states[key] = type(found)(
        found.head, found.feed, bytes(16), found.last, found.updated_ms, found.state
    )
    document = problem(await api.client.get(f"{ADDRESS}/s/state"), 409, "state_incompatible")
    assert document["got"] == "0" * 32
    info = (await api.client.get(f"{ADDRESS}/s")).json()
    assert (info["version"], info["position"]) == ("0" * 12, 2)


async def test_predictions_do_not_use_the_store(api: Harness) -> None:
    api.store.away = StoreUnavailable("no answer")
    body = {"sequences": [{"inputs": rows(3).tolist()}]}
    predicted, refused = await asyncio.gather(
        api.client.post("/v1/models/probe/predict", json=body),
        api.chunk({"inputs": rows(2).tolist()}),
    )
    assert predicted.status_code == 200
    problem(refused, 503, "store_unavailable")


async def test_a_damaged_state_is_not_used_and_can_be_deleted_or_overwritten(
    pipeline_server: RealServer,
    models: Mapping[str, Artifact],
    damage: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its stream is named in the log; a deletion or a restore replaces it."""
    async with harness(pipeline_server, models, state_cache_bytes=0) as api:
        body = {"position": 0, "inputs": rows(3).tolist()}
        for way_out in ("delete", "restore"):
            await api.chunk(body, stream="spoilt")
            path = "/v1/models/probe/streams/spoilt"
            saved = (await api.client.get(f"{path}/state")).json()
            damage("spoilt")
            capsys.readouterr()
            for response in (
                await api.chunk({**body, "position": 3}, stream="spoilt"),
                await api.chunk({"inputs": body["inputs"]}, stream="spoilt"),
                await api.chunk(body, stream="spoilt"),
                await api.client.get(path),
                await api.client.get(f"{path}/state"),
                await api.client.post(f"{path}/fork", json={"to": "copy"}),
            ):
                document = problem(response, 500, "state_damaged")
                assert (document["stream"], document["retryable"]) == ("spoilt", False)
            logged = capsys.readouterr().out.splitlines()
            named = [line for line in logged if "stream=spoilt" in line]
            assert sum("[error" in line and "state_damaged" in line for line in named) >= 6
            if way_out == "delete":
                assert (await api.client.delete(path)).status_code == 204
                assert (await api.chunk(body, stream="spoilt")).json()["created"] is True
                assert (await api.client.delete(path)).status_code == 204
            else:
                restored = await api.client.put(f"{path}/state", json=saved)
                assert restored.status_code in (200, 201)
                again = await api.chunk({**body, "position": 3}, stream="spoilt")
                assert again.json()["position"] == 6


async def test_reads_check_if_match(api: Harness) -> None:
    before = await api.chunk({"inputs": rows(2).tolist()})
    after = await api.chunk({"inputs": rows(2).tolist()})
    for path in (f"{ADDRESS}/s", f"{ADDRESS}/s/state"):
        for etag, status in ((before.headers["etag"], 412), (after.headers["etag"], 200)):
            response = await api.client.get(path, headers={"if-match": etag})
            assert response.status_code == status
        stale = await api.client.get(path, headers={"if-match": before.headers["etag"]})
        assert problem(stale, 412, "state_changed")["position"] == 4
        assert (await api.client.get(path, headers={"if-match": "*"})).status_code == 200
        weak = await api.client.get(path, headers={"if-match": 'W/"a"'})
        problem(weak, 400, "invalid_precondition")
        missing = await api.client.get(path.replace("/s", "/t", 1), headers={"if-match": "*"})
        assert missing.status_code in (404, 412)


@pytest.mark.parametrize("feed", ["events", "inputs"])
@pytest.mark.parametrize(
    "clock",
    [
        {"clock.seen": 2**61},
        {"clock.seen": 2**61, "clock.out_of_order": 2**61 - 1},
        {"clock.last_ms": -2_208_988_800_000},
        {"clock.last_ms": 7_258_118_399_999},
    ],
)
async def test_every_restored_state_can_be_continued(
    api: Harness, feed: str, clock: dict[str, int]
) -> None:
    await api.chunk({"events": [EVENT, LATER]}, model="small")
    address = "/v1/models/small/streams"
    kept = (await api.client.get(f"{address}/s/state")).json()
    kept["state"].update(clock)
    restored = await api.client.put(f"{address}/t/state", json={**kept, "feed": feed})
    assert restored.status_code == 201, restored.text
    features = len((await api.client.get("/v1/models/small")).json()["columns"])
    steps: dict[str, Any] = {"inputs": [[0.0] * features]}
    if feed == "events":
        moments = ["1900-01-01T00:00:00Z", "2199-12-31T23:59:59.999Z"]
        steps = {"events": [{**EVENT, "at": moment} for moment in moments * 2]}
    for _ in range(2):
        response = await api.chunk(steps, model="small", stream="t")
        assert response.status_code == 200, response.text
    kept = (await api.client.get(f"{address}/t/state")).json()
    assert kept["state"]["clock.seen"] >= clock.get("clock.seen", 0)


@pytest.mark.parametrize("position", [2**62, 2**62 - 1])
async def test_the_last_restorable_position_can_be_continued(api: Harness, position: int) -> None:
    await api.chunk({"inputs": rows(2).tolist()})
    kept = (await api.client.get(f"{ADDRESS}/s/state")).json()
    kept["position"] = position
    response = await api.client.put(f"{ADDRESS}/t/state", json=kept)
    assert response.status_code == 201
    for _ in range(2):
        response = await api.chunk({"inputs": rows(2).tolist()}, stream="t")
        assert response.status_code == 200, response.text
    assert (await api.client.get(f"{ADDRESS}/t")).json()["position"] == position + 4


@pytest.mark.parametrize("depth", [30, 150, 400, 1000])
@pytest.mark.parametrize("packed", [False, True])
async def test_deeply_nested_states_are_rejected(api: Harness, depth: int, packed: bool) -> None:
    await api.chunk({"inputs": rows(2).tolist()})
    kept = (await api.client.get(f"{ADDRESS}/s/state")).json()
    kept["state"]["lstm_1.hidden"] = "deep"
    if packed:
        text = ormsgpack.packb(kept).replace(b"\xa4deep", b"\x91" * depth + b"\x01")
    else:
        text = json.dumps(kept).encode().replace(b'"deep"', b"[" * depth + b"1" + b"]" * depth)
    headers = {**(MSGPACK if packed else JSON), "accept": "application/json"}
    response = await api.client.put(f"{ADDRESS}/t/state", content=text, headers=headers)
    assert response.status_code in (400, 422), response.text


async def test_created_is_true_for_the_chunk_that_creates_its_stream_only(api: Harness) -> None:
    """In its reply and in its replays, also as an item; not after a restore or a fork at 0."""

    async def created(stream: str, position: int) -> list[bool | None]:
        body = {"position": position, "inputs": rows(2, seed=position).tolist()}
        replies = [(await api.chunk(body, stream=stream)).json() for _ in range(2)]
        many = {"chunks": [{"stream": stream, **body}]}
        items = (await api.client.post("/v1/models/probe/chunks", json=many)).json()["results"]
        packed = {**body, "inputs": rows(2, seed=position).tobytes()}
        replies += [items[0]["reply"], await api.packed(packed, stream=stream)]
        assert [reply["replayed"] for reply in replies] == [False, True, True, True]
        return [reply.get("created") for reply in replies]

    assert await created("s", 0) == [True] * 4
    assert await created("s", 2) == [None] * 4
    kept = (await api.client.get(f"{ADDRESS}/s/state")).json()
    restored = await api.client.put(f"{ADDRESS}/zero/state", json={**kept, "position": 0})
    assert restored.status_code == 201
    await api.client.post(f"{ADDRESS}/zero/fork", json={"to": "fork"})
    for name in ("fork", "zero"):
        assert await created(name, 0) == [None] * 4
    await api.client.delete(f"{ADDRESS}/zero")
    assert await created("zero", 0) == [True] * 4
