"""Long bodies give the same results as short ones, are queued, and respect deadlines."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import ormsgpack
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifact.artifact import Artifact, write_artifact
from service.codec import request_body
from service.codec.long_bodies import long_reader
from service.codec.long_bodies.admission import Checkpoint, LongBodyAdmission
from service.codec.long_bodies.json_structure import JsonStructure
from service.codec.long_bodies.long_reader import LongReader
from service.codec.media import Media
from service.codec.request_reader import RequestReader
from service.codec.settings import RequestSettings
from service.core.errors import (
    CarryError,
    DeadlineExceeded,
    InvalidInput,
    MalformedBody,
    Overloaded,
)
from service.core.values import StreamKey
from service.pipeline.served_model import ServedModel
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
from tests.service.transports.v1.test_fast_decoder import (
    EDGES,
    KINDS,
    json_bodies,
    packed_bodies,
    read,
    shown,
)
from tests.support.decoders import decoder_spec, future_of, hourly_events
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import contracting_weights
from tests.support.servers import RealServer

SMALL = RequestSettings(max_chunk_steps=4, max_predict_steps=6, max_items=3)
LONG = replace(
    LIMITS, max_body_bytes=2**24, max_chunk_steps=10_000, max_predict_steps=20_000, max_items=1_000
)


@pytest.fixture(scope="module")
def readers(models: Mapping[str, Artifact]) -> Mapping[str, RequestReader]:
    return {
        name: RequestReader(ServedModel(artifact, NumpyRuntime(artifact)), SMALL, lambda: b"n" * 16)
        for name, artifact in models.items()
    }


def read_long(reader: RequestReader, kind: str, media: Media, body: bytes) -> Any:
    """As `read`, with the reader of long bodies."""
    long, checkpoint = LongReader(reader), Checkpoint(math.inf)
    try:
        if kind == "chunk":
            return shown(uvloop.run(long.chunk(body, media, checkpoint, "s", None)))
        way = long.items if kind == "items" else long.sequences
        return shown(uvloop.run(way(body, media, checkpoint)))
    except CarryError as error:
        return shown(error)


def is_error(result: Any) -> bool:
    return isinstance(result, tuple) and isinstance(result[0], type)


def agree(short: Any, long: Any) -> None:
    """The same values, and an error in the same item, if not always in the same words."""
    if is_error(short):
        # Nothing behind an error in a long item is parsed.
        unseen = short[0] is MalformedBody and isinstance(long, list) and any(map(is_error, long))
        assert is_error(long) or unseen, (short, long)
    elif isinstance(short, list):
        assert isinstance(long, list), (short, long)
        assert len(short) == len(long)
        for one, other in zip(short, long, strict=True):
            agree(one, other)
    else:
        assert short == long


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["probe", "small"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_long_and_short_reader_agree(
    readers: Mapping[str, RequestReader], data: st.DataObject, model: str, kind: str
) -> None:
    """With blocks so small that any element may be the first of one."""
    reader = readers[model]
    features, events = reader.served.input_features, model == "small"
    media = data.draw(st.sampled_from(list(Media)))
    bodies = json_bodies if media is Media.JSON else packed_bodies
    body = data.draw(bodies(kind, features, events))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(long_reader, "BLOCK_BYTES", data.draw(st.integers(1, 120)))
        patched.setattr(long_reader, "LONG_BYTES", data.draw(st.sampled_from([120, 10_000])))
        agree(read(reader, kind, media, body), read_long(reader, kind, media, body))


@pytest.mark.parametrize("text", EDGES)
def test_long_and_short_reader_agree_on_edge_cases(
    readers: Mapping[str, RequestReader], text: str
) -> None:
    reader, body = readers["probe"], text.encode()
    item = b'{"stream":"a",' + body[1:]
    for kind, whole in (
        ("chunk", body),
        ("items", b'{"chunks":[' + item + b"]}"),
        ("sequences", b'{"sequences":[' + body + b"]}"),
    ):
        agree(read(reader, kind, Media.JSON, whole), read_long(reader, kind, Media.JSON, whole))


ROW = "[0.5," + " " * long_reader.BLOCK_BYTES + "-1.25,3]"


@pytest.mark.parametrize(
    "text",
    [
        f'{{"inputs":[{ROW},]}}',
        f'{{"inputs":[ ,{ROW}]}}',
        f'{{"inputs":[{ROW},,{ROW}]}}',
        f'{{"inputs":[{ROW}],"\\ud800":1}}',
        f'{{"inputs":[{ROW}],{" " * 5000}"position"{" " * 5000}:0}}',
    ],
    ids=["element last", "element first", "element between", "surrogate", "space"],
)
def test_long_elements_hide_no_error(readers: Mapping[str, RequestReader], text: str) -> None:
    test_long_and_short_reader_agree_on_edge_cases(readers, text)


@pytest.mark.parametrize("chunks", ["{0},", ",{0}", "{0}, ,{0}"])
def test_list_without_an_element_between_commas_is_malformed(
    readers: Mapping[str, RequestReader], chunks: str
) -> None:
    item = f'{{"stream":"a","inputs":[{ROW}]}}'
    body = f'{{"chunks":[{chunks.format(item)}]}}'.encode()
    agree(*[way(readers["probe"], "items", Media.JSON, body) for way in (read, read_long)])


@pytest.mark.parametrize("media", list(Media))
def test_long_event_with_unknown_members_is_rejected_before_it_is_parsed(
    readers: Mapping[str, RequestReader], monkeypatch: pytest.MonkeyPatch, media: Media
) -> None:
    """60,000 members held the event loop for 116 ms."""
    reader = readers["small"]
    event = {f"m{at:05d}": 0 for at in range(60_000)}
    dumps = orjson.dumps if media is Media.JSON else ormsgpack.packb
    monkeypatch.setattr(reader, "part_of_steps", None)
    error, _, facts = read_long(reader, "chunk", media, dumps({"events": [event]}))
    assert error is InvalidInput
    assert facts["at"].startswith("events[0]")


def test_long_valid_event_is_read(readers: Mapping[str, RequestReader]) -> None:
    text = json.dumps({"events": [EVENT]}).replace("{", "{" + " " * long_reader.LONG_BYTES)
    results = [
        way(readers["small"], "chunk", Media.JSON, text.encode()) for way in (read, read_long)
    ]
    assert not is_error(results[0])
    assert results[0] == results[1]


def test_long_member_name_is_an_unknown_member(readers: Mapping[str, RequestReader]) -> None:
    reader, name = readers["probe"], "n" * 5000
    for text in (f'{{"{name}":1,"inputs":[[1,2,3]]}}', f'{{"inputs":[[1,2,3]],"{name}":1}}'):
        short, long = (way(reader, "chunk", Media.JSON, text.encode()) for way in (read, read_long))
        assert short[0] is long[0] is InvalidInput
        assert name.startswith(long[2]["at"])


def test_long_member_name_in_messagepack_is_an_unknown_member(
    readers: Mapping[str, RequestReader],
) -> None:
    reader, name = readers["probe"], "n" * 5000
    for value in ({name: 1, "inputs": b""}, {"inputs": b"", name: 1}, {"final": None, name: 1}):
        body = ormsgpack.packb(value)
        short, long = (way(reader, "chunk", Media.MSGPACK, body) for way in (read, read_long))
        assert short[0] is long[0] is InvalidInput
        assert long[2]["at"] == name[:256]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_commas_in_strings_are_not_separators(data: st.DataObject) -> None:
    strings = st.text(st.sampled_from(['"', "\\", ",", "[", "}", "a", "\n", "é"]), max_size=6)
    value = data.draw(st.dictionaries(strings, st.lists(strings, max_size=4), max_size=4))
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans()), indent=1).encode()
    structure = JsonStructure(text)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "service.codec.long_bodies.json_structure.BLOCK_BYTES",
            data.draw(st.integers(1, 9)),
        )
        for _ in structure.scan():
            pass
    members = structure.split_members()
    assert members is not None
    assert [member.name for member in members] == list(value)
    for member in members:
        elements = structure.split_elements(member)
        assert elements is not None
        assert [json.loads(bytes(element)) for element in elements] == value[member.name]


@pytest.fixture(scope="module")
def weather(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    spec = decoder_spec(max_horizon=3000)
    folder = tmp_path_factory.mktemp("models")
    return write_artifact(folder / "weather", spec, contracting_weights(spec, 4))


@pytest.fixture
async def api(
    pipeline_server: RealServer, models: Mapping[str, Artifact], weather: Artifact
) -> AsyncIterator[Harness]:
    async with harness(pipeline_server, {**models, "weather": weather}, limits=LONG) as running:
        yield running


def request_of(body: Any, *, packed: bool) -> dict[str, Any]:
    content = ormsgpack.packb(body) if packed else json.dumps(body).encode()
    assert len(content) > long_reader.LONG_BYTES
    return {"content": content, "headers": MSGPACK if packed else JSON}


@pytest.mark.parametrize("packed", [False, True])
async def test_a_long_list_of_events_is_one_chunk(api: Harness, packed: bool) -> None:
    events = [EVENT, LATER] * 800
    whole = request_of({"position": 0, "events": events}, packed=packed)
    address = "/v1/models/small/streams"
    assert (await api.client.post(f"{address}/whole/chunks", **whole)).status_code == 200
    for start in (0, 1000):
        await api.chunk({"events": events[start : start + 1000]}, model="small", stream="cut")
    found = [(await api.client.get(f"{address}/{name}/state")).json() for name in ("whole", "cut")]
    assert found[0]["position"] == found[1]["position"] == 1600
    assert found[0]["state"]["clock.seen"] == found[1]["state"]["clock.seen"]
    values = [np.float32(each["state"]["lstm_1.hidden"]) for each in found]
    np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
async def test_an_invalid_event_of_a_long_list_is_reported_with_its_index(
    api: Harness, packed: bool
) -> None:
    events = [EVENT] * 1600
    events[1234] = {**EVENT, "heavy": "no"}
    whole = request_of({"position": 0, "events": events}, packed=packed)
    response = await api.client.post("/v1/models/small/streams/s/chunks", **whole)
    found = ormsgpack.unpackb(response.content) if packed else response.json()
    assert (response.status_code, found["at"]) == (422, "events[1234].heavy")
    assert found["stream"] == "s"


async def test_an_invalid_row_of_a_long_list_is_reported_with_its_index(api: Harness) -> None:
    for wrong, at in (([1, 2, 1e39], "[2]"), ([1, 2], ""), ([1, None, 2], "[1]")):
        given = rows(4000).tolist()
        given[3210] = wrong
        response = await api.chunk({"inputs": given})
        assert problem(response, 422, "invalid_input")["at"] == f"inputs[3210]{at}"


@pytest.mark.parametrize("packed", [False, True])
async def test_long_future_is_read(api: Harness, packed: bool) -> None:
    await api.chunk({"events": hourly_events(3)}, model="weather")
    steps = 2000
    address = "/v1/models/weather/streams/s/forecast"
    future = future_of(steps)
    body = {"horizon": steps, "future": future}
    response = await api.client.post(address, **request_of(body, packed=packed))
    found = ormsgpack.unpackb(response.content) if packed else response.json()
    assert response.status_code == 200, found
    assert len(found["forecast"]["warmth"]["point"]) == steps
    future[1500] = {**future[1500], "holiday": 3}
    response = await api.client.post(address, **request_of(body, packed=packed))
    found = ormsgpack.unpackb(response.content) if packed else response.json()
    assert (response.status_code, found["at"]) == (422, "future[1500].holiday")
    body = {"horizon": 3000, "future": future_of(3001)}
    response = await api.client.post(address, **request_of(body, packed=packed))
    assert response.status_code == 422


async def test_long_bodies_are_validated_one_at_a_time(api: Harness) -> None:
    request = request_of({"inputs": rows(4000).tolist()}, packed=False)
    bodies = api.app.state.api.long_bodies
    address = "/v1/models/probe/streams/s/chunks"
    async with bodies.admit(b"", math.inf):
        sent = asyncio.create_task(api.client.post(address, **request))
        request["headers"] = {**JSON, "carry-timeout": "0.2"}
        late = await api.client.post("/v1/models/probe/streams/t/chunks", **request)
        problem(late, 504, "deadline_exceeded")
        assert not sent.done()
    assert (await sent).status_code == 200
    assert (api.position(), api.position("t")) == (4000, None)


async def test_too_many_waiting_long_bodies_are_rejected() -> None:
    bodies = LongBodyAdmission(max_waiting_bytes=10)
    order: list[int] = []

    async def read_one(at: int) -> None:
        async with bodies.admit(b"12345", math.inf):
            order.append(at)

    async with bodies.admit(b"123456789", math.inf):
        waiting = [asyncio.create_task(read_one(at)) for at in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as error:
            await read_one(2)
        assert error.value.facts["retry_after_s"] == 1
    await asyncio.gather(*waiting)
    assert order == [0, 1]
    async with bodies.admit(b"more than may wait", math.inf):
        pass


async def test_deadline_ends_reading(readers: Mapping[str, RequestReader]) -> None:
    body = json.dumps({"inputs": [[1, 2, 3]]}).encode()
    checkpoint = Checkpoint(time.monotonic() - 1)
    with pytest.raises(DeadlineExceeded):
        await LongReader(readers["probe"]).chunk(body, Media.JSON, checkpoint, "s", None)


async def test_a_cancelled_long_body_stops_waiting() -> None:
    bodies = LongBodyAdmission(max_waiting_bytes=10)

    async def read_one() -> None:
        async with bodies.admit(b"12345678", math.inf):
            pass

    async with bodies.admit(b"", math.inf):
        waiting = asyncio.create_task(read_one())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        other = asyncio.create_task(read_one())
        await asyncio.sleep(0)
        assert not other.done()
    await other


async def test_long_bodies_are_rejected_unparsed_when_the_queue_is_full(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        api.pipeline,
        "check_admission",
        lambda *_: Overloaded("full", retry_after_s=1),
    )
    for path in ("streams/s/chunks", "chunks"):
        response = await api.client.post(
            f"/v1/models/probe/{path}", content=b"[" * 100_000, headers=JSON
        )
        problem(response, 429, "overloaded")


@pytest.mark.parametrize("media", list(Media))
@pytest.mark.parametrize("kind", ["items", "sequences"])
def test_short_bodies_are_counted_before_they_are_validated(
    readers: Mapping[str, RequestReader],
    monkeypatch: pytest.MonkeyPatch,
    media: Media,
    kind: str,
) -> None:
    """65,000 empty objects of one byte took half a second of the event loop."""
    reader = readers["probe"]
    name = "chunks" if kind == "items" else "sequences"
    dumps = ormsgpack.packb if media is Media.MSGPACK else orjson.dumps
    body = dumps({name: [{}] * 5000})
    monkeypatch.setattr(reader.strict, "validate", None)
    error, _, facts = read(reader, kind, media, body)
    assert error is InvalidInput
    assert (facts["at"], facts["expected"], facts["got"]) == (name, 3, 5000)


@pytest.mark.parametrize("packed", [False, True])
async def test_long_state_is_restored(
    api: Harness, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """The states of these models are short, so the limit is lowered to treat them as long."""
    for module in (request_body, long_reader):
        monkeypatch.setattr(module, "LONG_BYTES", 40)
    await api.chunk({"events": [EVENT, LATER]}, model="small")
    address = "/v1/models/small/streams"
    kept = (await api.client.get(f"{address}/s/state")).json()
    for name in ("fingerprint", "epoch", "tag", "model", "version", "stream", "updated_ms"):
        kept[name] = kept[name] if name == "fingerprint" else None
    dumps = ormsgpack.packb if packed else orjson.dumps

    async def put(body: Any) -> tuple[int, dict[str, Any]]:
        response = await api.client.put(
            f"{address}/t/state",
            content=dumps(body),
            headers={**(MSGPACK if packed else JSON), "accept": "application/json"},
        )
        return response.status_code, response.json()

    for part, value in (
        ("lstm_1.hidden", [0.0] * 9000),
        ("lstm_1.hidden", [[0.0]] * len(kept["state"]["lstm_1.hidden"])),
        ("lstm_1.hidden", ["0"] * len(kept["state"]["lstm_1.hidden"])),
        ("clock.seen", [1]),
        ("clock.seen", 1.5),
        ("other", [0.0]),
    ):
        status, found = await put({**kept, "state": {**kept["state"], part: value}})
        assert (status, found["code"]) == (422, "invalid_input"), found
    assert (await put(kept))[0] == 201
    found = [api.store.states[StreamKey("small", name)].state for name in "st"]
    np.testing.assert_array_equal(found[0].floats, found[1].floats)
    np.testing.assert_array_equal(found[0].ints, found[1].ints)
