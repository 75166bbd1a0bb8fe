"""Frames of a live socket: the envelope of a chunk, of its outcome, and the hello.

A client's frame is the body of a chunk request with further members: `id`, which is returned with
the outcome, `stream` on a socket for many streams, and `if_match`. This module separates them from
the body, which v1's reader validates; a long frame is split by v1's long reader, and its envelope
is read here. JSON comes in text frames and MessagePack in binary ones; an outcome has the media
type of its frame.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from service.codec.duplicates import (
    HEADER_BYTES,
    duplicate_error,
    find_duplicate,
    packed_length,
    replace_long_values,
)
from service.codec.long_bodies.splitting import SplitObject
from service.codec.media import Encoded, Media, dumps, encoded_object, malformed
from service.core.errors import CarryError, InvalidInput
from service.core.values import Precondition
from service.transports.live.leading_members import leading_members
from service.transports.v1.problems import problem
from service.transports.v1.request_fields import parse_if_match, stream_name

MAX_ID_CHARS: Final = 128
MAX_MEMBERS: Final = 32
"""Members of a frame; no body of a chunk has as many with its envelope."""

FrameId = str | int
Envelope = dict[str, msgspec.Raw]
"""The members of a frame, undecoded."""

_ID: Final = (
    Annotated[str, Meta(max_length=MAX_ID_CHARS)]
    | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    | None
)
_ID_EXPECTED: Final = f"an integer of 64 bits or a string of at most {MAX_ID_CHARS} characters"
_MARKS: Final = {
    Media.JSON: (b'"id"', b'"stream"', b'"if_match"'),
    Media.MSGPACK: (b"\xa2id", b"\xa6stream", b"\xa8if_match"),
}
_MEMBERS: Final[Mapping[Media, Any]] = {
    Media.JSON: msgspec.json.Decoder(Envelope),
    Media.MSGPACK: msgspec.msgpack.Decoder(Envelope),
}


class Frame(NamedTuple):
    """A client's frame.

    Attributes:
        members: None if the frame certainly is a body alone.
    """

    id: FrameId | None
    members: Envelope | None
    media: Media
    data: bytes | bytearray

    def stream(self) -> str:
        """The stream that the frame names.

        Raises:
            InvalidInput, InvalidName
        """
        return stream_name(self._text("stream", required=True) or "")

    def precondition(self) -> Precondition | None:
        """The `if_match` of the frame.

        Raises:
            InvalidInput, InvalidPrecondition
        """
        text = self._text("if_match", required=False)
        return None if text is None else parse_if_match(text, "if_match", bare=True)

    def has(self, name: str) -> bool:
        """Whether the frame has this member, as far as it is read."""
        return self.members is not None and name in self.members

    def body(self, envelope: Collection[str]) -> bytes:
        """The frame without these members: the body of a chunk request."""
        if self.members is None:
            return bytes(self.data)
        body: dict[str, Encoded] = {
            name: memoryview(raw) for name, raw in self.members.items() if name not in envelope
        }
        return encoded_object(self.media, body)

    def _text(self, name: str, *, required: bool) -> str | None:
        raw = None if self.members is None else self.members.get(name)
        kind: Any = str if required else str | None
        got = "none"
        if raw is not None:
            try:
                text: str | None = _decode(self.media, raw, kind)
                return text
            except (msgspec.MsgspecError, ValueError):
                got = "another type"
        elif not required:
            return None
        raise InvalidInput(f"{name}: expected a string, got {got}", at=name, expected="a string")


def read_frame(media: Media, data: bytes | bytearray) -> Frame:
    """Separate the envelope of a short frame from its body, which is not validated.

    Raises:
        MalformedBody, InvalidInput
    """
    if not any(mark in data for mark in _MARKS[media]):
        return Frame(None, None, media, data)
    try:
        members: Envelope = _MEMBERS[media].decode(data)
    except msgspec.ValidationError:
        expected = "an object whose names are strings"
        raise InvalidInput(f"body: expected {expected}", at="body", expected=expected) from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise malformed(media, str(error)) from None
    if len(members) > MAX_MEMBERS:
        expected = f"at most {MAX_MEMBERS} members"
        raise InvalidInput(f"body: expected {expected}, got {len(members)}", at="body")
    _check_no_duplicates(media, data, members)
    return Frame(_frame_id(media, members), members, media, data)


def read_long_frame(media: Media, data: bytes | bytearray) -> Frame:
    """Read the beginning of a long frame: its members before the first list.

    Raises:
        InvalidInput
    """
    members = leading_members(media, data)
    return Frame(_frame_id(media, members), members, media, data)


def split_frame(frame: Frame, split: SplitObject, envelope: Collection[str]) -> Frame:
    """A long frame with all of its envelope, which is taken out of its split body.

    Raises:
        InvalidInput
    """
    encoded = {name: split.members.pop(name) for name in envelope if name in split.members}
    members = {name: msgspec.Raw(value) for name, value in encoded.items()}
    return Frame(_frame_id(frame.media, members), members, frame.media, frame.data)


def _frame_id(media: Media, members: Envelope) -> FrameId | None:
    """The id of a frame with these members.

    Raises:
        InvalidInput
    """
    frame_id: FrameId | None = None
    if (raw := members.get("id")) is not None:
        try:
            frame_id = _decode(media, raw, _ID)
        except (msgspec.MsgspecError, ValueError):
            raise InvalidInput(
                f"id: expected {_ID_EXPECTED}", at="id", expected=_ID_EXPECTED
            ) from None
    return frame_id


def _check_no_duplicates(media: Media, data: bytes | bytearray, members: Envelope) -> None:
    """Reject a frame that has a member twice; the decoder kept the last of them.

    Raises:
        InvalidInput
    """
    if media is Media.MSGPACK:
        counted = packed_length(bytes(data[:HEADER_BYTES]))
        if counted is not None and counted[0] != len(members):
            raise find_duplicate(media, bytes(data)) or duplicate_error("body")
        return
    rest = replace_long_values(data, members.values())
    # a name without escapes that occurs once in the frame is not a duplicate
    is_certain = b"\\" not in rest and all(
        rest.count(b'"%b"' % name.encode()) == 1 for name in members
    )
    if not is_certain and (duplicate := find_duplicate(media, rest)) is not None:
        raise duplicate


def _decode(media: Media, raw: msgspec.Raw, kind: Any) -> Any:
    decode = msgspec.json.decode if media is Media.JSON else msgspec.msgpack.decode
    return decode(raw, type=kind)


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
    return encoded_object(media, {**members, "status": dumps(media, status), name: document})
