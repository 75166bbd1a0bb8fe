"""Rules of the values that identify a stream and its state, written once for all who check them.

The types of bodies, the URL, the headers, the frames of live sockets and the API document use them.
"""

from __future__ import annotations

import re
from typing import Final

from models.spec.stream_name import STREAM_NAME_RULE, is_stream_name
from service.core.errors import InvalidName, InvalidPrecondition
from service.core.values import Precondition

EPOCH: Final = "[0-9a-f]{16}"
TAG: Final = "[0-9a-f]{32}"
FINGERPRINT: Final = "[0-9a-f]{32}"
VERSION_NAME: Final = "^[A-Za-z0-9._-]{1,64}$"
MAX_POSITION: Final = 2**63 - 1
"""Also the largest integer of any other member, so that an error can name a rejected one."""
MAX_FRAME_ID_CHARS: Final = 128
MAX_PRECONDITION: Final = 8 * 1024
"""Longest list of ETags, in characters."""

is_epoch = re.compile(EPOCH).fullmatch
is_stream_prefix = re.compile(r"[A-Za-z0-9._:@-]{0,256}").fullmatch
is_bare_etag = re.compile(f"{EPOCH}-{TAG}").fullmatch
_ETAG = re.compile(r'[ \t]*"([\x21\x23-\x7e\x80-\xff]*)"[ \t]*(?:,|\Z)')


def stream_name(name: str, at: str = "stream") -> str:
    """The name, if it is one.

    Raises:
        InvalidName
    """
    if not is_stream_name(name):
        raise _invalid_name(at, STREAM_NAME_RULE, name)
    return name


def stream_prefix(prefix: str) -> str:
    """The beginning of a stream's name; may be empty."""
    if not is_stream_prefix(prefix):
        raise _invalid_name("prefix", "at most 256 characters of A-Z a-z 0-9 . _ : @ -", prefix)
    return prefix


def _invalid_name(at: str, expected: str, name: str) -> InvalidName:
    got = name if len(name) <= 300 else f"{len(name)} characters"
    return InvalidName(f"{at}: expected {expected}, got {got!r}", at=at, expected=expected, got=got)


def parse_if_match(text: str, at: str, *, bare: bool = False) -> Precondition:
    """A list of strong ETags, or `*`.

    Args:
        text: the header's value.
        at: its name in errors.
        bare: whether a single ETag may be without quotes.

    Raises:
        InvalidPrecondition: also for weak ETags, since states are compared exactly.
    """
    text = text.strip(" \t")
    if text == "*":
        return Precondition(any_state=True)
    if bare and is_bare_etag(text):
        return Precondition((text,))
    if len(text) > MAX_PRECONDITION:
        raise InvalidPrecondition(
            f"{at}: expected at most {MAX_PRECONDITION} characters, got {len(text)}",
            at=at,
            expected=MAX_PRECONDITION,
            got=len(text),
        )
    etags: list[str] = []
    end = 0
    while match := _ETAG.match(text, end):
        etags.append(match[1])
        end = match.end()
    if not etags or end != len(text) or text.endswith(","):
        expected = 'strong ETags such as "epoch-tag", separated by commas, or *'
        raise InvalidPrecondition(
            f"{at}: expected {expected}, got {text[:300]!r}",
            at=at,
            expected=expected,
            got=text[:300],
        )
    return Precondition(tuple(etags))
