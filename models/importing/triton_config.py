"""Reads the state pairs of a Triton model from its `config.pbtxt`.

    sequence_batching {
      state [{ input_name: "h_in" output_name: "h_out" data_type: TYPE_FP32 dims: [ 8 ]
               initial_state: { data_type: TYPE_FP32 dims: [ 8 ] zero_data: true } }]
    }

The file is protobuf's text format. Its fields are read by name, and unknown ones are ignored, in
every form; the library of protobuf reads only forms whose fields it knows.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.artifact.files import inside, open_regular
from models.errors import ImportedModelError

Message = dict[str, list[Any]]

MAX_CONFIG_BYTES = 2**20
MAX_INITIAL_BYTES = 2**28
_DTYPES = {
    "TYPE_BOOL": "bool",
    **{f"TYPE_FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"TYPE_INT{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"TYPE_UINT{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
_CONTROLS = {f"CONTROL_SEQUENCE_{kind.upper()}": kind for kind in ("start", "ready", "end")}
_TOKEN = re.compile(
    r"""\s+|\#[^\n]*|(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
    r"""|(?P<word>[A-Za-z_][\w.]*|-?[\d.][\w.+-]*)|(?P<mark>[{}<>\[\]:,;-])"""
)


class TritonControl(NamedTuple):
    """A control input.

    Attributes:
        kind: `start`, `ready` or `end`.
        values: of false and of true.
    """

    name: str
    kind: str
    values: tuple[float, float]


class TritonConfig:
    """The sequence batching of one model.

    Args:
        text: the content of the file.
        folder: the model's folder, where `initial_state/` is.

    Raises:
        ImportedModelError: it is not such a file, has no state pairs, or a control input that Carry
            cannot give.
    """

    def __init__(self, text: str, folder: Path | None = None):
        self._folder = folder
        try:
            config = _read_message(_tokens(text), "")
        except RecursionError as error:
            raise ImportedModelError("config.pbtxt: messages are nested too deeply") from error
        sequence: Message = _last(config, "sequence_batching", {})
        self._states: list[Message] = sequence.get("state", [])
        if not self._states:
            raise ImportedModelError(
                "config.pbtxt: expected `sequence_batching { state [...] }` with the state pairs, "
                "found none; name them with `--state IN=OUT`"
            )
        self.controls = tuple(map(_control, sequence.get("control_input", [])))
        self.inputs = tuple(str(_last(each, "name")) for each in config.get("input", []))
        self.outputs = tuple(str(_last(each, "name")) for each in config.get("output", []))
        self.pairs = {
            str(_last(state, "input_name")): str(_last(state, "output_name"))
            for state in self._states
        }

    def initial_values(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The values of states that do not start from zero, by state input."""
        for state in self._states:
            for initial in state.get("initial_state", []):
                if "data_file" in initial:
                    yield str(_last(state, "input_name")), self._read_file(initial)

    def _read_file(self, initial: Message) -> NDArray[Any]:
        name, kind = str(_last(initial, "data_file")), str(_last(initial, "data_type"))
        dims = [int(size) for size in initial.get("dims", [])]
        if kind not in _DTYPES or self._folder is None or not inside(name):
            raise ImportedModelError(
                f"config.pbtxt: initial_state: expected a file in `initial_state/` and a type of "
                f"numbers, got {name!r} and {kind}"
            )
        folder = self._folder / "initial_state"
        try:
            with open_regular(folder / name, folder) as stream:
                data = stream.read(MAX_INITIAL_BYTES)
        except OSError as error:
            raise ImportedModelError(
                f"config.pbtxt: initial_state/{name}: cannot be read: {error.strerror}"
            ) from error
        values = np.frombuffer(data, np.dtype(_DTYPES[kind]).newbyteorder("<"))
        if values.size != int(np.prod(dims)):
            raise ImportedModelError(
                f"config.pbtxt: initial_state/{name}: expected {dims} values of {kind}, "
                f"got {len(data)} bytes"
            )
        return values.reshape(dims)


def _control(declared: Message) -> TritonControl:
    """One control input: its name, kind, and the values of false and true."""
    name, control = str(_last(declared, "name")), _last(declared, "control", {})
    kind = str(_last(control, "kind"))
    if kind not in _CONTROLS:
        raise ImportedModelError(
            f"config.pbtxt: control_input {name!r}: expected one of {sorted(_CONTROLS)}, got "
            f"{kind}; Carry's streams have names instead of correlation ids, so export the model "
            "without it"
        )
    values = next((control[key] for key in control if key.endswith("_false_true")), ["0", "1"])
    try:
        no, yes = (float({"false": "0", "true": "1"}.get(each, each)) for each in values)
    except (TypeError, ValueError) as error:
        raise ImportedModelError(
            f"config.pbtxt: control_input {name!r}: expected the values of false and true, got "
            f"{values}"
        ) from error
    return TritonControl(name, _CONTROLS[kind], (no, yes))


def _tokens(text: str) -> list[str]:
    """Names, numbers, strings and marks in reverse, behind a "" for the end."""
    tokens, at = [""], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            line = text.count("\n", 0, at) + 1
            raise ImportedModelError(
                f"config.pbtxt:{line}: expected protobuf's text format, got {text[at : at + 20]!r}"
            )
        at = match.end()
        if match.lastgroup:
            tokens.append(match.group())
    return tokens[:1] + tokens[:0:-1]


def _read_message(tokens: list[str], end: str) -> Message:
    """The fields up to a closing mark."""
    fields: Message = {}
    while (name := tokens.pop()) != end:
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            raise _unexpected_error(f"the name of a field or {end!r}", name)
        values = fields.setdefault(name, [])
        _skip(tokens, ":")
        if _skip(tokens, "["):
            while not _skip(tokens, "]"):
                values.append(_read_value(tokens))
                _skip(tokens, ",")
        else:
            values.append(_read_value(tokens))
        while _skip(tokens, ",;"):
            pass
    return fields


def _read_value(tokens: list[str]) -> Message | str:
    value = tokens.pop()
    if value in ("{", "<"):
        return _read_message(tokens, "}" if value == "{" else ">")
    if value in "}>[]:,;-":
        raise _unexpected_error("a value", value)
    try:
        return str(ast.literal_eval(value)) if value[0] in "\"'" else value
    except (SyntaxError, ValueError) as error:
        raise _unexpected_error("a string", value) from error


def _skip(tokens: list[str], marks: str) -> bool:
    """Pass a token that is one of these marks, if it is the next one."""
    is_there = tokens[-1] != "" and tokens[-1] in marks
    if is_there:
        tokens.pop()
    return is_there


def _unexpected_error(expected: str, got: str) -> ImportedModelError:
    found = f", got {got!r}" if got else " before the end"
    return ImportedModelError(f"config.pbtxt: expected {expected}{found}")


def _last(message: Message, name: str, default: Any = "") -> Any:
    """The last value of a field, which counts in protobuf."""
    values = message.get(name)
    return values[-1] if values else default
