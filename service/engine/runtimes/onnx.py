"""The ONNX Runtime runtime: one session per model, which computes in the thread of its caller.

ONNX Runtime compiles nothing, so a batch runs at its own shape, and only shorter rows are padded.
The session keeps no state between calls.

`OnnxRuntime` runs networks of layers, and only on graphs that `models.onnx` generates from spec and
weights: a graph file could contain other weights under the model's fingerprint, read other files,
or loop forever.

`ImportedRuntime` runs imported graphs, which are their networks: the fingerprint covers the graph,
and an artifact is rejected whose graph refers to other files, or whose work depends on values.

ONNX Runtime terminates a call between two operators, also in a loop, when `RunOptions.terminate` is
set.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import structlog

from models.artifact.artifact import Artifact
from models.errors import ArtifactError
from models.onnx.library import onnxruntime, open_session
from models.onnx.names import (
    LENGTHS,
    OUTPUTS,
    ROWS,
    STATES,
    STATES_AFTER,
)
from models.onnx.stateful_graph import StatefulGraph
from service.core.errors import InferenceTimeout
from service.core.values import FloatRows
from service.engine.runtimes.base import FloatBatch, Lengths

log = structlog.get_logger(__name__)

SLICE_STEPS = 64
"""Longest call of a model whose chunks may be split."""
RESULTS = [OUTPUTS, STATES_AFTER]


class _TerminableRuntime:
    """A model whose calls another thread can terminate."""

    def __init__(self, artifact: Artifact):
        self._model = artifact.spec.name
        self._options: Any = onnxruntime.RunOptions()

    def terminate_call(self) -> None:
        """Make the running call raise `InferenceTimeout`; see `Runtime.terminate_call`."""
        self._options.terminate = True
        log.warning("inference_terminated", model=self._model)

    def _raise(self, error: Exception) -> NoReturn:
        """Raise the error of a call: `InferenceTimeout` if the call was terminated."""
        if not self._options.terminate:
            raise error
        raise InferenceTimeout("the inference call took too long and was terminated") from error


class OnnxRuntime(_TerminableRuntime):
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
        super().__init__(artifact)
        where = str(artifact.path)
        graph = artifact.graphs.data
        if graph is None:
            raise ArtifactError(f"{where}: no graph can represent it: {artifact.graphs.rejection}")
        self._session = open_session(graph, threads, where)
        blocks = artifact.spec.blocks
        self._window = 1 if blocks is None else blocks.window
        self.max_steps = artifact.spec.chunk_limit or max(SLICE_STEPS, self._window)
        self._features = artifact.spec.input_features
        self._state_size = artifact.network_state.float_size

    def padded_shape(self, rows: int, steps: int) -> tuple[int, int]:
        """The shape itself; at least a whole window for a model with blocks."""
        return rows, max(steps, self._window)

    def warm(self) -> None:
        """Run once, which allocates what later calls need."""
        self.step(
            np.zeros((1, self._window, self._features), np.float32),
            np.ones(1, np.int32),
            np.zeros((1, self._state_size), np.float32),
        )

    def step(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        """Run one batch; see `Runtime.step`."""
        feeds = {ROWS: rows, LENGTHS: lengths, STATES: states}
        try:
            outputs, after = self._session.run(RESULTS, feeds, self._options)
        except Exception as error:  # its exceptions have no common base
            self._raise(error)
        finally:
            self._options.terminate = False  # a call that was in its last operator completes
        return outputs, after


class ImportedRuntime(_TerminableRuntime):
    """One imported graph on ONNX Runtime.

    Args:
        artifact: the model, whose spec has `onnx`.
        threads: threads inside one operator.

    Raises:
        ArtifactError: ONNX Runtime rejects the graph.
    """

    name = "onnxruntime"
    max_batch = 64

    def __init__(self, artifact: Artifact, threads: int = 1):
        super().__init__(artifact)
        network, graph = artifact.spec.onnx, artifact.network
        if network is None or graph is None:
            raise ArtifactError(f"{artifact.path}: expected an imported graph, got none")
        session = open_session(graph, threads, str(artifact.path))
        self._graph = StatefulGraph(network, artifact.network_state, session, self._options)
        self.max_steps = artifact.spec.chunk_limit or SLICE_STEPS
        self._features = network.features
        self._initial = artifact.state.pack(artifact.state.initial())

    def padded_shape(self, rows: int, steps: int) -> tuple[int, int]:
        """The shape itself: the graph has no fixed one."""
        return rows, steps

    def warm(self) -> None:
        """Run once, which allocates what later calls need."""
        rows = np.zeros((1, 1, self._features), np.float32)
        self.step(rows, np.ones(1, np.int32), self._initial[np.newaxis])

    def step(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        """Run one batch; see `Runtime.step`."""
        try:
            return self._graph.step(rows, lengths, states)
        except Exception as error:
            self._raise(error)
        finally:
            self._options.terminate = False
