"""Runs a network as the service does: streams cut into chunks, batched, padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.networks.build import StepNetwork
from models.spec.model import ModelSpec
from tests.support.oracle import contracting_weights, oracle_step

Floats = NDArray[np.float32]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def network_of(spec: ModelSpec, seed: int = 3) -> StepNetwork:
    """A network with contracting weights."""
    network = StepNetwork(spec)
    network.set_weights(contracting_weights(spec, seed))
    return network


def assert_oracle(
    network: StepNetwork,
    streams: Sequence[Floats],
    states: Floats,
    outputs: Sequence[Floats],
    after: Floats,
) -> None:
    """Assert that outputs and states after are the oracle's."""
    for b, rows in enumerate(streams):
        expected = oracle_step(network.spec, network.get_weights(), rows, states[b])
        np.testing.assert_allclose(outputs[b], expected[0], **CLOSE)
        np.testing.assert_allclose(after[b], expected[1], **CLOSE)


def step(
    network: StepNetwork, rows: Floats, lengths: list[int], state: Floats
) -> tuple[Floats, Floats]:
    """One step in NumPy terms; arguments as for `StepNetwork.step`."""
    outputs, after = network.step(rows, np.array(lengths, np.int32), state)
    return np.asarray(outputs), np.asarray(after)


def run_in_chunks(
    network: StepNetwork,
    streams: list[Floats],
    states: Floats,
    random: np.random.Generator,
) -> tuple[list[Floats], Floats, list[list[int]]]:
    """All streams side by side, each cut at random; padding holds zeros, 7.5 or NaN.

    In every round each unfinished stream gives a chunk of 1 to 5 rows; the batch is put in a
    random order and padded to the longest chunk and up to two steps more.

    Returns:
        Outputs of each stream, float32 [length, O], the states after, float32 [B, N], and the
        lengths of each stream's chunks.
    """
    states = states.copy()
    cuts: list[list[int]] = [[] for _ in streams]
    at = [0] * len(streams)
    outputs: list[list[Floats]] = [[] for _ in streams]
    while True:
        waiting = [b for b, rows in enumerate(streams) if at[b] < len(rows)]
        if not waiting:
            return [np.concatenate(parts) for parts in outputs], states, cuts
        random.shuffle(waiting)
        lengths = [int(min(random.integers(1, 6), len(streams[b]) - at[b])) for b in waiting]
        steps = max(lengths) + int(random.integers(0, 3))
        filler = random.choice([0.0, np.nan, 7.5])
        batch = np.full((len(waiting), steps, streams[0].shape[1]), filler, np.float32)
        for row, b in enumerate(waiting):
            batch[row, : lengths[row]] = streams[b][at[b] : at[b] + lengths[row]]
        values, after = step(network, batch, lengths, states[waiting])
        for row, b in enumerate(waiting):
            outputs[b].append(values[row, : lengths[row]])
            states[b] = after[row]
            at[b] += lengths[row]
            cuts[b].append(lengths[row])
