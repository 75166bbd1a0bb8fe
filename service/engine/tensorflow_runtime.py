"""The tensorflow runtime: the Keras step, XLA-compiled at a small ladder of shapes.

XLA compiles per shape, so batches are padded up to the next rung in rows and in steps: at
most rows x steps rungs, all compiled by `warm` before the service is ready. One compiled
program per rung; the weights are variables captured by it. Not safe to call from two threads.
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import tensorflow as tf

from models.artifact import Artifact
from models.networks.build import StepNetwork
from service.domain import FloatRows
from service.engine.protocol import FloatBatch, Lengths

ROW_RUNGS = (1, 8, 32)
STEP_RUNGS = (1, 4, 16, 64)


class TensorflowRuntime:
    """One model on TensorFlow.

    Args:
        artifact: the model.
        threads: threads inside one TensorFlow operation, set once per process and before
            TensorFlow's first use; 0 leaves TensorFlow's own choice.
    """

    name = "tensorflow"
    max_batch = ROW_RUNGS[-1]
    max_steps = STEP_RUNGS[-1]

    def __init__(self, artifact: Artifact, threads: int = 1):
        if threads:
            _limit_threads(threads)
        network = StepNetwork(artifact.spec)
        network.set_weights(artifact.weights)
        self._features = artifact.spec.input_features
        self._state_size = artifact.state.float_size
        self._function: Any = tf.function(network.step, jit_compile=True, autograph=False)
        self._programs: dict[tuple[int, int], Any] = {}

    def padded_shape(self, rows: int, steps: int) -> tuple[int, int]:
        """The next rungs up."""
        return (
            ROW_RUNGS[bisect.bisect_left(ROW_RUNGS, rows)],
            STEP_RUNGS[bisect.bisect_left(STEP_RUNGS, steps)],
        )

    def warm(self) -> None:
        """Compile every rung and run it once."""
        for rows in ROW_RUNGS:
            for steps in STEP_RUNGS:
                self.step(
                    np.zeros((rows, steps, self._features), np.float32),
                    np.ones(rows, np.int32),
                    np.zeros((rows, self._state_size), np.float32),
                )

    def step(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        """Run one padded batch; see `Runtime.step`."""
        shape = rows.shape[0], rows.shape[1]
        program = self._programs.get(shape)
        if program is None:
            program = self._function.get_concrete_function(
                tf.TensorSpec(rows.shape, tf.float32),
                tf.TensorSpec(lengths.shape, tf.int32),
                tf.TensorSpec(states.shape, tf.float32),
            )
            self._programs[shape] = program
        outputs, stepped = program(tf.constant(rows), tf.constant(lengths), tf.constant(states))
        return outputs.numpy(), stepped.numpy()


def _limit_threads(threads: int) -> None:
    """Set TensorFlow's pools, where no TensorFlow use has fixed them yet."""
    if tf.config.threading.get_intra_op_parallelism_threads() == threads:
        return
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
