"""Errors of request bodies: their places, and what they name and keep; and ids of frames."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import ormsgpack
import pytest

from service.codec.media import Media
from service.core.errors import CarryError
from service.transports.v1.context import ModelCodec
from tests.service.codec.paths import (
    dumps,
    read_chunk,
    result,
    shown,
)
from tests.service.transports.v1.harness import EVENT


@pytest.mark.parametrize("load", ["1", "NaN", "1e999"])
def test_lone_surrogate_is_malformed_whatever_is_beside_it(
    codecs: Mapping[str, ModelCodec], load: str
) -> None:
    text = json.dumps({"events": [{**EVENT, "load": "@", "carrier": "\ud800"}]})
    error = read_chunk(codecs["small"], text.replace('"@"', load).encode())
    assert error.code == "malformed_body"


def test_errors_of_an_object_are_reported_with_unknown_members_first(
    codecs: Mapping[str, ModelCodec],
) -> None:
    body = {"position": -1, "events": [{"load": "x", "carrier": 3, "other": 1}], "odd": True}
    for media, content in ((Media.JSON, dumps(body)), (Media.MSGPACK, ormsgpack.packb(body))):
        error = read_chunk(codecs["small"], content, media)
        places = [each["at"] for each in error.facts["errors"]]
        wrong = ("other", "load", "at", "carrier")
        assert places == ["odd", *(f"events[0].{name}" for name in wrong)]
        missing = error.facts["errors"][3]
        assert missing["expected"].startswith("an RFC 3339 timestamp")
        assert missing["got"] == "nothing"


def test_chunk_that_is_too_long_is_reported_before_unknown_members(
    codecs: Mapping[str, ModelCodec],
) -> None:
    too_long = {"odd": 1, "events": [EVENT] * 5}
    for media, content in (
        (Media.JSON, dumps(too_long)),
        (Media.MSGPACK, ormsgpack.packb(too_long)),
    ):
        assert read_chunk(codecs["small"], content, media).code == "chunk_too_long"


MEMBERS_TWICE = b"\x83\xa8position\xa1x\xa8position\x02"


@pytest.mark.parametrize(
    ("body", "code", "at"),
    [
        (MEMBERS_TWICE + b"\xa5final\xc2", "invalid_input", "body"),
        (MEMBERS_TWICE + b"\xa5final\xc1", "malformed_body", "body"),
        (b"\x81\x01\x02", "malformed_body", "body"),
        (b"\x81\xa6events\x91\x81\x01\x02", "malformed_body", "body"),
        (b"\x81\xa8position\xd4\x01\x01", "malformed_body", "body"),
        (b"\x81\xa6events\x91\xd4\x01\x01", "malformed_body", "body"),
        (b"\xde\x27\x11" + b"\xa1x\xc0" * 10_001, "invalid_input", "body"),
    ],
)
def test_messagepack_that_json_cannot_represent_is_rejected(
    codecs: Mapping[str, ModelCodec], body: bytes, code: str, at: str
) -> None:
    error = read_chunk(codecs["small"], body, Media.MSGPACK)
    assert (error.code, error.facts["at"]) == (code, at)


@pytest.mark.parametrize("media", Media)
@pytest.mark.parametrize(
    "name",
    [
        "x - at `$",
        "x - at `$.events[0]",
        "x - at `$[...]",
        "x - at `$[" + "1" * 5000 + "]",
        "x - at `$" + ".a" * 20,
        "x` - at `$.inputs[0",
        "x` - at `$.events[0]",
        "x - at `$.events[0]`",
        "x - at `key` in `$",
        ", got `ext`",
    ],
)
def test_name_that_looks_like_a_place_is_an_unknown_member(
    codecs: Mapping[str, ModelCodec], media: Media, name: str
) -> None:
    """The decoder's errors have the name and the place in one text."""
    encode = dumps if media is Media.JSON else ormsgpack.packb
    event = {**EVENT, name: 1}
    for at, body in (("", {name: 1}), ("events[0].", {"events": [event]})):
        error = read_chunk(codecs["small"], encode(body), media)
        assert (error.code, error.facts["at"]) == ("invalid_input", f"{at}{name[:100]}")
        assert error.facts["got"] == "1"


