"""A runtime with detection after the network, which another runtime computes."""

from __future__ import annotations

from models.artifact.artifact import Artifact
from models.detection.detector import DetectingStep
from service.engine.runtimes.base import Runtime


class DetectingRuntime:
    """One model with `detection`.

    Args:
        runtime: of the network.
        artifact: the model.
    """

    def __init__(self, runtime: Runtime, artifact: Artifact):
        self.step = DetectingStep(artifact.spec, runtime.step)
        self.name = runtime.name
        self.max_batch = runtime.max_batch
        self.max_steps = runtime.max_steps
        self.padded_shape = runtime.padded_shape
        self.warm = runtime.warm
        self.terminate_call = runtime.terminate_call
