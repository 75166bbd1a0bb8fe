"""Decodes bodies in JSON and MessagePack to typed values, and reports every error in them.

A body is decoded once. orjson parses JSON, since hostile numbers would take msgspec's parser
seconds, and msgspec checks the objects against the type. msgspec decodes MessagePack straight into
the type, since a byte of it can be an object. Of duplicate members the last one counts.

If a document does not fit, it and its type are walked together down to the values that do not fit.
Paths in msgspec's messages would not do: the messages have names of the client in them. Of
MessagePack only the values on that path are decoded. A place is written as
`events[3].dep_delay`.

A type describes what its errors say, in the `extra` of its `Meta`: `EXPECTED` is a description of
valid values, `WRONG_LENGTH` makes the error of a list whose length does not fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from types import NoneType, UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

import msgspec
import orjson

from models.events.reader import EXPECTED, LARGEST, MAX_GOT_CHARS
from service.codec.media import Media, malformed
from service.core.errors import CarryError, InvalidInput
from service.core.memo import Memo

T = TypeVar("T")

WRONG_LENGTH: Final = "wrong_length"
"""Key in a type's `extra`: a function of a place and the length of a list, which makes an error."""

MAX_NAME_CHARS: Final = 100
MAX_REPORTED: Final = 5
"""Most errors that are reported."""

MAX_MEMBERS: Final = 10_000
"""Most members of a state, and of an object that is searched for wrong ones."""

_MAPS: Final = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])
_ARRAYS: Final = frozenset([*range(0x90, 0xA0), 0xDC, 0xDD])
_KIND: Final = re.compile(r"Expected `([a-z |]+)`, got `[A-Za-z]+`")
_BOUND: Final = re.compile(r"Expected `(?:int|float)` ([<>]=?) (-?[0-9.e+]+)")
_LENGTH: Final = re.compile(r"Expected `([a-z]+)` of length ([<>]=) (\d+)")
_KINDS: Final = {
    "array": "a list",
    "object": "an object",
    "str": "a valid string",
    "int": "a valid integer",
    "float": "a valid number",
    "bool": "a valid boolean",
    "bytes": "a string of bytes",
}
_BOUNDS: Final = {
    ">": "greater than",
    ">=": "greater than or equal to",
    "<": "less than",
    "<=": "less than or equal to",
}
_LENGTHS: Final = {">=": "at least", "<=": "at most"}
_PARTS: Final = {"str": ("string", "characters"), "object": ("object", "members")}
_FINITE: Final = "a finite number"
_OUT_OF_RANGE: Final = {
    "Number out of range": _FINITE,
    "Integer value out of range": "an integer of 64 bits",
}
_NOT_JSON: Final = re.compile(
    r"Expected `[a-z |]+`(?:, got `ext`|(?:, got `[a-z]+`)? - at `key` in )"
)
"""In msgspec's messages for what MessagePack allows and JSON does not."""
_MSGPACK_DECODERS: Final = Memo(msgspec.msgpack.Decoder, 1024)
_NOT_FINITE: Final = re.compile(rb"NaN|Infinity")
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def decode(media: Media, body: bytes, kind: type[T]) -> T:
    """The value of a whole body.

    Raises:
        MalformedBody: it is not one document of that media type.
        InvalidInput: the document does not fit the type.
        CarryError: made by the type, by `WRONG_LENGTH`.
    """
    return decode_element(media, load_json(body) if media is Media.JSON else body, kind)


def load_document(media: Media, body: bytes) -> Any:
    """A document that `decode_element` may decode more than once.

    Raises:
        MalformedBody
    """
    return load_json(body) if media is Media.JSON else body


