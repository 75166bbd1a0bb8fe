"""Frames of live sockets, and the id and stream of a frame or an item whose body is invalid."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final, NamedTuple

import msgspec

from service.codec.body_types import FrameId
from service.codec.decoding import load_json
from service.codec.media import Media
from service.core.errors import CarryError
from service.core.values import Chunk, is_stream_name

MAX_SCALAR_BYTES: Final = 2048
"""Longest value of an id or of a stream's name, before it is decoded."""


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


class _Envelope(msgspec.Struct, gc=False):
    """The members of a frame that its error names, undecoded."""

    id: msgspec.Raw = msgspec.Raw()
    stream: msgspec.Raw = msgspec.Raw()


_MODULES: Final = {Media.JSON: msgspec.json, Media.MSGPACK: msgspec.msgpack}
_DECODERS: Final = {media: module.Decoder(_Envelope) for media, module in _MODULES.items()}


def read_envelope(media: Media, body: bytes | msgspec.Raw) -> tuple[str | int | None, str | None]:
    """The id of a frame and the stream that it names, without anything else of it; None for
    what is absent or invalid."""
    members: Any = None
    try:
        envelope = _DECODERS[media].decode(body)
        members = {"id": _scalar(envelope.id, media), "stream": _scalar(envelope.stream, media)}
    except (msgspec.MsgspecError, ValueError, RecursionError):
        if media is Media.JSON:
            members = _members_with_nan(bytes(body))
    frame_id = None
    if isinstance(members, dict):
        with suppress(msgspec.ValidationError):
            frame_id = msgspec.convert(members.get("id"), FrameId | None)
    return frame_id, stream_of_item(Media.JSON, members)


def stream_of_item(media: Media, element: Any) -> str | None:
    """The stream that an invalid item names; None if it names none."""
    if media is Media.MSGPACK:
        return read_envelope(media, element)[1]
    name = element.get("stream") if isinstance(element, dict) else None
    return name if isinstance(name, str) and is_stream_name(name) else None


def _members_with_nan(body: bytes) -> Any:
    """Decode a body with NaN or infinities, which msgspec rejects; None if it is malformed."""
    try:
        return load_json(body)
    except CarryError:
        return None


def _scalar(raw: msgspec.Raw, media: Media) -> Any:
    """The string or the number in a short value; None for any other."""
    if not 0 < len(memoryview(raw)) <= MAX_SCALAR_BYTES:
        return None
    try:
        return _MODULES[media].decode(raw, type=str | int)
    except (msgspec.MsgspecError, ValueError):
        return None
