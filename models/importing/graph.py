"""Converts the layer graph of a Keras model to a `ModelSpec`.

The walk follows the model's nodes from its one input to its outputs, nested models included, and
collects all unsupported layers: the error names each of them by class and name, with the reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from models.errors import ImportedModelError, SpecError
from models.importing.layers import ConvertedLayer, UnsupportedLayerError, convert_layer
from models.importing.states import (
    Call,
    Value,
    call_of,
    initial_inputs,
    starts_from,
    state_parts,
)
from models.spec.chunking import DEFAULT_CHUNK_STEPS
from models.spec.layers import FEATURES, RECURRENT
from models.spec.model import ModelSpec, parse_spec

_MERGING_OPERATIONS = {"Add": "add", "Multiply": "multiply"}
"""`x + y` and `x * y` of a functional model: Keras operations that are no layers."""


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
        outputs: the Keras model's outputs, in their order.
        layers: Keras name, Keras class and our layer's name ("" if it was left out).
        notes: what the user should know.
    """

    spec: ModelSpec
    weights: dict[str, NDArray[np.float32]]
    outputs: tuple[ModelOutput, ...]
    layers: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Walk:
    layers: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=lambda: {FEATURES})
    table: list[tuple[str, str, str]] = field(default_factory=list)
    without_state: set[str] = field(default_factory=set)
    """Layers that start from another one, and keep no state of their own."""


def translate(model: Any, name: str) -> Translation:
    """Translate a built Sequential or functional Keras model.

    Args:
        model: the Keras model.
        name: the packaged model's name, a lower-case slug.

    Raises:
        ImportedModelError: it has another number of inputs than one, an input that is not
            [batch, steps, features], or unsupported layers.
    """
    graph = functional_of(model)
    features = _input_features(graph)
    walk = _Walk()
    shape = tuple(graph.inputs[0].shape)
    outputs = _walk_graph(walk, graph, [Value(FEATURES, shape, "the input")])
    heads, model_outputs = _heads(walk, graph, outputs)
    if walk.refused:
        raise ImportedModelError(
            "the model has unsupported layers:\n" + "\n".join(f"  {line}" for line in walk.refused)
        )
    data = {"name": name, "features": features, "layers": walk.layers, "heads": heads}
    spec = _parse(data)
    if spec.chunk_limit is not None and (shape[1] or 0) > DEFAULT_CHUNK_STEPS:
        spec = _parse({**data, "max_chunk_steps": shape[1]})
    notes = (*walk.notes, *_chunking_notes(spec, model))
    return Translation(spec, walk.weights, model_outputs, tuple(walk.table), notes)


def _parse(data: dict[str, Any]) -> ModelSpec:
    try:
        return parse_spec(data, "the imported model")
    except SpecError as error:
        raise ImportedModelError(str(error)) from error


def _chunking_notes(spec: ModelSpec, model: Any) -> list[str]:
    """Notes on how the model's chunking relates to the original."""
    if spec.chunking == "per_chunk":
        recurrent = [layer for layer in spec.layers if isinstance(layer, RECURRENT)]
        starts = " and ".join(
            f"{to.name!r} from {to.starts_from!r}" for to in recurrent if to.starts_from
        )
        return [
            f"chunking per_chunk: states are passed on within a call ({starts}), so a chunk, of at "
            f"most {spec.chunk_limit} steps, is one call of the original that goes on from the "
            "stream's state; other chunk boundaries give other outputs"
        ]
    notes = []
    if spec.chunking == "whole":
        notes.append(
            f"chunking whole: it takes whole sequences of at most {spec.chunk_limit} steps "
            "(predict), and has no streams"
        )
        if any(getattr(layer, "stateful", False) for layer in model._flatten_layers()):
            notes.append("stateful=True is left out: each sequence begins in the zero state")
    return notes


def functional_of(model: Any) -> Any:
    """The graph of a Sequential or functional model; ImportedModelError for any other."""
    if isinstance(model, keras.Sequential):
        model = model._functional
    if not isinstance(model, keras.Model) or not hasattr(model, "_nodes_by_depth"):
        raise ImportedModelError(
            "expected a Sequential or functional Keras model with a known input shape"
        )
    return model


def _input_features(graph: Any) -> int:
    shapes = [tuple(tensor.shape) for tensor in graph.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][2] is None:
        problem = f"expected one input of shape [batch, steps, features], got {shapes}"
        raise ImportedModelError(
            "\n".join([problem, *(f"  {line}" for line in initial_inputs(graph))])
        )
    return int(shapes[0][2])


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
            results = _walk_nested(walk, operation, reads)
        else:
            tensors = call_of(node)
            call = replace(
                tensors,
                reads=[values[id(tensor)] for tensor in tensors.reads],
                initial=[None if t is None else values[id(t)] for t in tensors.initial],
            )
            results = _add_layer(walk, operation, call, node.outputs, calls[id(operation)])
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


