"""Models with blocks on both runtimes: any chunk boundaries, any batch, the defined outputs."""

from __future__ import annotations

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from models.spec.state import State
from service.engine.compute import Compute
from service.engine.runtimes.base import Runtime
from service.engine.runtimes.loading import RUNTIMES, open_runtime
from service.pipeline.inference import infer_batch
from service.pipeline.served_model import Segment, ServedModel
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import contracting_weights, oracle_in_blocks

ONE_RUNG = {64: (8,)}
"""Rows by steps of what TensorFlow compiles, for seconds a rung: as many as there are streams."""

SPEC = parse_spec(
    {
        "name": "tagger",
        "features": 2,
        "layers": [
            {"kind": "bidirectional", "units": 3},
            {"kind": "lstm", "units": 3, "projection": 2},
            {"kind": "bidirectional", "cell": "gru", "units": 2, "merge": "sum"},
        ],
        "heads": [{"kind": "dense", "name": "label", "units": 2}],
        "blocks": {"size": 3, "lookahead": 4},
    }
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("blocks")
    return write_artifact(folder / "tagger", SPEC, contracting_weights(SPEC, 3))


@pytest.fixture(scope="module", params=[*RUNTIMES, "numpy"])
def runtime(request: pytest.FixtureRequest, artifact: Artifact) -> Runtime:
    if request.param == "numpy":
        return NumpyRuntime(artifact)
    threads = 0 if request.param == "tensorflow" else 1
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "tensorflow":
            patched.setattr("service.engine.runtimes.tensorflow.ROWS_AT", ONE_RUNG)
        opened = open_runtime(request.param, artifact, threads=threads)
    opened.warm()
    return opened


async def streamed(
    runtime: Runtime, artifact: Artifact, streams: list[np.ndarray], random: np.random.Generator
) -> list[np.ndarray]:
    """All streams in one batch, each in chunks of its own, also of one event or none."""
    served = ServedModel(artifact, runtime)
    layout = served.blocks
    assert layout is not None
    compute = Compute()
    states: list[State] = [artifact.state.zero()] * len(streams)
    at = [0] * len(streams)
    outputs: list[list[np.ndarray]] = [[] for _ in streams]
    ended = [False] * len(streams)
    while not all(ended):
        members = [b for b, done in enumerate(ended) if not done]
        known = []
        for b in members:
            count = int(random.choice([1, 1, 2, 3, 5, 11]))
            piece = streams[b][at[b] : at[b] + count]
            at[b] += len(piece)
            # sometimes the end comes with the last events, sometimes alone
            ended[b] = at[b] == len(streams[b]) and (not len(piece) or bool(random.integers(2)))
            known.append(Segment(states[b], piece, states[b].ints, ended[b]))
        done = await infer_batch(compute, served, known, lambda *_: None)
        for b, output, state in zip(members, done.outputs, map(State, *done.states), strict=True):
            outputs[b].append(output)
            states[b] = state
            layout.check(state)
    compute.close()
    assert all(layout.is_closed(state) for state in states)
    return [np.concatenate(parts) for parts in outputs]


async def test_outputs_depend_on_the_stream_only(runtime: Runtime, artifact: Artifact) -> None:
    random = np.random.default_rng(1)
    lengths = (1, 2, 3, 4, 7, 8, 20, 31)
    streams = [random.normal(size=(n, 2)).astype(np.float32) for n in lengths]
    first = await streamed(runtime, artifact, streams, random)
    again = await streamed(runtime, artifact, streams, random)
    for rows, one, other in zip(streams, first, again, strict=True):
        wanted = oracle_in_blocks(SPEC, artifact.weights, rows)
        np.testing.assert_allclose(one, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-6)
