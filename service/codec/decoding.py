"""Decoding of bodies, JSON and MessagePack alike, to typed values, and every error of it.

A body is decoded once. orjson parses JSON, since hostile numbers would take msgspec's parser
seconds, and msgspec checks the objects against the type. msgspec decodes MessagePack straight into
the type, since a byte of it can be an object. Of duplicate members the last one counts. msgspec's
errors are translated here, and nowhere else: the place, what was expected, what was received. A
place is written as in `events[3].dep_delay`.

A type describes what its errors say, in the `extra` of its `Meta`: `EXPECTED` is a description of
valid values, `WRONG_LENGTH` makes the error of a list whose length does not fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, TypeVar

import msgspec
import orjson
from msgspec import inspect

from models.events.reader import EXPECTED, LARGEST, MAX_GOT_CHARS
from service.codec.documents import Document, MsgpackDocument, ParsedDocument, Path
from service.codec.media import Media, malformed
from service.core.errors import CarryError, InvalidInput

T = TypeVar("T")

WRONG_LENGTH: Final = "wrong_length"
"""Key in a type's `extra`: a function of a place and the length of a list, which makes an error."""

MAX_NAME_CHARS: Final = 100
MAX_REPORTED: Final = 5
"""Most errors of one object that are reported."""

MAX_DEPTH: Final = 16
"""More steps than a place has in any of the types."""

_STEP: Final = re.compile(r"\.([A-Za-z_][A-Za-z0-9_]*)|\[(\d{1,9}|\.\.\.)\]")
_AT: Final = " - at `$"
_PLACE: Final = re.compile(rf"{re.escape(_AT)}((?:{_STEP.pattern}){{1,{MAX_DEPTH}}})`")
_ANY_NAME: Final = "..."
"""Step from a mapping to the value of a name that msgspec does not say."""
_MISSING: Final = re.compile(r"Object missing required field `(.+)`")
_UNKNOWN_BEGIN: Final = "Object contains unknown field `"
_UNKNOWN: Final = re.compile(rf"{_UNKNOWN_BEGIN}(.*)`", re.DOTALL)
_KIND: Final = re.compile(r"Expected `([a-z |]+)`, got `[A-Za-z]+`")
_BOUND: Final = re.compile(r"Expected `(?:int|float)` ([<>]=?) (-?[0-9.e+]+)")
_LENGTH: Final = re.compile(r"Expected `([a-z]+)` of (?:at (?:least|most) )?length ([<>]=)? ?(\d+)")
_PATTERN: Final = re.compile(r"Expected `str` matching regex '(.+)'")
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
FINITE: Final = "a finite number"
_OUT_OF_RANGE: Final = {
    "Number out of range": FINITE,
    "Integer value out of range": "an integer of 64 bits",
}
_NOT_JSON: Final = re.compile(
    r"Expected `[a-z |]+`(?:, got `ext`|(?:, got `[a-z]+`)? - at `key` in )"
)
"""In msgspec's errors for what MessagePack allows and JSON does not."""
_NOT_FINITE: Final = re.compile(rb"NaN|Infinity")
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def decode(media: Media, body: bytes, kind: type[T]) -> T:
    """The value of a whole body.

    Raises:
        MalformedBody: it is not one document of that media type.
        InvalidInput: the document does not fit the type.
        CarryError: made by the type, by `WRONG_LENGTH`.
    """
    if media is Media.JSON:
        return convert(load_json(body), kind)
    return decode_msgpack(body, kind)


def load_document(media: Media, body: bytes) -> Any:
    """A document that `decode_element` may decode more than once.

    Raises:
        MalformedBody
    """
    return load_json(body) if media is Media.JSON else body


def decode_element(media: Media, element: Any, kind: type[T], at: str = "") -> T:
    """Decode a document of `load_document`, or an element of a list that was not decoded: Python's
    objects from JSON, and bytes of MessagePack.

    Args:
        at: the place of the element, with which the places in errors begin; empty for a body.

    Raises:
        MalformedBody, InvalidInput, CarryError: as `decode`.
    """
    if media is Media.JSON:
        return convert(element, kind, at)
    return decode_msgpack(element, kind, at)


def undecoded_type(media: Media) -> Any:
    """The type of an element that `decode_element` decodes."""
    return Any if media is Media.JSON else msgspec.Raw


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


