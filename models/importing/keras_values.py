"""The tensors of a Keras model, and what is read through: masks, slices, `Reshape`, `Masking`.

Masks mark the padding of training sequences, which streams do not have. Keras computes the mask of
`Masking` and of `Embedding(mask_zero=True)` by operations besides the layers: the input differs
from a constant. On events that never equal it the mask is all true, and the layers compute what
they compute without it; so it is left out, and a note says which events not to send. A mask of
anything else is not supported.

A slice of the steps can be served if it is the last one, `x[:, -1]`: there is an output for every
step, of which the last equals Keras' output.

Keras accepts any tensor as `initial_state`. Two patterns are supported:

    explicit states   inputs of the model, whose new values the model returns: they are the
                      stream's state, which the service keeps in place of the caller
    hand-off          all states that one recurrent layer returned, in its order, passed to a layer
                      with the same states: `starts_from` in a `ModelSpec`
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from keras import layers as kl

from models.importing.keras_layers import (
    LAST_STEP,
    ConvertedLayer,
    UnsupportedLayerError,
    state_parts,
)

_FROM_ELSEWHERE = (
    "a layer starts from its own state of the stream, from inputs of the model that are its whole "
    "state, or from the states that another returned in the same call"
)
_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of the Keras model.

    Attributes:
        name: the layer of the `ModelSpec` that computes it; "" for a model's input.
        shape: the Keras shape.
        owner: class and name of the Keras layer, for messages.
        part: which part of a recurrent layer's returned state it is, or None.
        rejected: whether its layer is unsupported.
        columns: the columns of the model's inputs that it is, or None if a layer computes it.
        state_input: which input of the model it is, if it is one that holds a state.
        mask: whether it marks the steps that are not padding.
        arranged: the shape that a `Reshape` gives to the values of the last step, if it does.
    """

    name: str
    shape: tuple[Any, ...]
    owner: str
    part: str | None = None
    rejected: bool = False
    columns: range | None = None
    state_input: int | None = None
    mask: bool = False
    arranged: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """The tensors of one call of a layer.

    Attributes:
        reads: the input tensors.
        initial: each tensor of its `initial_state`; None if it is not one of the model's.
        mask: its `mask`, if it was called with one.
    """

    reads: Sequence[Any]
    initial: Sequence[Any] = ()
    mask: Any = None


def owner_of(operation: Any) -> str:
    """Class and name of an operation, for messages."""
    return f"{type(operation).__name__} {operation.name!r}"


def call_of(node: Any) -> Call:
    """The tensors that a node's operation is called with."""
    if not isinstance(node.operation, (kl.RNN, kl.Bidirectional)):
        return Call(node.input_tensors)
    signature = inspect.signature(node.operation.call)
    arguments = signature.bind(*node.arguments.args, **node.arguments.kwargs).arguments
    initial = arguments.get("initial_state")
    states = [] if initial is None else keras.tree.flatten(initial)
    return Call(
        [arguments["sequences"]],
        [state if isinstance(state, keras.KerasTensor) else None for state in states],
        arguments.get("mask"),
    )


def state_inputs(graph: Any) -> set[int]:
    """Which inputs of a graph are a recurrent layer's initial state, nested models included."""
    index = {id(tensor): place for place, tensor in enumerate(graph.inputs)}
    states: set[int] = set()
    for node in (each for nodes in graph._nodes_by_depth.values() for each in nodes):
        if node.is_input:
            continue
        tensors, inner = call_of(node).initial, node.operation
        if isinstance(inner, keras.Model) and hasattr(inner, "_nodes_by_depth"):
            tensors = [node.input_tensors[place] for place in state_inputs(inner)]
        states.update(index[id(tensor)] for tensor in tensors if id(tensor) in index)
    return states


def explicit_states(
    layer: Any, initial: Sequence[Value | None], names: Sequence[str]
) -> dict[int, str]:
    """Index of an input -> the state part that it holds; empty if no state is an input.

    Args:
        initial: the tensors of the layer's `initial_state`.
        names: the layers of the `ModelSpec` that it becomes.

    Raises:
        UnsupportedLayerError: some are inputs, and they are not its whole state.
    """
    inputs = [v.state_input for v in initial if v is not None and v.state_input is not None]
    if not inputs:
        return {}
    if isinstance(layer, kl.Bidirectional):
        raise UnsupportedLayerError(
            "its initial_state is given as inputs, and a bidirectional layer has no state that "
            "goes on; leave initial_state out"
        )
    owned = zip(names, state_parts(layer), strict=True)
    parts = [f"{name}.{part}" for name, own in owned for part in own]
    if len(set(inputs)) != len(parts) or len(initial) != len(parts):
        raise UnsupportedLayerError(
            f"its initial_state is given by {len(set(inputs))} inputs of the model; expected one "
            f"for each of its states {parts}, in this order"
        )
    return dict(zip(inputs, parts, strict=True))


