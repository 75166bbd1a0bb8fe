"""The ONNX Runtime runtime: one session per model, which computes in the thread of its caller.

ONNX Runtime compiles nothing, so a batch runs at its own shape, and only shorter rows are padded.
The session keeps no state between calls.

Networks of layers run only on graphs that `models.onnx` generates from spec and weights: a graph
file could contain other weights under the model's fingerprint, read other files, or loop forever.
Imported graphs are their networks: the fingerprint covers the graph, and an artifact is rejected
whose graph refers to other files, or whose work depends on values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import structlog

from models.artifact.artifact import Artifact
from models.errors import ArtifactError
from models.onnx.library import onnxruntime, open_session
from models.onnx.messages import LENGTHS, OUTPUTS, ROWS, STATES, STATES_AFTER
from service.core.errors import InferenceTimeout
from service.core.values import FloatRows
from service.engine.runtimes.base import FloatBatch, Lengths

log = structlog.get_logger(__name__)

SLICE_STEPS = 64
"""Longest call of a model whose chunks may be split."""
RESULTS = [OUTPUTS, STATES_AFTER]


class OnnxRuntime:
    """One model on ONNX Runtime.

    Args:
        artifact: the model.
        threads: threads inside one operator.

    Raises:
        ArtifactError: no graph can represent the model, or ONNX Runtime rejects it.
    """

    name = "onnxruntime"
    max_batch = 64

    def __init__(self, artifact: Artifact, threads: int = 1):
        spec, where = artifact.spec, str(artifact.path)
        self._model = spec.name
        self._features = spec.input_features
        self._state = artifact.network_state
        self._window = 1 if spec.blocks is None else spec.blocks.window
        self.max_steps = spec.chunk_limit or max(SLICE_STEPS, self._window)
        self._options: Any = onnxruntime.RunOptions()
        graph = artifact.graphs.data if artifact.network is None else artifact.network
        if graph is None:
            raise ArtifactError(f"{where}: no graph can represent it: {artifact.graphs.rejection}")
        self._session = open_session(graph, threads, where)
        self._run = self._run_layers
        if spec.onnx is not None:
            from models.onnx.stateful_graph import StatefulGraph  # for imported graphs alone

            self._run = StatefulGraph(spec.onnx, self._state, self._session, self._options).step

    def padded_shape(self, rows: int, steps: int) -> tuple[int, int]:
        """The shape itself; at least a whole window for a model with blocks."""
        return rows, max(steps, self._window)

    def warm(self) -> None:
        """Run once, which allocates what later calls need."""
        rows = np.zeros((1, self._window, self._features), np.float32)
        initial = self._state.pack(self._state.initial())
        self.step(rows, np.ones(1, np.int32), initial[np.newaxis])

    def step(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        """Run one batch; see `Runtime.step`."""
        try:
            return self._run(rows, lengths, states)
        except Exception as error:  # its exceptions have no common base
            if not self._options.terminate:
                raise
            raise InferenceTimeout("the inference call took too long and was terminated") from error
        finally:
            self._options.terminate = False  # a call that was in its last operator completes

    def _run_layers(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        feeds = {ROWS: rows, LENGTHS: lengths, STATES: states}
        outputs, after = self._session.run(RESULTS, feeds, self._options)
        return outputs, after

    def terminate_call(self) -> None:
        """Make the running call raise `InferenceTimeout`, between two operators, also in a loop."""
        self._options.terminate = True
        log.warning("inference_terminated", model=self._model)
