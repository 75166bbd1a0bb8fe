"""Chunking semantics of a network: whether its outputs depend on how a stream is cut into chunks.

invisible   every layer is causal and continues from its own state: outputs do not depend on
            the chunk boundaries
per_chunk   some layer sees the chunk as a whole: each chunk is one Keras call from the carried
            state, and outputs depend on the chunk boundaries
whole       some layer reads backward: only complete sequences can be processed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from models.spec.layers import AttentionLayer, BidirectionalLayer, Layer, Recurrent

Chunking = Literal["invisible", "per_chunk", "whole"]

DEFAULT_CHUNK_STEPS = 1024
"""Default of the longest chunk of a network that sees a chunk as a whole."""


def chunking_of(layers: Iterable[Layer], *, blocks: bool) -> Chunking:
    """Determine the chunking semantics of a network.

    Args:
        blocks: whether the stream is processed in blocks (`models.spec.blocks`).
    """
    if blocks:
        return "invisible"
    layers = tuple(layers)
    if any(isinstance(layer, BidirectionalLayer) for layer in layers):
        return "whole"
    return "per_chunk" if any(layer.is_non_causal for layer in layers) else "invisible"


def non_causal_layers(layers: Iterable[Layer]) -> frozenset[str]:
    """Names of the layers whose value at a step depends on later steps of the same chunk: their
    outputs must not be trained or evaluated on later steps."""
    names: set[str] = set()
    for layer in layers:
        if layer.is_non_causal or names.intersection(layer.inputs):
            names.add(layer.name)
    return frozenset(names)


def chunk_constant_layers(layers: Iterable[Layer]) -> frozenset[str]:
    """Names of the layers that have the same value at every step of a chunk."""
    names: set[str] = set()
    for layer in layers:
        is_source = isinstance(layer, AttentionLayer) and layer.over == "chunk"
        if is_source or (layer.is_stepwise and names.issuperset(layer.inputs)):
            names.add(layer.name)
    return frozenset(names)


def check_starts_from(layer: Recurrent, before: Mapping[str, Layer]) -> None:
    """Check that a layer can take its initial state from the layer in `starts_from`.

    Args:
        before: the preceding layers, by name.

    Raises:
        ValueError: it cannot.
    """
    if layer.starts_from is None:
        return
    source = before.get(layer.starts_from)
    if not isinstance(source, Recurrent):
        names = [name for name, other in before.items() if isinstance(other, Recurrent)]
        raise ValueError(
            f"layer {layer.name!r} starts from {layer.starts_from!r}, "
            f"expected a recurrent layer before it: {names}"
        )
    if layer.returned_state != source.returned_state:
        raise ValueError(
            f"layer {layer.name!r} starts from {source.name!r}, which returns "
            f"{_format_parts(source.returned_state)}; expected "
            f"{_format_parts(layer.returned_state)}"
        )


def _format_parts(parts: Mapping[str, int]) -> str:
    return " and ".join(f"{name} [{size}]" for name, size in parts.items())
