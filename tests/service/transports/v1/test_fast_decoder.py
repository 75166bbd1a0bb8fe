"""The fast decoder returns what the strict validator returns, or None."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import ormsgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import astuple

from models.artifact.artifact import Artifact
from service.codec.fast_decoder import MAX_BYTES, MAX_DOT, FastDecoder
from service.codec.media import Media
from service.codec.request_reader import RequestReader
from service.codec.rows_items import RowsItemsReader
from service.codec.settings import RequestSettings
from service.core.errors import CarryError, InvalidInput
from service.core.values import Chunk, SequenceInput, Steps
from service.pipeline.served_model import ServedModel
from tests.service.transports.v1.harness import EVENT, EVENT_MS, LATER, rows
from tests.support.numpy_runtime import NumpyRuntime

LIMITS = RequestSettings(max_chunk_steps=4, max_predict_steps=6, max_items=3)
KINDS = ("chunk", "items", "sequences")


class UndecidedDecoder(FastDecoder):
    """Leaves every body to the strict validator."""

    def decode_chunk(self, media: Media, body: bytes) -> None:
        return None

    def decode_items(self, media: Media, body: bytes) -> None:
        return None

    def decode_sequences(self, media: Media, body: bytes) -> None:
        return None


@pytest.fixture(scope="module")
def readers(models: Mapping[str, Artifact]) -> Mapping[str, tuple[RequestReader, RequestReader]]:
    """Per model, a reader with the fast decoder and one without."""
    found = {}
    for name, artifact in models.items():
        served = ServedModel(artifact, NumpyRuntime(artifact))
        fast, strict = (RequestReader(served, LIMITS, lambda: b"n" * 16) for _ in "ab")
        strict.fast = UndecidedDecoder(served, LIMITS)
        found[name] = fast, strict
    return found


def shown_steps(steps: Steps) -> Any:
    if steps.rows is not None:
        assert steps.columns is None
        assert steps.rows.dtype == np.float32
        return steps.feed, steps.length, steps.rows.shape, steps.rows.tobytes(), steps.resets
    columns = steps.columns
    assert columns is not None
    values = {
        name: (array.dtype, array.tolist(), columns.present[name].tolist())
        for name, array in columns.values.items()
    }
    return steps.feed, steps.length, values, steps.resets


def shown(value: Any) -> Any:
    """A value whose equality is that of all that a pipeline or a client would see."""
    if isinstance(value, CarryError):
        return type(value), value.detail, dict(value.facts)
    if isinstance(value, Chunk):
        return (
            *[member for member in astuple(value) if member is not value.steps],
            shown_steps(value.steps),
        )
    if isinstance(value, SequenceInput):
        return shown_steps(value.steps), value.token
    return [shown(item) for item in value]


def read(reader: RequestReader, kind: str, media: Media, body: bytes) -> Any:
    try:
        if kind == "chunk":
            return shown(reader.chunk(body, media, "s", None))
        found = shown(
            reader.items(body, media) if kind == "items" else reader.sequences(body, media)
        )
    except CarryError as error:
        found = shown(error)
    if kind == "items":
        packed = RowsItemsReader(reader).items(body, media)
        assert packed is None or shown(packed) == found
    return found


def is_decoded(reader: RequestReader, kind: str, media: Media, body: bytes) -> bool:
    return getattr(reader.fast, f"decode_{kind}")(media, body) is not None


NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(["0", "-0", "-0.0", "1E5", "1e-400", "3.4028235e38", "3.4028235677973366e38"]),
)
ODD = st.sampled_from(
    [
        *("true", "false", "null", "NaN", "Infinity", "-Infinity", "1e999", "1e39", '"1"', "[1]"),
        *("{}", "01", "1.", ".5", "+1", "", "9" * 400, "0x1", "[]"),
    ]
)


def mostly(good: st.SearchStrategy[str], odd: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.integers(0, 30).flatmap(lambda roll: odd if roll == 0 else good)


def listed(items: st.SearchStrategy[str], least: int, most: int) -> st.SearchStrategy[str]:
    return st.lists(items, min_size=least, max_size=most).map(lambda found: f"[{','.join(found)}]")


def an_object(members: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{name}:{value}" for name, value in members) + "}"


NAMES = st.sampled_from([*LATER, "more"])
VALUES = st.sampled_from([None, True, 1, -0.0, 2.5, "x", "", EVENT_MS, "2013-01-01", [], 1e39])
RESETS = st.sampled_from([True, True, False, None, 1])


@st.composite
def json_events(draw: st.DrawFn) -> str:
    events = []
    for _ in range(draw(st.integers(0, 5))):
        event: dict[str, Any] = dict(draw(st.sampled_from([EVENT, LATER])))
        if draw(st.integers(0, 3)) == 0:
            event[draw(NAMES)] = draw(VALUES)
        if draw(st.integers(0, 4)) == 0:
            event["reset"] = draw(RESETS)
        events.append(json.dumps(event))
    return f"[{','.join(events)}]"


Member = st.SearchStrategy[tuple[str, str]]


def member(name: str, value: st.SearchStrategy[str]) -> Member:
    return st.tuples(st.just(f'"{name}"'), value)


class Members(NamedTuple):
    """Strategies for the members of a chunk or a sequence in JSON."""

    feed: Member
    always: list[Member]
    sometimes: list[Member]
    odd: Member


@cache
def json_members(kind: str, features: int, events: bool) -> Members:
    """The members for one kind of request; made once, which takes as long as to draw a body."""
    rows = {wide: listed(mostly(NUMBERS, ODD), wide, wide) for wide in (features - 1, features)}
    row = st.integers(0, 40).flatmap(lambda roll: rows[features - 1 if roll == 0 else features])
    feeds = [
        st.tuples(
            st.sampled_from(['"inputs"', '"inputs"', '"\\u0069nputs"']),
            mostly(listed(mostly(row, ODD), 0, 5), ODD),
        )
    ]
    if events:
        feeds.append(member("events", mostly(json_events(), ODD)))
    always, sometimes = [], []
    if kind == "sequences":
        strings = st.sampled_from(['"aGVsbG8="', '""', '"aGVsbG8"', '"\\u0061GVsbG8="', "null"])
        sometimes.append(member("state_token", mostly(strings, ODD)))
    else:
        sometimes.append(member("position", mostly(st.integers(0, 2**64).map(str), ODD)))
        epochs = st.sampled_from(['"0123456789abcdef"', '"0123456789abcdef\\n"', "null", '"0"'])
        sometimes.append(member("epoch", epochs))
    if kind == "items":
        names = st.sampled_from(['"a"', '"b:c"', '"no good"', '"a\\n"', '""', '"é"', "1"])
        always.append(member("stream", mostly(st.just('"a"'), names)))
        sometimes.append(member("if_match", st.sampled_from(["null", '"*"', '"W/x"', '""'])))
    indexes = st.sampled_from(["[]", "[0]", "[0,1]", "[1,0]", "[1,1]", "[4]", "[-1]", "[0.0]"])
    sometimes.append(member("resets", mostly(indexes, ODD)))
    odd = st.one_of(*feeds, member("odd", st.just("1")))
    return Members(st.one_of(feeds), always, sometimes, odd)


@st.composite
def json_bodies(draw: st.DrawFn, kind: str, features: int, events: bool) -> bytes:
    """Bodies that are nearly good, sometimes good, sometimes not even JSON."""
    strategies = json_members(kind, features, events)

    def one() -> str:
        members = [draw(strategies.feed), *[draw(each) for each in strategies.always]]
        members += [draw(each) for each in strategies.sometimes if draw(st.integers(0, 2)) == 0]
        if draw(st.integers(0, 12)) == 0:
            members.append(draw(st.sampled_from(members)))
        if draw(st.integers(0, 20)) == 0:
            members.append(draw(strategies.odd))
        return an_object(draw(st.permutations(members)))

    if kind == "chunk":
        text = one()
    else:
        name = "chunks" if kind == "items" else "sequences"
        text = f'{{"{name}": [{", ".join(one() for _ in range(draw(st.integers(0, 4))))}]}}'
    return mutated(text.encode(), draw(MUTATIONS))


MUTATIONS = st.tuples(
    st.integers(0, 9),
    st.integers(0, 10**6),
    st.one_of(
        st.sampled_from([b" ", b",", b"]", b"\x00", b"\xef\xbb\xbf"]),
        st.binary(min_size=1, max_size=1),
    ),
)


def mutated(body: bytes, mutation: tuple[int, int, bytes]) -> bytes:
    """The body, at times with a byte lost, doubled or changed."""
    roll, place, other = mutation
    at = place % max(1, len(body))
    match roll:
        case 0:
            return body[:at] + body[at + 1 :]
        case 1:
            return body[:at] + other + body[at:]
        case 2:
            return body[:at] + other + body[at + 1 :]
    return body


@st.composite
def packed_bodies(draw: st.DrawFn, kind: str, features: int, events: bool) -> bytes:
    def one() -> Any:
        size = draw(st.sampled_from([0, 1, 1, 2, 2, 3, 5]))
        values = rows(size, seed=draw(st.integers(0, 99)), features=features)
        if size and draw(st.integers(0, 6)) == 0:
            odd = st.sampled_from([np.inf, -np.inf, np.nan, 3e38, -0.0, 1e-45])
            values[draw(st.integers(0, size - 1)), 0] = draw(odd)
        elif features > 3:
            values = np.zeros_like(values)
        inputs: Any = values.tobytes()
        if draw(st.integers(0, 9)) == 0:
            inputs = draw(st.sampled_from([inputs[:-1], "text", None, 1, [[1.0] * features], True]))
        body: dict[Any, Any] = {"inputs": inputs}
        if events and draw(st.booleans()):
            body = {"events": json.loads(draw(json_events()))}
        if kind == "items":
            body["stream"] = draw(st.sampled_from(["a", "a", "b", "b", "c", "no good", b"a", 1]))
        if kind != "sequences" and draw(st.booleans()):
            positions = st.sampled_from([0, 7, 2**63 - 1, 2**63, -1, 1.0, True, None, "0"])
            body["position"] = draw(positions)
        if kind != "sequences" and draw(st.integers(0, 5)) == 0:
            body["epoch"] = draw(st.sampled_from(["0" * 16, "0" * 16 + "\n", b"0" * 16, None]))
        if kind == "sequences" and draw(st.integers(0, 3)) == 0:
            body["state_token"] = draw(st.sampled_from([b"hello", b"", "aGVsbG8=", None, [1]]))
        if draw(st.integers(0, 3)) == 0:
            lists: list[Any] = [[], [0], [0, 1], [1, 0], [1, 1], [4], [-1], [0.0], [True], None]
            body["resets"] = draw(st.sampled_from(lists))
        if draw(st.integers(0, 20)) == 0:
            body[draw(st.sampled_from(["odd", "epoch", "if_match", "stream"]))] = "a"
        return body

    if kind == "chunk":
        value = one()
    else:
        name = "chunks" if kind == "items" else "sequences"
        value = {name: [one() for _ in range(draw(st.integers(0, 4)))]}
    return mutated(ormsgpack.packb(value), draw(MUTATIONS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["probe", "small"])
@pytest.mark.parametrize("media", list(Media), ids=["json", "msgpack"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_body_is_decoded_as_validated(
    readers: Mapping[str, tuple[RequestReader, RequestReader]],
    data: st.DataObject,
    media: Media,
    model: str,
    kind: str,
) -> None:
    fast, strict = readers[model]
    bodies = json_bodies if media is Media.JSON else packed_bodies
    body = data.draw(bodies(kind, fast.served.input_features, model == "small"))
    assert read(fast, kind, media, body) == read(strict, kind, media, body)


EDGES = [
    '{"inputs":[[1,2,3]],"position":9223372036854775807}',
    '{"inputs":[[1,2,3]],"position":9223372036854775808}',
    '{"inputs":[[1,2,3]],"position":-0}',
    '{"inputs":[[1,2,3]],"position":1.0}',
    '{"inputs":[[1,2,3]],"position":true}',
    '{"inputs":[[1,2,3]],"position":null,"epoch":null,"events":null}',
    '{"inputs":null,"position":1}',
    '{"inputs":[[1,2,true]]}',
    '{"inputs":[[1,2,-0]]}',
    '{"inputs":[[1,2,-0.0]]}',
    '{"inputs":[[1,2,1e39]]}',
    '{"inputs":[[1,2,1e999]]}',
    '{"inputs":[[1,2,NaN]]}',
    '{"inputs":[[1,2,123456789012345678901234567890]]}',
    '{"inputs":[[1,2]]}',
    '{"inputs":[[1,2,[3]]]}',
    '{"inputs":[[1,2,[3,4]],[5,6,[]]]}',
    '{"inputs":[[1,2,3],[[4,5,6]]]}',
    '{"inputs":["abc"]}',
    '{"inputs":[{"a":1,"b":2,"c":3}]}',
    '{"inputs":{"a":[1,2,3]}}',
    '{"inputs":[[1,2,18446744073709551615]]}',
    '{"inputs":[[1,2,3.4028235677973366e38]]}',
    '{"inputs":[[1,2,1e200]]}',
    '{"inputs":[[1,2,3]],"position":7,"epoch":"0123456789abcdef"}',
    '{"epoch":"0123456789abcdeF","inputs":[[1,2,3]]}',
    '{"epoch":["0123456789abcdef"],"inputs":[[1,2,3]]}',
    '{"inputs":[]}',
    '{"inputs":[[1,2,3],[1,2,3],[1,2,3],[1,2,3],[1,2,3]]}',
    '{"inputs":[[1,2,3]],"inputs":[[4,5,6]]}',
    '{"inputs":[[1,2]],"inputs":[[4,5,6]]}',
    '{"inputs":[[4,5,6]],"inputs":[[1,2]]}',
    '{"position":-1,"inputs":[[4,5,6]],"position":1}',
    '{"inputs":[[1,2,3]],"epoch":"0123456789abcdef\\n"}',
    '{"inputs":[[1,2,3]],"epoch":"0123456789abcde\\ud800"}',
    '{"inputs":[[1,2,3]],"odd":1}',
    '{"\\u0069nputs":[[1,2,3]]}',
    '{"inputs":[[1,2,3]]} ',
    '{"inputs":[[1,2,3]]}{}',
    '\ufeff{"inputs":[[1,2,3]]}',
]


@pytest.mark.parametrize("text", EDGES)
def test_edge_cases_are_decoded_as_validated(
    readers: Mapping[str, tuple[RequestReader, RequestReader]], text: str
) -> None:
    fast, strict = readers["probe"]
    body = text.encode()
    assert read(fast, "chunk", Media.JSON, body) == read(strict, "chunk", Media.JSON, body)
    item = b'{"stream":"a",' + body[1:]
    for kind, whole in (
        ("items", b'{"chunks":[' + item + b"]}"),
        ("sequences", b'{"sequences":[' + body + b"]}"),
    ):
        assert read(fast, kind, Media.JSON, whole) == read(strict, kind, Media.JSON, whole)


@pytest.mark.parametrize("position", [2**63 - 1, 2**63, 2**64 - 1, -1, 1.0, True, None, b"1"])
def test_packed_positions_are_decoded_as_validated(
    readers: Mapping[str, tuple[RequestReader, RequestReader]], position: object
) -> None:
    fast, strict = readers["probe"]
    body = ormsgpack.packb({"inputs": rows(1).tobytes(), "position": position})
    assert read(fast, "chunk", Media.MSGPACK, body) == read(strict, "chunk", Media.MSGPACK, body)


def test_events_and_inputs_together_are_rejected(
    readers: Mapping[str, tuple[RequestReader, RequestReader]],
) -> None:
    fast, strict = readers["small"]
    both = {"events": [EVENT], "inputs": [[0.0] * fast.served.input_features]}
    body = body_of(Media.JSON, both)
    assert not is_decoded(fast, "chunk", Media.JSON, body)
    assert read(fast, "chunk", Media.JSON, body) == read(strict, "chunk", Media.JSON, body)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@given(values=st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_valid_rows_are_decoded(
    readers: Mapping[str, tuple[RequestReader, RequestReader]], values: list[list[float]]
) -> None:
    fast, _ = readers["probe"]
    expected = np.array(values, np.float32)
    given_rows = {Media.JSON: values, Media.MSGPACK: expected.tobytes()}
    for media, inputs in given_rows.items():
        dumps = json.dumps if media is Media.JSON else ormsgpack.packb
        steps = {"inputs": inputs}
        for kind, value in (
            ("chunk", {"position": 3, **steps}),
            ("items", {"chunks": [{"stream": "a", **steps}, {"stream": "b", **steps}]}),
            ("sequences", {"sequences": [steps]}),
        ):
            text: Any = dumps(value)
            body = text.encode() if isinstance(text, str) else text
            assert is_decoded(fast, kind, media, body)
        found = fast.chunk(body_of(media, {"position": 3, **steps}), media, "s", None)
        assert found.steps.rows is not None
        np.testing.assert_array_equal(found.steps.rows.view(np.int32), expected.view(np.int32))


def body_of(media: Media, value: Any) -> bytes:
    return json.dumps(value).encode() if media is Media.JSON else ormsgpack.packb(value)


def test_valid_events_are_decoded(
    readers: Mapping[str, tuple[RequestReader, RequestReader]],
) -> None:
    fast, strict = readers["small"]
    for media in Media:
        for kind, value in (
            ("chunk", {"position": 3, "events": [EVENT, LATER]}),
            ("items", {"chunks": [{"stream": "a", "events": [EVENT, LATER]}]}),
            ("sequences", {"sequences": [{"events": [LATER]}, {"events": [EVENT]}]}),
        ):
            body = body_of(media, value)
            assert is_decoded(fast, kind, media, body)
            assert read(fast, kind, media, body) == read(strict, kind, media, body)


def test_items_with_events_and_inputs_of_different_lengths_are_decoded(
    readers: Mapping[str, tuple[RequestReader, RequestReader]],
) -> None:
    fast, strict = readers["small"]
    zeros = [[0.0] * fast.served.input_features]
    items = [
        {"stream": "a", "inputs": zeros * 2},
        {"stream": "b", "events": [EVENT]},
        {"stream": "a", "inputs": [[0.5, *zeros[0][1:]]]},
    ]
    body = body_of(Media.JSON, {"chunks": items})
    assert is_decoded(fast, "items", Media.JSON, body)
    found = read(fast, "items", Media.JSON, body)
    assert found == read(strict, "items", Media.JSON, body)
    assert [item[-1][1] for item in found] == [2, 1, 1]


@pytest.mark.parametrize("sizes", [(20, 16), (16, 20), (12, 13, 23)])
def test_incomplete_rows_are_not_completed_by_other_chunks(
    readers: Mapping[str, tuple[RequestReader, RequestReader]], sizes: tuple[int, ...]
) -> None:
    """Rows of 12 bytes: together the lengths are whole rows, and each is its own chunk's alone."""
    fast, strict = readers["probe"]
    given = [rows(2).tobytes()[:size] for size in sizes]
    parts: list[dict[str, Any]] = [{"inputs": inputs} for inputs in given]
    items = [{"stream": f"s{at}", **part} for at, part in enumerate(parts)]
    many = ormsgpack.packb({"chunks": items})
    found = read(fast, "items", Media.MSGPACK, many)
    assert found == read(strict, "items", Media.MSGPACK, many)
    torn = [at for at, size in enumerate(sizes) if size % 12]
    assert [at for at, item in enumerate(found) if item[0] is InvalidInput] == torn
    predict = ormsgpack.packb({"sequences": parts})
    found = read(fast, "sequences", Media.MSGPACK, predict)
    assert found[0] is InvalidInput
    assert found[2]["at"] == f"sequences[{torn[0]}].inputs"


