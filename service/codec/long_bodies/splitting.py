"""Splitting of long documents into members and elements, before an object is made of any.

In JSON `JsonStructure` finds the separators; in MessagePack headers give the counts, and msgspec
skips the values. A document with more than a request may have is rejected by count alone. The parts
are views of the document and are not validated: their readers do that. Splitting a list is safe
because its parts parse only if it was split between elements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from service.codec.duplicates import (
    duplicate_error,
    is_packed_array,
    is_packed_map,
    packed_length,
    packed_pairs,
    packed_parts,
)
from service.codec.long_bodies.admission import Checkpoint
from service.codec.long_bodies.json_structure import (
    JsonElements,
    JsonStructure,
    is_blank,
)
from service.codec.media import Media, malformed
from service.core.errors import CarryError, InvalidInput

Exceeded = Callable[[str], CarryError]
"""Makes the error for a list with too many elements, from the place of the list."""

MORE: Final = "more"
"""`got` of an error if counting stopped at the limit."""

_UNKNOWN: Final = re.compile("unknown field `(.*)`")
_MEMBER: Final = re.compile(r"length.* at `\$\.(.*)`$")
_BINARY: Final = ("inputs", "state_token")
_MAX_NAME: Final = 4096
"""Longest member name, in characters, that is decoded: no accepted body has a longer one, and the
whole body may be one name."""
_SHOWN_NAME_BYTES: Final = 256

_OBJECT: Final = msgspec.msgpack.Decoder(
    dict[Annotated[str, msgspec.Meta(max_length=_MAX_NAME)], msgspec.Raw]
)
_STRING_HEADERS: Final = {0xDA: 3, 0xDB: 5}
"""Sizes of the headers of long strings in MessagePack, by their first byte."""
_LIST: Final = msgspec.msgpack.Decoder(list[msgspec.Raw])


class PackedElements:
    """The elements of a list in MessagePack."""

    def __init__(self, elements: list[msgspec.Raw]):
        self._elements = elements

    def __len__(self) -> int:
        return len(self._elements)

    def __iter__(self) -> Iterator[memoryview]:
        return map(memoryview, self._elements)


Elements = JsonElements | PackedElements
"""The encoded elements of a list; each is a view, made when it is read."""


class SplitObject(NamedTuple):
    """The parts of an object.

    Attributes:
        members: the encoded value of each member that was not split.
        lists: the encoded elements of each member that was.
    """

    members: dict[str, memoryview]
    lists: dict[str, Elements]


class ObjectLimits(NamedTuple):
    """The members that an object may have, and how many elements.

    Attributes:
        members: the known names.
        lists: the members that are split into elements.
        max_elements: most elements of any member.
        exceeded: makes the error for one of `lists` that has more.
    """

    members: Sequence[str]
    lists: Collection[str]
    max_elements: int
    exceeded: Exceeded


async def split_object(
    document: bytes | memoryview,
    media: Media,
    limits: ObjectLimits,
    inside: str,
    checkpoint: Checkpoint,
) -> SplitObject:
    """Split an object into its members, and some of them into elements.

    Args:
        inside: place of the object in the request, such as `chunks[2]`; empty for the body.

    Raises:
        MalformedBody, InvalidInput; what `exceeded` makes; DeadlineExceeded
    """
    await checkpoint()
    if media is Media.JSON:
        return await _split_json(memoryview(document), limits, inside, checkpoint)
    try:
        return await _split_packed(memoryview(document), limits, inside, checkpoint)
    except msgspec.ValidationError as error:
        raise invalid(inside or "body", "an object whose names are text", "other names") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, IndexError) as error:
        raise malformed(media, str(error)) from error


async def _split_json(
    text: memoryview, limits: ObjectLimits, inside: str, checkpoint: Checkpoint
) -> SplitObject:
    structure = JsonStructure(text)
    for _ in structure.scan():
        await checkpoint()
        if len(structure.members) >= len(limits.members):
            raise _too_many_members(limits, structure.names(), inside)
        if structure.elements >= limits.max_elements:
            raise _too_long(limits, structure.member_of_element(limits.max_elements - 1), inside)
    members = structure.split_members()
    if members is None:
        raise _not_an_object(text, inside)
    split = SplitObject({}, {})
    for member in members:
        _check_not_seen(split, member.name, inside)
        elements = structure.split_elements(member) if member.name in limits.lists else None
        if elements is None:
            split.members[member.name] = text[member.start : member.stop]
        else:
            split.lists[member.name] = elements
    return split


async def _split_packed(
    value: memoryview, limits: ObjectLimits, inside: str, checkpoint: Checkpoint
) -> SplitObject:
    counted = packed_length(value)
    if counted is None or not is_packed_map(value):
        raise invalid(inside or "body", "an object", "a list" if counted else "a value")
    if counted[0] > len(limits.members):
        few = counted[0] <= 2 * len(limits.members)
        names = [name for name, _ in packed_pairs(value)] if few else []
        raise _too_many_members(limits, names, inside)
    if name := _long_name(value):
        raise _unknown(limits, name, inside)
    await checkpoint()
    try:
        _bounded(tuple(limits.members), limits.max_elements).decode(value)
    except msgspec.ValidationError as error:
        if out_of_bounds := _out_of_bounds(limits, str(error), inside):
            raise out_of_bounds from error
    await checkpoint()
    members = _OBJECT.decode(value)
    split = SplitObject({}, {})
    if len(members) < counted[0]:
        for name, _ in packed_pairs(value):
            _check_not_seen(split, name, inside)
            split.members[name] = value
    for name, raw in members.items():
        part = memoryview(raw)
        elements = packed_length(part)
        if elements is not None and elements[0] > limits.max_elements:
            raise _too_long(limits, name, inside)
        if name in limits.lists and is_packed_array(part):
            await checkpoint()
            split.lists[name] = PackedElements(_LIST.decode(part))
        else:
            split.members[name] = part
    return split


def _long_name(value: memoryview) -> str | None:
    """The beginning of the first name of a MessagePack object that is too long to be decoded.

    Other errors are left to the decoders that follow: msgspec would copy the name twice for its
    error.
    """
    try:
        _OBJECT.decode(value)
    except msgspec.ValidationError as error:
        if "length" not in str(error):
            return None
        for raw in packed_parts(value)[::2]:
            name = memoryview(raw)
            if len(name) > _MAX_NAME and (header := _STRING_HEADERS.get(name[0])):
                return bytes(name[header:][:_SHOWN_NAME_BYTES]).decode(errors="replace")
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    return None


@lru_cache(maxsize=256)
def _bounded(members: tuple[str, ...], most: int) -> msgspec.msgpack.Decoder[Any]:
    """A decoder of a MessagePack object that stops at the first member that is unknown or has too
    many elements: the header of a list gives their number before the first of them."""
    bounded = msgspec.Meta(max_length=most)
    names = {f"f{at}": name for at, name in enumerate(members)}
    container: Any = (
        Annotated[list[msgspec.Raw], bounded] | Annotated[dict[str, msgspec.Raw], bounded]
    )
    number = int | float | bool | None
    fields: list[Any] = [
        (attribute, container | number | (memoryview if name in _BINARY else str), None)
        for attribute, name in names.items()
    ]
    kind = msgspec.defstruct("Bounded", fields, rename=names, forbid_unknown_fields=True)
    return msgspec.msgpack.Decoder(kind)


def group_by_size(
    media: Media, elements: Iterable[memoryview], size: int
) -> Iterator[list[memoryview]]:
    """Group consecutive elements up to a size in bytes; a longer element is a group of its own.

    Raises:
        MalformedBody: a group has no element, since nothing is between two commas; next to other
            elements, their decoder rejects this.
    """
    group: list[memoryview] = []
    length = 0
    for element in elements:
        length += len(element)
        if length > size and group:
            _check_group(media, group)
            yield group
            group, length = [], len(element)
        group.append(element)
    if group:
        _check_group(media, group)
        yield group


def _check_group(media: Media, group: Sequence[memoryview]) -> None:
    if media is Media.JSON and len(group) == 1 and is_blank(group[0]):
        raise malformed(media, "an element is missing beside a comma")


def member_place(inside: str, name: str) -> str:
    """The place of a member of the object at `inside`."""
    return f"{inside}.{name}" if inside else name


def invalid(at: str, expected: str, got: str) -> InvalidInput:
    """The error for an invalid value."""
    return InvalidInput(f"{at}: expected {expected}, got {got}", at=at, expected=expected, got=got)


def _check_not_seen(split: SplitObject, name: str, inside: str) -> None:
    if name in split.members or name in split.lists:
        raise duplicate_error(member_place(inside, name))


def _too_many_members(limits: ObjectLimits, names: Sequence[str], inside: str) -> InvalidInput:
    """The error for more members than are known: one is unknown or duplicate.

    Args:
        names: names of the first members.
    """
    for at, name in enumerate(names):
        if name and name not in limits.members:
            return _unknown(limits, name, inside)
        if name and name in names[:at]:
            return duplicate_error(member_place(inside, name))
    expected = f"at most the members {', '.join(limits.members)}, each once"
    return invalid(inside or "body", expected, MORE)


def _out_of_bounds(limits: ObjectLimits, reason: str, inside: str) -> CarryError | None:
    """The error for what msgspec reports; None if it is not about the limits."""
    if unknown := _UNKNOWN.search(reason):
        return _unknown(limits, unknown[1], inside)
    if member := _MEMBER.search(reason):
        return _too_long(limits, member[1], inside)
    return None


def _too_long(limits: ObjectLimits, name: str, inside: str) -> CarryError:
    at = member_place(inside, name)
    if name in limits.lists:
        return limits.exceeded(at)
    if name in limits.members:
        return invalid(at, f"a value of less than {limits.max_elements} parts", MORE)
    return _unknown(limits, name, inside)


def _unknown(limits: ObjectLimits, name: str, inside: str) -> InvalidInput:
    expected = f"one of the members {', '.join(limits.members)}"
    return invalid(member_place(inside, name), expected, "another one")


def _not_an_object(text: memoryview, inside: str) -> CarryError:
    lead = bytes(text[:64]).lstrip(b" \t\r\n")[:1]
    if lead in (b"[", b'"') or lead.isdigit():
        return invalid(inside or "body", "an object", "a list" if lead == b"[" else "a value")
    return malformed(Media.JSON, f"it cannot be parsed at {inside or 'its beginning or end'}")
