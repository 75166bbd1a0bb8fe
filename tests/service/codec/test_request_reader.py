"""One request means the same on every path: its values, or the error and its place.

Requests are generated with wrong and unusual values. An oracle (`paths`), which shares no
code with the readers, says what each means. The paths are those of every transport: usual and
unusual JSON, MessagePack, an item of many, a frame of a live socket, and V2 as JSON, with a binary
tensor and over gRPC.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import ormsgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.codec.json_rows import (
    FRAME_MEMBERS,
    MAX_BYTES,
    MAX_EXPONENTS,
    MAX_LONG_BYTES,
    JsonRowsDecoder,
)
from service.codec.media import Media
from service.codec.settings import RequestSettings
from service.core.errors import CarryError
from service.core.values import Chunk
from service.transports.v1.context import ModelCodec
from tests.service.codec.paths import (
    EPOCH,
    Wrong,
    as_item,
    by_v2,
    check,
    codec_of,
    dumps,
    expected,
    in_frame,
    packed,
    read_chunk,
    result,
    shown,
    unusual,
    without_prefix,
)
from tests.service.transports.v1.harness import EVENT, EVENT_MS, LATER, rows
from tests.support.models import small_spec

# What is generated.

NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0, 1, 2, -0.0, 1.5, 2.0, 3e38]),
)
ODD_NUMBERS: list[Any] = [
    math.nan,
    math.inf,
    -math.inf,
    1e39,
    3.4028235677973366e38,
    True,
    None,
    "1",
    [1.0],
    {},
    10**30,
]
EVENT_MEMBERS = st.sampled_from([*LATER, "more"])
ODD_VALUES: list[Any] = [
    *(None, True, 1, -0.0, 2.5, "x", "", EVENT_MS, "2013-01-01", "2013-02-30T00:00:00Z"),
    *("2013-01-01T05:17:00.5Z", "x" * 257, [], {}, 1e39, math.nan, 10**15),
]


ODD_MEMBERS: dict[str, list[Any]] = {
    "position": [0, 7, 2**63 - 1, 2**63, -1, 1.0, True, None, "0"],
    "epoch": [EPOCH, EPOCH.upper(), EPOCH + "\n", None, 5],
    "resets": [[], [0], [0, 1], [1, 0], [1, 1], [4], [-1], [0.0], [True], None, 5],
    "final": [False, True, None],
    "dry_run": [True, False, 1],
    "false_alarms_per_day": [None, 0.5, 0],
    "odd": [1],
}


def mostly(usual: Any, odd: Any, chance: int = 20) -> st.SearchStrategy[Any]:
    return st.integers(0, chance).flatmap(lambda roll: odd if roll == 0 else usual)


@st.composite
def events(draw: st.DrawFn) -> Any:
    found = []
    for _ in range(draw(st.integers(0, 5))):
        event: dict[str, Any] = dict(draw(st.sampled_from([EVENT, LATER])))
        if draw(st.integers(0, 3)) == 0:
            event[draw(EVENT_MEMBERS)] = draw(st.sampled_from(ODD_VALUES))
        if draw(st.integers(0, 4)) == 0:
            event["reset"] = draw(st.sampled_from([True, True, False, None, 1]))
        found.append(draw(mostly(st.just(event), st.sampled_from([None, 1, []]))))
    return found


SMALL_WIDTH = len(small_spec().columns)


@st.composite
def bodies(draw: st.DrawFn, model: str) -> dict[str, Any]:
    wide = 3 if model == "probe" else SMALL_WIDTH
    value = mostly(NUMBERS, st.sampled_from(ODD_NUMBERS), 40) if model == "probe" else st.just(0.0)
    width = mostly(st.just(wide), st.just(wide - 1), 40)
    row = width.flatmap(lambda count: st.lists(value, min_size=count, max_size=count))
    inputs = mostly(st.lists(row, max_size=5), st.sampled_from([None, 1, "x", {}, [[]], [1]]))
    body: dict[str, Any] = {"inputs": draw(inputs)}
    if model == "small" and draw(st.booleans()):
        body = {"events": draw(mostly(events(), st.sampled_from([None, 1, {}])))}
        if draw(st.integers(0, 15)) == 0:
            body["inputs"] = draw(inputs)
    for name, values in ODD_MEMBERS.items():
        if draw(st.integers(0, 2 if name == "position" else 8)) == 0:
            body[name] = draw(st.sampled_from(values))
    return dict(draw(st.permutations(list(body.items()))))


def check_every_path(codec: ModelCodec, body: Mapping[str, Any]) -> None:
    """Compare the result of each path with the oracle's, and those of JSON with each other."""
    wanted = expected(codec, body)
    found = {
        "JSON": read_chunk(codec, dumps(body)),
        "unusual JSON": read_chunk(codec, unusual(body)),
        "frame": in_frame(codec, body),
        "item": as_item(codec, body),
        **by_v2(codec, body),
    }
    if (content := packed(body, codec.served.input_features)) is not None:
        found["MessagePack"] = read_chunk(codec, content, Media.MSGPACK)
    for name, each in found.items():
        check(name, each, wanted)
    if isinstance(wanted, Wrong) and len(wanted.places) == 1:
        facts = {
            name: {key: each.facts[key] for key in ("at", "got") if key in each.facts}
            for name, each in found.items()
            if name in ("JSON", "unusual JSON", "item")
        }
        assert facts["JSON"] == facts["unusual JSON"]
        assert facts["JSON"] == facts["item"]


