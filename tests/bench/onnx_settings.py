"""Ways to set and call ONNX Runtime, side by side in one process; all on one thread.

python -m tests.bench.onnx_settings

The first way is the service's own (`service/engine/runtimes/onnx.py`). The ways take turns, and
of the turns' times the smallest counts. The network is that of `tests.bench.runtimes`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models.networks.initial_artifact import initialise_artifact
from models.onnx.library import onnxruntime
from models.spec.model import parse_spec
from service.engine.runtimes.onnx import RESULTS, OnnxRuntime
from tests.bench.runtimes import SPEC

SHAPES = ((1, 1), (1, 16), (8, 16), (32, 16))
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256)
STEPS = (16, 32, 64, 128, 256)
ROUNDS = 8
TURN_S = 0.03

Arrays = dict[str, np.ndarray[Any, Any]]
Way = Callable[[Arrays], Any]
LEVELS = onnxruntime.GraphOptimizationLevel


def session(graph: bytes, **changes: Any) -> onnxruntime.InferenceSession:
    """A session set as the service's, but for the changes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = changes.get("arena", False)
    options.graph_optimization_level = changes.get("level", LEVELS.ORT_ENABLE_ALL)
    if changes.get("unpacked"):
        options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def ways(graph: bytes) -> dict[str, Way]:
    """Each way by its name in the table."""
    plain = session(graph)

    def runs(chosen: onnxruntime.InferenceSession) -> Way:
        return lambda given: chosen.run(RESULTS, given)

    def bound(given: Arrays) -> Any:
        binding = plain.io_binding()
        for name, array in given.items():
            binding.bind_cpu_input(name, array)
        for name in RESULTS:
            binding.bind_output(name)
        plain.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()

    def values(given: Arrays) -> Any:
        wrap = onnxruntime.OrtValue.ortvalue_from_numpy
        found = plain.run_with_ort_values(
            RESULTS, {name: wrap(array) for name, array in given.items()}
        )
        return [value.numpy() for value in found]

    return {
        "as the service": runs(plain),
        "with arena and memory pattern": runs(session(graph, arena=True)),
        "inputs and outputs bound": bound,
        "OrtValues": values,
        "weights not packed": runs(session(graph, unpacked=True)),
        "basic graph optimisations": runs(session(graph, level=LEVELS.ORT_ENABLE_BASIC)),
        "no graph optimisations": runs(session(graph, level=LEVELS.ORT_DISABLE_ALL)),
    }


def arrays(rows: int, steps: int, state_size: int) -> Arrays:
    random = np.random.default_rng(1)
    return {
        "rows": random.normal(size=(rows, steps, 16)).astype(np.float32),
        "lengths": np.full(rows, steps, np.int32),
        "states": random.uniform(-1, 1, (rows, state_size)).astype(np.float32),
    }


def fastest_s(way: Way, given: Arrays) -> float:
    """The fastest call of one turn."""
    best, until_s = float("inf"), time.perf_counter() + TURN_S
    while (began_s := time.perf_counter()) < until_s:
        way(given)
        best = min(best, time.perf_counter() - began_s)
    return best


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        artifact = initialise_artifact(parse_spec(SPEC), Path(folder) / "bench", seed=1)
    graph = artifact.graphs.data
    assert graph is not None
    size = artifact.state.float_size
    tried = ways(graph)
    given = {shape: arrays(*shape, size) for shape in SHAPES}
    best: dict[tuple[str, tuple[int, int]], float] = {}
    for _ in range(ROUNDS):
        for shape in SHAPES:
            for name, way in tried.items():
                found = fastest_s(way, given[shape])
                best[name, shape] = min(found, best.get((name, shape), found))
    print("| us a call | " + " | ".join(f"{rows} x {steps}" for rows, steps in SHAPES) + " |")
    print("| --- |" + " --- |" * len(SHAPES))
    for name in tried:
        cells = [f"{best[name, shape] * 1e6:,.1f}" for shape in SHAPES]
        print(f"| {name} | " + " | ".join(cells) + " |")

    runtime = OnnxRuntime(artifact, 1)

    def call(given: Arrays) -> Any:
        return runtime.step(given["rows"], given["lengths"], given["states"])

    print("\nsteps a second, by streams at 16 steps and by steps of one stream:")
    for shapes in ([(rows, 16) for rows in ROWS], [(1, steps) for steps in STEPS]):
        rates = {}
        for shape in shapes:
            inputs = arrays(*shape, size)
            fastest = min(fastest_s(call, inputs) for _ in range(ROUNDS))
            rates[shape] = shape[0] * shape[1] / fastest
        print(", ".join(f"{rows} x {steps}: {rate:,.0f}" for (rows, steps), rate in rates.items()))


if __name__ == "__main__":
    main()