def convert(value: Any, kind: type[T], inside: str = "") -> T:
    """Python's objects as a typed value.

    Args:
        inside: the place of the value; empty for a body.

    Raises:
        InvalidInput, CarryError
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _translate(error, kind, inside, ParsedDocument(value, convert)) from error


def decode_msgpack(body: bytes | msgspec.Raw, kind: type[T], inside: str = "") -> T:
    """A document in MessagePack as a typed value.

    Raises:
        MalformedBody, InvalidInput, CarryError
    """
    try:
        value: T = _msgpack_decoder(kind).decode(body)  # type: ignore[arg-type]
    except msgspec.ValidationError as error:
        raise _translate_msgpack(error, body, kind, inside) from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise malformed(Media.MSGPACK, str(error)) from error
    return value


def _translate_msgpack(
    error: msgspec.ValidationError, body: bytes | msgspec.Raw, kind: Any, inside: str
) -> CarryError:
    """As `_translate`, unless the document is damaged behind its first invalid value."""
    try:
        if _NOT_JSON.match(str(error)):
            raise ValueError("names are strings, and there are no extension types")
        return _translate(error, kind, inside, MsgpackDocument(msgspec.Raw(body), decode_msgpack))
    except (msgspec.MsgspecError, ValueError, RecursionError) as damage:
        return malformed(Media.MSGPACK, str(damage))


def detached(error: CarryError) -> CarryError:
    """The error without traceback and causes, whose frames keep the body: if a frame keeps the
    error too, it would stay in memory until the garbage collector runs."""
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


def place(path: Sequence[str | int], inside: str = "") -> str:
    """`["events", 3, "load"]` as `events[3].load`; the body itself is `body`."""
    text = inside
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else step
    return text or "body"


def _translate(
    error: msgspec.ValidationError,
    kind: Any,
    inside: str,
    source: Document,
) -> CarryError:
    """The API's error for one of msgspec, with the other errors of the same object."""
    reason, path = _reason_and_path(str(error), kind)
    if _ANY_NAME in path:
        known = path[: path.index(_ANY_NAME)]
        return invalid(place(known, inside), _expected(reason), "another value")
    first = _first_error(reason, path, kind, inside, source)
    if not isinstance(first, InvalidInput):
        return first
    try:
        errors = _errors_of_object(path, kind, inside, source) or [first]
    except LookupError:
        errors = [first]
    reported = errors[:MAX_REPORTED]
    detail = "; ".join([error.detail for error in reported])
    if len(errors) > len(reported):
        detail += "; and more"
    facts = [{name: error.facts[name] for name in ("at", "expected", "got")} for error in reported]
    return InvalidInput(detail, **facts[0], **({"errors": facts} if facts[1:] else {}))


def _reason_and_path(message: str, kind: Any) -> tuple[str, Path]:
    """Parse a message of msgspec into its reason and a path; empty for the value as a whole.

    The name of an unknown member is the client's and may end as a place does, of any length: only
    an object of the type can have an unknown member.
    """
    end = message.rfind(_AT)
    match = _PLACE.fullmatch(message, end) if end >= 0 else None
    if match is None:
        return message, []
    path: Path = []
    for step in _STEP.finditer(match[1]):
        path.append(int(step[2]) if step[2] and step[2] != _ANY_NAME else step[1] or step[2])
    if message.startswith(_UNKNOWN_BEGIN):
        node = _alternatives(_node(_type_info(kind), path))[0]
        if not (_UNKNOWN.fullmatch(message, 0, end) and isinstance(node, inspect.StructType)):
            return message, []
    return message[:end], path


def _first_error(reason: str, path: Path, kind: Any, inside: str, source: Document) -> CarryError:
    node = _node(_type_info(kind), path)
    extra: Mapping[str, Any] = {}
    while isinstance(node, inspect.Metadata):
        extra, node = {**(node.extra or {}), **extra}, node.type
    if match := _MISSING.fullmatch(reason):
        return _missing(place([*path, match[1]], inside))
    if match := _UNKNOWN.fullmatch(reason):
        known = [field.encode_name for field in getattr(node, "fields", ())]
        try:
            got = format_value(source.value([*path, match[1]]))
        except LookupError:
            got = "another value"
        return _unknown(match[1], path, known, inside, got)
    try:
        value = source.value(path)
    except LookupError:
        value = msgspec.UNSET
    at = place(path, inside)
    if (wrong_length := extra.get(WRONG_LENGTH)) and _LENGTH.match(reason):
        made: CarryError = wrong_length(at, "more" if value is msgspec.UNSET else len(value))
        return made
    got = "another value" if value is msgspec.UNSET else format_value(value)
    return invalid(at, extra.get(EXPECTED) or _expected(reason), got)