@pytest.mark.parametrize("model", ["probe", "small"])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_every_path_gives_what_the_oracle_says(
    codecs: Mapping[str, ModelCodec], data: st.DataObject, model: str
) -> None:
    check_every_path(codecs[model], data.draw(bodies(model)))


def test_every_path_gives_what_the_oracle_says_of_each_odd_value(
    codecs: Mapping[str, ModelCodec],
) -> None:
    """Alone, in a body that is valid but for it."""
    row, event = [1.0, 2.0, 3.0], {**EVENT}
    for name, values in ODD_MEMBERS.items():
        for value in values:
            check_every_path(codecs["probe"], {"inputs": [row] * 3, name: value})
            check_every_path(codecs["small"], {"events": [event, LATER, event], name: value})
    for number in ODD_NUMBERS:
        for at in range(3):
            wrong = [*row[:at], number, *row[at + 1 :]]
            check_every_path(codecs["probe"], {"inputs": [row, wrong], "position": 0})
    for steps in (
        [],
        [row] * 4,
        [row] * 5,
        [row, [1.0]],
        [[*row, 1.0]],
        [row[:2], [*row, 1.0]],
        [1],
        {},
        "x",
        [[]],
    ):
        check_every_path(codecs["probe"], {"inputs": steps, "position": 0})
    for member in (*LATER, "more", "reset"):
        for value in ODD_VALUES:
            check_every_path(codecs["small"], {"events": [event, {**event, member: value}]})
    marked = [{**event, "reset": True}, LATER, event]
    for resets in ({}, {"resets": [1]}, {"resets": [0, 2]}):
        check_every_path(codecs["small"], {"events": marked, **resets})
    for events in ([], [event] * 4, [event] * 5, [None], [1], {}, "x", [{}]):
        check_every_path(codecs["small"], {"events": events})
    wide = codecs["small"].served.input_features
    zeros = [[0.0] * wide]
    check_every_path(codecs["small"], {"inputs": zeros, "position": 0})
    for both in ({"inputs": zeros, "events": [event]}, {"inputs": None, "events": None}, {}):
        check_every_path(codecs["small"], both)
    for code in (0.0, 1.0, 2.0, 1.5, -1.0, 99.0):
        check_every_path(codecs["small"], {"inputs": [[code] * wide], "position": 1})


