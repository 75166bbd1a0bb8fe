"""Calls of ONNX Runtime that take too long are terminated, and the runtime stays usable."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.core.errors import InferenceTimeout
from service.engine.runtimes.loading import open_runtime
from tests.support.detection import sensor_model
from tests.support.onnx_graphs import import_here
from tests.support.onnx_variants import ENDLESS_STEPS, VARIANTS, write_endless


def imported(folder: Path, graph: str) -> Artifact:
    path = folder / "graph.onnx"
    write = VARIANTS[graph].write if graph in VARIANTS else write_endless
    write(path)
    return import_here(path, folder / "out").artifact


def call(runtime: Any, found: Artifact, steps: int) -> Any:
    rows = np.zeros((2, steps, found.spec.input_features), np.float32)
    states = np.zeros((2, found.runtime_state.float_size), np.float32)
    return runtime.step(rows, np.full(2, steps, np.int32), states)


def test_an_endless_call_of_an_imported_graph_is_terminated(tmp_path: Path) -> None:
    found = imported(tmp_path, "endless")
    runtime = open_runtime("onnxruntime", found, 1)
    with ThreadPoolExecutor(1) as thread:
        endless = thread.submit(call, runtime, found, ENDLESS_STEPS + 1)
        while not endless.done():
            runtime.terminate_call()
    with pytest.raises(InferenceTimeout, match="took too long"):
        endless.result()
    outputs, states = call(runtime, found, ENDLESS_STEPS)
    assert np.isfinite(outputs).all()
    assert np.isfinite(states).all()


@pytest.mark.parametrize("kind", ["step", "layers", "detection"])
def test_every_model_on_onnx_runtime_can_be_terminated(
    tmp_path: Path, artifact: Artifact, kind: str
) -> None:
    """Also between two of the calls of a graph that is run step by step."""
    found = artifact
    if kind != "layers":
        found = (
            imported(tmp_path, "last-step") if kind == "step" else sensor_model(tmp_path, units=4)
        )
    runtime = open_runtime("onnxruntime", found, 1)
    runtime.terminate_call()
    with pytest.raises(InferenceTimeout):
        call(runtime, found, 2)
    outputs, _ = call(runtime, found, 2)
    assert np.isfinite(outputs).all()


@pytest.mark.parametrize("kind", ["step", "layers"])
def test_call_that_completes_although_it_was_terminated_leaves_the_next_one_alone(
    tmp_path: Path, artifact: Artifact, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime looks at the flag before each operator, not after the last one."""
    found = artifact if kind == "layers" else imported(tmp_path, "last-step")
    runtime: Any = open_runtime("onnxruntime", found, 1)
    holder = runtime if kind == "layers" else runtime._graph
    session = holder._session

    def run_long(*arguments: Any) -> Any:
        values = session.run(*arguments)
        runtime.terminate_call()
        return values

    with monkeypatch.context() as patch:
        patch.setattr(holder, "_session", SimpleNamespace(run=run_long))
        call(runtime, found, 1)
    call(runtime, found, 1)