def _add_layer(
    walk: _Walk, operation: Any, call: Call, outputs: list[Any], calls: int
) -> list[Value]:
    """Add one layer to the walk; an unsupported one is skipped, so that the walk continues."""
    kind = type(operation).__name__
    owner = f"{kind} {operation.name!r}"
    shapes = [tuple(tensor.shape) for tensor in outputs]
    name = call.reads[0].name
    refused = False
    try:
        converted = _convert(operation, call, calls)
    except UnsupportedLayerError as error:
        walk.refused.append(f"{owner}: {error}")
        converted, refused = ConvertedLayer(), True
    if converted.note:
        walk.notes.append(f"{owner}: {converted.note}")
    if converted.data:
        name = _unique_name(walk.names, operation.name)
        walk.layers.append({"name": name, "inputs": [v.name for v in call.reads], **converted.data})
        walk.weights.update({f"{name}.{part}": w for part, w in converted.weights.items()})
    if "starts_from" in converted.data:
        walk.without_state.add(name)
    walk.table.append((operation.name, kind, name if converted.data else ""))
    states = state_parts(operation) if getattr(operation, "return_state", False) else ()
    parts = [*[None] * (len(shapes) - len(states)), *states]
    return [
        Value(name, shape, owner, part, refused) for shape, part in zip(shapes, parts, strict=True)
    ]


def _convert(operation: Any, call: Call, calls: int) -> ConvertedLayer:
    kind, reads = type(operation).__name__, call.reads
    merging = type(operation).__module__.startswith("keras.") and kind in _MERGING_OPERATIONS
    if merging and not isinstance(operation, keras.layers.Layer):
        converted = ConvertedLayer({"kind": _MERGING_OPERATIONS[kind]})
        if len(reads) < 2:
            raise UnsupportedLayerError("it merges a layer with a constant; use a layer for it")
    else:
        converted = convert_layer(operation, len(reads[0].shape))
    if calls > 1:
        raise UnsupportedLayerError(
            f"it is used {calls} times in the model, and each use would need its own state "
            "and weights"
        )
    merges = converted.data.get("kind") in ("add", "multiply", "average", "concatenate")
    if len(reads) > 1 and not merges:
        raise UnsupportedLayerError("it reads more than one tensor")
    if call.masked:
        raise UnsupportedLayerError("it is called with a mask; every event of a stream counts")
    if any(value.part for value in reads):
        raise UnsupportedLayerError(
            "it reads a layer's returned state; only sequences are passed on"
        )
    if len({len(value.shape) for value in reads}) > 1:
        raise UnsupportedLayerError("it merges whole sequences with a last step")
    if merges and converted.data["kind"] != "concatenate" and len({v.shape[-1] for v in reads}) > 1:
        widths = [value.shape[-1] for value in reads]
        raise UnsupportedLayerError(f"it broadcasts widths {widths}; expected equal ones")
    if call.initial:
        data = {**converted.data, "starts_from": starts_from(operation, call.initial)}
        return replace(converted, data=data)
    return converted


def _heads(
    walk: _Walk, graph: Any, outputs: Sequence[Value]
) -> tuple[list[dict[str, Any]], tuple[ModelOutput, ...]]:
    heads: list[dict[str, Any]] = []
    model_outputs: list[ModelOutput] = []
    sequences = sum(value.part is None for value in outputs)
    names: set[str] = set()
    for index, value in enumerate(outputs):
        if value.part is not None and value.name in walk.without_state:
            walk.refused.append(
                f"{value.owner}: output {index} of the model is its returned state, and a layer "
                "that starts from another one keeps none"
            )
            continue
        if value.part is not None:
            part = f"{value.name}.{value.part}"
            model_outputs.append(ModelOutput(index, part=part))
            walk.notes.append(f"output {index} is the state part {part!r}, not an output")
            continue
        keras_name = "output" if sequences == 1 else str(graph.output_names[index])
        head = _unique_name(names, keras_name)
        heads.append({"kind": "sequence", "name": head, "input": value.name})
        model_outputs.append(ModelOutput(index, head=head, last_only=len(value.shape) == 2))
    if not heads:
        walk.refused.append("the model: expected an output that is not a layer's state")
    return heads, tuple(model_outputs)


def _unique_name(used: set[str], keras_name: str) -> str:
    """A valid, unused name that resembles the Keras name."""
    name = re.sub(r"[^a-z0-9_]+", "_", keras_name.lower()).strip("_")[:56] or "layer"
    if not name[0].isalpha():
        name = f"layer_{name}"
    free, number = name, 1
    while free in used:
        number += 1
        free = f"{name}_{number}"
    used.add(free)
    return free
