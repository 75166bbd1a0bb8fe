"""Duplicate members are rejected by every reader of bodies."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import httpx
import ormsgpack
import pytest

from models.artifact.artifact import Artifact, write_artifact
from service.codec.duplicates import find_duplicate
from service.codec.media import Media
from tests.service.transports.v1.harness import (
    EVENT,
    JSON,
    LATER,
    LIMITS,
    MSGPACK,
    Harness,
    harness,
    problem,
    rows,
)
from tests.support.decoders import decoder_spec, future_of, hourly_events
from tests.support.documents import (
    Members,
    document,
    has_duplicates,
    members,
    quoted,
    with_duplicates,
)
from tests.support.oracle import contracting_weights
from tests.support.servers import RealServer

HEADERS = {Media.JSON: JSON, Media.MSGPACK: MSGPACK}
LONG = replace(
    LIMITS, max_body_bytes=2**24, max_chunk_steps=10_000, max_predict_steps=20_000, max_items=1_000
)
MEDIA = pytest.mark.parametrize("media", list(Media), ids=["json", "msgpack"])


@pytest.fixture(scope="module")
def weather(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    spec = decoder_spec()
    folder = tmp_path_factory.mktemp("models")
    return write_artifact(folder / "weather", spec, contracting_weights(spec, 4))


@pytest.fixture
async def api(
    pipeline_server: RealServer, models: Mapping[str, Artifact], weather: Artifact
) -> AsyncIterator[Harness]:
    served = {**models, "weather": weather}
    async with harness(pipeline_server, served, limits=LONG) as running:
        yield running


async def send(
    api: Harness, path: str, media: Media, value: Any, method: str = "POST"
) -> httpx.Response:
    return await api.client.request(
        method, f"/v1/models/{path}", content=document(media, value), headers=HEADERS[media]
    )


def answer(response: httpx.Response) -> dict[str, Any]:
    packed = response.headers["content-type"] == "application/msgpack"
    found: dict[str, Any] = ormsgpack.unpackb(response.content) if packed else response.json()
    return found


def rejected(response: httpx.Response) -> str:
    """The place in a request that was rejected as a whole."""
    found = answer(response)
    assert (response.status_code, found["code"]) == (422, "invalid_input"), found
    place: str = found["at"]
    return place


def inputs(media: Media, count: int) -> Any:
    given = rows(count)
    return given.tolist() if media is Media.JSON else given.tobytes()


# 6,000 rows are long in MessagePack, and in JSON longer than the fast decoder accepts
@MEDIA
@pytest.mark.parametrize("count", [1, 3000, 6000], ids=["short", "long", "longer"])
async def test_chunk_with_duplicate_member_is_rejected(
    api: Harness, media: Media, count: int
) -> None:
    body = members({"position": 0, "inputs": inputs(media, count), "epoch": None})
    again = {"inputs": inputs(media, 1), "position": 0, "epoch": None}
    for twice, value in again.items():
        for wrong in (
            body.with_duplicate(twice, value),
            Members([(twice, value), *body]),
        ):
            response = await send(api, "probe/streams/s/chunks", media, wrong)
            assert rejected(response) == twice
    assert api.position() is None
    assert (await send(api, "probe/streams/s/chunks", media, body)).status_code == 200
    assert api.position() == count


@MEDIA
@pytest.mark.parametrize("count", [2, 1500], ids=["short", "long"])
async def test_event_with_duplicate_member_is_rejected(
    api: Harness, media: Media, count: int
) -> None:
    for again, event in (("load", EVENT), ("carrier", EVENT), ("gate", LATER), ("late", LATER)):
        body = members({"position": 0, "events": [EVENT, LATER] * (count // 2)})
        body[1][1][-1] = members(event).with_duplicate(again, event.get(again))
        response = await send(api, "small/streams/s/chunks", media, body)
        assert rejected(response) == f"events[{count - 1}].{again}"
    assert api.position("s", "small") is None


@MEDIA
@pytest.mark.parametrize("count", [1, 3000], ids=["short", "long"])
async def test_item_with_duplicate_member_fails_alone(
    api: Harness, media: Media, count: int
) -> None:
    item = members({"stream": "a", "position": 0, "inputs": inputs(media, count)})
    items = [
        item,
        Members([*item, ("stream", "b")]),
        Members([("stream", "c"), ("position", 7), *item[1:]]),
        Members([("stream", "d"), *item[1:]]),
    ]
    response = await send(api, "probe/chunks", media, members({"chunks": items}))
    results = answer(response)["results"]
    assert [result["status"] for result in results] == [200, 422, 422, 200]
    assert [results[at]["error"]["at"] for at in (1, 2)] == [
        "chunks[1].stream",
        "chunks[2].position",
    ]
    assert (api.position("a"), api.position("d")) == (count, count)
    assert (api.position("b"), api.position("c")) == (None, None)


@MEDIA
@pytest.mark.parametrize("count", [1, 400], ids=["short", "long"])
async def test_event_of_item_with_duplicate_member_is_rejected(
    api: Harness, media: Media, count: int
) -> None:
    good = members({"stream": "a", "events": [EVENT] * count})
    wrong = members({"stream": "b", "events": [EVENT] * count})
    wrong[1][1][-1] = members(EVENT).with_duplicate("heavy", False)
    body = members({"chunks": [good, wrong]})
    results = answer(await send(api, "small/chunks", media, body))["results"]
    assert [result["status"] for result in results] == [200, 422]
    assert results[1]["error"]["at"] == f"chunks[1].events[{count - 1}].heavy"


@MEDIA
@pytest.mark.parametrize("count", [1, 3000], ids=["short", "long"])
async def test_duplicate_lists_of_chunks_or_sequences_are_rejected(
    api: Harness, media: Media, count: int
) -> None:
    item = members({"stream": "a", "inputs": inputs(media, count)})
    for path, name, part in (
        ("probe/chunks", "chunks", item),
        ("probe/predict", "sequences", Members(item[1:])),
    ):
        body = Members([(name, [part]), (name, [part])])
        response = await send(api, path, media, body)
        assert rejected(response) == name
    assert api.position("a") is None


@MEDIA
@pytest.mark.parametrize("count", [1, 3000], ids=["short", "long"])
async def test_sequence_with_duplicate_member_is_rejected(
    api: Harness, media: Media, count: int
) -> None:
    given = inputs(media, count)
    body = Members([("sequences", [Members([("inputs", given), ("inputs", given)])])])
    response = await send(api, "probe/predict", media, body)
    assert rejected(response) == "sequences[0].inputs"
    event = members(EVENT).with_duplicate("load", 1.0)
    body = members({"sequences": [{"events": [EVENT] * count}, {"events": [event]}]})
    response = await send(api, "small/predict", media, body)
    assert rejected(response) == "sequences[1].events[0].load"


@MEDIA
async def test_forecast_with_duplicate_member_is_rejected(api: Harness, media: Media) -> None:
    await api.chunk({"events": hourly_events(3)}, model="weather")
    body = members({"horizon": 2, "future": future_of(2)})
    address = "weather/streams/s/forecast"
    assert (await send(api, address, media, body)).status_code == 200
    response = await send(api, address, media, body.with_duplicate("horizon", 3))
    assert rejected(response) == "horizon"
    name, value = body[1][1][1][0]
    body[1][1][1] = body[1][1][1].with_duplicate(name, value)
    response = await send(api, address, media, body)
    assert rejected(response) == f"future[1].{name}"


@MEDIA
async def test_state_or_fork_with_duplicate_member_is_rejected(api: Harness, media: Media) -> None:
    await api.chunk({"inputs": rows(2).tolist()})
    kept = (await api.client.get("/v1/models/probe/streams/s/state")).json()
    state = members(kept["state"])
    twice = {**kept, "state": state.with_duplicate("lstm_1.hidden", kept["state"]["lstm_1.hidden"])}
    for body, at in (
        (members(kept).with_duplicate("position", 9), "position"),
        (members(twice), "state.lstm_1.hidden"),
    ):
        response = await send(api, "probe/streams/new/state", media, body, "PUT")
        assert rejected(response) == at
    body = Members([("to", "new"), ("to", "newer")])
    response = await send(api, "probe/streams/s/fork", media, body)
    assert rejected(response) == "to"
    assert len(api.store.states) == 1
    response = await send(api, "probe/streams/new/state", media, members(kept), "PUT")
    assert response.status_code == 201


@pytest.mark.parametrize(
    "text",
    [
        '{"position":0,"inputs":[[1,2,3]],"\\u0069nputs":[[4,5,6]]}',
        '{"\\u0069nputs":[[4,5,6]],"position" : 0,"inputs"\t:[[1,2,3]]}',
        '{"inputs":[[4,5,6]],"inputs" :null}',
        '{"inputs":null,"inputs":[[4,5,6]]}',
        '{"inputs":[[4,5,6]],"epoch":null,"epoch":null}',
    ],
)
async def test_escaped_duplicate_members_are_rejected(api: Harness, text: str) -> None:
    document = problem(await api.chunk(text), 422, "invalid_input")
    assert "more than once" in document["detail"]
    assert api.position() is None


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ('{"a":{"b":[1,{"c":1,"d":2,"c":3}]}}', "a.b[1].c"),
        ('{"a":1,"b":":","c":"\\":","d":"a"}', None),
        ('[{"a":1},{"a":1}]', None),
        (f'{{"a":{"9" * 5000},"a":1}}', "a"),
    ],
)
def test_error_names_the_place_of_the_duplicate_member(text: str, at: str | None) -> None:
    found = find_duplicate(Media.JSON, text.encode())
    assert (None if found is None else found.facts["at"]) == at


@pytest.mark.parametrize("fast_path", [True, False], ids=["fast path", "slow path"])
async def test_duplicates_are_those_that_another_parser_finds(
    pipeline_server: RealServer, models: Mapping[str, Artifact], fast_path: bool
) -> None:
    """In JSON, whatever is escaped in names and strings."""
    async with harness(pipeline_server, models, fast_path=fast_path) as api:
        for seed in range(100):
            choose = random.Random(seed)
            events = [EVENT, {**LATER, "carrier": "a" + quoted(choose)}]
            text = with_duplicates(choose, {"events": events, "position": 0})
            answer = await api.chunk(text, stream=f"s{seed}", model="small")
            is_rejected = "more than once" in answer.text
            assert is_rejected == has_duplicates(text), (seed, text)
            assert answer.status_code == (422 if is_rejected else 200), answer.text


def test_member_name_is_the_same_in_every_encoding() -> None:
    """`a` as a short and as a long string in MessagePack is one name."""
    body = b"\x82\xa1a\x01\xd9\x01a\x02"
    found = find_duplicate(Media.MSGPACK, body)
    assert found is not None
    assert found.facts["at"] == "a"


@pytest.mark.parametrize("absent", ["null", "left out"])
async def test_absent_values_are_not_duplicates(api: Harness, absent: str) -> None:
    """Counts alone cannot distinguish them from duplicates."""
    gone: dict[str, Any] = {"delay": None, "gate": None} if absent == "null" else {}
    events = [{**EVENT, **gone}, {**LATER, "carrier": 'a "quoted": \\ one'}]
    for packed in (False, True):
        request = {"content": ormsgpack.packb({"events": events}), "headers": MSGPACK}
        response = await api.chunk(
            {"events": events}, model="small", stream=f"s{packed}", **(request if packed else {})
        )
        assert response.status_code == 200, response.text


async def test_a_state_with_numeric_keys_is_rejected(api: Harness) -> None:
    await api.chunk({"inputs": rows(2).tolist()})
    kept = (await api.client.get("/v1/models/probe/streams/s/state")).json()
    kept["state"]["lstm_1.hidden"] = [{1: 2, 3: 4}]
    packed = ormsgpack.packb(kept, option=ormsgpack.OPT_NON_STR_KEYS)
    response = await api.client.put(
        "/v1/models/probe/streams/new/state", content=packed, headers=MSGPACK
    )
    problem_codes = ("invalid_input", "malformed_body")
    assert ormsgpack.unpackb(response.content)["code"] in problem_codes
    assert response.status_code in (400, 422)