def load_json(body: bytes) -> Any:
    """The value of a JSON document; NaN, infinities and numbers beyond float64 are floats, so that
    whoever reads them names their place.

    Raises:
        MalformedBody
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = str(error)
        may_be_read = "infinity" in reason or _NOT_FINITE.search(body) is not None
        # the standard library accepts lone surrogates
        if may_be_read and _SURROGATE.search(body) is None:
            try:
                return json.loads(body.decode())
            except (ValueError, RecursionError):
                pass
        raise malformed(Media.JSON, reason) from error


def undecoded_type(media: Media) -> Any:
    """The type of an element that `decode_element` decodes."""
    return Any if media is Media.JSON else msgspec.Raw


def decode_element(media: Media, element: Any, kind: type[T], at: str = "") -> T:
    """Decode a document of `load_document`, or an element of a list that was not decoded: Python's
    objects from JSON, and bytes of MessagePack.

    Args:
        at: the place of the element, with which the places in errors begin; empty for a body.

    Raises:
        MalformedBody, InvalidInput, CarryError: as `decode`.
    """
    try:
        if media is Media.JSON:
            return msgspec.convert(element, kind)
        decoded: T = _MSGPACK_DECODERS[kind].decode(element)
        return decoded
    except msgspec.ValidationError as error:
        # the error is raised below: with this exception as its cause, it would keep the body
        reason = str(error)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise malformed(media, str(error)) from error
    try:
        # without a variable for the error: with one, the frame would keep the body
        value: Any = element if media is Media.JSON else msgspec.Raw(element)
        raise _combine(_errors(value, kind, at, reason))
    except (msgspec.MsgspecError, ValueError, RecursionError) as damage:
        # damaged after the first value that does not fit
        raise malformed(media, str(damage)) from damage


def detach_error(error: CarryError) -> CarryError:
    """Drop the traceback and the causes of an error; returns the error.

    Their frames keep the body: if a frame keeps the error too, the body would stay in memory until
    the garbage collector runs.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def invalid(at: str, expected: object, got: object) -> InvalidInput:
    """The error for a part of a request that does not fit."""
    return InvalidInput(f"{at}: expected {expected}, got {got}", at=at, expected=expected, got=got)


def format_value(value: Any) -> str:
    """A value as a client wrote it, cut to a few characters."""
    match value:
        case Mapping():
            return "an object"
        case list() | tuple():
            return f"a list of {len(value)}"
        case bytes() | bytearray() | memoryview():
            return f"{len(value)} bytes"
        case float() if value != value:
            return "NaN"
        case float() if value in (float("inf"), float("-inf")):
            return "Infinity" if value > 0 else "-Infinity"
    try:
        text = orjson.dumps(value).decode()
    except TypeError:
        # an integer over 64 bits, or no value of JSON
        text = repr(value)
    return text if len(text) <= MAX_GOT_CHARS else f"{text[:MAX_GOT_CHARS]}..."


def _combine(errors: list[CarryError]) -> CarryError:
    """One error that reports the first few; another than InvalidInput is reported alone."""
    if not errors:
        # of a member that MessagePack has twice, the first value is wrong and the last one fits
        return invalid("body", "each member once", "one twice")
    several: list[InvalidInput] = []
    for error in errors:
        if not isinstance(error, InvalidInput):
            return error
        several.append(error)
    reported = several[:MAX_REPORTED]
    detail = "; ".join([error.detail for error in reported])
    if len(several) > len(reported):
        detail += "; and more"
    facts = [error.facts for error in reported]
    return InvalidInput(detail, **facts[0], **({"errors": facts} if facts[1:] else {}))


def _errors(value: Any, kind: Any, at: str, reason: str | None = None) -> list[CarryError]:
    """The errors of a value: those of its first few wrong members, of its first wrong element, or
    its own; none if it fits.

    Args:
        reason: why it does not fit, in msgspec's words, if that is known.

    Raises:
        ValueError: it is MessagePack that JSON cannot express.
        MsgspecError, RecursionError: it is damaged.
    """
    reason = reason or _reason(value, kind)
    if reason is None:
        return []
    extra, kind = _split_type(kind)
    origin, fields = get_origin(kind), _fields(kind)
    if fields is not None or (origin is dict and not _LENGTH.match(reason)):
        members = _members(value, at)
        if members is not None:
            if fields is None:
                fields = dict.fromkeys(members, (get_args(kind)[1], True))
            return _errors_of_members(members, fields, at)
    elif origin in (list, tuple):
        # the last match: names that the client chose come before it
        _, has_index, path = reason.rpartition(" - at `$[")
        if has_index:
            index = int(path[: path.index("]")])
            return _errors(_elements(value)[index], get_args(kind)[0], f"{at}[{index}]")
    if _NOT_JSON.match(reason):
        raise ValueError("names are strings, and there are no extension types")
    wrong_length = extra.get(WRONG_LENGTH)
    if wrong_length is not None and _LENGTH.match(reason):
        return [wrong_length(at, _length(value))]
    return [invalid(at or "body", extra.get(EXPECTED) or _expected(reason), _format(value))]


