"""Long documents, cut into their members and elements before an object is made of any.

In JSON `JsonStructure` finds where they end; in MessagePack the headers say how many there are, and
msgspec passes over them. More than a request may have are rejected by their count alone. The parts
are views of the document and are not validated: their readers do that, and a list may be cut
between its elements, because nowhere else do its parts parse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from service.api.duplicates import (
    duplicated,
    is_packed_array,
    is_packed_map,
    packed_count,
    packed_pairs,
)
from service.api.json_structure import JsonStructure
from service.api.media import Media, malformed
from service.api.turns import Turns
from service.errors import CarryError, InvalidInput

Exceeded = Callable[[str], CarryError]
"""Makes the rejection of a list, by its place, that has more elements than it may have."""

MORE: Final = "more"
"""What came, where it was not counted to its end."""

_UNKNOWN: Final = re.compile("unknown field `(.*)`")
_MEMBER: Final = re.compile(r"length.* at `\$\.(.*)`$")
_OBJECT: Final = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_LIST: Final = msgspec.msgpack.Decoder(list[msgspec.Raw])


class Cut(NamedTuple):
    """An object, cut.

    Attributes:
        members: values as they lie in the document, but for the lists.
        lists: the elements of those members that were to be cut and are lists.
    """

    members: dict[str, memoryview]
    lists: dict[str, list[memoryview]]


class Shape(NamedTuple):
    """What an object may have.

    Attributes:
        members: names that are known.
        lists: those whose elements are cut too.
        most: elements that any of its members may have.
        exceeded: what is raised where one of `lists` has more.
    """

    members: Sequence[str]
    lists: Collection[str]
    most: int
    exceeded: Exceeded


async def cut(
    document: bytes | memoryview, media: Media, shape: Shape, inside: str, turns: Turns
) -> Cut:
    """Cut an object.

    Args:
        inside: its place in the request, as `chunks[2]`; empty for the body.

    Raises:
        MalformedBody, InvalidInput; what `exceeded` makes; DeadlineExceeded
    """
    await turns.next()
    if media is Media.JSON:
        return await _cut_json(memoryview(document), shape, inside, turns)
    try:
        return await _cut_packed(memoryview(document), shape, inside, turns)
    except msgspec.ValidationError as error:
        raise invalid(inside or "body", "an object whose names are text", "other names") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, IndexError) as error:
        raise malformed(media, str(error)) from error


async def _cut_json(text: memoryview, shape: Shape, inside: str, turns: Turns) -> Cut:
    structure = JsonStructure(text)
    for _ in structure.scan():
        await turns.next()
        if len(structure.members) >= len(shape.members):
            raise _too_many_members(shape, structure.names(), inside)
        if structure.elements >= shape.most:
            raise _too_long(shape, structure.member_of_element(shape.most - 1), inside)
    members = structure.cut_members()
    if members is None:
        raise _no_object(text, inside)
    found = Cut({}, {})
    for member in members:
        _check_new(found, member.name, inside)
        elements = structure.cut_elements(member) if member.name in shape.lists else None
        if elements is None:
            found.members[member.name] = text[member.start : member.stop]
        else:
            found.lists[member.name] = elements
    return found


async def _cut_packed(value: memoryview, shape: Shape, inside: str, turns: Turns) -> Cut:
    counted = packed_count(value)
    if counted is None or not is_packed_map(value):
        raise invalid(inside or "body", "an object", "a list" if counted else "a value")
    if counted[0] > len(shape.members):
        few = counted[0] <= 2 * len(shape.members)
        names = [name for name, _ in packed_pairs(value)] if few else []
        raise _too_many_members(shape, names, inside)
    try:
        _bounded(tuple(shape.members), shape.most).decode(value)
    except msgspec.ValidationError as error:
        if out_of_bounds := _out_of_bounds(shape, str(error), inside):
            raise out_of_bounds from error
    await turns.next()
    members = _OBJECT.decode(value)
    found = Cut({}, {})
    if len(members) < counted[0]:
        for name, _ in packed_pairs(value):
            _check_new(found, name, inside)
            found.members[name] = value
    for name, raw in members.items():
        part = memoryview(raw)
        elements = packed_count(part)
        if elements is not None and elements[0] > shape.most:
            raise _too_long(shape, name, inside)
        if name in shape.lists and is_packed_array(part):
            await turns.next()
            found.lists[name] = [memoryview(element) for element in _LIST.decode(part)]
        else:
            found.members[name] = part
    return found


@lru_cache(maxsize=256)
def _bounded(members: tuple[str, ...], most: int) -> msgspec.msgpack.Decoder[Any]:
    """Reads an object of these members in MessagePack, up to the first that is unknown or has too
    many elements: their number is said before they are."""
    some = msgspec.Meta(max_length=most)
    names = {f"f{at}": name for at, name in enumerate(members)}
    container: Any = Annotated[list[msgspec.Raw], some] | Annotated[dict[str, msgspec.Raw], some]
    number = int | float | bool | None
    fields: list[Any] = [
        (attribute, container | number | (memoryview if name == "inputs" else str), None)
        for attribute, name in names.items()
    ]
    kind = msgspec.defstruct("Bounded", fields, rename=names, forbid_unknown_fields=True)
    return msgspec.msgpack.Decoder(kind)


def groups(elements: Sequence[memoryview], size: int) -> Iterator[list[memoryview]]:
    """Elements in their order, so many together as have about that many bytes; longer ones
    alone."""
    group: list[memoryview] = []
    length = 0
    for element in elements:
        if group and length + len(element) > size:
            yield group
            group, length = [], 0
        group.append(element)
        length += len(element)
    if group:
        yield group


def member_place(inside: str, name: str) -> str:
    """The place of a member of the object at `inside`."""
    return f"{inside}.{name}" if inside else name


def invalid(at: str, expected: str, got: str) -> InvalidInput:
    """The rejection of what is at a place."""
    return InvalidInput(f"{at}: expected {expected}, got {got}", at=at, expected=expected, got=got)


def _check_new(found: Cut, name: str, inside: str) -> None:
    if name in found.members or name in found.lists:
        raise duplicated(member_place(inside, name))


def _too_many_members(shape: Shape, names: Sequence[str], inside: str) -> InvalidInput:
    """The rejection of more members than there are names: one is unknown, or comes twice.

    Args:
        names: of the first of them.
    """
    for at, name in enumerate(names):
        if name and name not in shape.members:
            return _unknown(shape, name, inside)
        if name and name in names[:at]:
            return duplicated(member_place(inside, name))
    expected = f"at most the members {', '.join(shape.members)}, each once"
    return invalid(inside or "body", expected, MORE)


def _out_of_bounds(shape: Shape, reason: str, inside: str) -> CarryError | None:
    """What msgspec says of an object beyond its bounds; None where that is another error."""
    if unknown := _UNKNOWN.search(reason):
        return _unknown(shape, unknown[1], inside)
    if member := _MEMBER.search(reason):
        return _too_long(shape, member[1], inside)
    return None


def _too_long(shape: Shape, name: str, inside: str) -> CarryError:
    at = member_place(inside, name)
    if name in shape.lists:
        return shape.exceeded(at)
    if name in shape.members:
        return invalid(at, f"a value of less than {shape.most} parts", MORE)
    return _unknown(shape, name, inside)


def _unknown(shape: Shape, name: str, inside: str) -> InvalidInput:
    expected = f"one of the members {', '.join(shape.members)}"
    return invalid(member_place(inside, name), expected, "another one")


def _no_object(text: memoryview, inside: str) -> CarryError:
    lead = bytes(text[:64]).lstrip(b" \t\r\n")[:1]
    if lead in (b"[", b'"') or lead.isdigit():
        return invalid(inside or "body", "an object", "a list" if lead == b"[" else "a value")
    return malformed(Media.JSON, f"it cannot be parsed at {inside or 'its beginning or end'}")
