"""Converts the layer graph of a Keras model to a `ModelSpec`.

The walk follows the model's nodes from its inputs to its outputs, nested models included, and
collects all unsupported layers: the error names each of them by class and name, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
from keras import layers as kl
from numpy.typing import NDArray

from models.errors import ImportedModelError, SpecError
from models.importing.converted import ConvertedLayer, UnsupportedLayerError
from models.importing.inputs import InputColumns, ModelInput
from models.importing.layers import Converted, convert_layer
from models.importing.masks import is_mask, read_mask
from models.importing.naming import output_names, unique_layer_name, unique_output_name
from models.importing.notes import chunking_notes
from models.importing.reasons import EXPORT
from models.importing.recurrent import state_parts
from models.importing.reshaping import read_through
from models.importing.states import Call, Value, call_of, explicit_states, starts_from
from models.spec.chunking import DEFAULT_CHUNK_STEPS
from models.spec.layers import FEATURES
from models.spec.model import ModelSpec, parse_spec

_MERGING_OPERATIONS = {"Add": "add", "Multiply": "multiply"}
"""`x + y` and `x * y` of a functional model: Keras operations that are not layers."""
_CONSTANT = Value("", (), "a constant")
_MERGES = ("add", "multiply", "average", "concatenate")


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
        inputs: the Keras model's inputs, in their order.
        states: index of an input -> the state part that it holds.
        fixed_steps: the number of steps that the Keras model's input fixes, or None.
        lowest_code: the smallest code that is not padding.
        outputs: the Keras model's outputs, in their order.
        layers: Keras name, Keras class and our layer's name ("" if it was left out).
        notes: what the user should know.
    """

    spec: ModelSpec
    weights: dict[str, NDArray[np.float32]]
    inputs: tuple[ModelInput, ...]
    states: dict[int, str]
    fixed_steps: int | None
    lowest_code: int
    outputs: tuple[ModelOutput, ...]
    layers: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Walk:
    columns: InputColumns
    names: set[str]
    layers: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    table: list[tuple[str, str, str]] = field(default_factory=list)
    without_state: set[str] = field(default_factory=set)
    """Layers that start from another one, and have no stored state."""
    states: dict[int, str] = field(default_factory=dict)
    """Input of the model -> the state part that it holds."""
    owners: dict[str, str] = field(default_factory=dict)
    """State part that an input holds -> the Keras layer, for messages."""


def translate(model: Any, name: str) -> Translation:
    """Translate a built Sequential or functional Keras model.

    Args:
        model: the Keras model.
        name: the packaged model's name, a lower-case slug.

    Raises:
        ImportedModelError: an input is not a sequence, or the model has unsupported layers.
    """
    graph = functional_of(model)
    names = {FEATURES}
    columns = InputColumns.of(graph, names)
    walk = _Walk(columns, names)
    outputs = _walk_graph(walk, graph, columns.values)
    heads, model_outputs = _heads(walk, graph, outputs)
    walk.refused.extend(_unreturned_states(walk, model_outputs))
    walk.refused.extend(columns.problems())
    if walk.refused:
        raise ImportedModelError(
            "the model has unsupported layers:\n" + "\n".join(f"  {line}" for line in walk.refused)
        )
    embeddings, tables = columns.embeddings()
    data = {
        "name": name,
        "features": columns.count,
        "embeddings": embeddings,
        "layers": _with_slices(columns, walk.layers),
        "heads": [{**head, "input": _renamed(columns, head["input"])} for head in heads],
    }
    spec = _parse(data)
    if spec.chunk_limit is not None and (columns.steps or 0) > DEFAULT_CHUNK_STEPS:
        spec = _parse({**data, "max_chunk_steps": columns.steps})
    input_names = [tensor.name for tensor in graph.inputs]
    notes = [*walk.notes, *columns.notes(input_names)]
    if walk.states:
        given = ", ".join(f"{input_names[i]!r} is {part!r}" for i, part in walk.states.items())
        notes.append(
            f"the inputs that hold states are the stream's state, zero for a new stream: {given}"
        )
    notes += chunking_notes(spec, model, columns.steps, explicit=bool(walk.states))
    return Translation(
        spec,
        {**walk.weights, **tables},
        tuple(columns.inputs),
        walk.states,
        columns.steps,
        int(columns.masked),
        model_outputs,
        tuple(walk.table),
        tuple(notes),
    )


def _parse(data: dict[str, Any]) -> ModelSpec:
    try:
        return parse_spec(data, "the imported model")
    except SpecError as error:
        raise ImportedModelError(str(error)) from error


