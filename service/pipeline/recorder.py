"""What the pipeline and the engine report about themselves, to whoever counts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from service.core.values import Timing


class Recorder(Protocol):
    """Counts and times; never raises, never blocks. Called from the event loop."""

    def record_chunks(self, model: str, steps: int, timings: Sequence[Timing]) -> None:
        """Chunks of one batch were processed and committed: their steps together, and the
        times of each."""

    def record_replay(self, model: str) -> None:
        """A retry was answered from the stored reply."""

    def record_error(self, model: str, code: str) -> None:
        """A request, or an item of one, was answered with a problem."""

    def record_conflict(self, model: str) -> None:
        """A commit found the stream moved on; the chunk is done again."""

    def record_cache_lookups(self, model: str, hits: int, misses: int) -> None:
        """States found in, and missing from, this worker's cache when a batch was loaded."""

    def record_runtime_call(
        self, model: str, rows: int, steps: int, padded_steps: int, seconds: float
    ) -> None:
        """One runtime call: rows B, real steps, B x T after padding, wall time."""

    def record_queue_depth(self, model: str, depth: int) -> None:
        """Chunks waiting for a batch."""
