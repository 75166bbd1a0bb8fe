"""Oracle of a network in float64 NumPy, computed per stream, per event and per layer.

Written from the published equations (`tests.support.oracle_layers`) and not from the Keras code,
so that a mistake in one is not repeated in the other. It shares only names and their order
(`models.spec.layout`) with what it checks. Slow on purpose: every loop is spelt out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.spec.layout import network_state, weight_shapes
from models.spec.model import ModelSpec
from tests.support.oracle_heads import head_outputs
from tests.support.oracle_layers import (
    Floats,
    attend_over_chunk,
    attend_over_stream,
    run_layer,
)

FloatRows = NDArray[np.float32]


def oracle_step(
    spec: ModelSpec,
    weights: Mapping[str, NDArray[np.float32]],
    rows: NDArray[np.float32],
    state: NDArray[np.float32] | Floats,
) -> tuple[Floats, Floats]:
    """Consume one stream's rows, or in blocks the rows of one window.

    Args:
        spec: the model.
        weights: every weight by name.
        rows: [T, F], encoded columns.
        state: [N], packed.

    Returns:
        Outputs float64 [T, O], the weights of attention over the chunk last, and the state
        after the last row, float64 [N]; in blocks the outputs of the block's own rows, [at most
        C, O], and the state after these.
    """
    block = len(rows) if spec.blocks is None else min(spec.blocks.size, len(rows))
    exact = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    names = [part.name for part in network_state(spec).parts]
    slices = network_state(spec).slices
    parts = {name: np.array(state, np.float64)[slices[name]] for name in names}
    exact_rows = np.asarray(rows, np.float64)
    values = {"features": np.array([features_of(spec, exact, row) for row in exact_rows])}
    shares: dict[str, Floats] = {}
    for layer in spec.layers:
        read = [values[name] for name in layer.inputs]
        if layer.kind == "attention" and layer.over == "chunk":
            values[layer.name], shares[layer.name] = attend_over_chunk(layer, exact, read[0])
        elif layer.kind == "attention":
            values[layer.name] = attend_over_stream(layer, exact, read[0], parts)
        else:
            blocks = spec.blocks is not None
            values[layer.name] = run_layer(layer, exact, read, parts, block, blocks)
    outputs = []
    where = {column.name: index for index, column in enumerate(spec.columns)}
    for t, row in enumerate(exact_rows[:block]):
        if spec.decoder is not None:
            for index, target in enumerate(spec.decoder.targets):
                if f"{target}.missing" not in where or not row[where[f"{target}.missing"]]:
                    parts["decoder.last"][index] = row[where[target]]
        found = [
            head_outputs(spec, head, exact, values[head.input][t], row, parts)
            for head in spec.heads
        ]
        outputs.append(np.concatenate([*found, [given[t] for given in shares.values()]]))
    return np.array(outputs), np.concatenate([parts[name] for name in names])


def oracle_in_cuts(
    spec: ModelSpec,
    weights: Mapping[str, NDArray[np.float32]],
    rows: NDArray[np.float32],
    state: NDArray[np.float32] | Floats,
    cuts: Sequence[int],
) -> tuple[Floats, Floats]:
    """As `oracle_step`, chunk after chunk of these lengths, which add up to T."""
    outputs, at = [], 0
    for length in cuts:
        found, state = oracle_step(spec, weights, rows[at : at + length], state)
        outputs.append(found)
        at += length
    assert at == len(rows)
    return np.concatenate(outputs), state


def oracle_in_blocks(
    spec: ModelSpec, weights: Mapping[str, NDArray[np.float32]], rows: NDArray[np.float32]
) -> Floats:
    """A whole stream of a model with blocks from its beginning to its end: outputs [T, O].

    Block k is rows kC to kC + C-1; its window has up to R more; the state goes on from block to
    block.
    """
    size, lookahead = spec.blocks.size, spec.blocks.lookahead
    state = np.zeros(network_state(spec).float_size)
    outputs = []
    for start in range(0, len(rows), size):
        window = rows[start : start + size + lookahead]
        found, state = oracle_step(spec, weights, window, state)
        outputs.append(found)
    return np.concatenate(outputs)


def features_of(spec: ModelSpec, weights: Mapping[str, Floats], row: Floats) -> Floats:
    pieces = []
    for column, value in zip(spec.columns, row, strict=True):
        if column.statistic:
            continue
        if column.codes is None:
            pieces.append(np.array([value]))
        else:
            pieces.append(weights[f"embedding.{column.name}"][int(value)])
    return np.concatenate(pieces)


def random_states(spec: ModelSpec, random: np.random.Generator, count: int) -> FloatRows:
    """States that streams of the model can be in, float32 [count, N], none of them zero.

    The first has seen nothing that an attention over the stream would know.
    """
    layout = network_state(spec)
    states = random.uniform(-1, 1, (count, layout.float_size)).astype(np.float32)
    for part in layout.parts:
        values = states[:, layout.slices[part.name]] if part.dtype == "float32" else states[:, :0]
        match part.name.rpartition(".")[2]:
            case "normaliser":
                values[:, 0] = 1 + np.abs(values[:, 0])
                values[:, 1] *= 1e-8
            case "sum":
                values[:, part.shape[1] :] *= 1e-8
        if part.name.endswith((".maximum", ".normaliser", ".sum")):
            values[0] = 0
    return states


def joined(spec: ModelSpec, state: NDArray[np.floating[Any]]) -> Floats:
    """The numbers of a state [..., N]: sums kept as high and low parts added up, the low part 0.

    One sum can be parted in several ways, so states are compared like this.
    """
    layout = network_state(spec)
    numbers = np.array(state, np.float64)
    for part in layout.parts:
        if part.name.endswith((".normaliser", ".sum")):
            values = numbers[..., layout.slices[part.name]]
            half = values.shape[-1] // 2
            values[..., :half] += values[..., half:]
            values[..., half:] = 0
    return numbers


def contracting_weights(spec: ModelSpec, seed: int) -> dict[str, NDArray[np.float32]]:
    """Random weights, every value different, under which two states of a stream come closer.

    Recurrent kernels have a spectral norm of 0.4, everything else stays within about 1, so
    float32 errors fade instead of growing and can be held to 1e-5. Layer normalisation inside a
    cell undoes what a small kernel does, so the gain of what is recalled is small there.
    """
    random = np.random.default_rng(seed)
    found = {}
    for name, shape in weight_shapes(spec).items():
        values = random.uniform(-1, 1, shape)
        match name.rpartition(".")[2]:
            case "recurrent_kernel":
                values *= 0.4 / np.linalg.norm(values, 2)
            case "kernel" | "projection":
                values /= np.sqrt(shape[0] if len(shape) == 2 else shape[0] * shape[1])
            case "recurrent_gamma":
                values *= 0.2
            case "peepholes":
                values *= 0.5
            case "gamma" | "moving_variance" | "kernel_gamma" | "carry_gamma":
                values = 1 + 0.5 * values
        found[name] = values.astype(np.float32)
    return found
