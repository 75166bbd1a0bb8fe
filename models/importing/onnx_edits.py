"""Edits of an imported ONNX graph: inputs that become constants, and inputs with a context.

A context is what a graph reads of earlier rows in front of each row, which its callers keep: the
last samples of an audio chunk, or the other rows of a window. It becomes a state pair:

    context, row -> [context | row], which the graph reads; its last values are the next context
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import Any

import numpy as np

from models.errors import ImportedModelError
from models.onnx.messages import (
    MOST,
    DataType,
    GraphProto,
    NodeProto,
    Nodes,
    inner_messages,
    tensor_of,
    tensor_value,
)
from models.spec.onnx_network import Axes


def fix_input(graph: Any, name: str, value: float) -> None:
    """Replace an input of a GraphProto by a constant.

    Raises:
        ImportedModelError: there is no such input, or it is of another type.
    """
    named = [at for at, each in enumerate(graph.input) if each.name == name]
    if not named:
        names = [each.name for each in graph.input]
        raise ImportedModelError(f"--constant {name}: expected one of the inputs {names}")
    declared = graph.input[named[0]].type.tensor_type
    try:
        dtype = DataType(declared.elem_type).name.lower()
    except ValueError:
        raise ImportedModelError(f"--constant {name}: expected an input of numbers") from None
    # a dynamic axis, usually the batch's, is broadcast
    shape = [max(1, size.dim_value) for size in declared.shape.dim]
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.full(shape, value).astype(dtype)
    if not (array == value).all() and not dtype.startswith("float"):
        raise ImportedModelError(f"--constant {name}={value:g}: expected a value of {dtype}")
    del graph.input[named[0]]
    for tensor in [each for each in graph.initializer if each.name == name]:
        graph.initializer.remove(tensor)
    graph.initializer.append(tensor_of(name, array))


def add_context(
    graph: Any, name: str, shape: Sequence[int | str | None], context: int, axes: Axes
) -> dict[str, str]:
    """Give an input of a GraphProto a context, kept in a new state pair.

    Args:
        name: the input; afterwards it takes rows without their context.
        shape: its declared dimensions, with the context.
        context: C, the number of values in front of each row; 0 adds no state pair.
        axes: their order; `step` for an input of a fixed number of values, whatever its rank.

    Returns:
        The state pair, output by input.

    Raises:
        ImportedModelError: the context leaves no column, or is longer than a row in a graph of
            several steps.
    """
    is_step = axes == "step"
    fixed = [size for size in shape[1:] if isinstance(size, int)]
    values = prod(fixed) if is_step else fixed[-1]
    row, most = values - context, values - 1 if is_step else values // 2
    if not 0 <= context <= most:
        raise ImportedModelError(
            f"--context {context}: expected at most {most} of the {values} values that the graph "
            f"reads for a row of {name}"
        )
    declared = next(each.type.tensor_type for each in graph.input if each.name == name)
    before, after, whole = (f"{name}.{part}" for part in ("context", "next_context", "whole"))
    for node in inner_messages(graph, NodeProto):
        node.input[:] = [whole if each == name else each for each in node.input]
    sizes = declared.shape.dim
    if is_step:
        del sizes[2:]
    last, time = len(sizes) - 1, 1 if axes == "batch_major" else 0
    _set_size(sizes[last], row)
    for pair, tensors in ((before, graph.input), (after, graph.output)) if context else ():
        tensor = tensor_value(pair, DataType(declared.elem_type), ())
        kept = tensor.type.tensor_type.shape.dim
        kept.extend(sizes)
        _set_size(kept[last], context)
        if not is_step:
            _set_size(kept[time], 1)
        tensors.append(tensor)
    nodes = Nodes(GraphProto())
    if is_step:
        flat = nodes.add("Concat", before, name, axis=1) if context else name
        nodes.add("Reshape", flat, nodes.integers(0, *fixed[:-1], -1), name=whole)
        if context:
            places = nodes.integers(*range(row, values))
            nodes.add("Gather", flat, places, name=after, axis=1)  # slices differ by opset
    else:
        tails = nodes.part(name, -context, MOST, last)
        contexts = nodes.concat([before, tails], time)
        nodes.add("Concat", nodes.part(contexts, 0, -1, time), name, name=whole, axis=last)
        nodes.add("Identity", nodes.part(contexts, -1, MOST, time), name=after)
    _put_in_front(graph, nodes.graph, {name, before, after, whole}, f"{whole}.")
    return {before: after} if context else {}


def _set_size(dimension: Any, size: int) -> None:
    dimension.ClearField("dim_param")
    dimension.dim_value = size


def _put_in_front(graph: Any, first: Any, shared: Collection[str], prefix: str) -> None:
    """Run the nodes of another GraphProto first; its other names than the shared get a prefix."""
    for node in first.node:
        for names in (node.input, node.output):
            names[:] = [each if each in shared else prefix + each for each in names]
    for tensor in first.initializer:
        tensor.name = prefix + tensor.name
    graph.initializer.extend(first.initializer)
    nodes = [*first.node, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
