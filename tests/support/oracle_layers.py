"""Layers of the oracle in float64 NumPy, from the published equations.

LSTM (Hochreiter & Schmidhuber 1997, forget gate by Gers et al. 2000), gates i, f, c, o:

    i = s(x W_i + h U_i + b_i)      f = s(x W_f + h U_f + b_f)
    g = a(x W_c + h U_c + b_c)      o = s(x W_o + h U_o + b_o)
    c' = f c + i g                  h' = o a(c')

with its options: peepholes p (Gers & Schmidhuber 2000), layer normalisation of the sums and of
the carry (Ba et al. 2016, eq. 20-22; one bias for the sums' three), projection V (Sak et al. 2014):

    N(z; w, v) = w (z - mean z) / sqrt(var z + 0.001) + v
    (z_i, z_f, z_g, z_o) = N(x W; w_x, 0) + N(h U; w_h, 0) + b
    i = s(z_i + p_i c)    f = s(z_f + p_f c)    g = a(z_g)    c' = f c + i g
    o = s(z_o + p_o c')   h' = (o a(N(c'; w_c, v_c))) V

GRU (Cho et al. 2014), gates z, r, h; b has an input and a recurrent row if reset_after:

    z = s(x W_z + b_z + h U_z + d_z)        r = s(x W_r + b_r + h U_r + d_r)
    reset_after:  g = a(x W_h + b_h + r (h U_h + d_h))
    otherwise:    g = a(x W_h + b_h + (r h) U_h)
    h' = z h + (1 - z) g

Simple RNN (Elman 1990): h' = a(x W + h U + b). Causal convolution with kernel size k and dilation
d: y_t = a(b + sum_j x_(t - (k - 1 - j) d) W_j).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import erf

import numpy as np
from numpy.typing import NDArray

from models.spec.layers import (
    AttentionLayer,
    BidirectionalLayer,
    Conv1dLayer,
    GruLayer,
    Layer,
    LstmLayer,
)

Floats = NDArray[np.float64]


def sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))


def softplus(x: Floats) -> Floats:
    return np.logaddexp(0.0, x)


def softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max())
    return e / e.sum()


def _elu(x: Floats, alpha: float = 1.0) -> Floats:
    return np.where(x > 0, x, alpha * (np.exp(np.minimum(x, 0)) - 1))


def _gelu(x: Floats) -> Floats:
    return np.array([v * 0.5 * (1 + erf(v / 2**0.5)) for v in x])


ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "tanh": np.tanh,
    "softmax": softmax,
    "softplus": softplus,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "elu": _elu,
    "selu": lambda x: 1.0507009873554805 * _elu(x, 1.6732632423543772),
    "gelu": _gelu,
    "silu": lambda x: x * sigmoid(x),
    "exponential": np.exp,
    "relu6": lambda x: np.clip(x, 0, 6),
    "hard_silu": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "mish": lambda x: x * np.tanh(softplus(x)),
    "log_softmax": lambda x: x - np.logaddexp.reduce(x),
    "leaky_relu": lambda x: np.where(x >= 0, x, 0.2 * x),
}


def run_layer(
    layer: Layer,
    weights: Mapping[str, Floats],
    read: list[Floats],
    parts: dict[str, Floats],
    block: int,
    in_blocks: bool,
) -> Floats:
    """A layer over the whole chunk: arrays [T, width] -> [T, width].

    What is carried is the state after `block` steps; in blocks nothing is carried backward.
    """
    source = getattr(layer, "starts_from", None)
    if source is not None:
        # the state in which the other layer ended this very chunk
        ends = {name: part for name, part in parts.items() if name.startswith(f"{source}.")}
        parts.update((layer.name + name.removeprefix(source), part) for name, part in ends.items())
    two_way = isinstance(layer, BidirectionalLayer)
    forward = layer.directions[0] if two_way else layer
    steps = range(len(read[0]))
    ahead, carried = [], {}
    for t in steps:
        ahead.append(layer_step(forward, weights, [x[t] for x in read], parts))
        if t + 1 == block:
            carried = dict(parts)
    parts.update(carried)
    if not two_way:
        return np.array(ahead)
    # Schuster & Paliwal 1997: the other cell reads the steps from the last one on
    backward = layer.directions[1]
    if in_blocks:
        zero = np.zeros(layer.units)
        parts.update({f"{backward.name}.hidden": zero, f"{backward.name}.carry": zero})
    back = [layer_step(backward, weights, [x[t] for x in read], parts) for t in reversed(steps)][
        ::-1
    ]
    joined = {
        "concat": lambda a, b: np.concatenate([a, b]),
        "sum": lambda a, b: a + b,
        "mul": lambda a, b: a * b,
        "ave": lambda a, b: (a + b) / 2,
    }[layer.merge]
    return np.array([joined(a, b) for a, b in zip(ahead, back, strict=True)])


def layer_step(
    layer: Layer, weights: Mapping[str, Floats], read: list[Floats], parts: dict[str, Floats]
) -> Floats:
    x = read[0]

    def weight(kind: str, default: float = 0.0) -> Floats:
        return weights.get(f"{layer.name}.{kind}", np.array(default))

    match layer.kind:
        case "lstm":
            return _lstm(layer, weights, x, parts)
        case "gru":
            return _gru(layer, weights, x, parts)
        case "simple_rnn":
            z = x @ weight("kernel") + parts[f"{layer.name}.hidden"] @ weight("recurrent_kernel")
            parts[f"{layer.name}.hidden"] = ACTIVATIONS[layer.activation](z + weight("bias"))
            return parts[f"{layer.name}.hidden"]
        case "conv1d":
            return _conv1d(layer, weights, x, parts)
        case "affine":
            return (x - weight("shift")) * weight("scale") + weight("offset")
        case "prelu":
            return np.where(x >= 0, x, weight("slope") * x)
        case "slice":
            return x[layer.start : layer.stop]
        case "dense":
            return ACTIVATIONS[layer.activation](x @ weight("kernel") + weight("bias"))
        case "activation":
            return ACTIVATIONS[layer.activation](x)
        case "dropout":
            return x
        case "layer_normalization":
            variance = np.mean((x - np.mean(x)) ** 2)
            normal = (x - np.mean(x)) / np.sqrt(variance + layer.epsilon)
            return normal * weight("gamma", 1.0) + weight("beta")
        case "batch_normalization":
            spread = np.sqrt(weight("moving_variance") + layer.epsilon)
            normal = (x - weight("moving_mean")) / spread
            return normal * weight("gamma", 1.0) + weight("beta")
        case "rms_normalization":
            return weight("scale") * x / np.sqrt(np.mean(x**2) + layer.epsilon)
        case "unit_normalization":
            return x / np.sqrt(max(np.sum(x**2), 1e-12))
        case "add":
            return np.sum(read, axis=0)
        case "subtract":
            return read[0] - read[1]
        case "maximum":
            return np.max(read, axis=0)
        case "minimum":
            return np.min(read, axis=0)
        case "multiply":
            return np.prod(read, axis=0)
        case "average":
            return np.sum(read, axis=0) / len(read)
        case "concatenate":
            return np.concatenate(read)
    raise AssertionError(layer.kind)


def _lstm(
    layer: LstmLayer, weights: Mapping[str, Floats], x: Floats, parts: dict[str, Floats]
) -> Floats:
    u = layer.units
    gate, squash = ACTIVATIONS[layer.recurrent_activation], ACTIVATIONS[layer.activation]
    h, c = parts[f"{layer.name}.hidden"], parts[f"{layer.name}.carry"]

    def weight(kind: str, size: int = 0) -> Floats:
        return weights.get(f"{layer.name}.{kind}", np.zeros(size))

    read, recalled = x @ weight("kernel"), h @ weight("recurrent_kernel")
    if layer.layer_normalization:
        read = _normalised(read) * weight("kernel_gamma")
        recalled = _normalised(recalled) * weight("recurrent_gamma")
    z = read + recalled + weight("bias", 4 * u)
    p = weight("peepholes", 3 * u)
    i = gate(z[:u] + p[:u] * c)
    f = gate(z[u : 2 * u] + p[u : 2 * u] * c)
    g = squash(z[2 * u : 3 * u])
    carry = f * c + i * g
    o = gate(z[3 * u :] + p[2 * u :] * carry)
    seen = carry
    if layer.layer_normalization:
        seen = _normalised(carry) * weight("carry_gamma") + weight("carry_beta")
    hidden = o * squash(seen)
    if layer.projection is not None:
        hidden = hidden @ weight("projection")
    parts[f"{layer.name}.hidden"], parts[f"{layer.name}.carry"] = hidden, carry
    return hidden


def _gru(
    layer: GruLayer, weights: Mapping[str, Floats], x: Floats, parts: dict[str, Floats]
) -> Floats:
    u = layer.units
    gate, squash = ACTIVATIONS[layer.recurrent_activation], ACTIVATIONS[layer.activation]
    h = parts[f"{layer.name}.hidden"]
    w, r = weights[f"{layer.name}.kernel"], weights[f"{layer.name}.recurrent_kernel"]
    bias = weights.get(f"{layer.name}.bias", np.zeros((2, 3 * u)))
    b, d = (bias[0], bias[1]) if bias.ndim == 2 else (bias, np.zeros(3 * u))
    z = gate(x @ w[:, :u] + b[:u] + h @ r[:, :u] + d[:u])
    reset = gate(x @ w[:, u : 2 * u] + b[u : 2 * u] + h @ r[:, u : 2 * u] + d[u : 2 * u])
    if layer.reset_after:
        inner = reset * (h @ r[:, 2 * u :] + d[2 * u :])
    else:
        inner = (reset * h) @ r[:, 2 * u :]
    g = squash(x @ w[:, 2 * u :] + b[2 * u :] + inner)
    hidden = z * h + (1 - z) * g
    parts[f"{layer.name}.hidden"] = hidden
    return hidden


def _conv1d(
    layer: Conv1dLayer, weights: Mapping[str, Floats], x: Floats, parts: dict[str, Floats]
) -> Floats:
    """Row by row: W_j weighs the row (k - 1 - j) d steps ago; `past` holds the oldest row first."""
    k, d, name = layer.kernel_size, layer.dilation, f"{layer.name}.past"
    rows = [x]
    if name in parts:
        rows = [*parts[name].reshape(-1, len(x)), x]
        parts[name] = np.concatenate(rows[1:])
    total = weights.get(f"{layer.name}.bias", np.zeros(layer.units))
    for j in range(k):
        total = total + rows[-1 - (k - 1 - j) * d] @ weights[f"{layer.name}.kernel"][j]
    return ACTIVATIONS[layer.activation](total)


def _normalised(x: Floats, epsilon: float = 1e-3) -> Floats:
    return (x - np.mean(x)) / np.sqrt(np.mean((x - np.mean(x)) ** 2) + epsilon)


def _scores(layer: AttentionLayer, weights: Mapping[str, Floats], x: Floats) -> Floats:
    """Yang et al. 2016: s_t = tanh(h_t W + b) . context, [T]."""
    w, b = weights[f"{layer.name}.kernel"], weights[f"{layer.name}.bias"]
    return np.array([np.tanh(h @ w + b) @ weights[f"{layer.name}.context"] for h in x])


def attend_over_chunk(
    layer: AttentionLayer, weights: Mapping[str, Floats], x: Floats
) -> tuple[Floats, Floats]:
    """The weighted mean of the whole chunk at every step [T, W], and the weights [T]."""
    share = softmax(_scores(layer, weights, x))
    mean = sum(a * h for a, h in zip(share, x, strict=True))
    return np.array([mean for _ in x]), share


def attend_over_stream(
    layer: AttentionLayer, weights: Mapping[str, Floats], x: Floats, parts: dict[str, Floats]
) -> Floats:
    """Milakov & Gimelshein 2018: maximum, normaliser and weighted sum, step by step, [T, W].

    Both sums are what their two parts, high and low, add up to; a sum of 0 has seen nothing.
    """
    maximum = float(parts[f"{layer.name}.maximum"][0])
    normaliser = float(parts[f"{layer.name}.normaliser"].sum())
    total = parts[f"{layer.name}.sum"].reshape(2, -1).sum(axis=0)
    means = []
    for score, h in zip(_scores(layer, weights, x), x, strict=True):
        higher = score if normaliser == 0 else max(maximum, score)
        rescaled = 0.0 if normaliser == 0 else np.exp(maximum - higher)
        normaliser = normaliser * rescaled + np.exp(score - higher)
        total = total * rescaled + h * np.exp(score - higher)
        maximum = higher
        means.append(total / normaliser)
    parts[f"{layer.name}.maximum"] = np.array([maximum])
    parts[f"{layer.name}.normaliser"] = _high_and_low(np.array([normaliser]))
    parts[f"{layer.name}.sum"] = _high_and_low(total)
    return np.array(means)


def _high_and_low(values: Floats) -> Floats:
    high = values.astype(np.float32).astype(np.float64)
    return np.concatenate([high, values - high])
