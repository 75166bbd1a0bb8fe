"""Which media type a request speaks, and what is read before anything else is."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace
from starlette.requests import Request

from models.spec.state import State
from service.codec.decoding import decode
from service.codec.media import Media, dumps, media_of, negotiate_media
from service.codec.reply_writer import server_timing
from service.core.errors import (
    BodyTooLarge,
    InvalidPrecondition,
    MalformedBody,
    NotAcceptable,
    UnsupportedMediaType,
)
from service.core.values import NO_STREAM, Precondition, Reply, StreamKey, Timing
from service.transports.v1.call import parse_if_match, read_body


@pytest.mark.parametrize(
    ("accept", "otherwise", "media"),
    [
        (None, Media.MSGPACK, Media.MSGPACK),
        ("", Media.JSON, Media.JSON),
        ("*/*", Media.MSGPACK, Media.MSGPACK),
        ("application/*", Media.MSGPACK, Media.MSGPACK),
        ("application/json", Media.MSGPACK, Media.JSON),
        ("application/problem+json", Media.MSGPACK, Media.JSON),
        ("application/x-msgpack", Media.JSON, Media.MSGPACK),
        ("Application/VND.msgpack", Media.JSON, Media.MSGPACK),
        ("text/html, */*;q=0.8", Media.MSGPACK, Media.MSGPACK),
        ("application/json;q=0.5, application/msgpack", Media.JSON, Media.MSGPACK),
        ("application/json, application/msgpack;q=0.9", Media.MSGPACK, Media.JSON),
        ("*/*, application/json;q=0.1", Media.JSON, Media.MSGPACK),
        ("*/*;q=0.1, application/msgpack;q=0", Media.MSGPACK, Media.JSON),
        ("application/json; charset=utf-8; q=1", Media.MSGPACK, Media.JSON),
    ],
)
def test_accept_header_chooses_the_media_type(
    accept: str | None, otherwise: Media, media: Media
) -> None:
    assert negotiate_media(accept, otherwise) is media


@pytest.mark.parametrize(
    "accept",
    [
        "text/html",
        "*/*;q=0",
        "json",
        *(f"application/json;q={q}" for q in ("x", "nan", "inf", "-1")),
    ],
)
def test_accept_header_without_a_supported_type_is_rejected(accept: str) -> None:
    with pytest.raises(NotAcceptable):
        negotiate_media(accept, Media.JSON)


def test_long_headers_are_rejected_unparsed() -> None:
    """A list of a few thousand ranges would hold the event loop up."""
    ranges = ",".join(["text/x;q=0.1"] * 5000) + ",*/*"
    with pytest.raises(NotAcceptable, match="at most 1024 characters"):
        negotiate_media(ranges, Media.JSON)
    assert (
        negotiate_media(", ".join(["text/x;q=0.1"] * 60 + ["*/*"]), Media.MSGPACK) is Media.MSGPACK
    )
    with pytest.raises(UnsupportedMediaType, match="at most 1024 characters"):
        media_of("application/json" + ";a=b" * 16_000)
    with pytest.raises(InvalidPrecondition, match="at most 8192 characters"):
        parse_if_match(",".join(['""'] * 20_000), "If-Match")


def test_content_type_determines_the_media_type() -> None:
    assert media_of(None) is Media.JSON
    assert media_of('application/json; charset="utf-8"') is Media.JSON
    assert media_of("application/vnd.msgpack") is Media.MSGPACK
    for other in ("text/plain", "application/jsonx", "application/json; charset=utf-16"):
        with pytest.raises(UnsupportedMediaType):
            media_of(other)


def test_float32_survives_json() -> None:
    values = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    values = np.concatenate((values, np.float32([1e-45, 3.4028235e38, -0.0, 0.1])))
    for media in Media:
        read = np.array(
            decode(media, dumps(media, {"x": values}), dict[str, list[float]])["x"], np.float32
        )
        np.testing.assert_array_equal(read.view(np.int32), values.view(np.int32))
    assert dumps(Media.JSON, np.float32([0.1, 1])) == b"[0.1,1.0]"


def test_only_whole_documents_are_read() -> None:
    for media in Media:
        body = dumps(media, {"a": [1, 2]})
        assert decode(media, body, dict[str, list[int]]) == {"a": [1, 2]}
        for wrong in (body + b"\x00", body[:-1], body + body, b""):
            with pytest.raises(MalformedBody):
                decode(media, wrong, dict[str, list[int]])


def test_if_match_header_is_parsed() -> None:
    bare = f"{'0' * 16}-{'a' * 32}"
    assert parse_if_match(" * ", "If-Match") == Precondition(any_state=True)
    assert parse_if_match('"a","b" ,\t"c"', "If-Match") == Precondition(("a", "b", "c"))
    assert parse_if_match(bare, "if_match", bare=True) == Precondition((bare,))


def test_server_timing_lists_the_stages() -> None:
    timing = Timing(load_s=0.0025, infer_s=0.125, commit_s=1)
    no_rows, state = np.zeros((0, 1), np.float32), State(np.zeros(1), np.zeros(0, np.int64))
    first = Reply(StreamKey("m", "s"), NO_STREAM, no_rows, state, queue_s=0.001, timing=timing)
    shared = b"load;dur=2.500, infer;dur=125.000, commit;dur=1000.000"
    assert server_timing(first) == b"queue;dur=1.000, " + shared
    assert server_timing(replace(first, queue_s=0.02)) == b"queue;dur=20.000, " + shared
    other = replace(first, timing=Timing(commit_s=0.5))
    assert server_timing(other).endswith(b"load;dur=0.000, infer;dur=0.000, commit;dur=500.000")


async def test_a_declared_length_over_the_limit_is_rejected_before_reading() -> None:
    async def receive() -> dict[str, object]:
        raise AssertionError("the body was read")

    scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"11")]}
    with pytest.raises(BodyTooLarge) as caught:
        await read_body(Request(scope, receive), 10)
    assert caught.value.facts == {"expected": 10, "got": 11}
