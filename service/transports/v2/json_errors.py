"""Translates errors of the JSON decoder to API errors: the place, what was expected, what came."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from service.core.errors import InvalidInput

_KINDS: Final = {
    "array": "a list",
    "object": "an object",
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
}
_MISSING: Final = re.compile(r"Object missing required field `(.+)`")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.+)`", re.DOTALL)
_KIND: Final = re.compile(r"Expected `([a-z |]+)`, got `([a-z]+)`")
_BOUND: Final = re.compile(r"Expected `([a-z]+)` (?:of length )?([<>]=) (\d+)")
_BOUNDS: Final = {
    (">=", False): "of at least",
    ("<=", False): "of at most",
    ("<=", True): "with at most",
}


_INDEX: Final = re.compile(r"\[\d+\]")
_NO_MEMBERS: Final[Mapping[str, Sequence[str]]] = {}


def json_error(
    error: msgspec.ValidationError,
    inside: str = "",
    members: Mapping[str, Sequence[str]] = _NO_MEMBERS,
) -> InvalidInput:
    """The error for a document that does not fit its type.

    Args:
        inside: the place of the document; empty if it is the body.
        members: the members of the objects in it, by their place without indices.
    """
    reason, _, place = str(error).partition(" - at `$")
    at = (inside + place.rstrip("`")).lstrip(".") or "body"
    if match := _MISSING.fullmatch(reason):
        member = match[1] if at == "body" else f"{at}.{match[1]}"
        return _invalid(member, "this member, which is required", "nothing")
    if match := _UNKNOWN.fullmatch(reason):
        known = members.get(_INDEX.sub("", at), ())
        return _invalid(at, f"one of the members {', '.join(known)}", repr(match[1][:100]))
    if match := _KIND.fullmatch(reason):
        kinds = [_KINDS.get(kind, kind) for kind in match[1].split(" | ")]
        got = "a decimal number" if match[2] == "float" else _KINDS.get(match[2], match[2])
        return _invalid(at, ", ".join(kinds), got)
    if match := _BOUND.fullmatch(reason):
        parts = {"array": " elements", "object": " members"}.get(match[1], "")
        expected = f"{_KINDS[match[1]]} {_BOUNDS[match[2], bool(parts)]} {match[3]}{parts}"
        return _invalid(at, expected, "less" if match[2] == ">=" else "more")
    if reason == "Number out of range":
        return _invalid(at, "a finite number", "one out of range")
    return InvalidInput(f"{at}: {reason}", at=at, got=reason)


def _invalid(at: str, expected: str, got: str) -> InvalidInput:
    return InvalidInput(f"{at}: expected {expected}, got {got}", at=at, expected=expected, got=got)
