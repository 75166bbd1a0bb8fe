"""Frames that a live socket sends: the outcome of a chunk, and the hello.

A client's frame is the body of a chunk request with further members: `id`, which is returned with
the outcome, `stream` on a socket for many streams, and `if_match`; the model's reader reads it.
JSON comes in text frames and MessagePack in binary ones; an outcome has the media type of its
frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.codec.media import Media, dumps
from service.core.errors import CarryError
from service.transports.v1.problems import problem

FrameId = str | int


def hello_frame(facts: Mapping[str, Any]) -> bytes:
    """The first frame of a socket, always in JSON."""
    return dumps(Media.JSON, {"hello": facts})


def reply_outcome(frame_id: FrameId | None, reply: Mapping[str, Any]) -> dict[str, Any]:
    """The outcome of an applied chunk, with v1's reply."""
    return _outcome(frame_id, 200, reply=reply)


def error_outcome(
    frame_id: FrameId | None, error: CarryError, stream: str | None
) -> dict[str, Any]:
    """The outcome of a chunk that was rejected or failed, with v1's problem document."""
    document: dict[str, Any] = {**problem(error)}
    if stream is not None:
        document.setdefault("stream", stream)
    return _outcome(frame_id, document["status"], error=document)


def _outcome(frame_id: FrameId | None, status: int, **document: Any) -> dict[str, Any]:
    members = {"status": status, **document}
    return members if frame_id is None else {"id": frame_id, **members}
