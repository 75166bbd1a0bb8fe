"""Reading a `SPEC.yaml`: what is wrong in it is said with its line.

    SPEC.yaml:9: layers.1.units: expected greater than or equal to 1, got 0
    SPEC.yaml:12: heads.0: head 'next' reads 'lstm_3', expected one of ['features', 'lstm_1']

Every wrong place is named at once, in the order of the file. A check of the whole specification
(`ModelSpec`, or of training against its data) begins its message with what it is about: `layer
'x'`, `head 'x'`, `field 'x'`, `decoder: layer 'x'` or the dotted path of a member; that is how its
line is found. A key that stands twice in one mapping is refused, because YAML's readers silently
keep the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from models.errors import SpecError
from models.spec.model import ModelSpec

_SUBJECT = re.compile(r"(?:(decoder): )?(layer|head|field) '([^']*)'|([a-z_]+(?:\.[a-z_]+)*):")
_SECTIONS: dict[str, tuple[str, ...]] = {
    "layer": ("layers",),
    "head": ("heads",),
    "field": ("events", "fields"),
}
_SHOWN_CHARACTERS = 60


class _Problem(NamedTuple):
    line: int
    place: str
    said: str


def read_spec(path: Path) -> ModelSpec:
    """Read and validate a `SPEC.yaml`.

    Raises:
        SpecError: the file cannot be read, is not YAML, or describes no model; one line for
            each wrong place, `file:line: place: what was expected, what came`.
    """
    try:
        node, repeated, data = _loaded(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise SpecError(f"{path}{line}: expected YAML, got {said}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: {' '.join(str(error).split())}") from error
    if repeated:
        raise _refusal(path, repeated)
    try:
        return ModelSpec.model_validate(data)
    except ValidationError as error:
        # A list without an item that is right counts as too short; its items say what is wrong.
        found = [
            item
            for item in error.errors(include_url=False)
            if item["type"] != "too_short" or len(item["input"]) < item["ctx"]["min_length"]
        ]
        raise _refusal(path, [_located(item, node, data) for item in found]) from error


def add_line_number(path: Path, error: SpecError) -> SpecError:
    """What was found wrong after the file was read, with the line that it is about.

    Without a line where the message does not begin with a place in the file, or the file is
    another by now.
    """
    try:
        node, _, data = _loaded(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return SpecError(f"{path}: {error}")
    subject, said = _subject(str(error), data)
    line, place = _line(node, (), subject)
    if not place:
        return SpecError(f"{path}: {error}")
    return _refusal(path, [_Problem(line, place, said)])


def _refusal(path: Path, problems: Sequence[_Problem]) -> SpecError:
    return SpecError(
        "\n".join(f"{path}:{line}: {place}: {said}" for line, place, said in sorted(problems))
    )


def _loaded(text: str) -> tuple[yaml.Node | None, list[_Problem], Any]:
    """The document with its lines, the keys that stand twice in it, and its data."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, [], None
        # Before the data is made: a merge (`<<`) then repeats what it overrides.
        repeated = list(_repeated_keys(node))
        return node, repeated, loader.construct_document(node)
    finally:
        loader.dispose()


def _located(item: ErrorDetails, node: yaml.Node | None, data: Any) -> _Problem:
    steps, said = item["loc"], item["msg"]
    subject: tuple[int | str, ...] = ()
    context = item.get("ctx", {})
    match item["type"]:
        case "missing":
            subject, said = steps[-1:], "expected a value, got none"
        case "extra_forbidden":
            said = "expected no member of this name"
        case "too_short":
            least, got = context["min_length"], len(item["input"])
            said = f"expected {least} or more, got {got}"
        case "union_tag_invalid":
            steps = (*steps, "kind")
            said = f"expected one of {context['expected_tags']}, got {context['tag']!r}"
        case "union_tag_not_found":
            subject, said = ("kind",), "expected a value, got none"
        case "value_error":
            subject, said = _subject(said.removeprefix("Value error, "), data)
        case _:
            said = said.replace("Input should be ", "expected ", 1)
            said = f"{said}, got {_short(item['input'])}"
    line, place = _line(node, steps, subject)
    return _Problem(line, place or "spec", said)


def _line(
    node: yaml.Node | None, steps: Sequence[int | str], subject: Sequence[int | str]
) -> tuple[int, str]:
    """The line of a place, counted from 1, and its dotted path.

    Steps that are not in the file are passed over, since validation names the kind of a layer as
    a step. What the message is about ends the path in any case: a member that is missing, or has
    its default, stands at the line around it.
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
        # The last of equal keys holds: those that a merge overrides stand before it.
        for key, value in reversed(node.value):
            if key.value == str(step):
                return key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        item = node.value[step]
        return item.start_mark.line + 1, item
    return None


def _subject(said: str, data: Any) -> tuple[tuple[int | str, ...], str]:
    """The path of what a message begins with, and the message, which need not repeat a path.

    The path is empty where the message names nothing in the file.
    """
    match = _SUBJECT.match(said)
    if match is None:
        return (), said
    inside, kind, name, dotted = match.groups()
    if dotted is not None:
        return tuple(dotted.split(".")), said[match.end() :].strip()
    section = _SECTIONS[kind]
    if inside is not None:
        section, said = (inside, *section), said.removeprefix(f"{inside}: ")
    for index, found in enumerate(_names(data, section)):
        if found == name:
            return (*section, index), said
    return (), said


def _names(data: Any, section: Sequence[str]) -> Iterator[str]:
    """Names of a section's items in order, filled in as `ModelSpec` does where there is none."""
    for key in section:
        data = data.get(key) if isinstance(data, Mapping) else None
    counts: dict[str, int] = {}
    for item in data if isinstance(data, list) else []:
        member = item if isinstance(item, Mapping) else {}
        kind = str(member.get("kind"))
        counts[kind] = counts.get(kind, 0) + 1
        yield str(member.get("name") or f"{kind}_{counts[kind]}")


def _repeated_keys(root: yaml.Node) -> Iterator[_Problem]:
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                waiting.append(value)
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines and name != "<<":
                    said = f"expected it once, it stands at line {lines[name]} already"
                    yield _Problem(line, name, said)
                lines.setdefault(name, line)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
