"""The runtime alone: what the network costs without a service around it.

The engine's own `Runtime.step` on random rows and states, in one process on the servers' core.
Carry cannot be faster than this; how near it comes is the last word on everything else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.artifact.artifact import load_artifact
from service.engine.runtimes.loading import open_runtime

BATCHES = (1, 8, 32, 64, 128)


class Rate(NamedTuple):
    """What one batch size gives."""

    chunks_per_s: float
    cpu_us_per_chunk: float


class Compute:
    """One warm runtime; made by `Remote("tests.bench.compute:Compute", ...)`."""

    def __init__(self, runtime: str, artifact: str):
        self._artifact = load_artifact(Path(artifact))
        self._runtime = open_runtime(runtime, self._artifact, 1)
        self._runtime.warm()
        while self._runtime.warm_next():
            pass

    def rates(self, steps: int, batches: Sequence[int], seconds: float) -> dict[int, Rate]:
        """Chunks of `steps` events at each batch that the runtime takes.

        Args:
            seconds: for each batch.
        """
        runtime, random = self._runtime, np.random.default_rng(1)
        found = {}
        for batch in batches:
            if batch > runtime.max_batch:
                continue
            padded, long = runtime.padded_shape(batch, steps)
            rows = random.normal(size=(padded, long, self._artifact.spec.input_features))
            lengths = np.full(padded, steps, np.int32)
            states = random.uniform(-1, 1, (padded, self._artifact.state.float_size))
            arguments = (rows.astype(np.float32), lengths, states.astype(np.float32))
            runtime.step(*arguments)
            calls, began_s, cpu_before_s = 0, time.perf_counter(), time.process_time()
            while (passed_s := time.perf_counter() - began_s) < seconds:
                runtime.step(*arguments)
                calls += 1
            cpu_s = time.process_time() - cpu_before_s
            found[batch] = Rate(calls * batch / passed_s, cpu_s / (calls * batch) * 1e6)
        return found
