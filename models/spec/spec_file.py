"""Reads a `SPEC.yaml` and reports its errors with line numbers.

    SPEC.yaml:9: layers.1.units: expected greater than or equal to 1, got 0
    SPEC.yaml:12: heads.0: head 'next' reads 'lstm_3', expected one of ['features', 'lstm_1']

All errors are reported together, in the order of the file. A check of the specification as a whole
(by `ModelSpec`, or of training against its data) begins its message with its subject, by which the
line is found: `layer 'x'`, `head 'x'`, `field 'x'`, `decoder: layer 'x'` or the dotted path of a
member. Duplicate keys of a mapping are errors, because YAML readers silently keep the last one. The
size of the file, its values with those that aliases repeat, and their depth are bounded.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from models.artifact.files import open_regular
from models.errors import SpecError
from models.spec.model import ModelSpec

_SUBJECT = re.compile(r"(?:(decoder): )?(layer|head|field) '([^']*)'|([a-z_]+(?:\.[a-z_]+)*):")
_SECTIONS: dict[str, tuple[str, ...]] = {
    "layer": ("layers",),
    "head": ("heads",),
    "field": ("events", "fields"),
}
_MAX_VALUE_CHARACTERS = 60
_MAX_BITS = 64
_MAX_NUMBER_CHARACTERS = 100
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

MAX_BYTES = 256 * 1024
"""Longest file: a hundred times the longest example. It is parsed at 100 KiB/s."""

MAX_VALUES = 20_000
"""Most values of a file; an alias has those of its anchor again."""


class _Loader(yaml.SafeLoader):
    """Reads a time without quotes as its text: a specification has no other use for it."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; an error has its line, also for a number that is none."""
        try:
            # in base 60 its digits take quadratic time
            if node.tag in _NUMBERS and len(node.value) > _MAX_NUMBER_CHARACTERS:
                raise ValueError(f"more than {_MAX_NUMBER_CHARACTERS} characters")
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise ValueError(f"more than {_MAX_BITS} bits")
            return value
        except (LookupError, ValueError) as error:
            problem = f"{node.tag.rpartition(':')[2]}: {str(error)[:100]}"
            raise ConstructorError(None, None, problem, node.start_mark) from error


_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)


class _Problem(NamedTuple):
    """An error: line number, dotted path of the member, and message."""

    line: int
    path: str
    message: str