EDGES = [
    '{"inputs":[[1,2,3]],"position":-0}',
    '{"inputs":[[1,2,3]],"position":null,"epoch":null,"events":null}',
    '{"inputs":[[1,2,-0]]}',
    '{"inputs":[[1,2,1e999]]}',
    '{"inputs":[[1,2,NaN]]}',
    '{"inputs":[[1,2,123456789012345678901234567890]]}',
    '{"inputs":[[1,2,18446744073709551615]]}',
    '{"inputs":[[1,2,1e200]]}',
    '{"inputs":[[1,2,[3]]]}',
    '{"inputs":[[1,2,[3,4]],[5,6,[]]]}',
    '{"inputs":[[1,2,3],[[4,5,6]]]}',
    '{"inputs":[{"a":1,"b":2,"c":3}]}',
    '{"inputs":{"a":[1,2,3]}}',
    '{"inputs":[[1,2,3]],"position":7,"epoch":"0123456789abcdef"}',
    '{"epoch":["0123456789abcdef"],"inputs":[[1,2,3]]}',
    '{"inputs":[[1,2]],"inputs":[[4,5,6]]}',
    '{"inputs":[[4,5,6]],"inputs":[[1,2]]}',
    '{"position":-1,"inputs":[[4,5,6]],"position":1}',
    '{"inputs":[[1,2,3]],"epoch":"0123456789abcde\\ud800"}',
    '{"inputs":[[1,2,3]],"odd":1}',
    '{"\\u0069nputs":[[1,2,3]]}',
    '{"inputs":[[1,2,3]]} ',
    '{"inputs":[[1,2,3]]}{}',
    '\ufeff{"inputs":[[1,2,3]]}',
]


@pytest.mark.parametrize("text", EDGES)
def test_unusual_json_is_read_as_without_simdjson(
    codecs: Mapping[str, ModelCodec], text: str
) -> None:
    """A space in front keeps simdjson away."""
    reader, body = codecs["probe"].reader, text.encode()
    fast, slow = [shown(read_chunk(codecs["probe"], each)) for each in (body, b" " + body)]
    assert fast == slow or fast[0] == slow[0] == "malformed_body"
    item = b'{"stream":"a",' + body[1:]
    many = [b'{"chunks":[%b]}' % item, b' {"chunks":[%b]}' % item]
    fast, slow = [shown(result(lambda b=each: reader.items(b, Media.JSON))) for each in many]
    assert fast == slow or fast[0] == slow[0] == "malformed_body"
    framed = [reader.frame(each, Media.JSON, None) for each in (item, b" " + item)]
    assert [each[:2] for each in framed] == [framed[0][:2]] * 2
    assert shown(framed[0].result)[0] == shown(framed[1].result)[0]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_bodies_are_rejected_alike(
    codecs: Mapping[str, ModelCodec], data: st.DataObject
) -> None:
    """A damaged body is read in the same way by both decoders of JSON, and breaks none."""
    codec = codecs["probe"]
    body = dumps({"position": 0, "inputs": rows(2).tolist(), "epoch": EPOCH})
    many = dumps({"chunks": [{"stream": "a", "inputs": rows(1).tolist()}] * 2})
    put = data.draw(st.one_of(st.binary(max_size=2), st.sampled_from([b",", b"]", b"NaN", b'"'])))
    for whole, read in ((body, lambda b: read_chunk(codec, b)), (many, items(codec))):
        at = data.draw(st.integers(0, len(whole)))
        damaged = whole[:at] + put + whole[at + data.draw(st.integers(0, 3)) :]
        fast, slow = shown(read(damaged)), shown(read(b" " + damaged))
        assert fast == slow or fast[0] == slow[0] == "malformed_body"
    packed_body = ormsgpack.packb({"chunks": [{"stream": "a", "inputs": rows(1).tobytes()}]})
    at = data.draw(st.integers(0, len(packed_body)))
    damaged = packed_body[:at] + put + packed_body[at + data.draw(st.integers(0, 3)) :]
    found = result(lambda: codec.reader.items(damaged, Media.MSGPACK))
    assert isinstance(found, list | CarryError)