def starts_from(layer: Any, initial: Sequence[Value | None]) -> list[str]:
    """The layers of the `ModelSpec` whose returned states a Keras layer is called with.

    Args:
        initial: the tensors of its `initial_state`; None for one that no layer returned.

    Returns:
        One layer for each layer of the `ModelSpec` that this one becomes.

    Raises:
        UnsupportedLayerError: they are anything else than one layer's whole state in its order.
    """
    states = [value for value in initial if value is not None]
    if len(states) < len(initial):
        raise UnsupportedLayerError(f"its initial_state is a constant; {_FROM_ELSEWHERE}")
    for value in states:
        if value.part is None and not value.rejected:
            raise UnsupportedLayerError(
                f"its initial_state is the output of {value.owner}; {_FROM_ELSEWHERE} "
                "(return_state=True)"
            )
    owners = list(dict.fromkeys(value.owner for value in states))
    if len(owners) > 1:
        raise UnsupportedLayerError(
            f"its initial_state comes from {' and '.join(owners)}; expected one layer's"
        )
    parts, remaining = state_parts(layer), iter(states)
    names = [{value.name for _, value in zip(own, remaining, strict=False)} for own in parts]
    actual, expected = [value.part for value in states], [part for own in parts for part in own]
    if not any(value.rejected for value in states) and (
        actual != expected or any(len(sources) > 1 for sources in names)
    ):
        raise UnsupportedLayerError(
            f"its initial_state is {actual} of {owners[0]}; expected its {expected}, in this order"
        )
    return [next(iter(sources), "") for sources in names]


def is_mask(node: Any) -> bool:
    """Whether a node of the Keras model is an operation that computes a mask."""
    is_operation = not isinstance(node.operation, keras.layers.Layer)
    return is_operation and all(tensor.dtype == "bool" for tensor in node.outputs)


def read_mask(node: Any, reads: Sequence[Value], notes: list[str]) -> Value:
    """The mask that such a node computes, rejected if it depends on anything but padding.

    What the user should know is added to `notes`.
    """
    operation = node.operation
    kind = type(operation).__name__
    marks_padding = kind == "NotEqual" and len(reads) == 1 and reads[0].columns is not None
    if marks_padding:
        (constant,) = [value for value in node.arguments.args if not hasattr(value, "shape")]
        every = "" if len(reads[0].shape) == 2 else "every value "
        notes.append(
            f"a mask (Masking, mask_zero) marks padding of training sequences, {reads[0].owner} "
            f"with {every}{constant:g}; a stream has no padding and such an event counts like any "
            "other: do not send it"
        )
    reads_values = not marks_padding and kind not in ("ZerosLike", "OnesLike")
    rejected = any(value.rejected if value.mask else reads_values for value in reads)
    shape = tuple(node.outputs[0].shape)
    return Value("", shape, owner_of(operation), rejected=rejected, mask=True)


def read_through(node: Any, value: Value, notes: list[str]) -> Value | ConvertedLayer | None:
    """The value that a slice, `Reshape` or `Masking` gives, or the `slice` that it is.

    None for any other operation. What the user should know is added to `notes`.

    Raises:
        UnsupportedLayerError: it chooses or arranges something else.
    """
    operation, shape = node.operation, tuple(node.outputs[0].shape)
    if isinstance(operation, kl.Masking):
        if value.columns is None:
            raise UnsupportedLayerError(
                "it would skip steps by the values of a layer before it; expected it at the "
                "front, where it reads the model's input"
            )
        return replace(value, shape=shape)
    result = replace(value, shape=shape, owner=owner_of(operation))
    if isinstance(operation, kl.Reshape):
        return _reshape(value, result)
    return _get_item(node, value, result, notes) if type(operation).__name__ == "GetItem" else None


def _reshape(value: Value, result: Value) -> Value:
    before, after = value.shape, result.shape
    is_column = value.columns is not None and len(value.columns) == 1 and len(before) == 2
    is_same = len(after) == len(before) and after[1:] == before[1:]
    if is_same or (is_column and len(after) == 3 and after[2] == 1):
        return result
    if len(before) == 2 and value.columns is None:
        return replace(result, arranged=after[1:])
    raise UnsupportedLayerError(
        f"it rearranges steps and features, {list(before)} to {list(after)}; expected "
        "[batch, steps] to [batch, steps, 1]: give the rows to the model as they are"
    )


def _get_item(node: Any, value: Value, result: Value, notes: list[str]) -> Value | ConvertedLayer:
    key = [*node.arguments.args[1:], *node.arguments.kwargs.values()][-1]
    items = list(key) if isinstance(key, (list, tuple)) else [key]
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[at : at + 1] = [_ALL] * (len(value.shape) - len(items) + (at < len(items)))
    text = f"[{', '.join(map(_format, items))}]"
    if value.part is not None or value.state_input is not None or items[0] != _ALL:
        raise UnsupportedLayerError(f"{text}: expected a slice of a sequence, x[:, ...]")
    features = items[-1]
    if len(value.shape) == 3 and items[1] != _ALL:
        if items[1] != -1 or features != _ALL or value.columns is not None:
            raise UnsupportedLayerError(
                f"{text} takes some of the steps; expected the last one of a layer's output, "
                "x[:, -1], since a stream gets an output at every step"
            )
        notes.append(f"{result.owner}: x[:, -1]: {LAST_STEP}")
        return result
    if features == _ALL:
        return result
    is_sequence = len(value.shape) == 3 or value.columns is None
    chosen = (range(value.shape[-1]) if value.columns is None else value.columns)[features]
    if not is_sequence or (isinstance(chosen, int) and value.columns is None):
        raise UnsupportedLayerError(
            f"{text} takes one value without its axis; expected to keep it, x[..., 2:3]"
        )
    if isinstance(chosen, int):
        chosen = range(chosen, chosen + 1)
    if chosen.step != 1 or not chosen:
        raise UnsupportedLayerError(f"{text}: expected adjacent features, x[..., 2:5]")
    if value.columns is None:
        return ConvertedLayer({"kind": "slice", "start": chosen.start, "stop": chosen.stop})
    return replace(result, columns=chosen)


def _format(item: Any) -> str:
    if not isinstance(item, slice):
        return str(item)
    start, stop = ("" if end is None else end for end in (item.start, item.stop))
    return f"{start}:{stop}" + ("" if item.step in (None, 1) else f":{item.step}")