def read_spec(path: Path) -> ModelSpec:
    """Read and validate a `SPEC.yaml`.

    Raises:
        SpecError: the file cannot be read, is not YAML, or describes no model; one line for
            each error, `file:line: member: expected ..., got ...`.
    """
    try:
        node, duplicates, data = _load(_read(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        message = ", ".join(part for part in (error.context, error.problem) if part)
        raise SpecError(f"{path}{line}: expected YAML, got {message}") from error
    except RecursionError as error:
        raise SpecError(f"{path}: expected YAML, got values that are nested too deeply") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise SpecError(f"{path}: {reason or ' '.join(str(error).split())}") from error
    if duplicates:
        raise _spec_error(path, duplicates)
    try:
        return ModelSpec.model_validate(data)
    except ValidationError as error:
        # A list without valid items counts as too short; the errors of its items are reported.
        errors = [
            item
            for item in error.errors(include_url=False)
            if item["type"] != "too_short" or len(item["input"]) < item["ctx"]["min_length"]
        ]
        raise _spec_error(path, [_locate(item, node, data) for item in errors]) from error


def add_line_number(path: Path, error: SpecError) -> SpecError:
    """Add the line number to an error that was detected after the file was read.

    The line is omitted if the message does not begin with a member of the file, or if the file has
    changed.
    """
    try:
        node, _, data = _load(_read(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return SpecError(f"{path}: {error}")
    subject, message = _parse_subject(str(error), data)
    line, member = _find_line(node, (), subject)
    if not member:
        return SpecError(f"{path}: {error}")
    return _spec_error(path, [_Problem(line, member, message)])


def _spec_error(path: Path, problems: Sequence[_Problem]) -> SpecError:
    return SpecError(
        "\n".join(
            f"{path}:{line}: {member}: {message}" for line, member, message in sorted(problems)
        )
    )


def _read(path: Path) -> str:
    """The text of a file; a FIFO or a device is rejected before a byte is read."""
    with open_regular(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"expected at most {MAX_BYTES} bytes, got more")
    return content.decode("utf-8")


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the values of a node, those of aliases as often as they occur.

    Args:
        counts: of the nodes before it, by `id`.
    """
    if id(node) not in counts:
        # of a value that contains itself: it has no end
        counts[id(node)] = MAX_VALUES + 1
        parts: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = chain.from_iterable(node.value)
        counts[id(node)] = 1 + sum([_count_values(part, counts) for part in parts])
    return counts[id(node)]


def _load(text: str) -> tuple[yaml.Node | None, list[_Problem], Any]:
    """Parse a document into nodes with lines, errors of duplicate keys, and data."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, [], None
        if _count_values(node, {}) > MAX_VALUES:
            problem = f"more than {MAX_VALUES} values, those of aliases included"
            raise ConstructorError(None, None, problem, node.start_mark)
        # Before the data is constructed: a merge (`<<`) then adds the keys that it overrides.
        duplicates = list(_find_duplicate_keys(node))
        return node, duplicates, loader.construct_document(node)
    finally:
        loader.dispose()


def _locate(item: ErrorDetails, node: yaml.Node | None, data: Any) -> _Problem:
    """Convert a validation error, with its line and path."""
    steps, message = item["loc"], item["msg"]
    subject: tuple[int | str, ...] = ()
    context = item.get("ctx", {})
    match item["type"]:
        case "missing":
            subject, message = steps[-1:], "expected a value, got none"
        case "extra_forbidden":
            message = "expected no member of this name"
        case "too_short":
            minimum, got = context["min_length"], len(item["input"])
            message = f"expected {minimum} or more, got {got}"
        case "too_long":
            message = f"expected at most {context['max_length']}, got {context['actual_length']}"
        case "union_tag_invalid":
            steps = (*steps, "kind")
            message = f"expected one of {context['expected_tags']}, got {context['tag']!r}"
        case "union_tag_not_found":
            subject, message = ("kind",), "expected a value, got none"
        case "model_type" | "dict_type":
            message = f"expected a mapping of members to values, got {_short(item['input'])}"
        case "value_error":
            subject, message = _parse_subject(message.removeprefix("Value error, "), data)
        case _:
            message = message.replace("Input should be ", "expected ", 1)
            message = f"{message}, got {_short(item['input'])}"
    line, member = _find_line(node, steps, subject)
    return _Problem(line, member or "spec", message)


def _find_line(
    node: yaml.Node | None, steps: Sequence[int | str], subject: Sequence[int | str]
) -> tuple[int, str]:
    """Find the line of a member, counted from 1, and its dotted path.

    Steps that are not in the file are skipped, since validation reports the kind of a layer as a
    step. The subject always ends the path: a member that is missing, or has its default, is
    reported at the line of its parent.
    """
    line = 1 if node is None else node.start_mark.line + 1
    path: list[str] = []
    found = None
    for step in (*steps, *subject):
        found = _member(node, step)
        if found is not None:
            line, node = found
            path.append(str(step))
    if subject and found is None:
        path.append(str(subject[-1]))
    return line, ".".join(path)


def _member(node: yaml.Node | None, step: int | str) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        # The last of equal keys is effective: keys that a merge overrides come before it.
        for key, value in reversed(node.value):
            if key.value == str(step):
                return key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        item = node.value[step]
        return item.start_mark.line + 1, item
    return None


def _parse_subject(message: str, data: Any) -> tuple[tuple[int | str, ...], str]:
    """Split a message into the path of its subject and the rest.

    The path is empty if the message names no member of the file.
    """
    match = _SUBJECT.match(message)
    if match is None:
        return (), message
    inside, kind, name, dotted = match.groups()
    if dotted is not None:
        return tuple(dotted.split(".")), message[match.end() :].strip()
    section = _SECTIONS[kind]
    if inside is not None:
        section, message = (inside, *section), message.removeprefix(f"{inside}: ")
    for index, item_name in enumerate(_names(data, section)):
        if item_name == name:
            return (*section, index), message
    return (), message


def _names(data: Any, section: Sequence[str]) -> Iterator[str]:
    """Yield the names of a section's items in order, with the defaults of `ModelSpec`."""
    for key in section:
        data = data.get(key) if isinstance(data, Mapping) else None
    counts: dict[str, int] = {}
    for item in data if isinstance(data, list) else []:
        member = item if isinstance(item, Mapping) else {}
        kind = str(member.get("kind"))
        counts[kind] = counts.get(kind, 0) + 1
        yield str(member.get("name") or f"{kind}_{counts[kind]}")


def _find_duplicate_keys(root: yaml.Node) -> Iterator[_Problem]:
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                pending.append(value)
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines and name != "<<":
                    message = f"expected a unique key, line {lines[name]} has it already"
                    yield _Problem(line, name, message)
                lines.setdefault(name, line)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[:_MAX_VALUE_CHARACTERS]}..."
