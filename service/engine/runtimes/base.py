"""What the engine asks of a runtime, whichever library runs the network.

A runtime computes; it never checks numbers, keeps no state between calls and knows nothing
of streams. `step` is called from the engine's one compute thread only.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.core.values import FloatRows

FloatBatch = NDArray[np.float32]
Lengths = NDArray[np.int32]


class Runtime(Protocol):
    """One model, ready to step."""

    @property
    def name(self) -> str:
        """`tensorflow` or `onnxruntime`."""

    @property
    def max_batch(self) -> int:
        """Most rows B of one call."""

    @property
    def max_steps(self) -> int:
        """Most steps T of one call. Longer chunks take several, where the model goes through
        them step by step; one that sees a chunk as a whole has no longer ones, and its calls
        take as many steps as its `chunk_limit`."""

    def padded_shape(self, rows: int, steps: int) -> tuple[int, int]:
        """The (B, T) at which a call of `rows` x `steps` runs; at least as large in both."""

    def warm(self) -> None:
        """Compile what must be ready before the first request; once, before use."""

    def warm_next(self) -> bool:
        """Compile one more shape, beside calls of `step`; False where nothing is left."""

    def step(
        self, rows: FloatBatch, lengths: Lengths, states: FloatRows
    ) -> tuple[FloatBatch, FloatRows]:
        """Run every row's steps from its state.

        Args:
            rows: float32 [B, T, F] of a padded shape; values beyond a length are zero.
            lengths: int32 [B], each 1..T (a padding row has length 1, never 0).
            states: float32 [B, N], packed.

        Returns:
            outputs float32 [B, T, O], meaningless beyond a length, and states float32 [B, N].
        """