EPOCH = "0123456789abcdef"
PACKED = rows(2).tobytes()
USUAL: list[dict[str, Any]] = [
    {"stream": "a", "inputs": PACKED},
    {"position": 2**63 - 1, "epoch": EPOCH, "inputs": PACKED, "stream": "b"},
    {"stream": "a", "position": 0, "inputs": PACKED[:12]},
]


@pytest.mark.parametrize("media", Media)
def test_rows_of_many_streams_are_read_in_one_pass(
    readers: Mapping[str, tuple[RequestReader, RequestReader]], media: Media
) -> None:
    fast, strict = readers["probe"]
    body = body_of(media, {"chunks": [shown_in(media, item) for item in USUAL]})
    found = RowsItemsReader(fast).items(body, media)
    assert found is not None
    assert shown(found) == read(strict, "items", media, body)


def shown_in(media: Media, item: Mapping[str, Any]) -> dict[str, Any]:
    """An item of `USUAL` in a media type."""
    if media is Media.MSGPACK:
        return dict(item)
    values = np.frombuffer(item["inputs"], np.float32).reshape(-1, 3)
    return {**item, "inputs": values.tolist()}


def with_member(name: str, value: Any) -> bytes:
    return ormsgpack.packb({"chunks": [*USUAL[:2], {**USUAL[0], name: value}]})


