"""Initial states of recurrent Keras layers: their own state, or one passed within the call.

Keras accepts any tensor as `initial_state`. Supported is a hand-off: all states that one recurrent
layer returned, in its order, passed to a layer with the same states. That is `starts_from` in a
`ModelSpec`; everything else is unsupported, with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers as kl

from models.importing.layers import UnsupportedLayerError

_FROM_ELSEWHERE = (
    "a layer starts from its own state of the stream, or from the states that another returned "
    "in the same call"
)


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of the Keras model.

    Attributes:
        name: the layer of the `ModelSpec` that computes it.
        shape: the Keras shape.
        owner: class and name of the Keras layer, for messages.
        part: which part of a recurrent layer's returned state it is, or None.
        refused: whether its layer is unsupported.
    """

    name: str
    shape: tuple[Any, ...]
    owner: str
    part: str | None = None
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """The tensors of one call of a layer.

    Attributes:
        reads: the input tensors.
        initial: each tensor of its `initial_state`; None if it is not one of the model's.
        masked: whether it was called with a `mask`.
    """

    reads: Sequence[Any]
    initial: Sequence[Any] = ()
    masked: bool = False


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
        arguments.get("mask") is not None,
    )


def state_parts(layer: Any) -> tuple[str, ...]:
    """The parts of the state that a Keras layer starts from and returns, in Keras' order."""
    if isinstance(layer, kl.Bidirectional):
        inner = state_parts(layer.forward_layer)
        return tuple(f"{side}.{part}" for side in ("forward", "backward") for part in inner)
    if isinstance(layer, kl.LSTM):
        return ("hidden", "carry")
    return ("hidden",) if isinstance(layer, kl.GRU) else ()


def starts_from(layer: Any, initial: Sequence[Value | None]) -> str:
    """The layer of the `ModelSpec` whose returned state a Keras layer is called with.

    Args:
        layer: the Keras layer.
        initial: the tensors of its `initial_state`; None for one that is no layer's.

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
    actual, expected = [value.part for value in states], list(state_parts(layer))
    if actual != expected and not any(value.refused for value in states):
        raise UnsupportedLayerError(
            f"its initial_state is {actual} of {owners[0]}; expected its {expected}, in this order"
        )
    return states[0].name


def initial_inputs(graph: Any) -> Iterator[str]:
    """For each layer that starts from inputs of the model, why it is unsupported."""
    names = {id(tensor): tensor.name for tensor in graph.inputs}
    for nodes in graph._nodes_by_depth.values():
        for node in nodes:
            if node.is_input:
                continue
            inputs = [names[id(t)] for t in call_of(node).initial if id(t) in names]
            if inputs:
                owner = f"{type(node.operation).__name__} {node.operation.name!r}"
                yield f"{owner}: its initial_state is given as inputs {inputs}; {_FROM_ELSEWHERE}"
