"""Frames of live sockets, and the id and stream of a frame or an item whose body is invalid."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final, NamedTuple

import msgspec

from models.spec.stream_name import is_stream_name
from service.codec.body_types import FrameId
from service.codec.decoding import load_json
from service.codec.media import Media
from service.core.errors import CarryError
from service.core.values import Chunk

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
    """The members of a frame in MessagePack that its error names, undecoded: a byte of the others
    could be an object."""

    id: msgspec.Raw = msgspec.Raw()
    stream: msgspec.Raw = msgspec.Raw()


_ENVELOPE: Final = msgspec.msgpack.Decoder(_Envelope)


def read_envelope(media: Media, body: bytes | msgspec.Raw) -> tuple[str | int | None, str | None]:
    """The id of a frame and the stream that it names, without anything else of it; None for
    what is absent or invalid."""
    try:
        if media is Media.JSON:
            members = load_json(bytes(body))
        else:
            envelope = _ENVELOPE.decode(body)
            members = {"id": _scalar(envelope.id), "stream": _scalar(envelope.stream)}
    except (CarryError, msgspec.MsgspecError, ValueError, RecursionError):
        return None, None
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


def _scalar(raw: msgspec.Raw) -> Any:
    """The string or the number in a short value; None for any other."""
    if not 0 < len(memoryview(raw)) <= MAX_SCALAR_BYTES:
        return None
    try:
        return msgspec.msgpack.decode(raw, type=str | int)
    except (msgspec.MsgspecError, ValueError):
        return None
