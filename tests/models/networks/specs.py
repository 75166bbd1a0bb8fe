"""Random stacks and batches for the property tests of the step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.spec.layout import layer_widths, network_state
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
CELLS = ["lstm", "gru"]
MERGES = ["concat", "sum", "mul", "ave"]
ONNX_CELLS = ["elu", "hard_sigmoid", "leaky_relu", "linear", "relu", "sigmoid", "softplus"]
ONNX_CELLS += ["softsign", "tanh"]
"""Activations that the cells of ONNX have."""

PLAIN = ["linear", "relu", "tanh", "softplus", "gelu", "silu", "relu6", "hard_silu", "mish"]


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


def two_way(cell: str = "lstm", units: int = 4, **more: Any) -> dict[str, Any]:
    """A bidirectional layer."""
    return {"kind": "bidirectional", "cell": cell, "units": units, **more}


@st.composite
def bidirectional_stacks(draw: st.DrawFn) -> ModelSpec:
    """Two to four layers, the first and others bidirectional; some start from another."""
    cell, units = draw(st.sampled_from(CELLS)), draw(st.integers(1, 4))
    options = {"use_bias": draw(st.booleans())}
    if cell == "gru":
        options["reset_after"] = draw(st.booleans())
    layers = [two_way(cell, units, merge=draw(st.sampled_from(MERGES)), **options)]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["handed", "alone", "one way", "dense"]))
        match kind:
            case "handed":
                merge = draw(st.sampled_from(MERGES))
                layers.append(two_way(cell, units, merge=merge, starts_from="bidirectional_1"))
            case "alone":
                layers.append(two_way(draw(st.sampled_from(CELLS)), draw(st.integers(1, 4))))
            case "one way":
                layers.append({"kind": draw(st.sampled_from(CELLS)), "units": 3})
            case _:
                layers.append({"kind": "dense", "units": 3, "activation": "relu"})
    heads, features = [{"kind": "sequence", "name": "output"}], draw(st.integers(1, 3))
    return parse_spec({"name": "m", "features": features, "layers": layers, "heads": heads})


def _recurrent(draw: st.DrawFn, number: int) -> dict[str, Any]:
    kind, units = draw(st.sampled_from(["lstm", "gru", "simple_rnn"])), draw(st.integers(1, 5))
    layer = {**_plain_recurrent(draw), "kind": kind, "name": f"l{number}", "units": units}
    if kind == "simple_rnn":
        del layer["recurrent_activation"]
        return layer
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
    kinds = ("lstm", "gru", "simple_rnn")
    source = draw(st.sampled_from([layer for layer in before if layer["kind"] in kinds]))
    kind, units = source["kind"], source["units"]
    layer = {**_plain_recurrent(draw), "name": name, "kind": kind, "units": units}
    if kind == "lstm":
        layer |= {**options(draw, units), "projection": source.get("projection")}
    elif kind == "simple_rnn":
        del layer["recurrent_activation"]
    return {**layer, "starts_from": source["name"]}


def _layer(draw: st.DrawFn, before: list[dict[str, Any]], number: int) -> dict[str, Any]:
    name = f"l{number}"
    kind = draw(
        st.sampled_from(
            [
                *("recurrent", "recurrent", "dense", "activation", "dropout", "norm", "merge"),
                *("attention", "conv1d", "affine", "prelu", "slice"),
                "rms_normalization",
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
        case "conv1d":
            return {
                "kind": "conv1d",
                "name": name,
                "units": draw(st.integers(1, 4)),
                "kernel_size": draw(st.integers(1, 3)),
                "dilation": draw(st.integers(1, 3)),
                "activation": draw(st.sampled_from(PLAIN)),
                "use_bias": draw(st.booleans()),
            }
        case "rms_normalization":
            # a small one would amplify the rounding errors of small values
            epsilon = draw(st.sampled_from([0.05, 0.2]))
            return {"kind": kind, "name": name, "epsilon": epsilon}
        case "affine" | "prelu":
            return {"kind": kind, "name": name}
        case "slice":
            width = _widths(before)[before[-1]["name"]]
            stop = draw(st.integers(1, width))
            return {"kind": "slice", "name": name, "start": stop // 2, "stop": stop}
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
    sizes = _widths(before)
    last = before[-1]["name"]
    kind = draw(
        st.sampled_from(
            ["add", "subtract", "multiply", "average", "maximum", "minimum", "concatenate"]
        )
    )
    names = [
        other["name"]
        for other in before
        if kind == "concatenate" or sizes[other["name"]] == sizes[last]
    ]
    most = 1 if kind == "subtract" else 2
    others = draw(st.lists(st.sampled_from(names), min_size=1, max_size=most))
    return {"kind": kind, "name": name, "inputs": [last, *others]}


def convolved_codes() -> ModelSpec:
    """Raw rows of three columns, the second one coded, under every layer without gates."""
    layers = [
        {"kind": "affine"},
        {"kind": "conv1d", "units": 4, "kernel_size": 3, "dilation": 2, "activation": "tanh"},
        {"kind": "slice", "start": 1, "stop": 4},
        {"kind": "prelu"},
        {"kind": "simple_rnn", "units": 3},
    ]
    heads = [{"kind": "sequence", "name": "Reg-1"}]
    codes = [{"column": 1, "codes": 5, "units": 2}]
    return parse_spec(
        {"name": "m", "features": 3, "embeddings": codes, "layers": layers, "heads": heads}
    )


def coded_batch(
    random: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """Rows [3, 7, 3], lengths and states for `convolved_codes`; padding is zero."""
    lengths = np.array([7, 1, 4], np.int32)
    rows = random.normal(size=(3, 7, 3)).astype(np.float32)
    rows[:, :, 1] = random.integers(0, 5, (3, 7))
    rows[np.arange(7) >= lengths[:, np.newaxis]] = 0
    size = network_state(convolved_codes()).float_size
    return rows, lengths, random.uniform(-1, 1, (3, size)).astype(np.float32)


def _widths(layers: list[dict[str, Any]]) -> dict[str, int]:
    head = {"kind": "sequence", "name": "output"}
    spec = {"name": "m", "features": 7, "layers": layers, "heads": [head]}
    return dict(layer_widths(parse_spec(spec)))


def sequences(random: np.random.Generator, lengths: list[int], features: int) -> Arrays:
    """Rows of each stream, float32 [length, features]."""
    return [random.normal(size=(n, features)).astype(np.float32) for n in lengths]
