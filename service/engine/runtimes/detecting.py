"""A runtime with detection after the network, which another runtime computes."""

from __future__ import annotations

import numpy as np

from models.artifact.artifact import Artifact
from models.detection.detector import Detector
from service.core.values import FloatRows
from service.engine.runtimes.base import FloatBatch, Lengths, Runtime


class DetectingRuntime:
    """One model with `detection`.

    Args:
        runtime: of the network.
        artifact: the model.
    """

    def __init__(self, runtime: Runtime, artifact: Artifact):
        self._runtime = runtime
        self._detector = Detector(artifact.spec)
        self._network_size = artifact.network_state.float_size
        self.name = runtime.name
        self.max_batch = runtime.max_batch
        self.max_steps = runtime.max_steps
        self.padded_shape = runtime.padded_shape
        self.warm = runtime.warm
        self.warm_next = runtime.warm_next

    def step(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        """Run the network and score its events; see `Runtime.step`."""
        network, own = np.split(states, [self._network_size], axis=1)
        outputs, stepped = self._runtime.step(rows, lengths, np.ascontiguousarray(network))
        detected, after = self._detector.step(rows, lengths, outputs, own)
        return detected, np.concatenate([stepped, after], axis=1)
