"""What a frame of a live socket, or an item of many, says of itself although its body is wrong."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from service.codec.body_types import FrameEnvelope, FrameId
from service.codec.decoding import load_json
from service.codec.media import Media
from service.core.errors import CarryError, MalformedBody
from service.core.values import Chunk, is_stream_name

MAX_SCALAR_BYTES: Final = 2048
"""Longest value of an id or of a stream's name, before it is decoded."""

_JSON_ENVELOPE: Final = msgspec.json.Decoder(FrameEnvelope)
_PACKED_ENVELOPE: Final = msgspec.msgpack.Decoder(FrameEnvelope)


class Frame(NamedTuple):
    """A frame of a live socket.

    Attributes:
        id: returned with its outcome.
        stream: that of the chunk; None if none is known.
        result: the chunk, or what is wrong with it.
    """

    id: str | int | None
    stream: str | None
    result: Chunk | CarryError


def read_envelope(media: Media, body: bytes) -> tuple[str | int | None, str | None]:
    """The id of a frame and the stream that it names, without anything else of it; None for
    what is absent or invalid."""
    decoder = _JSON_ENVELOPE if media is Media.JSON else _PACKED_ENVELOPE
    try:
        found = decoder.decode(body)
        frame_id, name = [_scalar(raw, media) for raw in (found.id, found.stream)]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        frame_id, name = _loaded_envelope(media, body)
    try:
        frame_id = msgspec.convert(frame_id, FrameId)
    except msgspec.ValidationError:
        frame_id = None
    return frame_id, _stream(name)


def stream_of_item(media: Media, element: Any) -> str | None:
    """The stream that an invalid item names; None if it names none."""
    if media is Media.MSGPACK:
        return read_envelope(media, element)[1]
    return _stream(element.get("stream")) if isinstance(element, dict) else None


def _loaded_envelope(media: Media, body: bytes) -> tuple[Any, Any]:
    """The same of a frame that may have NaN in it."""
    try:
        members = load_json(body) if media is Media.JSON else None
    except MalformedBody:
        members = None
    members = members if isinstance(members, dict) else {}
    return members.get("id"), members.get("stream")


def _stream(name: object) -> str | None:
    return name if isinstance(name, str) and is_stream_name(name) else None


def _scalar(raw: msgspec.Raw, media: Media) -> Any:
    """The string or the number in a short value; None for any other."""
    if not 0 < len(memoryview(raw)) <= MAX_SCALAR_BYTES:
        return None
    module = msgspec.json if media is Media.JSON else msgspec.msgpack
    try:
        return module.decode(raw, type=str | int)
    except (msgspec.MsgspecError, ValueError):
        return None
