"""Translation of pydantic's errors: the place, what was expected, what was received.

A place is written as in `events[3].dep_delay`. Only the first few errors are reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from service.codec.media import Media, malformed
from service.core.errors import CarryError, InvalidInput

MAX_REPORTED = 5
MAX_GOT_CHARS = 80

Place = tuple[int | str, ...]
Members = Callable[[Place], Sequence[str]]
"""The members that an object at a place may have."""

_SHOULD = re.compile(r"(?:Input|String|Value) should (?:be )?")


def place(loc: Place, inside: str = "") -> str:
    """`("events", 3, "load")` as `events[3].load`; the body itself is `body`."""
    text = inside
    for step in loc:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else step
    return text or "body"


class Origin(NamedTuple):
    """The place in a request of a part that is validated on its own.

    Attributes:
        inside: its place, such as `chunks[2]`; empty for the body.
        first: index in the request of the first element of its list.
        beside: members that were read before and are not in the part; errors name them too.
    """

    inside: str = ""
    first: int = 0
    beside: Sequence[str] = ()

    def place(self, loc: Place) -> str:
        """Translate a place in the part into one in the request."""
        if self.first and len(loc) > 1 and isinstance(loc[1], int):
            loc = (loc[0], loc[1] + self.first, *loc[2:])
        return place(loc, self.inside)


BODY = Origin()


def invalid_body(
    error: ValidationError, media: Media, members: Members, origin: Origin = BODY
) -> CarryError:
    """The error for a body that does not fit its type.

    Args:
        error: what validation raised.
        media: media type of the body.
        members: gives the known members of the object at a place.
        origin: place of the part in the request.

    Returns:
        `MalformedBody` if the body cannot be parsed, otherwise `InvalidInput`.
    """
    # `errors()` copies inputs into its result, one per error; unions aside they are few,
    # since lists stop at their first failing item.
    errors = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        return malformed(media, str(errors[0].get("ctx", {}).get("error", errors[0]["msg"])))
    reported = [
        {
            "at": origin.place(item["loc"]),
            "expected": _expected(item, members, origin),
            "got": "nothing" if item["type"] == "missing" else shown(item["input"]),
        }
        for item in errors[:MAX_REPORTED]
    ]
    detail = "; ".join(
        f"{item['at']}: expected {item['expected']}, got {item['got']}" for item in reported
    )
    if len(errors) > len(reported):
        detail += f"; and {len(errors) - len(reported)} more"
    more = {"errors": reported} if len(reported) > 1 else {}
    return InvalidInput(detail, **reported[0], **more)


def _expected(item: ErrorDetails, members: Members, origin: Origin) -> str:
    context = item.get("ctx", {})
    match item["type"]:
        case "missing":
            return "this member, which is required"
        case "extra_forbidden":
            inside = item["loc"][:-1]
            known = [*members(inside), *(() if inside else origin.beside)]
            return f"one of the members {', '.join(known)}"
        case "string_pattern_mismatch":
            return f"string matching {context['pattern']}"
        case "string_too_short":
            return f"string of at least {context['min_length']} characters"
        case "string_too_long":
            return f"string of at most {context['max_length']} characters"
        case "model_type" | "dict_type":
            return "an object"
        case "list_type":
            return "a list"
    return _SHOULD.sub("", item["msg"], count=1)


def shown(value: Any) -> str:
    """A value as a client wrote it, cut to a few characters."""
    match value:
        case dict():
            return "an object"
        case list() | tuple():
            return f"a list of {len(value)}"
        case bytes():
            return f"{len(value)} bytes"
        case float() if value != value:
            return "NaN"
        case float() if value in (float("inf"), float("-inf")):
            return "Infinity" if value > 0 else "-Infinity"
    try:
        text = orjson.dumps(value).decode()
    except TypeError:
        # An integer over 64 bits.
        text = repr(value)
    return text if len(text) <= MAX_GOT_CHARS else f"{text[:MAX_GOT_CHARS]}..."
