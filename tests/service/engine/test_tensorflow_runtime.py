"""The TensorFlow runtime matches the oracle at every rung; a warm one has compiled them all."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from service.engine.compute import Compute
from service.engine.runtimes.tensorflow import TensorflowRuntime, rungs_up_to
from tests.support.oracle import contracting_weights, oracle_step

SPEC = parse_spec(
    {
        "name": "small",
        "features": 2,
        # a layer takes half a second to compile at each of the twelve rungs
        "layers": [
            {"kind": "gru", "units": 4},
            {"kind": "concatenate", "inputs": ["gru_1", "features"]},
        ],
        "heads": [{"kind": "dense", "name": "out", "units": 3}],
    }
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_artifact(tmp_path_factory.mktemp("small"), SPEC, contracting_weights(SPEC, 1))


def rows_of(random: np.random.Generator, steps: int) -> NDArray[np.float32]:
    return random.normal(size=(steps, SPEC.input_features)).astype(np.float32)


async def check(runtime: TensorflowRuntime, artifact: Artifact, lengths: list[int]) -> None:
    """Ragged rows from random states equal the oracle, outputs and states."""
    random = np.random.default_rng(len(lengths))
    rows = [rows_of(random, length) for length in lengths]
    states = random.uniform(-0.5, 0.5, (len(rows), artifact.state.float_size)).astype(np.float32)
    kept = states.copy()
    compute = Compute()
    try:
        inferred = await compute.infer(runtime, rows, states, lambda *_: None)
    finally:
        compute.close()
    outputs, after = inferred.outputs, inferred.states
    assert inferred.finite
    np.testing.assert_array_equal(states, kept, "what the engine was given is not written to")
    for index, row in enumerate(rows):
        expected, state = oracle_step(artifact.spec, artifact.weights, row, kept[index])
        np.testing.assert_allclose(outputs[index], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(after[index], state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("max_steps", "steps"),
    [
        (1, [1]),
        (10, [1, 4, 10]),
        (64, [1, 4, 16, 64]),
        (70, [1, 4, 16, 64, 70]),
        (1000, [1, 4, 16, 64, 256, 1000]),
        (1024, [1, 4, 16, 64, 256, 1024]),
    ],
)
def test_ladder_reaches_the_longest_call(max_steps: int, steps: list[int]) -> None:
    rungs = rungs_up_to(max_steps)
    assert list(dict.fromkeys(step for _, step in rungs)) == steps
    assert rungs[-1] == (TensorflowRuntime.max_batch, max_steps)
    assert len(set(rungs)) == len(rungs)


async def test_a_warm_runtime_has_compiled_every_rung(artifact: Artifact) -> None:
    runtime = TensorflowRuntime(artifact, threads=0)
    runtime.warm()
    batches = [[1], [5, 1], [3] * 9, [64, 1, 20], [150, 2, 65, 64]]
    assert runtime.padded_shape(1, 1) == (1, 1)
    assert runtime.padded_shape(2, 3) == (32, 4)
    assert runtime.padded_shape(9, 16) == (16, 16)
    assert runtime.padded_shape(runtime.max_batch, runtime.max_steps) == (32, 64)
    for lengths in batches:
        await check(runtime, artifact, lengths)
