"""Reads the nodes of an ONNX file, with those of subgraphs and local functions, and no weights.

It reads the file as protobuf does, also one that is written to mislead: ONNX Runtime runs what
protobuf reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from models.onnx.decoding import DecodingError, decode_string, fields

_BYTES = 2
"""The wire type of strings and messages."""

_OWN_DOMAINS = ("ai.onnx", "com.microsoft", "com.ms.")
"""Domains whose operators are those of ONNX and ONNX Runtime, whatever function a model defines."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node.

    Attributes:
        operator: its type, behind its domain unless that is the default one.
        name: may be empty.
        inputs: names of the tensors that it reads; "" is an input that it leaves out.
        outputs: names of the tensors that it writes.
        graphs: its subgraphs, by the names of its attributes.
        scan_inputs: number of its inputs that a `Scan` runs over.
    """

    operator: str
    name: str
    inputs: list[str]
    outputs: list[str]
    graphs: dict[str, NodeGraph]
    scan_inputs: int

    def __str__(self) -> str:
        return f"the operator {self.operator} (node {self.name or self.outputs[0]!r})"

    def graph(self, name: str) -> NodeGraph:
        """The subgraph of that attribute; DecodingError if there is none."""
        if name not in self.graphs:
            raise DecodingError(f"{self} has no subgraph {name!r}")
        return self.graphs[name]


@dataclass(frozen=True, slots=True)
class NodeGraph:
    """A graph, a subgraph or the body of a local function, by the names of its tensors."""

    inputs: list[str]
    outputs: list[str]
    constants: list[str]
    nodes: list[Node]


def read_nodes(model: memoryview) -> tuple[NodeGraph, dict[str, NodeGraph]]:
    """The graph of a model, and its local functions by domain and name.

    Raises:
        DecodingError: the bytes are no ONNX file, or ambiguous.
    """
    graphs: list[memoryview] = []
    functions: dict[str, NodeGraph] = {}
    for number, value in _messages(model):
        if number == 7:
            graphs.append(value)
        elif number == 25:
            name, function = _read_function(value)
            if "." not in name or name.startswith(_OWN_DOMAINS) or name in functions:
                raise DecodingError(
                    f"the local function {name!r} has a domain of ONNX Runtime, or the name of "
                    "another one; export the model with functions inlined"
                )
            functions[name] = function
    return _read_graph(_merged(graphs)), functions


def _read_function(message: memoryview) -> tuple[str, NodeGraph]:
    strings: dict[int, list[str]] = {}
    nodes = []
    for number, value in _messages(message):
        if number == 7:
            nodes.append(_read_node(value))
        elif number in (1, 4, 5, 10):
            strings.setdefault(number, []).append(decode_string(value))
    name = _operator(strings.get(10), strings.get(1))
    return name, NodeGraph(strings.get(4, []), strings.get(5, []), [], nodes)


def _read_graph(message: memoryview) -> NodeGraph:
    graph = NodeGraph([], [], [], [])
    for number, value in _messages(message):
        if number == 1:
            graph.nodes.append(_read_node(value))
        elif number == 5:
            graph.constants.append(_string(value, 8))
        elif number == 11:
            graph.inputs.append(_string(value, 1))
        elif number == 12:
            graph.outputs.append(_string(value, 1))
        elif number == 15:
            values = [part for place, part in _messages(value) if place == 1]
            graph.constants.append(_string(_merged(values), 8))
    return graph


def _read_node(message: memoryview) -> Node:
    strings: dict[int, list[str]] = {}
    attributes: dict[str, memoryview] = {}
    for number, value in _messages(message):
        if number in (1, 2, 3, 4, 7):
            strings.setdefault(number, []).append(decode_string(value))
        elif number == 5:
            name = _string(value, 1)
            if name in attributes:
                raise DecodingError(f"expected one attribute {name!r} of a node, got two")
            attributes[name] = value
    parts = {
        name: [part for number, part in _messages(attribute) if number == 6]
        for name, attribute in attributes.items()
    }
    counts = [
        value
        for number, value, _ in fields(attributes.get("num_scan_inputs", memoryview(b"")))
        if number == 3 and isinstance(value, int)
    ]
    return Node(
        _operator(strings.get(7), strings.get(4)),
        strings.get(3, [""])[-1],
        strings.get(1, []),
        strings.get(2, []),
        {name: _read_graph(_merged(part)) for name, part in parts.items() if part},
        counts[-1] if counts else 0,
    )


def _operator(domains: list[str] | None, names: list[str] | None) -> str:
    """Domain and type of an operator or function; of repeated fields the last one counts."""
    domain, name = (domains or [""])[-1], (names or [""])[-1]
    return name if domain in ("", "ai.onnx") else f"{domain}.{name}"


def _string(message: memoryview, field: int) -> str:
    """A string of a message; the last one counts."""
    found = [value for number, value in _messages(message) if number == field]
    return decode_string(found[-1]) if found else ""


def _merged(messages: list[memoryview]) -> memoryview:
    """A message that is given in several fields, which protobuf merges."""
    return messages[0] if len(messages) == 1 else memoryview(b"".join(messages))


def _messages(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The strings and messages of a message; protobuf skips a field of another wire type."""
    for number, value, encoded in fields(message):
        if encoded[0] & 7 == _BYTES and not isinstance(value, int):
            yield number, value