def items(codec: ModelCodec) -> Callable[[bytes], Any]:
    return lambda body: result(lambda: codec.reader.items(body, Media.JSON))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), model=st.sampled_from(["probe", "small"]))
def test_items_and_sequences_equal_single_requests(
    codecs: Mapping[str, ModelCodec], data: st.DataObject, model: str
) -> None:
    codec = codecs[model]
    reader = codec.reader
    several = data.draw(st.lists(bodies(model), min_size=1, max_size=3))
    alone = [read_chunk(codec, dumps(body)) for body in several]
    many = dumps({"chunks": [{"stream": "s", **body} for body in several]})
    found = result(lambda: reader.items(many, Media.JSON))
    for at, (item, one) in enumerate(zip(found, alone, strict=True)):
        if isinstance(one, CarryError):
            facts = without_prefix(item.facts, f"chunks[{at}]")
            assert (item.code, facts["at"], facts["stream"]) == (one.code, one.facts["at"], "s")
        else:
            assert shown(item) == shown(one)
    kept = {"events", "inputs", "resets"}
    parts = [{name: body[name] for name in body if name in kept} for body in several]
    alone = [read_chunk(codec, dumps(part)) for part in parts]
    sequences = result(lambda: reader.sequences(dumps({"sequences": parts}), Media.JSON))
    if isinstance(sequences, CarryError):
        wrong = [one for one in alone if isinstance(one, CarryError)]
        assert wrong or sequences.facts["at"] == "sequences" or sequences.code == "chunk_too_long"
    else:
        # a sequence may be longer than a chunk
        for sequence, one in zip(sequences, alone, strict=True):
            if isinstance(one, Chunk):
                assert shown(sequence.steps) == shown(one.steps)
            else:
                assert one.code == "chunk_too_long"


@pytest.mark.parametrize("media", Media)
@pytest.mark.parametrize("name", ["", "..", "a b", "a\n", "x" * 257])
def test_item_with_a_wrong_name_fails_alone(
    codecs: Mapping[str, ModelCodec], media: Media, name: str
) -> None:
    reader, values = codecs["probe"].reader, rows(1)
    inputs: Any = values.tolist() if media is Media.JSON else values.tobytes()
    encode = dumps if media is Media.JSON else ormsgpack.packb
    items_of = [{"stream": each, "inputs": inputs} for each in ("a", name, "b")]
    found = reader.items(encode({"chunks": items_of}), media)
    assert [isinstance(each, Chunk) for each in found] == [True, False, True]
    assert isinstance(found[1], CarryError)
    assert (found[1].code, found[1].facts["at"]) == ("invalid_name", "chunks[1].stream")
    # a wrong name is no stream, whatever else is wrong
    [error] = reader.items(encode({"chunks": [{"stream": name, "odd": 1}]}), media)
    assert isinstance(error, CarryError)
    assert "stream" not in error.facts
    assert reader.frame(encode({"stream": name, "odd": 1}), media, None).stream is None


TWICE = {
    "a member of a chunk": ({"position": 3, "inputs": [[0.0] * 3]}, '"position": 3'),
    "the rows": ({"inputs": [[1.0, 2.0, 3.0]]}, '"inputs": [[1.0, 2.0, 3.0]]'),
}


