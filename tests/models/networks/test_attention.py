"""Attention over the stream: long streams, sums that are not lost, extreme scores, training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.networks.build import StepNetwork
from models.networks.layers import BLOCK_STEPS
from models.spec.model import parse_spec
from service.engine.runtimes import tensorflow
from service.engine.runtimes.base import Runtime
from service.engine.runtimes.loading import RUNTIMES, open_runtime
from tests.models.networks.long_attention import (
    MOST_STEPS,
    SPEC,
    make_artifact,
    rows_of,
    run,
    scores_of,
    weighted_means,
)
from tests.models.networks.running import network_of
from tests.support.oracle import contracting_weights, joined, oracle_step
from tests.support.stepping import step


@pytest.fixture(scope="module", autouse=True)
def one_program() -> Iterator[None]:
    """TensorFlow compiles one program per network, not four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorflow, "ROWS_AT", {MOST_STEPS: (1,)})
        yield


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("attention"))


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, artifact: Artifact) -> Iterator[Runtime]:
    backend = open_runtime(request.param, artifact, threads=0)
    backend.warm()
    return backend


def test_a_long_stream_equals_float64(runtime: Runtime, artifact: Artifact) -> None:
    rows = rows_of(20_000)
    expected = weighted_means(scores_of(artifact, rows), rows, np.longdouble)
    outputs = run(runtime, artifact, rows)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_a_step_changes_the_sum_of_a_long_stream(runtime: Runtime, artifact: Artifact) -> None:
    """After 3e7 steps a float32 sum would move by 2 or not at all."""
    layout, rows = artifact.state, rows_of(200)
    state = layout.zero()
    parts = layout.by_name(state)
    parts["past.maximum"][...] = 2.0
    parts["past.normaliser"][0] = 3e7
    parts["past.sum"][0] = [3e7, -3e7, 6e7]
    before, after = joined(SPEC, state.floats), state.floats[np.newaxis]
    for row in rows:
        _, after = step(runtime, [row[np.newaxis]], after)
    shares = np.exp(scores_of(artifact, rows) - 2.0)
    grown = joined(SPEC, after[0]) - before
    where = layout.slices
    np.testing.assert_allclose(grown[where["past.normaliser"]][0], shares.sum(), rtol=1e-5)
    added = (shares[:, np.newaxis] * rows).sum(axis=0)
    np.testing.assert_allclose(grown[where["past.sum"]][:3], added, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RUNTIMES)
def test_extreme_scores_give_finite_outputs(tmp_path: Path, name: str) -> None:
    """A context of thousands: exp of a difference under- or overflows unless it is rescaled."""
    weights = contracting_weights(SPEC, 6)
    weights["past.context"] = np.full(4, 4000, np.float32)
    weights["past.kernel"] = np.full((3, 4), 0.25, np.float32)
    artifact = write_artifact(tmp_path / "steep", SPEC, weights)
    rising = np.repeat(np.linspace(-2, 2, 30)[:, np.newaxis], 3, axis=1).astype(np.float32)
    runtime = open_runtime(name, artifact, threads=0)
    runtime.warm()
    for rows in (rising, rising[::-1].copy()):
        expected, _ = oracle_step(SPEC, weights, rows, artifact.state.zero().floats)
        state = artifact.state.zero().floats[np.newaxis]
        outputs = []
        for chunk in (rows[:1], rows[1:13], rows[13:]):
            (values,), state = step(runtime, [chunk], state)
            outputs.append(values)
        np.testing.assert_allclose(np.concatenate(outputs), expected, rtol=1e-5, atol=1e-5)


def test_a_call_of_several_blocks_equals_its_steps() -> None:
    network = network_of(SPEC, 7)
    rows = rows_of(2 * BLOCK_STEPS + 9)
    lengths = [len(rows), BLOCK_STEPS + 1, BLOCK_STEPS]
    batch = np.stack([rows] * 3)
    zero = np.zeros((3, network.state_size), np.float32)
    outputs, after = network.step(batch, np.array(lengths, np.int32), zero)
    for b, length in enumerate(lengths):
        expected, state = oracle_step(SPEC, network.get_weights(), rows[:length], zero[b])
        np.testing.assert_allclose(outputs[b, :length], expected, rtol=1e-5, atol=1e-5)
        state_after = joined(SPEC, np.asarray(after)[b])
        np.testing.assert_allclose(state_after, joined(SPEC, state), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("over", ["chunk", "stream"])
def test_gradients_equal_finite_differences(over: str) -> None:
    """Also beside a row of length 0, whose every score is masked."""
    layers = [
        {"kind": "gru", "units": 3},
        {"kind": "attention", "name": "focus", "over": over, "units": 2},
    ]
    heads = [{"kind": "dense", "name": "y", "units": 3}]
    spec = parse_spec({"name": "m", "features": 2, "layers": layers, "heads": heads})
    network = StepNetwork(spec)
    weights = contracting_weights(spec, 8)
    random = np.random.default_rng(8)
    rows = random.normal(size=(3, 6, 2)).astype(np.float32)
    lengths = np.array([6, 4, 0], np.int32)
    state = np.zeros((3, network.state_size), np.float32)
    targets = random.normal(size=(3, 6, 3)).astype(np.float32)
    counts = (np.arange(6) < lengths[:, np.newaxis])[..., np.newaxis]

    def loss() -> tf.Tensor:
        outputs = network.forward(rows, lengths, state).raw["y"]
        return tf.reduce_sum(tf.where(counts, tf.square(outputs - targets), 0.0))

    network.set_weights(weights)
    with tf.GradientTape() as tape:
        value = loss()
    names = ["focus.kernel", "focus.bias", "focus.context", "gru_1.kernel", "heads.y.kernel"]
    gradients = dict(
        zip(list(weights), tape.gradient(value, network.trainable_variables), strict=True)
    )
    for name in names:
        place = tuple(random.integers(0, size) for size in weights[name].shape)
        sides = []
        for sign in (1, -1):
            shifted = {key: array.copy() for key, array in weights.items()}
            shifted[name][place] += sign * 1e-2
            network.set_weights(shifted)
            sides.append(float(loss()))
        slope = (sides[0] - sides[1]) / 2e-2
        assert np.asarray(gradients[name])[place] == pytest.approx(slope, rel=2e-2, abs=6e-4)