def _errors_of_members(
    members: Mapping[str, Any], fields: Mapping[str, tuple[Any, bool]], at: str
) -> list[CarryError]:
    """The errors of an object's members, unknown ones first.

    A misspelt name explains why a required one is missing.
    """
    lead = f"{at}." if at else ""
    unknown = list(islice((name for name in members if name not in fields), MAX_REPORTED + 1))
    expected = f"one of the members {', '.join(fields)}"
    errors: list[CarryError] = [
        invalid(f"{lead}{name[:MAX_NAME_CHARS]}", expected, _format(members[name]))
        for name in unknown
    ]
    for name, (kind, is_required) in fields.items():
        if len(errors) > MAX_REPORTED:
            break
        if name in members:
            errors += _errors(members[name], kind, f"{lead}{name}")
        elif is_required:
            extra, bare = _split_type(kind)
            expected = extra.get(EXPECTED) or _expected(_reason(None, bare) or "a value")
            errors.append(invalid(f"{lead}{name}", expected, "nothing"))
    return errors


def _reason(value: Any, kind: Any) -> str | None:
    """Why a value does not fit a type, in msgspec's words; None if it fits."""
    try:
        if isinstance(value, msgspec.Raw):
            msgspec.msgpack.decode(value, type=kind)
        else:
            msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return str(error)
    return None


def _split_type(kind: Any) -> tuple[dict[str, Any], Any]:
    """The `extra` of a type, and the type without `Meta` and None."""
    extra: dict[str, Any] = {}
    while True:
        origin, parts = get_origin(kind), get_args(kind)
        if origin is Annotated:
            for meta in parts[1:]:
                extra = {**(meta.extra or {}), **extra}
        elif origin in (Union, UnionType):
            parts = tuple([part for part in parts if part is not NoneType])
            if len(parts) > 1:
                return extra, kind
        else:
            return extra, kind
        kind = parts[0]


@lru_cache(maxsize=1024)
def _fields(kind: Any) -> dict[str, tuple[Any, bool]] | None:
    """The types of a struct's members by their names, and whether each is required."""
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return None
    fields = msgspec.structs.fields(kind)
    return {field.encode_name: (field.type, field.required) for field in fields}


def _members(value: Any, at: str) -> Mapping[str, Any] | None:
    """The members of an object; None for another value."""
    is_raw = isinstance(value, msgspec.Raw)
    if not (memoryview(value)[0] in _MAPS if is_raw else isinstance(value, dict)):
        return None
    if _length(value) > MAX_MEMBERS:
        raise invalid(at or "body", f"at most {MAX_MEMBERS} members", _length(value))
    if not is_raw:
        members: Mapping[str, Any] = value
        return members
    try:
        return msgspec.msgpack.decode(value, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise ValueError("names are strings") from error


def _elements(value: Any) -> Any:
    if isinstance(value, msgspec.Raw):
        return msgspec.msgpack.decode(value, type=list[msgspec.Raw])
    return value


def _length(value: Any) -> int:
    """The number of elements or members; of MessagePack by the header."""
    if not isinstance(value, msgspec.Raw):
        return len(value)
    header = bytes(memoryview(value)[:5])
    if header[0] < 0xA0:
        return header[0] & 0x0F
    return int.from_bytes(header[1:3] if header[0] in (0xDC, 0xDE) else header[1:5], "big")


def _format(value: Any) -> str:
    """Format a wrong value for its error; a long one of MessagePack is not decoded."""
    if isinstance(value, msgspec.Raw):
        first = memoryview(value)[0]
        if first in _MAPS:
            return "an object"
        if first in _ARRAYS:
            return f"a list of {_length(value)}"
        value = msgspec.msgpack.decode(value)
    return format_value(value)


def _expected(reason: str) -> str:
    """The description of valid values in a reason of msgspec."""
    if match := _KIND.fullmatch(reason):
        kinds = [kind for kind in match[1].split(" | ") if kind != "null"]
        return " or ".join([_KINDS.get(kind, kind) for kind in kinds]) or "null"
    if match := _BOUND.fullmatch(reason):
        is_bound = abs(float(match[2])) < LARGEST
        return f"{_BOUNDS[match[1]]} {match[2].removesuffix('.0')}" if is_bound else _FINITE
    if match := _LENGTH.fullmatch(reason):
        kind, bound, length = match.groups()
        noun, unit = _PARTS.get(kind, ("list", "values"))
        return f"{noun} of {_LENGTHS[bound]} {length} {unit}"
    return _OUT_OF_RANGE.get(reason, reason[:300])