@pytest.mark.parametrize("earlier", ["4", "null", '"x"', "[[9, 9, 9]]"])
@pytest.mark.parametrize("name", TWICE)
def test_last_of_duplicate_members_counts(
    codecs: Mapping[str, ModelCodec], name: str, earlier: str
) -> None:
    codec, (body, member) = codecs["probe"], TWICE[name]
    key = member.partition(":")[0]
    text = json.dumps(body).replace(member, f"{key}: {earlier}, {member}").encode()
    assert shown(read_chunk(codec, text)) == shown(read_chunk(codec, dumps(body)))
    many = b'{"chunks": [{"stream": "other", "stream": "s", %b]}' % text[1:]
    [item] = result(lambda: codec.reader.items(many, Media.JSON))
    assert shown(item) == shown(read_chunk(codec, dumps(body)))
    frame = codec.reader.frame(b'{"id": 1, "id": 2, %b' % text[1:], Media.JSON, "s")
    assert frame.id == 2
    assert shown(frame.result) == shown(read_chunk(codec, dumps(body)))
    rest = ormsgpack.packb({"inputs": rows(1).tobytes()})[1:]
    packed_twice = b"\x83\xa8position\x01\xa8position\x02" + rest
    assert read_chunk(codec, packed_twice, Media.MSGPACK).position == 2