def _with_slices(columns: InputColumns, layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    slices, _ = columns.layers()
    return slices + [
        {**layer, "inputs": [_renamed(columns, name) for name in layer["inputs"]]}
        for layer in layers
    ]


def _renamed(columns: InputColumns, name: str) -> str:
    return columns.layers()[1].get(name, name)


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


def _walk_graph(walk: _Walk, graph: Any, inputs: list[Value]) -> list[Value]:
    """Convert every node of the graph, inputs first; returns the values of its outputs."""
    values = {id(tensor): value for tensor, value in zip(graph.inputs, inputs, strict=True)}
    nodes = [
        node
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
        if not node.is_input
    ]
    calls = Counter(id(node.operation) for node in nodes)
    for node in nodes:
        operation = node.operation
        if isinstance(operation, keras.Model):
            reads = [values[id(tensor)] for tensor in node.input_tensors]
            results = _walk_nested(walk, operation, [v for v in reads if not v.mask])
        else:
            tensors = call_of(node)
            call = replace(
                tensors,
                reads=[values[id(tensor)] for tensor in tensors.reads],
                initial=[None if t is None else values[id(t)] for t in tensors.initial],
                mask=None if tensors.mask is None else values.get(id(tensors.mask), _CONSTANT),
            )
            results = _add_node(walk, node, call, calls[id(operation)])
        values.update({id(t): v for t, v in zip(node.outputs, results, strict=True)})
    return [values[id(tensor)] for tensor in graph.outputs]


def _walk_nested(walk: _Walk, model: Any, reads: list[Value]) -> list[Value]:
    graph = functional_of(model)
    if len(graph.inputs) != len(reads):
        raise ImportedModelError(
            f"{type(model).__name__} {model.name!r}: expected {len(reads)} inputs, "
            f"got {len(graph.inputs)}"
        )
    return _walk_graph(walk, graph, reads)


def _add_node(walk: _Walk, node: Any, call: Call, calls: int) -> list[Value]:
    """Add one operation to the walk; an unsupported one is skipped, so that the walk continues."""
    operation = node.operation
    kind = type(operation).__name__
    owner = f"{kind} {operation.name!r}"
    shapes = [tuple(tensor.shape) for tensor in node.outputs]
    before = (len(walk.layers), dict(walk.weights))
    try:
        if is_mask(node):
            return [read_mask(node, call.reads, walk.notes)]
        call = replace(call, reads=[value for value in call.reads if not value.mask])
        if isinstance(operation, kl.Embedding):
            return [_embed(walk, operation, call, owner, shapes[0])]
        read = read_through(node, call.reads[0], walk.notes)
        if isinstance(read, Value):
            walk.table.append((operation.name, kind, ""))
            return [read]
        chain = _convert(operation, call, calls) if read is None else (read,)
        return _add_layer(walk, operation, call, shapes, chain)
    except UnsupportedLayerError as error:
        walk.refused.append(f"{owner}: {error}")
        walk.table.append((operation.name, kind, ""))
        del walk.layers[before[0] :]
        walk.weights = before[1]
    parts: list[str | None] = [part for own in state_parts(operation) for part in own]
    if not getattr(operation, "return_state", False) or len(parts) >= len(shapes):
        parts = []
    parts = [*[None] * (len(shapes) - len(parts)), *parts]
    name = call.reads[0].name
    return [Value(name, s, owner, p, refused=True) for s, p in zip(shapes, parts, strict=True)]


def _embed(walk: _Walk, layer: Any, call: Call, owner: str, shape: tuple[Any, ...]) -> Value:
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        raise UnsupportedLayerError("expected plain float32 weights, neither LoRA nor quantised")
    name = walk.columns.embed(call.reads[0], layer)
    walk.table.append((layer.name, "Embedding", name))
    return Value(name, shape, owner)


def _add_layer(
    walk: _Walk, operation: Any, call: Call, shapes: list[tuple[Any, ...]], chain: Converted
) -> list[Value]:
    owner = f"{type(operation).__name__} {operation.name!r}"
    if not chain[0].data:
        if chain[0].note:
            walk.notes.append(f"{owner}: {chain[0].note}")
        walk.table.append((operation.name, type(operation).__name__, ""))
        return [replace(call.reads[0], shape=shapes[0], owner=owner)]
    reads = [walk.columns.read(value) for value in call.reads]
    names = [
        unique_layer_name(
            walk.names, operation.name if len(chain) == 1 else f"{operation.name}_{number}"
        )
        for number in range(1, len(chain) + 1)
    ]
    sources: list[str | None] = [None] * len(chain)
    if call.initial:
        held = explicit_states(operation, call.initial, names)
        if not held:
            sources = list(starts_from(operation, call.initial))
        walk.states.update(held)
        walk.owners.update(dict.fromkeys(held.values(), owner))
    for name, converted, source in zip(names, chain, sources, strict=True):
        data = {"name": name, "inputs": reads, **converted.data}
        if source is not None:
            data["starts_from"] = source
            walk.without_state.add(name)
        walk.layers.append(data)
        walk.weights.update({f"{name}.{part}": w for part, w in converted.weights.items()})
        if converted.note:
            walk.notes.append(f"{owner}: {converted.note}")
        walk.table.append((operation.name, type(operation).__name__, name))
        reads = [name]
    states = state_parts(operation) if getattr(operation, "return_state", False) else []
    returned = [
        Value(name, shape, owner, part)
        for (name, part), shape in zip(
            [(name, part) for name, own in zip(names, states, strict=False) for part in own],
            shapes[1:],
            strict=True,
        )
    ]
    return [Value(names[-1], shapes[0], owner), *returned]


def _convert(operation: Any, call: Call, calls: int) -> Converted:
    kind, reads = type(operation).__name__, call.reads
    merging = type(operation).__module__.startswith("keras.") and kind in _MERGING_OPERATIONS
    if merging and not isinstance(operation, keras.layers.Layer):
        converted: Converted = (ConvertedLayer({"kind": _MERGING_OPERATIONS[kind]}),)
        if len(reads) < 2:
            raise UnsupportedLayerError(
                "it merges a layer with a constant; use a layer for it, such as Rescaling"
            )
    else:
        converted = convert_layer(operation, reads[0].shape)
    if calls > 1:
        raise UnsupportedLayerError(
            f"it is used {calls} times in the model, and each use would need its own state "
            "and weights; use a separate layer for each"
        )
    merges = converted[0].data.get("kind") in _MERGES
    if len(reads) > 1 and not merges:
        raise UnsupportedLayerError("it reads more than one tensor; expected one")
    if call.mask is not None and (call.mask.refused or not call.mask.mask):
        raise UnsupportedLayerError(
            "it is called with a mask; every event of a stream counts: leave the mask out, or use "
            "Masking at the front"
        )
    if any(value.part for value in reads):
        raise UnsupportedLayerError(
            "it reads a layer's returned state; only sequences are passed on: read the layer's "
            "output, whose last step is the returned hidden state"
        )
    if any(value.state_input is not None for value in reads):
        raise UnsupportedLayerError(
            "it reads an input that is the initial state of a layer too; expected initial_state "
            "to be the inputs themselves, and their only use"
        )
    if any(value.arranged for value in reads):
        raise UnsupportedLayerError(
            "it reads the last step's values as Reshape arranged them; expected Reshape to be the "
            "last layer"
        )
    if len({len(value.shape) for value in reads}) > 1:
        raise UnsupportedLayerError(
            "it merges whole sequences with a last step; expected return_sequences=True for all, "
            "or the last step of all (x[:, -1])"
        )
    if (
        merges
        and converted[0].data["kind"] != "concatenate"
        and len({v.shape[-1] for v in reads}) > 1
    ):
        widths = [value.shape[-1] for value in reads]
        raise UnsupportedLayerError(f"it broadcasts widths {widths}; expected equal ones")
    return converted


def _heads(
    walk: _Walk, graph: Any, outputs: Sequence[Value]
) -> tuple[list[dict[str, Any]], tuple[ModelOutput, ...]]:
    heads: list[dict[str, Any]] = []
    model_outputs: list[ModelOutput] = []
    keras_names = output_names(graph, sum(value.part is None for value in outputs))
    names: set[str] = set()
    for index, value in enumerate(outputs):
        if value.part is not None and value.name in walk.without_state:
            walk.refused.append(
                f"{value.owner}: output {index} of the model is its returned state, and a layer "
                "that starts from another one keeps none; leave this output out"
            )
            continue
        if value.part is not None:
            part = f"{value.name}.{value.part}"
            model_outputs.append(ModelOutput(index, part=part))
            if part not in walk.owners:
                walk.notes.append(f"output {index} is the state part {part!r}, not an output")
            continue
        head = unique_output_name(names, keras_names[index])
        if head != keras_names[index] and not value.refused:
            walk.notes.append(f"output {keras_names[index]!r} is called {head!r}")
        try:
            name = walk.columns.read(value)
        except UnsupportedLayerError as error:
            walk.refused.append(f"the model: its output {keras_names[index]!r}: {error}")
            continue
        heads.append({"kind": "sequence", "name": head, "input": name, "shape": value.arranged})
        last_only = len(value.shape) == 2 or bool(value.arranged)
        model_outputs.append(ModelOutput(index, head=head, last_only=last_only))
    if not heads and not walk.refused:
        walk.refused.append(
            "the model: expected an output that is not a layer's state; return the layer's "
            "sequence too"
        )
    return heads, tuple(model_outputs)


def _unreturned_states(walk: _Walk, outputs: Sequence[ModelOutput]) -> list[str]:
    """Layers whose initial state is an input, and whose new state is not an output, as lines."""
    returned = {output.part for output in outputs}
    missing: dict[str, list[str]] = {}
    for part, owner in walk.owners.items():
        if part not in returned:
            missing.setdefault(owner, []).append(part)
    return [
        f"{owner}: its initial_state is given as inputs, but {' and '.join(parts)} after the call "
        "is not an output of the model; expected all of its new states as outputs "
        "(return_state=True)"
        for owner, parts in missing.items()
    ]
