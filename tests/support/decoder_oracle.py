"""Oracle of a decoder in float64 NumPy, computed one path at a time."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from models.spec.layout import state_spec
from models.spec.model import ModelSpec
from models.spec.state import State
from tests.support.oracle import features_of
from tests.support.oracle_layers import Floats, layer_step, softplus


def oracle_decode(
    spec: ModelSpec,
    weights: Mapping[str, NDArray[np.float32]],
    state: NDArray[np.float32] | Floats,
    known: NDArray[np.float32],
    draws: NDArray[np.float64] | None = None,
) -> tuple[Floats, Floats]:
    """Look ahead from a stream's state along one path, by the definition in `models.spec.decoder`.

    Args:
        spec: a model with a decoder.
        weights: every weight by name.
        state: [N], packed, the encoder's.
        known: [H, K], encoded, what is known of the coming steps.
        draws: [H, D], uniform numbers (quantiles) or normal ones (gaussian) that the path is
            drawn by; None follows the medians.

    Returns:
        The path [H, D] and every step's quantiles [H, D, Q] given the path before it, in the
        fields' units.
    """
    decoder, network = spec.decoder, spec.decoder_network
    layout = state_spec(spec)
    given = layout.by_name(State(np.asarray(state), np.zeros(layout.int_size, np.int64)))
    own = {
        name.removeprefix("decoder."): np.asarray(value, np.float64)
        for name, value in weights.items()
        if name.startswith("decoder.")
    }
    parts: dict[str, Floats] = {}
    for layer in decoder.layers:
        kinds = {"lstm": ("hidden", "carry"), "gru": ("hidden",)}.get(layer.kind, ())
        for kind in kinds:
            source = decoder.starts_from.get(layer.name)
            parts[f"{layer.name}.{kind}"] = (
                np.zeros(layer.units)
                if source is None
                else np.array(given[f"{source}.{kind}"], np.float64)
            )
    count = len(decoder.targets)
    previous = np.array(given["decoder.last"], np.float64)
    path, ranges = [], []
    for step, covariates in enumerate(np.asarray(known, np.float64)):
        row = np.concatenate([previous, covariates])
        values = {"features": features_of(network, own, row)}
        for layer in decoder.layers:
            values[layer.name] = layer_step(layer, own, [values[n] for n in layer.inputs], parts)
        last = values[decoder.layers[-1].name]
        raw = last @ own["heads.distribution.kernel"] + own["heads.distribution.bias"]
        raw = raw.reshape(count, -1)
        levels = np.array(decoder.head.quantiles)
        found = np.zeros((count, len(levels)))
        for target in range(count):
            if decoder.head.kind == "gaussian":
                mean, spread = raw[target, 0], np.exp(np.clip(raw[target, 1], -7, 7))
                found[target] = [mean + spread * NormalDist().inv_cdf(p) for p in levels]
            else:
                found[target] = raw[target, 0] + np.append(0, np.cumsum(softplus(raw[target, 1:])))
            draw = None if draws is None else draws[step, target]
            if draw is None:
                previous[target] = found[target, list(levels).index(0.5)]
            elif decoder.head.kind == "gaussian":
                previous[target] = mean + spread * draw
            else:
                previous[target] = _at_level(levels, found[target], draw)
        path.append(_decoded(spec, previous[:, np.newaxis])[:, 0])
        ranges.append(_decoded(spec, found))
    return np.array(path), np.array(ranges)


def _at_level(levels: Floats, values: Floats, level: float) -> float:
    """The quantile at `level`: linear between the given ones, exponential beyond."""
    if level < levels[0]:
        density = (levels[1] - levels[0]) / (values[1] - values[0])
        return values[0] + levels[0] / density * log(level / levels[0])
    if level > levels[-1]:
        density = (levels[-1] - levels[-2]) / (values[-1] - values[-2])
        return values[-1] - (1 - levels[-1]) / density * log((1 - level) / (1 - levels[-1]))
    return float(np.interp(level, levels, values))


def _decoded(spec: ModelSpec, values: Floats) -> Floats:
    """[D, k] standardised -> in units."""
    found = []
    for target, row in zip(spec.decoder.targets, values, strict=True):
        field = spec.events.field(target)
        row = row * field.std + field.mean
        if field.transform == "signed_log1p":
            row = np.sign(row) * (np.exp(np.abs(row)) - 1)
        found.append(row)
    return np.array(found)
