"""The interface of a runtime: the library that runs the network.

A runtime computes; it does not validate numbers, keeps no state between calls and knows no streams.
`step` is never called concurrently: the engine makes one call at a time, in its compute thread or
on the event loop. `terminate_call` is called from another thread.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.core.values import FloatRows

FloatBatch = NDArray[np.float32]
Lengths = NDArray[np.int32]


class Runtime(Protocol):
    """One model in one runtime."""

    @property
    def name(self) -> str:
        """`tensorflow` or `onnxruntime`."""

    @property
    def max_batch(self) -> int:
        """Maximum rows B of one call."""

    @property
    def max_steps(self) -> int:
        """Maximum steps T of one call. A longer chunk takes several calls if the model processes it
        step by step; a model that sees a chunk as a whole takes chunks up to its `chunk_limit`,
        which one call can take."""

    def padded_shape(self, rows: int, steps: int) -> tuple[int, int]:
        """The shape (B, T) to which a call of `rows` x `steps` is padded."""

    def warm(self) -> None:
        """Warm up: compile every shape; once, before use."""

    def step(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        """Run every row's steps from its state.

        Args:
            rows: float32 [B, T, F] of a padded shape; values beyond a length are zero.
            lengths: int32 [B], each 1..T (a padding row has length 1, never 0).
            states: float32 [B, W], each as `StateSpec.pack` returns it for the network's parts.

        Returns:
            outputs float32 [B, T, O], undefined beyond a length, and states float32 [B, W].
        """

    def terminate_call(self) -> None:
        """Make the running call raise `InferenceTimeout`, if the library can terminate it."""