@pytest.mark.parametrize(
    "body",
    [
        # a map of two members, of which the second comes twice
        b"\x81\xa6chunks\x91\x83\xa6stream\xa1a\xa6inputs\xc4\x0c%b\xa6inputs\xc4\x0c%b"
        % (PACKED[:12], PACKED[12:24]),
        ormsgpack.packb({"chunks": USUAL}).replace(b"\xa8position\x00", b"\xa8position\xcc\x00"),
        ormsgpack.packb({"chunks": []}),
        ormsgpack.packb({"chunks": USUAL, "more": 1}),
        ormsgpack.packb({"chunks": USUAL}) + b"\xc0",
        ormsgpack.packb({"chunks": [*USUAL, USUAL[0]]}),
        *[with_member(name, None) for name in ("position", "epoch", "if_match", "events")],
        *[with_member("position", position) for position in (-1, 2**63, 1.0, True)],
        *[with_member("epoch", epoch) for epoch in (EPOCH.upper(), EPOCH + "\n", b"")],
        *[with_member("stream", name) for name in ("", "..", "a b", "a\n", 1, None)],
        *[with_member("inputs", PACKED[:size]) for size in (0, 4, 13)],
        with_member("inputs", PACKED[:20] + np.float32(np.nan).tobytes()),
        with_member("inputs", rows(5).tobytes()),
        with_member("inputs", rows(1).tolist()),
        with_member("resets", [0]),
        with_member("final", value=False),
    ],
)
def test_other_bodies_are_left_to_the_other_readers(
    readers: Mapping[str, tuple[RequestReader, RequestReader]], body: bytes
) -> None:
    for name in ("probe", "small"):
        assert RowsItemsReader(readers[name][0]).items(body, Media.MSGPACK) is None


