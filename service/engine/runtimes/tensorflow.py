"""The TensorFlow runtime: the Keras step network, XLA-compiled at a small ladder of shapes.

XLA compiles per shape, so batches are padded to a rung of the ladder, in rows and in steps. Every
rung is compiled before the service is ready (docs/decisions/runtimes.md); a batch uses the
cheapest one that fits. The ladder of a model that sees a chunk as a whole reaches its longest
chunk. Each rung is one program, which captures the weights as variables.
"""

from __future__ import annotations

from typing import Any

import structlog
import tensorflow as tf

from models.artifact.artifact import Artifact
from models.networks.build import StepNetwork
from service.core.values import FloatRows
from service.engine.runtimes.base import FloatBatch, Lengths

ROWS_AT = {1: (1, 8, 32), 4: (1, 32), 16: (1, 8, 16, 32), 64: (1, 8, 32)}
"""Rows of the rungs by steps: finest around a dozen steps, where most batches are."""
SLICE_STEPS = max(ROWS_AT)
"""Longest call of a model whose chunks may be split."""
MAX_ROWS = 32
DECODER_RUNGS = ((1, 1), (8, 1), (MAX_ROWS, 1))
"""Rungs of a decoder, which computes one step at a time."""

CALL_ROWS = 8
"""Fixed cost of a step, in rows: 1 row took 0.67 of the time of 8 rows at 64 steps
(docs/decisions/runtimes.md). Only the order of the rungs by cost matters."""

log = structlog.get_logger(__name__)


class TensorflowRuntime:
    """One model on TensorFlow.

    Args:
        artifact: the model.
        threads: threads inside one TensorFlow operation, set once per process and before
            TensorFlow's first use; 0 leaves TensorFlow's own choice.
        decoding: whether the model is a decoder's step (`Artifact.decoder`).
    """

    name = "tensorflow"
    max_batch = MAX_ROWS

    def __init__(self, artifact: Artifact, threads: int = 1, *, decoding: bool = False):
        if threads:
            _limit_threads(threads)
        self._model = artifact.spec.name
        network = StepNetwork(artifact.spec, unroll=decoding)
        network.set_weights(artifact.weights)
        self.max_steps = 1 if decoding else artifact.spec.chunk_limit or SLICE_STEPS
        self._rungs = list(DECODER_RUNGS) if decoding else rungs_up_to(self.max_steps)
        if artifact.spec.blocks is not None:
            # every call computes whole windows
            self.max_steps = artifact.spec.blocks.window
            self._rungs = [(rows, self.max_steps) for rows in ROWS_AT[SLICE_STEPS]]
        self._features = artifact.spec.input_features
        self._state_size = artifact.network_state.float_size
        # Exactly the arguments of a call: for a call that does not bind to the whole signature,
        # TensorFlow formats an error message with every array before it falls back (2 ms a call).
        self._function: Any = tf.function(
            lambda rows, lengths, states: network.step(rows, lengths, states),
            jit_compile=True,
            autograph=False,
        )
        self._programs: dict[tuple[int, int], Any] = {}

    def padded_shape(self, rows: int, steps: int) -> tuple[int, int]:
        """The cheapest rung that fits."""
        fitting = (rung for rung in self._rungs if rung[0] >= rows and rung[1] >= steps)
        return min(fitting, key=_cost)

    def warm(self) -> None:
        """Compile every rung and run it once."""
        log.info("compiling", model=self._model, programs=len(self._rungs))
        for rung in self._rungs:
            self._compile(rung)

    def _compile(self, rung: tuple[int, int]) -> None:
        rows, steps = rung
        program = self._function.get_concrete_function(
            tf.TensorSpec((rows, steps, self._features), tf.float32),
            tf.TensorSpec((rows,), tf.int32),
            tf.TensorSpec((rows, self._state_size), tf.float32),
        )
        # XLA compiles at the first call
        program(
            tf.zeros((rows, steps, self._features)),
            tf.ones((rows,), tf.int32),
            tf.zeros((rows, self._state_size)),
        )
        self._programs[rung] = program

    def step(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        """Run one padded batch; see `Runtime.step`."""
        program = self._programs[rows.shape[0], rows.shape[1]]
        outputs, stepped = program(tf.constant(rows), tf.constant(lengths), tf.constant(states))
        return outputs.numpy(), stepped.numpy()

    def terminate_call(self) -> None:
        """Do nothing: TensorFlow cannot terminate a call, and its rung bounds the work."""


def rungs_up_to(max_steps: int) -> list[tuple[int, int]]:
    """The ladder for calls of at most `max_steps` steps; the last rung fits every batch. Beyond
    `ROWS_AT`, each rung has four times the steps of the one before."""
    row_rungs = {steps: rows for steps, rows in ROWS_AT.items() if steps < max_steps}
    steps = SLICE_STEPS
    while (steps := steps * 4) < max_steps:
        row_rungs[steps] = ROWS_AT[SLICE_STEPS]
    row_rungs[max_steps] = ROWS_AT.get(max_steps, ROWS_AT[SLICE_STEPS])
    return [(rows, steps) for steps, rungs in row_rungs.items() for rows in rungs]


def _cost(rung: tuple[int, int]) -> int:
    rows, steps = rung
    return steps * (rows + CALL_ROWS)


def _limit_threads(threads: int) -> None:
    """Set the size of TensorFlow's thread pools, unless TensorFlow has been used already."""
    if tf.config.threading.get_intra_op_parallelism_threads() == threads:
        return
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
