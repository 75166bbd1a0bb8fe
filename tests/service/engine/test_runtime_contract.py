"""The contract of a runtime: every runtime against the float64 oracle, and against itself.

Weights are random and distinct, states are not zero. Equal means |a-b| <= 1e-5 + 1e-5 |b| to
the oracle, and |a-b| <= 1e-6 + 1e-6 |b| between two ways through the same runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.layout import weight_shapes
from models.spec.model import ModelSpec, parse_spec
from service.engine.compute import Compute
from service.engine.runtimes.base import Runtime
from service.engine.runtimes.loading import RUNTIMES, open_runtime
from tests.support.events import FULL_SCHEMA
from tests.support.oracle import contracting_weights, joined, oracle_in_cuts, random_states
from tests.support.stepping import in_cuts, step

Floats = NDArray[np.float32]

STACKED: dict[str, Any] = {
    "layers": [
        {"kind": "lstm", "units": 7},
        {"kind": "gru", "units": 6},
        {"kind": "gru", "units": 5, "reset_after": False},
        {"kind": "lstm", "units": 4, "use_bias": False, "activation": "softsign"},
    ],
    "heads": [
        {"kind": "sequence", "name": "last"},
        {"kind": "dense", "name": "out", "units": 3, "input": "gru_2", "activation": "softmax"},
    ],
}
FLOW: dict[str, Any] = {
    "kind": "numeric",
    "name": "flow",
    "optional": True,
    "transform": "signed_log1p",
    "mean": 2.0,
    "std": 3.0,
    "normalisation": {"std": 0.7},
    "season_events": 4,
}
EVENTS: dict[str, Any] = {
    "events": {
        "timezone": FULL_SCHEMA.timezone,
        "fields": [FLOW, *FULL_SCHEMA.model_dump(mode="json")["fields"]],
    },
    "layers": [
        {"kind": "lstm", "units": 6},
        # so that padding shows: behind a recurrent layer alone the rows could be anything
        {"kind": "concatenate", "inputs": ["lstm_1", "features"]},
    ],
    "heads": [
        {"kind": "anomaly", "name": "odd", "targets": ["carrier", "delay", "late", "load", "flow"]},
        {"kind": "forecast", "name": "range", "targets": ["delay", "flow", "load"]},
        {"kind": "forecast", "name": "point", "targets": ["flow", "delay"], "quantiles": []},
        {"kind": "classification", "name": "gate", "target": "gate"},
        {"kind": "classification", "name": "heavy", "target": "heavy"},
        {"kind": "classification", "name": "late_load", "target": "load", "above": 4.5},
        {"kind": "anomaly", "name": "odd_gate", "targets": ["gate"], "input": "lstm_1"},
        {"kind": "classification", "name": "likely", "target": "carrier", "top": 3},
        {"kind": "classification", "name": "gates", "target": "gate", "top": 9, "input": "lstm_1"},
        {"kind": "dense", "name": "next", "units": 1, "targets": ["load"]},
        {"kind": "label", "name": "faulty"},
        {"kind": "label", "name": "phase", "classes": ["start", "run", "stop"]},
    ],
}
ATTENDING: dict[str, Any] = {
    "layers": [
        {"kind": "lstm", "units": 5},
        {"kind": "attention", "name": "so_far", "over": "stream", "units": 4},
        {"kind": "concatenate", "inputs": ["lstm_1", "so_far"]},
        {"kind": "gru", "units": 4},
        {"kind": "attention", "name": "again", "over": "stream", "units": 3},
    ],
    "heads": [
        {"kind": "sequence", "name": "last"},
        {"kind": "dense", "name": "out", "units": 3, "input": "so_far"},
    ],
}
WHOLE: dict[str, Any] = {
    "layers": [
        {"kind": "gru", "units": 5},
        {"kind": "attention", "name": "here", "over": "chunk", "units": 4},
        {"kind": "attention", "name": "so_far", "over": "stream", "units": 4, "inputs": ["gru_1"]},
        {"kind": "add", "name": "both", "inputs": ["here", "so_far"]},
        {"kind": "lstm", "units": 4, "inputs": ["both"]},
        {"kind": "dense", "name": "tail", "units": 3, "inputs": ["here"], "activation": "tanh"},
    ],
    "heads": [
        {"kind": "dense", "name": "once", "units": 2},
        {"kind": "sequence", "name": "each", "input": "lstm_1"},
    ],
    "max_chunk_steps": 70,
}
MODELS = {
    "stacked": {"features": 3, **STACKED},
    "events": EVENTS,
    "attending": {"features": 3, **ATTENDING},
    "whole": {"features": 3, **WHOLE},
}


TWO_RUNGS = {16: (1,), 64: (32,)}
"""Rows by steps of what TensorFlow compiles: a rung takes seconds.
`test_tensorflow_runtime.py` compiles every rung."""


class Opened(NamedTuple):
    artifact: Artifact
    runtime: Runtime

    @property
    def spec(self) -> ModelSpec:
        return self.artifact.spec

    def states(self, random: np.random.Generator, count: int) -> Floats:
        return random_states(self.spec, random, count)


def spec_of(name: str) -> ModelSpec:
    return parse_spec({"name": name, **MODELS[name]})


@pytest.fixture(
    scope="module", params=[(name, model) for model in MODELS for name in RUNTIMES], ids="-".join
)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    name, model = request.param
    spec = spec_of(model)
    folder = tmp_path_factory.mktemp("models") / model
    artifact = write_artifact(folder, spec, contracting_weights(spec, 11))
    with pytest.MonkeyPatch.context() as patched:
        if name == "tensorflow":
            patched.setattr("service.engine.runtimes.tensorflow.ROWS_AT", TWO_RUNGS)
        runtime = open_runtime(name, artifact, threads=0 if name == "tensorflow" else 1)
    runtime.warm()
    return Opened(artifact, runtime)


def encoded(random: np.random.Generator, spec: ModelSpec, steps: int) -> Floats:
    """Rows that an encoder could have written, float32 [steps, F]."""
    rows = random.normal(size=(steps, spec.input_features))
    for index, column in enumerate(spec.columns):
        if column.codes is not None:
            rows[:, index] = random.integers(0, column.codes, steps)
        elif column.name in ("heavy", "late") or column.name.endswith(".missing"):
            rows[:, index] = random.integers(0, 2, steps)
    for index, column in enumerate(spec.columns):
        if column.name.endswith(".missing"):
            rows[:, index - 1] *= 1 - rows[:, index]
    return rows.astype(np.float32)


def equals_the_oracle(
    opened: Opened,
    rows: Floats,
    state: Floats,
    outputs: Floats,
    after: Floats,
    cuts: Sequence[int] | None = None,
) -> None:
    weights, chunks = opened.artifact.weights, cuts or [len(rows)]
    expected, expected_state = oracle_in_cuts(opened.spec, weights, rows, state, chunks)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    numbers, expected_numbers = joined(opened.spec, after), joined(opened.spec, expected_state)
    np.testing.assert_allclose(numbers, expected_numbers, rtol=1e-5, atol=1e-5)


def same(actual: Floats, expected: Floats) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def same_state(opened: Opened, actual: Floats, expected: Floats) -> None:
    np.testing.assert_allclose(
        joined(opened.spec, actual), joined(opened.spec, expected), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("lengths", [[1], [16], [1, 9, 16, 3, 16, 2], [64, 1]], ids=str)
def test_ragged_batch_matches_the_oracle(opened: Opened, lengths: list[int]) -> None:
    random = np.random.default_rng(len(lengths))
    rows = [encoded(random, opened.spec, length) for length in lengths]
    states = opened.states(random, len(rows))
    kept = [array.copy() for array in (*rows, states)]
    outputs, after = step(opened.runtime, rows, states)
    for given, before in zip((*rows, states), kept, strict=True):
        np.testing.assert_array_equal(given, before, "what is given is not written to")
    for index, row in enumerate(rows):
        equals_the_oracle(opened, row, states[index], outputs[index], after[index])


def test_chunk_boundaries_are_invisible_or_as_the_models_chunking_says(opened: Opened) -> None:
    random = np.random.default_rng(1)
    rows = encoded(random, opened.spec, 40)
    state = opened.states(random, 1)[0]
    whole, after = in_cuts(opened.runtime, rows, state, [40])
    equals_the_oracle(opened, rows, state, whole, after)
    for cuts in ([1] * 40, [16, 16, 8], [3, 1, 20, 16], [39, 1]):
        outputs, end = in_cuts(opened.runtime, rows, state, cuts)
        if opened.spec.chunking == "invisible":
            same(outputs, whole)
            same_state(opened, end, after)
        else:
            equals_the_oracle(opened, rows, state, outputs, end, cuts)
            assert np.abs(outputs - whole).max() > 1e-3


async def test_longest_chunk_is_one_call_if_the_model_sees_chunks_whole(
    opened: Opened,
) -> None:
    limit = opened.spec.chunk_limit
    random = np.random.default_rng(7)
    rows = [encoded(random, opened.spec, length) for length in (limit or 150, 5)]
    states, calls = opened.states(random, 2), []
    compute = Compute()
    try:
        inferred = await compute.infer(
            opened.runtime, rows, states, lambda *call: calls.append(call)
        )
    finally:
        compute.close()
    assert len(calls) == (3 if limit is None else 1)
    for index, row in enumerate(rows):
        actual = inferred.outputs[index], inferred.states[index]
        equals_the_oracle(opened, row, states[index], *actual)


def test_batched_outputs_equal_single_outputs(opened: Opened) -> None:
    random = np.random.default_rng(2)
    rows = [encoded(random, opened.spec, length) for length in (5, 12, 1, 16, 2, 7, 16, 3, 11)]
    states = opened.states(random, len(rows))
    order = random.permutation(len(rows))
    together, after = step(opened.runtime, [rows[index] for index in order], states[order])
    for place, index in enumerate(order):
        (alone,), state = step(opened.runtime, [rows[index]], states[index : index + 1])
        same(together[place], alone)
        same_state(opened, after[place], state[0])


@pytest.mark.parametrize(("more_rows", "more_steps"), [(6, 0), (0, 40), (7, 13)])
def test_padding_does_not_change_outputs(opened: Opened, more_rows: int, more_steps: int) -> None:
    random = np.random.default_rng(3)
    rows = [encoded(random, opened.spec, length) for length in (4, 16)]
    states = opened.states(random, 2)
    outputs, after = step(opened.runtime, rows, states)
    padded, padded_after = step(
        opened.runtime, rows, states, more_rows=more_rows, more_steps=more_steps
    )
    same_state(opened, padded_after, after)
    for actual, expected in zip(padded, outputs, strict=True):
        same(actual, expected)


def test_state_does_not_change_beyond_a_rows_length(opened: Opened) -> None:
    random = np.random.default_rng(4)
    rows = encoded(random, opened.spec, 16)
    state = opened.states(random, 1)
    shapes = opened.runtime.padded_shape(1, 16)
    assert shapes == (1, 16)
    lengths = np.array([6], np.int32)
    # the engine never sends this: what lies beyond a length must not matter to the state
    _, after = opened.runtime.step(rows[np.newaxis], lengths, state)
    _, short = step(opened.runtime, [rows[:6]], state)
    same_state(opened, after, short)
    assert np.abs(short - state).max() > 1e-3


def test_results_are_not_overwritten_by_the_next_call(opened: Opened) -> None:
    random = np.random.default_rng(5)
    rows = [encoded(random, opened.spec, 16) for _ in range(2)]
    states = opened.states(random, 2)
    (first,), after = step(opened.runtime, rows[:1], states[:1])
    kept, kept_after = first.copy(), after.copy()
    step(opened.runtime, rows[1:], states[1:])
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(after, kept_after)


@pytest.mark.parametrize("options", [{}, {"peepholes": True}, {"projection": 15}], ids=str)
def test_chunk_boundaries_are_bitwise_invisible_on_onnxruntime(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Recurrent weights so large that a difference in the last digit is visible after a few steps,
    as it is between XLA's programs of two shapes.
    """
    spec = parse_spec(
        {
            "name": "chaotic",
            "features": 4,
            "layers": [{"kind": "lstm", "units": 20, **options}, {"kind": "gru", "units": 20}],
            "heads": [{"kind": "sequence", "name": "last"}],
        }
    )
    random = np.random.default_rng(6)
    weights = {
        key: (random.normal(size=shape) * 2).astype(np.float32)
        for key, shape in weight_shapes(spec).items()
    }
    artifact = write_artifact(tmp_path / "m", spec, weights)
    runtime = open_runtime("onnxruntime", artifact, 1)
    rows = random.normal(size=(64, 4)).astype(np.float32)
    state = random.uniform(-1, 1, artifact.state.float_size).astype(np.float32)
    whole, after = in_cuts(runtime, rows, state, [64])
    touched, _ = in_cuts(runtime, rows, state + np.float32(1e-6), [64])
    assert np.abs(touched - whole).max() > 1e-3
    for cuts in ([1] * 64, [16] * 4, [3, 5, 13, 43]):
        outputs, end = in_cuts(runtime, rows, state, cuts)
        same(outputs, whole)
        same(end, after)
    company = [rows, rows[:7], rows[:30]]
    outputs, _ = step(runtime, company, np.stack([state] * 3))
    for actual, row in zip(outputs, company, strict=True):
        same(actual, whole[: len(row)])