@pytest.mark.parametrize("media", Media)
@pytest.mark.parametrize("size", [(20, 16), (16, 20), (12, 13, 23)], ids=str)
def test_incomplete_rows_are_not_completed_by_other_chunks(
    codecs: Mapping[str, ModelCodec], media: Media, size: tuple[int, ...]
) -> None:
    """Rows of 12 bytes: together the lengths are whole rows, and each is its own chunk's alone."""
    reader = codecs["probe"].reader
    if media is Media.JSON:
        inputs: list[Any] = [[[0.0] * (each // 4)] for each in size]
    else:
        inputs = [rows(2).tobytes()[:each] for each in size]
    encode = dumps if media is Media.JSON else ormsgpack.packb
    many = encode({"chunks": [{"stream": f"s{at}", "inputs": x} for at, x in enumerate(inputs)]})
    found = reader.items(many, media)
    assert [isinstance(each, CarryError) for each in found] == [
        each % 12 > 0 if media is Media.MSGPACK else each // 4 != 3 for each in size
    ]
    predict = encode({"sequences": [{"inputs": each} for each in inputs]})
    error = result(lambda: reader.sequences(predict, media))
    assert error.code == "invalid_input"


@pytest.mark.parametrize("largest", [0.5, 1e39, 1.3e154, 1e300])
@pytest.mark.parametrize("count", [1, 10_000, 25_000])
def test_number_beyond_float32_among_many_is_found(
    codecs: Mapping[str, ModelCodec], count: int, largest: float
) -> None:
    """Also in a body that is too long for the parser that is kept."""
    codec = codec_of(codecs["probe"].served.artifact, RequestSettings(max_chunk_steps=30_000))
    inputs = [[0.0, 1.0, 2.0]] * count + [[largest, 0.0, 0.0]]
    body = dumps({"inputs": inputs})
    assert (len(body) > MAX_BYTES) == (count == 25_000)
    found = read_chunk(codec, body)
    if largest == 0.5:
        np.testing.assert_array_equal(found.steps.rows, np.float32(inputs))
    else:
        assert found.facts["at"] == f"inputs[{count}][0]"
        assert found.facts["got"] == json.dumps(largest)


LONG_ROWS = [[at / 8, -1.5, 2.0] for at in range(20_000)]
needs_simdjson = pytest.mark.skipif(
    find_spec("simdjson") is None, reason="simdjson has no wheel for this version of Python"
)


@needs_simdjson
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n", "\t:\r\n")], ids=repr)
@pytest.mark.parametrize("first", ["inputs", "position", "epoch"])
def test_long_rows_are_decoded_without_an_object_for_each_number(
    first: str, separators: tuple[str, str]
) -> None:
    members = {"inputs": LONG_ROWS, "position": 7, "epoch": EPOCH}
    body = {first: members.pop(first)} | members
    text = json.dumps(body, separators=separators).encode()
    assert MAX_BYTES < len(text) < MAX_LONG_BYTES
    chunk = JsonRowsDecoder(3, len(LONG_ROWS)).decode(text)
    assert chunk is not None
    assert (chunk.position, chunk.epoch, chunk.steps.length) == (7, EPOCH, len(LONG_ROWS))
    np.testing.assert_array_equal(chunk.steps.rows, np.float32(LONG_ROWS))
    frame = json.dumps({"stream": "s", "id": "]", "inputs": LONG_ROWS}).encode()
    found = JsonRowsDecoder(3, len(LONG_ROWS)).decode(frame, FRAME_MEMBERS)
    assert found is not None
    assert (found.stream, found.id, found.steps.length) == ("s", "]", len(LONG_ROWS))


LONG_TEXT = json.dumps({"position": 7, "inputs": LONG_ROWS}, separators=(",", ":")).encode()


@settings(max_examples=60)
@given(
    at=st.one_of(
        st.integers(0, 40),
        st.integers(0, len(LONG_TEXT)),
        st.integers(len(LONG_TEXT) - 20, len(LONG_TEXT)),
    ),
    removed=st.integers(0, 4),
    added=st.text('[]{},:".1e "', max_size=4),
)
def test_changed_long_body_means_what_it_means_in_plain_python(
    at: int, removed: int, added: str
) -> None:
    text = LONG_TEXT[:at] + added.encode() + LONG_TEXT[at + removed :]
    chunk = JsonRowsDecoder(3, len(LONG_ROWS)).decode(text)
    if chunk is None:
        return  # left to the other decoder
    document = json.loads(text)
    assert document.keys() <= {"position", "inputs"}
    assert chunk.position == document.get("position")
    np.testing.assert_array_equal(chunk.steps.rows, np.float32(document["inputs"]))


UNUSUAL_ROWS = {
    "a row of another width": (b"],[", b",1],["),
    "a list for a number": (b",2.0],[", b",[2.0]],["),
    "rows that complete each other": (b",2.0],[", b"],[2.0,"),
    "no comma": (b"],[", b"]["),
    "two commas": (b"],[", b"],,["),
    "an empty row": (b"],[", b"],[],["),
    "a value that is no number": (b"],[", b"],null,["),
    "another member": (b"],[", b'],"inputs":[['),
    "one row more": (b"],[", b"],[1,2,3],["),
    "a number beyond float32": (b"],[", b"],[1e39,0,0],["),
}


@pytest.mark.parametrize("name", UNUSUAL_ROWS)
@pytest.mark.parametrize("at", [0, len(LONG_TEXT) // 2])
def test_unusual_row_leaves_a_long_body_to_the_other_decoder(at: int, name: str) -> None:
    found, replacement = UNUSUAL_ROWS[name]
    text = LONG_TEXT[:at] + LONG_TEXT[at:].replace(found, replacement, 1)
    assert text != LONG_TEXT
    assert JsonRowsDecoder(3, len(LONG_ROWS)).decode(text) is None


@needs_simdjson
@pytest.mark.parametrize("number", [b"4.992374897329902418e28", b"5E-324"])
def test_many_exponents_leave_a_long_body_to_the_other_decoder(number: bytes) -> None:
    decoder = JsonRowsDecoder(3, len(LONG_ROWS))
    assert decoder.decode(LONG_TEXT.replace(b"-1.5", number, MAX_EXPONENTS)) is not None
    assert decoder.decode(LONG_TEXT.replace(b"-1.5", number, MAX_EXPONENTS + 1)) is None


@needs_simdjson
def test_long_request_for_many_streams_is_decoded_without_an_object_for_each_number() -> None:
    items = [{"stream": f"s{at}", "inputs": LONG_ROWS[:100], "position": at} for at in range(200)]
    text = json.dumps({"chunks": items}).encode()
    assert MAX_BYTES < len(text) < MAX_LONG_BYTES
    decoded = JsonRowsDecoder(3, 100).decode_items(text, len(items))
    assert decoded is not None
    assert [(each.stream, each.position) for each in decoded] == [(f"s{n}", n) for n in range(200)]
    for each in decoded:
        np.testing.assert_array_equal(each.steps.rows, np.float32(LONG_ROWS[:100]))
