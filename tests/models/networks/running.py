"""Runs networks as the service does: streams cut into chunks, batched, padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
from numpy.typing import NDArray

from models.networks.build import StepNetwork
from models.onnx.graph import write_graph
from models.onnx.library import open_session
from models.spec.model import ModelSpec
from tests.support.oracle import (
    contracting_weights,
    joined,
    oracle_in_cuts,
    oracle_step,
    random_states,
)

Floats = NDArray[np.float32]
Run = Callable[[Floats, Sequence[int], Floats], tuple[Floats, Floats]]
"""Runs rows [B, T, F] of these lengths from states [B, N]; gives outputs [B, T, O] and the states
after."""

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def network_of(spec: ModelSpec, seed: int = 3) -> StepNetwork:
    """A network with contracting weights."""
    network = StepNetwork(spec)
    network.set_weights(contracting_weights(spec, seed))
    return network


def step(
    network: StepNetwork, rows: Floats, lengths: Sequence[int], state: Floats
) -> tuple[Floats, Floats]:
    """One step in NumPy terms; arguments as for `StepNetwork.step`."""
    outputs, after = network.step(rows, np.array(lengths, np.int32), state)
    return np.asarray(outputs), np.asarray(after)


def keras_run(spec: ModelSpec, weights: Mapping[str, Floats]) -> Run:
    """The Keras network, step by step."""
    network = StepNetwork(spec)
    network.set_weights(weights)
    return partial(step, network)


def compiled_run(spec: ModelSpec, weights: Mapping[str, Floats]) -> Run:
    """The Keras network, compiled."""
    network = StepNetwork(spec)
    network.set_weights(weights)
    compiled = tf.function(network.step, jit_compile=True)

    def run(rows: Floats, lengths: Sequence[int], states: Floats) -> tuple[Floats, Floats]:
        outputs, after = compiled(*map(tf.constant, (rows, np.array(lengths, np.int32), states)))
        return np.asarray(outputs), np.asarray(after)

    return run


def onnx_run(spec: ModelSpec, weights: Mapping[str, Floats]) -> Run:
    """The written graph."""
    graph = write_graph(spec, weights)
    assert onnx.load_from_string(graph).SerializeToString(deterministic=True) == graph
    session: Any = open_session(graph, 1, spec.name)

    def run(rows: Floats, lengths: Sequence[int], states: Floats) -> tuple[Floats, Floats]:
        inputs = {"rows": rows, "lengths": np.array(lengths, np.int32), "states": states}
        outputs, after = session.run(["outputs", "states_after"], inputs)
        return outputs, after

    return run


RUNS: dict[str, Callable[[ModelSpec, Mapping[str, Floats]], Run]] = {
    "keras": keras_run,
    "compiled": compiled_run,
    "onnx": onnx_run,
}


def check_batch(
    kind: str, spec: ModelSpec, seed: int, rows: Floats, lengths: Sequence[int], states: Floats
) -> None:
    """Compare one call with the oracle on each row alone."""
    weights = contracting_weights(spec, seed)
    outputs, after = RUNS[kind](spec, weights)(rows, lengths, states)
    for b, length in enumerate(lengths):
        expected, expected_state = oracle_step(spec, weights, rows[b, :length], states[b])
        np.testing.assert_allclose(outputs[b, : len(expected)], expected, **CLOSE)
        np.testing.assert_allclose(after[b], expected_state, **CLOSE)


def check_in_chunks(kind: str, spec: ModelSpec, seed: int, streams: list[Floats]) -> None:
    """Compare streams that are cut at random, from states that are not zero, with the oracle."""
    random, weights = np.random.default_rng(seed), contracting_weights(spec, seed)
    states = random_states(spec, random, len(streams))
    outputs, after, cuts = run_in_chunks(RUNS[kind](spec, weights), streams, states, random)
    for b, rows in enumerate(streams):
        lengths = [len(rows)] if spec.chunking == "invisible" else cuts[b]
        expected, expected_state = oracle_in_cuts(spec, weights, rows, states[b], lengths)
        np.testing.assert_allclose(outputs[b], expected, **CLOSE)
        np.testing.assert_allclose(joined(spec, after[b]), joined(spec, expected_state), **CLOSE)


def run_in_chunks(
    run: Run, streams: list[Floats], states: Floats, random: np.random.Generator
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
        values, after = run(batch, lengths, states[waiting])
        for row, b in enumerate(waiting):
            outputs[b].append(values[row, : lengths[row]])
            states[b] = after[row]
            at[b] += lengths[row]
            cuts[b].append(lengths[row])