def _errors_of_object(path: Path, kind: Any, inside: str, source: Document) -> list[InvalidInput]:
    """The first few errors of the innermost object at a path; raises LookupError."""
    end = len(path)
    while end >= 0:
        node = _alternatives(_node(_type_info(kind), path[:end]))[0]
        if isinstance(node, inspect.StructType):
            break
        end -= 1
    else:
        return []
    path = path[:end]
    members = source.members(path)
    fields = _fields(node.cls)
    errors: list[InvalidInput] = []
    for name, field in fields.items():
        at = place([*path, name], inside)
        try:
            if name in members:
                source.check(members[name], field.type, at)
            elif field.required:
                raise _missing(at)
        except InvalidInput as error:
            detached(error)
            several = error.facts.get("errors", [])
            errors += [invalid(**facts) for facts in several] or [error]
        except CarryError:
            # too long: not what is reported here
            pass
    for name in members:
        if len(errors) > MAX_REPORTED:
            break
        if name not in fields:
            got = format_value(source.element(members[name]))
            errors.append(_unknown(name, path, fields, inside, got))
    return errors


def _missing(at: str) -> InvalidInput:
    return invalid(at, "this member, which is required", "nothing")


def _unknown(name: str, path: Path, known: Iterable[str], inside: str, got: str) -> InvalidInput:
    at = place([*path, name[:MAX_NAME_CHARS]], inside)
    return invalid(at, f"one of the members {', '.join(known)}", got)


def _expected(reason: str) -> str:
    """The description of valid values in a reason of msgspec."""
    if match := _KIND.fullmatch(reason):
        kinds = [kind for kind in match[1].split(" | ") if kind != "null"]
        return " or ".join([_KINDS.get(kind, kind) for kind in kinds]) or "null"
    if match := _BOUND.fullmatch(reason):
        is_bound = abs(float(match[2])) < LARGEST
        return f"{_BOUNDS[match[1]]} {match[2].removesuffix('.0')}" if is_bound else FINITE
    if match := _LENGTH.fullmatch(reason):
        kind, bound, length = match.groups()
        noun, unit = ("string", "characters") if kind == "str" else ("list", "values")
        how = {">=": "at least ", "<=": "at most "}.get(bound, "")
        return f"{noun} of {how}{length} {unit}"
    if match := _PATTERN.fullmatch(reason):
        return f"string matching {match[1]}"
    return _OUT_OF_RANGE.get(reason, reason[:300])


@lru_cache(maxsize=1024)
def _msgpack_decoder(kind: Any) -> Any:
    return msgspec.msgpack.Decoder(kind)


@lru_cache(maxsize=1024)
def _type_info(kind: Any) -> Any:
    return inspect.type_info(kind)


@lru_cache(maxsize=1024)
def _fields(kind: Any) -> dict[str, msgspec.structs.FieldInfo]:
    """The fields of a struct by the names of their members."""
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def _node(node: Any, path: Path) -> Any:
    """The type at a path within a type; None if the path leads nowhere."""
    for step in path:
        for each in _alternatives(node):
            if isinstance(step, int) and isinstance(each, inspect.CollectionType):
                node = each.item_type
                break
            if isinstance(step, int) and isinstance(each, inspect.TupleType):
                node = each.item_types[step]
                break
            if isinstance(each, inspect.StructType):
                node = {field.encode_name: field.type for field in each.fields}.get(str(step))
                break
        else:
            return None
    if isinstance(node, inspect.UnionType):
        others = [each for each in node.types if not isinstance(each, inspect.NoneType)]
        return others[0] if len(others) == 1 else node
    return node


def _alternatives(node: Any) -> list[Any]:
    """The types of a union, or the one type."""
    while isinstance(node, inspect.Metadata):
        node = node.type
    if isinstance(node, inspect.UnionType):
        return [each for part in node.types for each in _alternatives(part)]
    return [node]
