"""Converts the layer graph of a Keras model to a `ModelSpec`.

The walk follows the model's nodes from its inputs to its outputs, nested models included, and
collects all unsupported layers: the error names each of them by class and name, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import layers as kl
from numpy.typing import NDArray

from models.errors import ImportedModelError, SpecError
from models.importing.keras_inputs import (
    InputColumns,
    output_names,
    unique_layer_name,
    unique_output_name,
)
from models.importing.keras_layers import (
    EXPORT,
    Converted,
    ConvertedLayer,
    UnsupportedLayerError,
    convert_layer,
    expect_float32,
    state_parts,
)
from models.importing.keras_values import (
    Call,
    Value,
    call_of,
    explicit_states,
    is_mask,
    owner_of,
    read_mask,
    read_through,
    starts_from,
)
from models.spec.chunking import DEFAULT_CHUNK_STEPS
from models.spec.layers import FEATURES, Recurrent
from models.spec.model import ModelSpec, parse_spec

_MERGING_OPERATIONS = {
    "Add": "add",
    "Subtract": "subtract",
    "Multiply": "multiply",
    "Maximum": "maximum",
    "Minimum": "minimum",
}
"""`x + y`, `x * y` and others of a functional model: Keras operations that are not layers."""
_CONSTANT = Value("", (), "a constant")
_ELEMENTWISE = ("add", "subtract", "multiply", "average", "maximum", "minimum")
_MERGES = (*_ELEMENTWISE, "concatenate")


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """The source of one output of the Keras model in the packaged model.

    Attributes:
        index: its place among the Keras model's outputs, flattened.
        head: the head that gives it, or None.
        part: the state part that gives it (a layer's returned state), or None.
        last_only: whether Keras gives the last step alone, [B, U].
    """

    index: int
    head: str | None = None
    part: str | None = None
    last_only: bool = False


@dataclass(frozen=True, slots=True)
class Translation:
    """A Keras model as a specification and its weights.

    Attributes:
        spec: the model.
        weights: name -> float32, as `models.spec.layout.weight_shapes` requires.
        columns: the Keras model's inputs.
        states: index of an input -> the state part that it holds.
        outputs: the Keras model's outputs, in their order.
        layers: Keras name, Keras class and our layer's name ("" if it was left out).
        notes: what the user should know.
    """

    spec: ModelSpec
    weights: dict[str, NDArray[np.float32]]
    columns: InputColumns
    states: dict[int, str]
    outputs: tuple[ModelOutput, ...]
    layers: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


def translate(model: Any, name: str) -> Translation:
    """Translate a built Sequential or functional Keras model to one of that name.

    Raises:
        ImportedModelError: an input is not a sequence, or the model has unsupported layers.
    """
    graph = functional_of(model)
    walk = _Walk(graph)
    columns = walk.columns
    heads, outputs = walk.add_outputs(graph, walk.add_graph(graph, columns.values))
    walk.rejected += [*walk.unreturned_states(outputs), *columns.problems()]
    if walk.rejected:
        raise ImportedModelError(
            "the model has unsupported layers:\n" + "\n".join(f"  {line}" for line in walk.rejected)
        )
    embeddings, tables = columns.embeddings()
    slices, renamed = columns.layers()
    for layer in walk.layers:
        layer["inputs"] = [renamed.get(each, each) for each in layer["inputs"]]
    data = {
        "name": name,
        "features": columns.count,
        "embeddings": embeddings,
        "layers": [*slices, *walk.layers],
        "heads": [{**head, "input": renamed.get(head["input"], head["input"])} for head in heads],
    }
    try:
        spec = parse_spec(data, "the imported model")
        if spec.chunk_limit is not None and (columns.steps or 0) > DEFAULT_CHUNK_STEPS:
            data["max_chunk_steps"] = columns.steps
            spec = parse_spec(data, "the imported model")
    except SpecError as error:
        raise ImportedModelError(str(error)) from error
    notes = [*walk.notes, *columns.notes()]
    if walk.states:
        given = (f"{columns.inputs[i].name!r} is {part!r}" for i, part in walk.states.items())
        notes.append(
            "the inputs that hold states are the stream's state, zero for a new stream: "
            + ", ".join(given)
        )
    return Translation(
        spec,
        {**walk.weights, **tables},
        columns,
        walk.states,
        outputs,
        tuple(walk.table),
        (*notes, *_chunking_notes(spec, model, columns.steps, explicit=bool(walk.states))),
    )


def functional_of(model: Any) -> Any:
    """The graph of a Sequential or functional model; ImportedModelError for any other."""
    if isinstance(model, keras.Sequential):
        model = model._functional
    if not isinstance(model, keras.Model) or not hasattr(model, "_nodes_by_depth"):
        raise ImportedModelError(
            "expected a Sequential or functional Keras model with a known input shape; begin it "
            f"with keras.Input((None, features)), or {EXPORT}"
        )
    return model


class _Walk:
    """State of the walk over the nodes: the layers that they have become so far.

    Attributes:
        layers: layers as plain spec data.
        weights: their weights by name.
        rejected: unsupported layers, one line each.
        notes: what the user should know.
        table: Keras name, Keras class and our layer's name of each layer.
        states: input of the model -> the state part that it holds.
    """

    def __init__(self, graph: Any):
        self._names = {FEATURES}
        self.columns = InputColumns.of(graph, self._names)
        self.layers: list[dict[str, Any]] = []
        self.weights: dict[str, NDArray[np.float32]] = {}
        self.rejected: list[str] = []
        self.notes: list[str] = []
        self.table: list[tuple[str, str, str]] = []
        self.states: dict[int, str] = {}
        self._without_state: set[str] = set()
        """Layers that start from another one, and have no stored state."""
        self._owners: dict[str, str] = {}
        """State part that an input holds -> the Keras layer, for messages."""

    def add_graph(self, graph: Any, inputs: Sequence[Value]) -> list[Value]:
        """Convert every node of a graph, inputs first; returns the values of its outputs."""
        values = {id(tensor): value for tensor, value in zip(graph.inputs, inputs, strict=True)}
        by_depth = [graph._nodes_by_depth[depth] for depth in sorted(graph._nodes_by_depth)]
        nodes = [node for each in reversed(by_depth) for node in each if not node.is_input]
        calls = Counter(id(node.operation) for node in nodes)
        for node in nodes:
            operation = node.operation
            if isinstance(operation, keras.Model):
                reads = [values[id(tensor)] for tensor in node.input_tensors]
                results = self._add_nested(operation, [v for v in reads if not v.mask])
            else:
                tensors = call_of(node)
                call = Call(
                    [values[id(tensor)] for tensor in tensors.reads],
                    [None if t is None else values[id(t)] for t in tensors.initial],
                    None if tensors.mask is None else values.get(id(tensors.mask), _CONSTANT),
                )
                results = self._add_node(node, call, calls[id(operation)])
            values.update({id(t): v for t, v in zip(node.outputs, results, strict=True)})
        return [values[id(tensor)] for tensor in graph.outputs]

    def _add_nested(self, model: Any, reads: Sequence[Value]) -> list[Value]:
        graph = functional_of(model)
        if len(graph.inputs) != len(reads):
            raise ImportedModelError(
                f"{owner_of(model)}: expected {len(reads)} inputs, got {len(graph.inputs)}"
            )
        return self.add_graph(graph, reads)

    def _add_node(self, node: Any, call: Call, calls: int) -> list[Value]:
        """Add one operation; an unsupported one is skipped, so that the walk continues."""
        operation, owner = node.operation, owner_of(node.operation)
        shapes = [tuple(tensor.shape) for tensor in node.outputs]
        if is_mask(node):
            return [read_mask(node, call.reads, self.notes)]
        call = replace(call, reads=[value for value in call.reads if not value.mask])
        try:
            if isinstance(operation, kl.Embedding):
                expect_float32(operation)
                name = self.columns.embed(call.reads[0], operation)
                self._list(operation, name)
                return [Value(name, shapes[0], owner)]
            read = read_through(node, call.reads[0], self.notes)
            if isinstance(read, Value):
                self._list(operation, "")
                return [read]
            chain = (read,) if read is not None else _convert(operation, call, calls)
            return self._add_layer(operation, call, shapes, chain)
        except UnsupportedLayerError as error:
            self.rejected.append(f"{owner}: {error}")
            self._list(operation, "")
        parts: list[str | None] = [part for own in state_parts(operation) for part in own]
        if not getattr(operation, "return_state", False) or len(parts) >= len(shapes):
            parts = []
        parts = [*[None] * (len(shapes) - len(parts)), *parts]
        name = call.reads[0].name
        return [Value(name, s, owner, p, rejected=True) for s, p in zip(shapes, parts, strict=True)]

    def _list(self, operation: Any, name: str) -> None:
        self.table.append((operation.name, type(operation).__name__, name))

    def _add_layer(
        self, operation: Any, call: Call, shapes: Sequence[tuple[Any, ...]], chain: Converted
    ) -> list[Value]:
        owner = owner_of(operation)
        notes = [f"{owner}: {each.note}" for each in chain if each.note]
        if not chain[0].data:
            self.notes += notes
            self._list(operation, "")
            return [replace(call.reads[0], shape=shapes[0], owner=owner)]
        reads = [self.columns.read(value) for value in call.reads]
        own_names = [operation.name]
        if len(chain) > 1:
            own_names = [f"{operation.name}_{number}" for number in range(1, len(chain) + 1)]
        names = [unique_layer_name(self._names, each) for each in own_names]
        sources: Sequence[str | None] = [None] * len(chain)
        if call.initial:
            held = explicit_states(operation, call.initial, names)
            if not held:
                sources = starts_from(operation, call.initial)
            self.states.update(held)
            self._owners.update(dict.fromkeys(held.values(), owner))
        self.notes += notes
        for name, converted, source in zip(names, chain, sources, strict=True):
            data = {"name": name, "inputs": reads, **converted.data}
            if source is not None:
                data["starts_from"] = source
                self._without_state.add(name)
            self.layers.append(data)
            self.weights.update({f"{name}.{part}": w for part, w in converted.weights.items()})
            self._list(operation, name)
            reads = [name]
        values = [Value(names[-1], shapes[0], owner)]
        if getattr(operation, "return_state", False):
            owned = zip(names, state_parts(operation), strict=True)
            returned = [(name, part) for name, own in owned for part in own]
            for (name, part), shape in zip(returned, shapes[1:], strict=True):
                values.append(Value(name, shape, owner, part))
        return values

    def add_outputs(
        self, graph: Any, outputs: Sequence[Value]
    ) -> tuple[list[dict[str, Any]], tuple[ModelOutput, ...]]:
        """The heads as plain spec data, and what each output of the model becomes."""
        heads: list[dict[str, Any]] = []
        model_outputs: list[ModelOutput] = []
        keras_names = output_names(graph, sum(value.part is None for value in outputs))
        names: set[str] = set()
        for index, (value, keras_name) in enumerate(zip(outputs, keras_names, strict=True)):
            if value.part is not None:
                part = f"{value.name}.{value.part}"
                if value.name in self._without_state:
                    self.rejected.append(
                        f"{value.owner}: output {index} of the model is its returned state, and a "
                        "layer that starts from another one keeps none; leave this output out"
                    )
                    continue
                model_outputs.append(ModelOutput(index, part=part))
                if part not in self._owners:
                    self.notes.append(f"output {index} is the state part {part!r}, not an output")
                continue
            head = unique_output_name(names, keras_name)
            if head != keras_name and not value.rejected:
                self.notes.append(f"output {keras_name!r} is called {head!r}")
            try:
                name = self.columns.read(value)
            except UnsupportedLayerError as error:
                self.rejected.append(f"the model: its output {keras_name!r}: {error}")
                continue
            heads.append({"kind": "sequence", "name": head, "input": name, "shape": value.arranged})
            last_only = len(value.shape) == 2 or bool(value.arranged)
            model_outputs.append(ModelOutput(index, head=head, last_only=last_only))
        if not heads and not self.rejected:
            self.rejected.append(
                "the model: expected an output that is not a layer's state; return the layer's "
                "sequence too"
            )
        return heads, tuple(model_outputs)

    def unreturned_states(self, outputs: Sequence[ModelOutput]) -> list[str]:
        """Layers with an initial state as input, whose new state is not an output, as lines."""
        returned = {output.part for output in outputs}
        missing: dict[str, list[str]] = {}
        for part, owner in self._owners.items():
            if part not in returned:
                missing.setdefault(owner, []).append(part)
        return [
            f"{owner}: its initial_state is given as inputs, but {' and '.join(parts)} after the "
            "call is not an output of the model; expected all of its new states as outputs "
            "(return_state=True)"
            for owner, parts in missing.items()
        ]


def _convert(operation: Any, call: Call, calls: int) -> Converted:
    """The layers that an operation becomes, if it can read what it is called with."""
    kind, reads = type(operation).__name__, call.reads
    is_operation = type(operation).__module__.startswith("keras.") and not isinstance(
        operation, kl.Layer
    )
    if is_operation and kind in _MERGING_OPERATIONS:
        converted: Converted = (ConvertedLayer({"kind": _MERGING_OPERATIONS[kind]}),)
        if len(reads) < 2:
            raise UnsupportedLayerError(
                "it merges a layer with a constant; use a layer for it, such as Rescaling"
            )
    else:
        converted = convert_layer(operation, reads[0].shape)
    merge = converted[0].data.get("kind")
    widths = [value.shape[-1] for value in reads]
    masked = call.mask is not None and (call.mask.rejected or not call.mask.mask)
    problems = [
        (
            calls > 1 and isinstance(operation, (kl.RNN, kl.Bidirectional)),
            f"it is used {calls} times in the model, and each use needs its own state; use a "
            "separate layer for each",
        ),
        (len(reads) > 1 and merge not in _MERGES, "it reads more than one tensor; expected one"),
        (
            masked,
            "it is called with a mask; every event of a stream counts: leave the mask out, or use "
            "Masking at the front",
        ),
        (
            any(value.part for value in reads),
            "it reads a layer's returned state; only sequences are passed on: read the layer's "
            "output, whose last step is the returned hidden state",
        ),
        (
            any(value.state_input is not None for value in reads),
            "it reads an input that is the initial state of a layer too; expected initial_state "
            "to be the inputs themselves, and their only use",
        ),
        (
            any(value.arranged for value in reads),
            "it reads the last step's values as Reshape arranged them; expected Reshape to be the "
            "last layer",
        ),
        (
            len({len(value.shape) for value in reads}) > 1,
            "it merges whole sequences with a last step; expected return_sequences=True for all, "
            "or the last step of all (x[:, -1])",
        ),
        (
            merge in _ELEMENTWISE and len(set(widths)) > 1,
            f"it broadcasts widths {widths}; expected equal ones",
        ),
    ]
    for is_present, problem in problems:
        if is_present:
            raise UnsupportedLayerError(problem)
    return converted


def _chunking_notes(
    spec: ModelSpec, model: Any, steps: int | None, *, explicit: bool
) -> Sequence[str]:
    """How the model's chunking relates to the original, whose states may be inputs (`explicit`)."""
    stateful = any(getattr(layer, "stateful", False) for layer in model._flatten_layers())
    if spec.chunking == "per_chunk":
        recurrent = [layer for layer in spec.layers if isinstance(layer, Recurrent)]
        starts = " and ".join(
            f"{to.name!r} from {to.starts_from!r}" for to in recurrent if to.starts_from
        )
        return [
            f"chunking per_chunk: states are passed on within a call ({starts}), so a chunk, of at "
            f"most {spec.chunk_limit} steps, is one call of the original that continues from the "
            "stream's state; other chunk boundaries give other outputs"
        ]
    if spec.chunking == "whole":
        left_out = "stateful=True is left out: each sequence begins in the zero state"
        return [
            f"chunking whole: it takes whole sequences of at most {spec.chunk_limit} steps "
            "(predict), and has no streams",
            *([left_out] if stateful else []),
        ]
    return [] if explicit or steps is None else window_notes(model, steps)


def window_notes(model: Any, steps: int) -> Sequence[str]:
    """What differs between a stream and a model of windows of that many steps."""
    if steps < 2 or any(getattr(layer, "stateful", False) for layer in model._flatten_layers()):
        return []
    return [
        f"the original reads windows of {steps} events, each from the zero state (stateful=False): "
        "a stream carries its state beyond them, and its outputs equal the original's on the first "
        f"{steps} events alone; to begin from the zero state every {steps} events, import it with "
        f"--reset-every {steps}"
    ]
