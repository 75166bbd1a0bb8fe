"""What the cuts of a stream mean to a network, and which layers see a chunk as a whole.

    invisible   every layer goes on from its own state: the cuts change nothing
    per_chunk   some layer looks at the chunk as a whole, so that each chunk is one Keras call
                from the carried state, and its cuts are part of what is computed
    whole       some layer reads backward from the end: only whole sequences have an end

Three things follow from the layers alone: the word above, which layers know the chunk's later
steps (what they give must not be trained or judged on those), and which give the same value at
every step. No runtime here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from models.spec.layers import (
    RECURRENT,
    ActivationLayer,
    AttentionLayer,
    BatchNormalizationLayer,
    BidirectionalLayer,
    DenseLayer,
    DropoutLayer,
    GruLayer,
    Layer,
    LayerNormalizationLayer,
    LstmLayer,
    MergeLayer,
    Recurrent,
    returned_state,
)

Chunking = Literal["invisible", "per_chunk", "whole"]

_STEP_BY_STEP = (
    DenseLayer,
    ActivationLayer,
    DropoutLayer,
    LayerNormalizationLayer,
    BatchNormalizationLayer,
    MergeLayer,
)
"""Layers that do the same to every step, and so give one value where they read one."""

DEFAULT_CHUNK_STEPS = 1024
"""Longest chunk of a network that sees it as a whole, where the specification says nothing."""


def chunking_of(layers: Iterable[Layer], *, blocks: bool) -> Chunking:
    """What cuts mean to a network of these layers.

    Args:
        blocks: whether the stream is cut into blocks of its own (`models.spec.blocks`).
    """
    if blocks:
        return "invisible"
    layers = tuple(layers)
    if any(isinstance(layer, BidirectionalLayer) for layer in layers):
        return "whole"
    return "per_chunk" if any(_sees_the_chunk(layer) for layer in layers) else "invisible"


def non_causal_layers(layers: Iterable[Layer]) -> frozenset[str]:
    """Layers whose value at a step depends on later steps of the same chunk."""
    found: set[str] = set()
    for layer in layers:
        if _sees_the_chunk(layer) or found.intersection(layer.inputs):
            found.add(layer.name)
    return frozenset(found)


def chunk_constant_layers(layers: Iterable[Layer]) -> frozenset[str]:
    """Layers that give the same value at every step of a chunk."""
    found: set[str] = set()
    for layer in layers:
        if isinstance(layer, AttentionLayer):
            one_value = layer.over == "chunk"
        else:
            one_value = isinstance(layer, _STEP_BY_STEP) and found.issuperset(layer.inputs)
        if one_value:
            found.add(layer.name)
    return frozenset(found)


def check_starts_from(layer: Recurrent, before: Mapping[str, Layer]) -> None:
    """Refuse a layer that cannot start from the layer it names; ValueError says why.

    Args:
        before: the layers that come before it, by name.
    """
    if layer.starts_from is None:
        return
    source = before.get(layer.starts_from)
    if not isinstance(source, RECURRENT):
        names = [name for name, other in before.items() if isinstance(other, RECURRENT)]
        raise ValueError(
            f"layer {layer.name!r} starts from {layer.starts_from!r}, "
            f"expected a recurrent layer before it: {names}"
        )
    wanted, given = returned_state(layer), returned_state(source)
    if wanted != given:
        raise ValueError(
            f"layer {layer.name!r} starts from {source.name!r}, which returns {_listed(given)}; "
            f"expected {_listed(wanted)}"
        )


def _sees_the_chunk(layer: Layer) -> bool:
    match layer:
        case LstmLayer() | GruLayer():
            return layer.starts_from is not None
        case BidirectionalLayer():
            return True
        case AttentionLayer():
            return layer.over == "chunk"
        case _:
            return False


def _listed(parts: Mapping[str, int]) -> str:
    return " and ".join(f"{name} [{size}]" for name, size in parts.items())
