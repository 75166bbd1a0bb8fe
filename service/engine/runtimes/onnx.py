"""The ONNX Runtime runtime: one session per model, which computes in the thread of its caller.

ONNX Runtime compiles nothing, so a batch runs at its own shape, and only shorter rows are padded.
One thread needs no pool; more threads sleep between calls instead of spinning. Memory is allocated
per call: an arena would keep the size of the largest batch and is no faster
(docs/decisions/runtimes.md). The session keeps no state between calls.

Only graphs that `models.onnx` generates from spec and weights are loaded: a graph file could
contain other weights under the model's fingerprint, read other files, or loop forever.
"""

from __future__ import annotations

import numpy as np

from models.artifact.artifact import Artifact
from models.errors import ArtifactError
from models.onnx.library import onnxruntime
from models.onnx.names import (
    LENGTHS,
    OUTPUTS,
    ROWS,
    STATES,
    STATES_AFTER,
)
from service.core.values import FloatRows
from service.engine.runtimes.base import FloatBatch, Lengths

SLICE_STEPS = 64
"""Longest call of a model whose chunks may be split."""
ERRORS_ONLY = 3
"""Log severity; ONNX Runtime warns about devices that are not used."""
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
        where = str(artifact.path)
        graph = artifact.graphs.data
        if graph is None:
            raise ArtifactError(f"{where}: no graph can represent it: {artifact.graphs.refused}")
        onnxruntime.set_default_logger_severity(ERRORS_ONLY)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no common base
            raise ArtifactError(f"{where}: ONNX Runtime rejects the graph: {error}") from error
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

    def warm_next(self) -> bool:
        """False: there are no shapes to compile."""
        return False

    def step(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        """Run one batch; see `Runtime.step`."""
        outputs, after = self._session.run(RESULTS, {ROWS: rows, LENGTHS: lengths, STATES: states})
        return outputs, after