@pytest.mark.parametrize("media", Media)
def test_rows_that_are_too_many_to_be_read_at_once_are_left_to_the_long_reader(
    readers: Mapping[str, tuple[RequestReader, RequestReader]], media: Media
) -> None:
    reader = RequestReader(readers["probe"][0].served, RequestSettings())
    item = shown_in(media, {"stream": "a", "inputs": np.ones(12_000, np.float32).tobytes()})
    fitting = MAX_BYTES // len(body_of(media, item))
    for count in (fitting, fitting + 1):
        body = body_of(media, {"chunks": [item] * count})
        is_read = RowsItemsReader(reader).items(body, media) is not None
        assert is_read == (len(body) <= MAX_BYTES)
        assert is_read == (count == fitting)


@pytest.mark.parametrize("largest", [1e39, 1.3e154, 1e300])
@pytest.mark.parametrize("count", [1, MAX_DOT])
def test_number_beyond_float32_among_many_is_left_to_the_strict_validator(
    readers: Mapping[str, tuple[RequestReader, RequestReader]], count: int, largest: float
) -> None:
    reader = RequestReader(readers["probe"][0].served, RequestSettings())
    item = {"stream": "a", "inputs": [[0.0, 1.0, 2.0]] * count}
    body = body_of(Media.JSON, {"chunks": [item, {**item, "inputs": [[largest, largest, 0.0]]}]})
    assert RowsItemsReader(reader).items(body, Media.JSON) is None
