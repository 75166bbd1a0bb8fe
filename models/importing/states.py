"""Tensors of a Keras model's calls, and the initial states among them.

Keras accepts any tensor as `initial_state`. Supported are two patterns; everything else is
unsupported, with the reason:

    explicit states   inputs of the model, whose new values the model returns: they are the
                      stream's state, which the service keeps in place of the caller
    hand-off          all states that one recurrent layer returned, in its order, passed to a layer
                      with the same states: `starts_from` in a `ModelSpec`
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers as kl

from models.importing.converted import UnsupportedLayerError
from models.importing.recurrent import state_parts

_FROM_ELSEWHERE = (
    "a layer starts from its own state of the stream, from inputs of the model that are its whole "
    "state, or from the states that another returned in the same call"
)


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of the Keras model.

    Attributes:
        name: the layer of the `ModelSpec` that computes it; "" for a model's input.
        shape: the Keras shape.
        owner: class and name of the Keras layer, for messages.
        part: which part of a recurrent layer's returned state it is, or None.
        refused: whether its layer is unsupported.
        columns: the columns of the model's inputs that it is, or None if a layer computes it.
        state_input: which input of the model it is, if it is one that holds a state.
        mask: whether it marks the steps that are not padding.
        arranged: the shape that a `Reshape` gives to the values of the last step, if it does.
    """

    name: str
    shape: tuple[Any, ...]
    owner: str
    part: str | None = None
    refused: bool = False
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
    for nodes in graph._nodes_by_depth.values():
        for node in nodes:
            if node.is_input:
                continue
            tensors = call_of(node).initial
            inner = node.operation
            if isinstance(inner, keras.Model) and hasattr(inner, "_nodes_by_depth"):
                tensors = [node.input_tensors[place] for place in state_inputs(inner)]
            states.update(index[id(tensor)] for tensor in tensors if id(tensor) in index)
    return states


def explicit_states(
    layer: Any, initial: Sequence[Value | None], names: Sequence[str]
) -> dict[int, str]:
    """The state parts that inputs of the model hold, for a layer that starts from inputs.

    Args:
        layer: the Keras layer.
        initial: the tensors of its `initial_state`.
        names: the layers of the `ModelSpec` that it becomes.

    Returns:
        Index of the input -> state part; empty if the layer does not start from inputs.

    Raises:
        UnsupportedLayerError: it starts from some inputs and from something else, or they are not
            its whole state.
    """
    inputs = [v.state_input for v in initial if v is not None and v.state_input is not None]
    if not inputs:
        return {}
    parts = [
        f"{name}.{part}"
        for name, own in zip(names, state_parts(layer), strict=True)
        for part in own
    ]
    if isinstance(layer, kl.Bidirectional):
        raise UnsupportedLayerError(
            "its initial_state is given as inputs, and a bidirectional layer has no state that "
            "goes on; leave initial_state out"
        )
    if len(set(inputs)) != len(parts) or len(initial) != len(parts):
        raise UnsupportedLayerError(
            f"its initial_state is given by {len(set(inputs))} inputs of the model; expected one "
            f"for each of its states {parts}, in this order"
        )
    return dict(zip(inputs, parts, strict=True))


def starts_from(layer: Any, initial: Sequence[Value | None]) -> list[str]:
    """The layers of the `ModelSpec` whose returned states a Keras layer is called with.

    Args:
        layer: the Keras layer.
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
        if value.part is None and not value.refused:
            raise UnsupportedLayerError(
                f"its initial_state is the output of {value.owner}; {_FROM_ELSEWHERE} "
                "(return_state=True)"
            )
    owners = list(dict.fromkeys(value.owner for value in states))
    if len(owners) > 1:
        raise UnsupportedLayerError(
            f"its initial_state comes from {' and '.join(owners)}; expected one layer's"
        )
    cells = state_parts(layer)
    actual, expected = [value.part for value in states], [part for own in cells for part in own]
    names, place = [], 0
    for own in cells:
        names.append({value.name for value in states[place : place + len(own)]})
        place += len(own)
    of_one = all(len(name) == 1 for name in names)
    if (actual != expected or not of_one) and not any(value.refused for value in states):
        raise UnsupportedLayerError(
            f"its initial_state is {actual} of {owners[0]}; expected its {expected}, in this order"
        )
    return [next(iter(name), "") for name in names]
