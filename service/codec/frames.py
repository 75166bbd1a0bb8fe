"""Frames of live sockets, and the id and stream of a frame or an item whose body is invalid."""

from __future__ import annotations

from collections.abc import Mapping
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
_MSGPACK_ENVELOPE: Final = msgspec.msgpack.Decoder(FrameEnvelope)


class Frame(NamedTuple):
    """A frame of a live socket.

    Attributes:
        id: returned with its outcome.
        stream: that of the chunk; None if none is known.
        result: the chunk, or its error.
    """

    id: str | int | None
    stream: str | None
    result: Chunk | CarryError


def read_envelope(
    media: Media, body: bytes, document: Any = msgspec.UNSET
) -> tuple[str | int | None, str | None]:
    """The id of a frame and the stream that it names, without anything else of it; None for
    what is absent or invalid.

    Args:
        document: what `load_document` gave; None if it failed, and unset if it was not called.
    """
    if isinstance(document, dict):
        return _check_envelope(document)
    decoder = _JSON_ENVELOPE if media is Media.JSON else _MSGPACK_ENVELOPE
    try:
        found = decoder.decode(body)
        members = {"id": _scalar(found.id, media), "stream": _scalar(found.stream, media)}
    except (msgspec.MsgspecError, ValueError, RecursionError):
        # JSON may have NaN in it
        is_unread = media is Media.JSON and document is msgspec.UNSET
        members = _load_members(body) if is_unread else {}
    return _check_envelope(members)


def stream_of_item(media: Media, element: Any) -> str | None:
    """The stream that an invalid item names; None if it names none."""
    if media is Media.MSGPACK:
        return read_envelope(media, element)[1]
    return _stream(element.get("stream")) if isinstance(element, dict) else None


def _load_members(body: bytes) -> dict[str, Any]:
    """The members of a frame in JSON; none if it is malformed."""
    try:
        members = load_json(body)
    except MalformedBody:
        return {}
    return members if isinstance(members, dict) else {}


def _check_envelope(members: Mapping[str, Any]) -> tuple[str | int | None, str | None]:
    try:
        frame_id = msgspec.convert(members.get("id"), FrameId)
    except msgspec.ValidationError:
        frame_id = None
    return frame_id, _stream(members.get("stream"))


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
