"""JSON and MessagePack: content negotiation and encoding.

Both carry the same schema. JSON writes float32 values with the fewest digits that read back
as the same float32; MessagePack writes them as float32. Only one whole document of
UTF-8 JSON or MessagePack is accepted: no trailing bytes, no extension types, no compression.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache, partial
from typing import Any, Final

import orjson
import ormsgpack

from service.core.errors import MalformedBody, NotAcceptable, UnsupportedMediaType


class Media(StrEnum):
    """Media types of bodies; the value is the content type."""

    JSON = "application/json"
    MSGPACK = "application/msgpack"

    # faster than Enum's, which is a Python function: every chunk looks up by its media type
    __hash__ = str.__hash__


SERVED: tuple[str, ...] = tuple(media.value for media in Media)

_READS: Mapping[str, Media] = {
    "application/json": Media.JSON,
    "application/msgpack": Media.MSGPACK,
    "application/x-msgpack": Media.MSGPACK,
    "application/vnd.msgpack": Media.MSGPACK,
}
_ACCEPTS: Mapping[str, tuple[Media, ...]] = {
    **{name: (media,) for name, media in _READS.items()},
    "application/problem+json": (Media.JSON,),
    "application/*": (Media.JSON, Media.MSGPACK),
    "*/*": (Media.JSON, Media.MSGPACK),
}

MAX_FIELD: Final = 1024
"""Longest `Accept` and `Content-Type`, in characters: longer ones would block the event loop while
they are parsed."""

encode_json: Final = partial(orjson.dumps, option=orjson.OPT_SERIALIZE_NUMPY)
"""`dumps` in JSON."""

encode_msgpack: Final = partial(ormsgpack.packb, option=ormsgpack.OPT_SERIALIZE_NUMPY)
"""`dumps` in MessagePack."""


def dumps(media: Media, value: Any) -> bytes:
    """Encode a value of dictionaries, lists, NumPy arrays (C order, not 0-d) and scalars."""
    return encode_json(value) if media is Media.JSON else encode_msgpack(value)


def malformed(media: Media, reason: str) -> MalformedBody:
    """The error for a body that cannot be parsed."""
    expected = f"one {'JSON' if media is Media.JSON else 'MessagePack'} document"
    return MalformedBody(
        f"body: expected {expected}: {reason}", at="body", expected=expected, got=reason
    )


@lru_cache(maxsize=256)
def media_of(content_type: str | None) -> Media:
    """The media type of a body with this Content-Type; JSON if there is none.

    Raises:
        UnsupportedMediaType
    """
    if not content_type:
        return Media.JSON
    if len(content_type) > MAX_FIELD:
        raise UnsupportedMediaType(
            f"Content-Type: expected at most {MAX_FIELD} characters, got {len(content_type)}",
            expected=list(SERVED),
        )
    name, _, parameters = content_type.partition(";")
    media = _READS.get(name.strip().lower())
    charset = _parameters(parameters).get("charset", "utf-8").strip('"').lower()
    if media is None or charset not in ("utf-8", "utf8"):
        # Without the charset the message could name the very type that was sent.
        suffix = "" if media is None else "; charset=utf-8"
        expected = [f"{served}{suffix}" for served in SERVED]
        raise UnsupportedMediaType(
            f"Content-Type: expected one of {', '.join(expected)}, got {content_type!r}",
            expected=expected,
            got=content_type,
        )
    return media


@lru_cache(maxsize=256)
def negotiate_media(accept: str | None, otherwise: Media) -> Media:
    """The media type of a reply.

    Args:
        accept: the Accept header.
        otherwise: used if the header gives both the same weight.

    Raises:
        NotAcceptable: neither is accepted.
    """
    if not accept:
        return otherwise
    if len(accept) > MAX_FIELD:
        raise NotAcceptable(
            f"Accept: expected at most {MAX_FIELD} characters, got {len(accept)}",
            expected=list(SERVED),
        )
    weights = {media: _weight(accept, media) for media in Media}
    best = max(weights.values())
    if best <= 0:
        raise NotAcceptable(
            f"Accept: expected one of {', '.join(SERVED)}, got {accept!r}",
            expected=list(SERVED),
            got=accept,
        )
    if weights[otherwise] == best:
        return otherwise
    return next(media for media, weight in weights.items() if weight == best)


def _weight(accept: str, media: Media) -> float:
    """The q of the most specific range that includes `media`; 0 if none does."""
    best: tuple[int, float] = (-len("*/*"), 0.0)
    for item in accept.split(","):
        name, _, parameters = item.partition(";")
        name = name.strip().lower()
        if media not in _ACCEPTS.get(name, ()):
            continue
        try:
            weight = float(_parameters(parameters).get("q", "1"))
        except ValueError:
            weight = 0.0
        best = max(best, (-name.count("*"), weight if 0 <= weight <= 1 else 0.0))
    return best[1]


def _parameters(text: str) -> dict[str, str]:
    pairs = (item.partition("=") for item in text.split(";"))
    return {name.strip().lower(): value.strip() for name, _, value in pairs}
