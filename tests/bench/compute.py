"""The compute alone: a runtime's steps in a process without a service."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from models.artifact.artifact import Artifact, load_artifact
from service.engine.runtimes.base import Runtime
from tests.bench.workloads import STEPS, step_arguments, warm_runtime

BATCHES = (1, 8, 32, 64, 128)
COMPUTE_S = 0.3


class Rate(NamedTuple):
    """The compute of one batch size, without a service."""

    chunks_per_s: float
    cpu_us_per_chunk: float


@cache
def _open(name: str, path: Path) -> tuple[Artifact, Runtime]:
    artifact = load_artifact(path)
    return artifact, warm_runtime(name, artifact)


def measure_rates(name: str, path: Path) -> dict[int, Rate]:
    """Steps of a runtime itself on random rows and states, at each batch that it takes."""
    (artifact, runtime), rates = _open(name, path), {}
    for batch in BATCHES:
        if batch > runtime.max_batch:
            continue
        arguments = step_arguments(runtime, artifact, batch, STEPS)
        runtime.step(*arguments)
        calls, started_s, cpu_before_s = 0, time.perf_counter(), time.process_time()
        while (passed_s := time.perf_counter() - started_s) < COMPUTE_S or not calls:
            runtime.step(*arguments)
            calls += 1
        cpu_s = time.process_time() - cpu_before_s
        rates[batch] = Rate(calls * batch / passed_s, cpu_s / (calls * batch) * 1e6)
    return rates
