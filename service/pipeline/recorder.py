"""Telemetry of the pipeline and the engine: interfaces of a metrics recorder and an audit log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from service.core.errors import CarryError
from service.core.values import Timing


class ModelStatistics(NamedTuple):
    """Totals of one model's chunks since the service started.

    Attributes:
        chunks: committed chunks.
        batches: calls of the network.
        errors: requests, or items of one, that were answered with an error.
        queue_s, load_s, infer_s, commit_s: times of the chunks by stage, in seconds.
    """

    chunks: int = 0
    batches: int = 0
    errors: int = 0
    queue_s: float = 0.0
    load_s: float = 0.0
    infer_s: float = 0.0
    commit_s: float = 0.0


class Recorder(Protocol):
    """Records counts and times; never raises, never blocks. Called from the event loop."""

    def record_chunks(
        self, model: str, version: str, steps: int, queue_s: Sequence[float], timing: Timing
    ) -> None:
        """Record committed chunks of one batch: the version that answered, their steps together,
        how long each waited, and the times that they share."""

    def record_replay(self, model: str) -> None:
        """Record a retry that was answered with the stored reply."""

    def record_error(self, model: str, error: CarryError) -> None:
        """Record a request, or an item of one, that was answered with an error."""

    def record_conflict(self, model: str) -> None:
        """Record a version conflict: another commit came first, and the chunk is retried."""

    def record_cache_lookups(self, model: str, hits: int, misses: int) -> None:
        """Record how many states of a batch were in this worker's cache, and how many not."""

    def record_runtime_call(
        self, model: str, rows: int, steps: int, padded_steps: int, seconds: float
    ) -> None:
        """Record one call of the runtime: rows B, steps, B x T steps with padding, wall time."""

    def record_websockets(self, model: str, change: int) -> None:
        """Record that WebSockets of a model were opened, or with a negative number closed."""

    def record_watchers(self, model: str, change: int) -> None:
        """Record that watches of a model's streams began, or with a negative number ended."""


Audit = Callable[..., None]
"""Writes a line about a change of streams other than by their chunks: `stream_deleted`,
`streams_deleted`, `state_written` or `stream_forked`, with the members `model`, `stream` (or the
prefix of several) and further facts; never raises."""


def no_audit(change: str, /, **facts: Any) -> None:
    """Record nothing."""
