"""Frames that a live socket sends: the outcome of a chunk, and the hello.

A client's frame is the body of a chunk request with further members: `id`, which is returned with
the outcome, `stream` on a socket for many streams, and `if_match`; the model's reader reads it.
JSON comes in text frames and MessagePack in binary ones; an outcome has the media type of its
frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.codec.media import Encoded, Media, dumps, encode_object
from service.core.errors import CarryError
from service.transports.v1.problems import problem

FrameId = str | int


def hello_frame(facts: Mapping[str, Any]) -> bytes:
    """The first frame of a socket, always in JSON."""
    return dumps(Media.JSON, {"hello": facts})


def reply_frame(media: Media, frame_id: FrameId | None, reply: bytes) -> bytes:
    """The outcome of an applied chunk, from the bytes of v1's reply."""
    return _outcome_frame(media, frame_id, 200, "reply", reply)


def error_frame(
    media: Media, frame_id: FrameId | None, error: CarryError, stream: str | None
) -> bytes:
    """The outcome of a chunk that was rejected or failed, with v1's problem document."""
    document: dict[str, Any] = {**problem(error)}
    if stream is not None:
        document.setdefault("stream", stream)
    return _outcome_frame(media, frame_id, document["status"], "error", dumps(media, document))


def _outcome_frame(
    media: Media, frame_id: FrameId | None, status: int, name: str, document: bytes
) -> bytes:
    members: dict[str, Encoded] = {} if frame_id is None else {"id": dumps(media, frame_id)}
    return encode_object(media, {**members, "status": dumps(media, status), name: document})
