"""Ensembles: networks trained from different seeds, merged into one that averages them.

Networks that differ in their seed only make different errors, and the mean of their raw values
makes smaller ones (Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation
using deep ensembles", average the probabilities instead). The merged network is an ordinary
one: every member's layers side by side, embeddings joined, and heads that read all members
with their kernels divided by the number of members. So it is served like any other; its state
is as many times as large.

Invariant: the merged network's raw values are the mean of its members'. A spec whose
layers cannot be merged (one that mixes or normalises the features themselves, or a head without
weights) is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from models.errors import SpecError
from models.events.schema import CategoricalField
from models.spec.heads import SequenceHead
from models.spec.layers import (
    FEATURES,
    BidirectionalLayer,
    Conv1dLayer,
    DenseLayer,
    DropoutLayer,
    Layer,
    MergeLayer,
    Recurrent,
)
from models.spec.layout import layer_widths
from models.spec.model import ModelSpec, parse_spec, schema_of

Weights = Mapping[str, NDArray[np.float32]]
Networks = Mapping[int, tuple[ModelSpec, Weights]]
"""The networks of one training, by seed."""
Places = NDArray[np.int64]

_WITH_KERNELS = Recurrent | Conv1dLayer | DenseLayer


def check_members(spec: ModelSpec) -> None:
    """Reject a spec whose network cannot be merged; SpecError names the layer or head."""
    if spec.decoder is not None:
        raise SpecError("training.members: a model with a decoder cannot be merged; expected 1")
    mixed = {FEATURES}
    for layer in spec.layers:
        reads = mixed.intersection(layer.inputs)
        if isinstance(layer, DropoutLayer) or (
            isinstance(layer, MergeLayer) and layer.kind == "concatenate"
        ):
            if reads:
                mixed.add(layer.name)
        elif reads and not isinstance(layer, _WITH_KERNELS):
            raise SpecError(
                f"training.members: layer {layer.name!r} ({layer.kind}) reads the features "
                "themselves; expected a recurrent or dense layer before it"
            )
    for head in spec.heads:
        if isinstance(head, SequenceHead) or head.input in mixed:
            raise SpecError(
                f"training.members: head {head.name!r} cannot be averaged; expected one with "
                "weights that reads a layer other than the features"
            )


def merge_members(
    spec: ModelSpec, members: Sequence[Weights]
) -> tuple[ModelSpec, dict[str, NDArray[np.float32]]]:
    """One network out of several of the same fitted spec.

    Args:
        spec: the members' spec.
        members: their weights, by name.

    Returns:
        The merged network's spec and weights; the given ones, if there is one member.

    Raises:
        SpecError: the network cannot be merged.
    """
    if len(members) == 1:
        return spec, dict(members[0])
    check_members(spec)
    count = len(members)
    merged_spec = _merged_spec(spec, count)
    weights: dict[str, NDArray[np.float32]] = {}
    for column in spec.columns:
        if column.embedding is not None:
            name = f"embedding.{column.name}"
            weights[name] = np.concatenate([member[name] for member in members], axis=1)
    widths = layer_widths(merged_spec)
    for index, member in enumerate(members):
        places: dict[str, Places] = {FEATURES: _feature_places(spec, index, count)}
        for layer in spec.layers:
            _place(spec, layer, index, member, places, widths, weights)
    for head in spec.heads:
        kernels = [member[f"heads.{head.name}.kernel"] for member in members]
        weights[f"heads.{head.name}.kernel"] = np.concatenate(kernels) / np.float32(count)
        if (bias := f"heads.{head.name}.bias") in members[0]:
            weights[bias] = np.mean([member[bias] for member in members], axis=0, dtype=np.float32)
    return merged_spec, weights


def _merged_spec(spec: ModelSpec, count: int) -> ModelSpec:
    schema = schema_of(spec)
    fields = [
        field.model_copy(update={"embedding": field.embedding * count})
        if isinstance(field, CategoricalField)
        else field
        for field in schema.fields
    ]
    layers = []
    for index in range(count):
        for layer in spec.layers:
            inputs = [
                name if name == FEATURES else _member_name(name, index) for name in layer.inputs
            ]
            own = {**layer.model_dump(), "name": _member_name(layer.name, index), "inputs": inputs}
            if own.get("starts_from") is not None:
                own["starts_from"] = _member_name(own["starts_from"], index)
            layers.append(own)
    for name in dict.fromkeys(head.input for head in spec.heads):
        inputs = [_member_name(name, index) for index in range(count)]
        layers.append({"kind": "concatenate", "name": _all(name), "inputs": inputs})
    heads = [{**head.model_dump(), "input": _all(head.input)} for head in spec.heads]
    plain = spec.model_dump()
    plain["events"]["fields"] = [field.model_dump() for field in fields]
    if plain["training"] is not None:
        plain["training"] |= {"members": 1, "seeds": None}
    return parse_spec({**plain, "layers": layers, "heads": heads})


def _feature_places(spec: ModelSpec, index: int, count: int) -> Places:
    """The positions of a member's features among the merged network's."""
    places: list[int] = []
    start = 0
    for column in spec.columns[: spec.read_features]:
        if column.embedding is None:
            places.append(start)
            start += 1
        else:
            first = start + index * column.embedding
            places.extend(range(first, first + column.embedding))
            start += count * column.embedding
    return np.array(places, np.int64)


def _place(
    spec: ModelSpec,
    layer: Layer,
    index: int,
    member: Weights,
    places: dict[str, Places],
    widths: Mapping[str, int],
    weights: dict[str, NDArray[np.float32]],
) -> None:
    """Copy one member's layer; kernel rows follow their inputs' positions in the merged network."""
    name = _member_name(layer.name, index)
    owners = [layer.name]
    if isinstance(layer, BidirectionalLayer):
        owners = [cell.name for cell in layer.directions]
    own = np.arange(layer_widths(spec)[layer.name])
    match layer:
        case _ if isinstance(layer, _WITH_KERNELS):
            source = layer.inputs[0]
            width = widths[source if source == FEATURES else _member_name(source, index)]
            for owner in owners:
                kernel = member[f"{owner}.kernel"]
                widened = np.zeros((*kernel.shape[:-2], width, kernel.shape[-1]), np.float32)
                widened[..., places[source], :] = kernel
                weights[f"{name}{owner.removeprefix(layer.name)}.kernel"] = widened
            places[layer.name] = own
        case DropoutLayer():
            places[layer.name] = places[layer.inputs[0]]
        case MergeLayer(kind="concatenate"):
            parts, start = [], 0
            for source in layer.inputs:
                parts.append(places[source] + start)
                start += widths[source if source == FEATURES else _member_name(source, index)]
            places[layer.name] = np.concatenate(parts)
        case _:
            places[layer.name] = own
    for key, value in member.items():
        if key.rpartition(".")[0] in owners:
            weights.setdefault(f"{name}{key.removeprefix(layer.name)}", value)


def _member_name(name: str, index: int) -> str:
    return f"{name}_m{index + 1}"


def _all(name: str) -> str:
    return f"{name}_all"
