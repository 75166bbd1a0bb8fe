"""Random stacks and batches for the property tests of the step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.spec.layout import layer_widths
from models.spec.model import ModelSpec, parse_spec

Arrays = list[NDArray[np.float32]]

SQUASHING = ["tanh", "softsign", "hard_sigmoid"]
GATES = ["sigmoid", "hard_sigmoid"]
OPTIONS: dict[str, Any] = {"peepholes": True, "layer_normalization": True, "projection": 3}
COMBINATIONS = [
    {name: OPTIONS[name] for name in names}
    for count in range(1, len(OPTIONS) + 1)
    for names in itertools.combinations(OPTIONS, count)
]
"""Every choice of an LSTM's options, for layers of 3 units or more."""
PLAIN = ["linear", "relu", "tanh", "softplus", "gelu", "silu"]


@st.composite
def stacks(draw: st.DrawFn, per_chunk: bool = False) -> ModelSpec:
    """A network over raw rows: 1 to 7 layers, at least one recurrent, one or two heads.

    Args:
        per_chunk: whether it ends in a layer that sees the chunk as a whole, and may hold more.
    """
    layers: list[dict[str, Any]] = [_recurrent(draw, 1)]
    if draw(st.booleans()):
        layers.insert(0, {"kind": "dense", "name": "l0", "units": 3, "activation": "tanh"})
    for number in range(2, draw(st.integers(1, 6)) + 1):
        if per_chunk and draw(st.booleans()):
            layers.append(_whole(draw, layers, f"l{number}"))
        else:
            layers.append(_layer(draw, layers, number))
    if per_chunk:
        layers.append(_whole(draw, layers, "last"))
    heads: list[dict[str, Any]] = [{"kind": "sequence", "name": "output"}]
    if draw(st.booleans()):
        heads.append(
            {
                "kind": "dense",
                "name": "dense",
                "units": draw(st.integers(1, 3)),
                "activation": draw(st.sampled_from(PLAIN)),
                "use_bias": draw(st.booleans()),
                "input": draw(st.sampled_from([layer["name"] for layer in layers])),
            }
        )
    features = draw(st.integers(1, 4))
    return parse_spec({"name": "m", "features": features, "layers": layers, "heads": heads})


def _recurrent(draw: st.DrawFn, number: int) -> dict[str, Any]:
    kind, units = draw(st.sampled_from(["lstm", "gru"])), draw(st.integers(1, 5))
    layer = {**_plain_recurrent(draw), "kind": kind, "name": f"l{number}", "units": units}
    if kind == "gru":
        layer["reset_after"] = draw(st.booleans())
    else:
        layer |= options(draw, units)
    return layer


def _plain_recurrent(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "activation": draw(st.sampled_from(SQUASHING)),
        "recurrent_activation": draw(st.sampled_from(GATES)),
        "use_bias": draw(st.booleans()),
        "dropout": 0.3,
    }


def options(draw: st.DrawFn, units: int) -> dict[str, Any]:
    """Options of an LSTM, alone and together; none of them in a third of the draws."""
    chosen_options: dict[str, Any] = {}
    if draw(st.integers(0, 2)):
        chosen_options = {
            "peepholes": draw(st.booleans()),
            "layer_normalization": draw(st.booleans()),
        }
        if draw(st.booleans()):
            chosen_options["projection"] = draw(st.integers(1, units))
    return chosen_options


def _whole(draw: st.DrawFn, before: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A layer that sees the chunk as a whole."""
    if draw(st.booleans()):
        return {
            "kind": "attention",
            "over": "chunk",
            "name": name,
            "units": draw(st.integers(1, 4)),
        }
    return _state_passing(draw, before, name)


def _state_passing(draw: st.DrawFn, before: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A layer of the kind and size of one before it, which it starts from."""
    source = draw(st.sampled_from([layer for layer in before if layer["kind"] in ("lstm", "gru")]))
    kind, units = source["kind"], source["units"]
    layer = {**_plain_recurrent(draw), "name": name, "kind": kind, "units": units}
    if kind == "lstm":
        layer |= {**options(draw, units), "projection": source.get("projection")}
    return {**layer, "starts_from": source["name"]}


def _layer(draw: st.DrawFn, before: list[dict[str, Any]], number: int) -> dict[str, Any]:
    name = f"l{number}"
    kind = draw(
        st.sampled_from(
            [
                *("recurrent", "recurrent", "dense", "activation", "dropout", "norm", "merge"),
                "attention",
            ]
        )
    )
    match kind:
        case "recurrent":
            return _recurrent(draw, number)
        case "attention":
            units = draw(st.integers(1, 4))
            return {"kind": "attention", "over": "stream", "name": name, "units": units}
        case "dense":
            activation = draw(st.sampled_from(PLAIN))
            units = draw(st.integers(1, 5))
            return {"kind": "dense", "name": name, "units": units, "activation": activation}
        case "activation":
            activation = draw(st.sampled_from(PLAIN))
            return {"kind": "activation", "name": name, "activation": activation}
        case "dropout":
            return {"kind": "dropout", "name": name, "rate": 0.5}
        case "norm":
            return {
                "kind": draw(st.sampled_from(["layer_normalization", "batch_normalization"])),
                "name": name,
                "epsilon": draw(st.sampled_from([0.05, 0.2])),
                "center": draw(st.booleans()),
                "scale": draw(st.booleans()),
            }
    return _merge(draw, before, name)


def _merge(draw: st.DrawFn, before: list[dict[str, Any]], name: str) -> dict[str, Any]:
    head = {"kind": "sequence", "name": "output"}
    sizes = layer_widths(
        parse_spec({"name": "m", "features": 7, "layers": before, "heads": [head]})
    )
    last = before[-1]["name"]
    kind = draw(st.sampled_from(["add", "multiply", "average", "concatenate"]))
    names = [
        other["name"]
        for other in before
        if kind == "concatenate" or sizes[other["name"]] == sizes[last]
    ]
    others = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2))
    return {"kind": kind, "name": name, "inputs": [last, *others]}


def sequences(random: np.random.Generator, lengths: list[int], features: int) -> Arrays:
    """Rows of each stream, float32 [length, features]."""
    return [random.normal(size=(n, features)).astype(np.float32) for n in lengths]
