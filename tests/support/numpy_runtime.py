"""A runtime that computes with the float64 oracle, for tests of everything around it.

Slow, exact, and without TensorFlow: what the pipeline answers through it must equal the oracle
on the whole sequence to float32 rounding, for any chunking and any batch.
"""

from __future__ import annotations

import numpy as np

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.core.values import FloatRows
from service.engine.runtimes.base import FloatBatch, Lengths
from service.pipeline.served_model import ServedModel
from tests.support.oracle import oracle_step


def numpy_served(artifact: Artifact, history: HistorySpec | None = None) -> ServedModel:
    """A model on the oracle, its decoder too where it has one."""
    decoder = None if artifact.decoder is None else NumpyRuntime(artifact.decoder)
    return ServedModel(artifact, NumpyRuntime(artifact), decoder, history)


class NumpyRuntime:
    """The oracle behind the runtime protocol."""

    name = "numpy"
    max_batch = 8
    padding = 1e30
    """What outputs beyond a length are: finite, as those of other runtimes, and far from any."""

    def __init__(self, artifact: Artifact):
        self._artifact = artifact
        self.max_steps = artifact.spec.chunk_limit or 16
        self.shapes: list[tuple[int, int]] = []
        """(rows, longest) of every call, padding rows included."""

    def padded_shape(self, rows: int, steps: int) -> tuple[int, int]:
        """One row and three steps more than needed, so that padding is always there."""
        return rows + 1, steps + 3

    def warm(self) -> None:
        """Nothing to compile."""

    def terminate_call(self) -> None:
        """Do nothing: no call is long."""

    def step(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        """Compute row by row; outputs beyond a length are `padding`, so that use is detected."""
        assert lengths.min() >= 1
        assert lengths.max() <= rows.shape[1]
        self.shapes.append((rows.shape[0], rows.shape[1]))
        blocks = self._artifact.spec.blocks
        most = rows.shape[1] if blocks is None else blocks.size
        shape = (len(rows), most, self._artifact.outputs.size)
        outputs = np.full(shape, self.padding, np.float32)
        stepped = np.empty_like(states)
        with np.errstate(over="ignore", invalid="ignore"):
            for index, length in enumerate(lengths):
                found, stepped[index] = oracle_step(
                    self._artifact.spec, self._artifact.weights, rows[index, :length], states[index]
                )
                outputs[index, : len(found)] = found
        return outputs, stepped
