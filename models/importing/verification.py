"""Verifies a translated Keras model on random sequences of several lengths.

What is compared depends on the chunking of the imported model:

    invisible   one call of the original against random chunks, with the state carried from chunk
                to chunk
    per_chunk   random chunks, each one call of both: the recurrent layers of the original without
                `initial_state` are made `stateful`, so that it continues like a stream
    whole       one call of both, from the zero state
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from models.errors import ImportedModelError
from models.importing.keras_graph import ModelOutput, Translation, functional_of
from models.networks.build import StepNetwork
from models.spec.layout import network_state, output_spec, state_spec
from models.spec.state import State

ABSOLUTE_TOLERANCE = 1e-5
RELATIVE_TOLERANCE = 1e-5
LENGTHS_STEPS = (1, 2, 7, 33)
"""Lengths of the random sequences, unless the model fixes the number of steps."""
BATCH = 3
SEED = 20240229

Floats = NDArray[np.float32]


def verify(model: Any, translation: Translation) -> dict[str, Any]:
    """Run both models on random sequences and compare their outputs.

    A model with `stateful=True` keeps its state from one sequence to the next, and so does the
    imported one, unless it takes whole sequences. Do not use `model` afterwards: its layers may
    have become stateful.

    Returns:
        `lengths_steps` of the sequences, `sequences` of each, and the `largest_difference`.

    Raises:
        ImportedModelError: the outputs differ, or those of the original are not finite.
    """
    network = StepNetwork(translation.spec)
    network.set_weights(translation.weights)
    chunking = translation.spec.chunking
    batches = {tensor.shape[0] for tensor in functional_of(model).inputs} - {None}
    batch = int(max(batches, default=BATCH))
    fixed_steps = translation.columns.steps
    lengths = (fixed_steps,) * 3 if fixed_steps else LENGTHS_STEPS
    is_stateful = reset(model) and chunking != "whole"
    if chunking == "per_chunk":
        _keep_states(model, batch)
    if fixed_steps and (chunking == "per_chunk" or translation.states):
        is_stateful = True  # the sequences are the chunks then
    random = np.random.default_rng(SEED)
    state, largest = _initial_state(translation, batch, random), 0.0
    for length in lengths:
        rows = _random_rows(translation, batch, length, random)
        if not is_stateful:
            reset(model)
            state = _initial_state(translation, batch, random)
        in_chunks = chunking == "per_chunk" and fixed_steps is None
        for call in _split(rows, random) if in_chunks else [rows]:
            expected = _run_original(model, translation, call, state)
            chunks = _split(call, random) if chunking == "invisible" else [call]
            outputs, state = _run_imported(network, chunks, state)
            for output in translation.outputs:
                actual = _output_of(translation, output, outputs, state)
                gap = difference(actual, expected[output.index], call.shape[1])
                largest = max(largest, gap)
    return {"lengths_steps": lengths, "sequences": batch, "largest_difference": largest}


def _random_rows(
    translation: Translation, batch: int, length: int, random: np.random.Generator
) -> Floats:
    """Standard normal numbers and uniform codes, float32 [B, T, F]."""
    columns = translation.spec.columns
    rows = random.standard_normal((batch, length, len(columns))).astype(np.float32)
    for index, column in enumerate(columns):
        if column.codes is not None:
            lowest = min(int(translation.columns.masked), column.codes - 1)
            rows[..., index] = random.integers(lowest, column.codes, (batch, length))
    return rows


def _initial_state(translation: Translation, batch: int, random: np.random.Generator) -> Floats:
    """Zero, except for the parts that inputs of the original hold: these are random."""
    layout = network_state(translation.spec)
    state = np.zeros((batch, layout.float_size), np.float32)
    for part in translation.states.values():
        columns = layout.slices[part]
        state[:, columns] = random.uniform(-1, 1, state[:, columns].shape)
    return state


def _run_original(
    model: Any, translation: Translation, rows: Floats, state: Floats
) -> list[Floats]:
    """Call the original on rows, and on the states before them where its inputs hold states."""
    slices, values = network_state(translation.spec).slices, []
    for index, own in enumerate(translation.columns.inputs):
        if own.columns is None:
            values.append(state[:, slices[translation.states[index]]])
            continue
        read = rows[..., own.columns.start : own.columns.stop]
        values.append((read[..., 0] if own.rank == 2 else read).astype(own.dtype))
    inputs = keras.tree.pack_sequence_as(functional_of(model)._inputs_struct, values)
    return [np.asarray(value) for value in keras.tree.flatten(model(inputs, training=False))]


def _split(rows: Floats, random: np.random.Generator) -> Iterator[Floats]:
    """Split rows into random chunks of 1 to 5 steps."""
    at = 0
    while at < rows.shape[1]:
        chunk = rows[:, at : at + int(random.integers(1, 6))]
        yield chunk
        at += chunk.shape[1]


def _run_imported(
    network: StepNetwork, chunks: Iterable[Floats], state: Floats
) -> tuple[Floats, Floats]:
    """Run the imported model on consecutive chunks."""
    parts = []
    for chunk in chunks:
        lengths = np.full(len(chunk), chunk.shape[1], np.int32)
        outputs, after = network.step(chunk, lengths, state)
        parts.append(np.asarray(outputs))
        state = np.asarray(after)
    return np.concatenate(parts, axis=1), state


def _output_of(
    translation: Translation, output: ModelOutput, outputs: Floats, state: Floats
) -> Floats:
    if output.head is not None:
        values = output_spec(translation.spec).by_name(outputs)[output.head]
        return values[:, -1] if output.last_only else values
    layout, ints = state_spec(translation.spec), np.zeros(0, np.int64)
    return np.stack([layout.by_name(State(row, ints))[str(output.part)] for row in state])


def difference(actual: Floats, expected: Floats, length: int) -> float:
    """The largest |a - b| of outputs on a sequence of `length` steps.

    Raises:
        ImportedModelError: it is too large, or values are not finite.
    """
    if actual.shape != expected.shape or not np.isfinite(expected).all():
        raise ImportedModelError(
            f"expected finite outputs of shape {list(actual.shape)} on a random "
            f"sequence of {length} steps, the original gives {list(expected.shape)}"
        )
    gap = np.abs(np.float64(actual) - expected)
    excess = gap / (ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * np.abs(expected))
    if not (excess <= 1).all():
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        raise ImportedModelError(
            f"the packaged model gives {actual[worst]!r} where the original gives "
            f"{expected[worst]!r} (sequence of {length} steps, largest difference "
            f"{gap.max():.3g}); expected |a - b| <= 1e-5 + 1e-5 |b|. Large recurrent weights "
            "make a network chaotic: any two float32 programs diverge there"
        )
    return float(gap.max())


def reset(model: Any) -> bool:
    """Zero the states of all `stateful=True` layers; returns whether any of them is recurrent."""
    is_stateful = False
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False) and hasattr(layer, "reset_state"):
            layer.reset_state()
            is_stateful = is_stateful or isinstance(layer, keras.layers.RNN)
    return is_stateful


def _keep_states(model: Any, batch: int) -> None:
    """Make the recurrent layers stateful, from the zero state.

    A layer that is called with an `initial_state` still starts from it.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.RNN):
            layer.stateful = True
            if layer.states is None:
                layer._create_state_variables(batch)
