"""A chunk whose outputs overflow fails; the others of its batch do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE
from service.core.errors import NotFinite, StreamNotFound
from service.core.values import Reply, StreamKey
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.pipelines import chunk_of, oracle_outputs, rows_of, sequence_of, worker


class Padding(NumpyRuntime):
    """A runtime that writes given numbers into the padding."""

    def __init__(self, artifact: Artifact, padding: float):
        super().__init__(artifact)
        self.padding = padding


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("padding", [NumpyRuntime.padding, math.inf, math.nan])
async def test_overflow_fails_its_own_stream_only(
    store_url: str, artifact: Artifact, padding: float, at: int
) -> None:
    """At any index of the batch, with any values in the padding."""
    random = np.random.default_rng(50)
    rows = [rows_of(random, steps) for steps in (2, 5, 3)]
    rows[at][-1] = 1e30 * np.sign(artifact.weights["heads.steep.kernel"][:, 0])
    runtime = Padding(artifact, padding)
    async with worker(store_url, artifact, runtime=runtime) as one:
        found = await one.process_many(ANYONE, [chunk_of(f"s{i}", rows[i], 0) for i in range(3)])
        assert len(runtime.shapes) == 1
        for index, outcome in enumerate(found):
            if index == at:
                assert isinstance(outcome, NotFinite)
                with pytest.raises(StreamNotFound):
                    await one.streams.read(ANYONE, StreamKey("probe", f"s{index}"))
                continue
            assert isinstance(outcome, Reply)
            np.testing.assert_allclose(
                outcome.outputs, oracle_outputs(artifact, rows[index]), rtol=1e-5, atol=1e-5
            )
        with pytest.raises(NotFinite):
            await one.predict(ANYONE, "probe", [sequence_of(r) for r in rows])
        assert await one.predict(ANYONE, "probe", [sequence_of(rows_of(random, 5))])