WRONG_MEMBERS: Mapping[str, Mapping[str, Any]] = {
    "a wrong value": {"position": "x"},
    "several": {"position": "x", "epoch": 3, "odd": 1},
    "an unknown member": {"odd": 1},
    "no steps": {},
    "a wrong event": {"events": [{**EVENT, "load": "x"}]},
    "a wrong moment": {"events": [{**EVENT, "at": "yesterday"}]},
    "a reset": {"events": [EVENT], "resets": [4]},
    "too many events": {"events": [EVENT] * 5},
}


@pytest.mark.parametrize("media", Media)
@pytest.mark.parametrize("wrong", [*WRONG_MEMBERS, "damaged"])
def test_rejected_body_is_not_kept_by_its_error(
    codecs: Mapping[str, ModelCodec], media: Media, wrong: str
) -> None:
    """Not even until the garbage collector runs: hundreds of bodies of 2 MiB may be rejected."""
    reader, encode = codecs["small"].reader, dumps if media is Media.JSON else ormsgpack.packb
    chunk = WRONG_MEMBERS.get(wrong, {"events": [EVENT]})
    documents: dict[str, Mapping[str, Any]] = {
        "chunk": chunk,
        "items": {"chunks": [{"stream": "s", **chunk}] * 2},
        "sequences": {"sequences": [chunk]},
    }
    readers: dict[str, Callable[[bytes], Any]] = {
        "chunk": lambda b: reader.chunk(b, media, reader.key("s")),
        "items": lambda b: reader.items(b, media),
        "sequences": lambda b: reader.sequences(b, media),
    }
    gc.disable()
    try:
        for name, read in [*readers.items(), ("chunk", lambda b: reader.frame(b, media, "s"))]:
            body = bytearray(encode(documents[name]))
            body = bytes(body[:-1] if wrong == "damaged" else body)
            before = sys.getrefcount(body)
            found = result(lambda read=read, body=body: read(body))
            if isinstance(found, CarryError):
                found = found.code
            assert sys.getrefcount(body) == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "members",
    [
        '"id":true,"stream":"a"',
        '"id":1.5,"stream":"a"',
        '"id":9223372036854775808,"stream":"a"',
        f'"id":"{"x" * 129}","stream":"a"',
        '"id":1,"stream":7',
        '"id":1',
    ],
)
def test_both_readers_report_the_same_frame_id(
    codecs: Mapping[str, ModelCodec], members: str
) -> None:
    body = b'{%b,"inputs":[[1,2,3]]}' % members.encode()
    reader = codecs["probe"].reader
    fast, slow = [reader.frame(text, Media.JSON, None) for text in (body, b" " + body)]
    assert isinstance(fast.result, CarryError)
    assert (fast[:2], shown(fast.result)) == (slow[:2], shown(slow.result))


@pytest.mark.parametrize("packed_id", [b"\xa2id\x08", b"\xa2id\xa18"])
def test_wrong_frame_has_its_id_and_stream(
    codecs: Mapping[str, ModelCodec], packed_id: bytes
) -> None:
    reader = codecs["probe"].reader
    text = b'{"inputs": [[0, 0, "x"]], "stream": "a", "id": 8}'
    frame = reader.frame(text, Media.JSON, None)
    assert (frame.id, frame.stream, frame.result.facts["at"]) == (8, "a", "inputs[0][2]")  # type: ignore[union-attr]
    frame = reader.frame(b"\x82" + packed_id + b"\xa6inputs\x01", Media.MSGPACK, "s")
    assert frame.id in (8, "8")
    assert reader.frame(b'{"id": [1], "inputs": []}', Media.JSON, "s").id is None
    assert reader.frame(b'{"id": 1', Media.JSON, "s").id is None
    frame = reader.frame(b'{"id": 1, "inputs": [[NaN, 0, 0]], "stream": "a"}', Media.JSON, None)
    assert (frame.id, frame.stream, frame.result.facts["got"]) == (1, "a", "NaN")  # type: ignore[union-attr]
    assert reader.frame(b'{"id": 1, "inputs": NaN', Media.JSON, None)[:2] == (None, None)
