"""Calls of ONNX Runtime that take too long are terminated, and the runtime stays usable."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.core.errors import InferenceTimeout
from service.engine.runtimes import onnx
from service.engine.runtimes.loading import open_runtime
from tests.support.detection import sensor_model
from tests.support.onnx_graphs import import_here
from tests.support.onnx_variants import ENDLESS_STEPS, VARIANTS, write_endless


def imported(folder: Path, graph: str) -> Artifact:
    path = folder / "graph.onnx"
    write = VARIANTS[graph].write if graph in VARIANTS else write_endless
    write(path)
    return import_here(path, folder / "out").artifact


def call(runtime: Any, model: Artifact, steps: int) -> Any:
    rows = np.zeros((2, steps, model.spec.input_features), np.float32)
    states = np.zeros((2, model.runtime_state.float_size), np.float32)
    outputs, after = runtime.step(rows, np.full(2, steps, np.int32), states)
    assert np.isfinite(outputs).all()
    assert np.isfinite(after).all()


def test_an_endless_call_of_an_imported_graph_is_terminated(tmp_path: Path) -> None:
    model = imported(tmp_path, "endless")
    runtime = open_runtime("onnxruntime", model, 1)
    with ThreadPoolExecutor(1) as thread:
        endless = thread.submit(call, runtime, model, ENDLESS_STEPS + 1)
        while not endless.done():
            runtime.terminate_call()
    with pytest.raises(InferenceTimeout, match="took too long"):
        endless.result()
    call(runtime, model, ENDLESS_STEPS)


@pytest.mark.parametrize("kind", ["step", "layers", "detection"])
def test_every_model_on_onnx_runtime_can_be_terminated(
    tmp_path: Path, artifact: Artifact, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between two of the calls of a graph that is run step by step; a call that completes
    although it was terminated leaves the next one alone: ONNX Runtime looks at the flag before each
    operator, not after the last one."""
    terminated_after: list[Any] = []
    open_session = onnx.open_session

    class Session:
        """A session that terminates its calls after their last operator."""

        def __init__(self, *arguments: Any):
            self._session = open_session(*arguments)

        def run(self, *arguments: Any) -> Any:
            values = self._session.run(*arguments)
            for runtime in terminated_after:
                runtime.terminate_call()
            return values

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

    monkeypatch.setattr(onnx, "open_session", Session)
    models = {
        "step": lambda: imported(tmp_path, "last-step"),
        "layers": lambda: artifact,
        "detection": lambda: sensor_model(tmp_path, units=4),
    }
    model = models[kind]()
    runtime = open_runtime("onnxruntime", model, 1)
    runtime.terminate_call()
    with pytest.raises(InferenceTimeout):
        call(runtime, model, 2)
    call(runtime, model, 2)
    terminated_after.append(runtime)
    call(runtime, model, 1)
    terminated_after.clear()
    call(runtime, model, 1)
