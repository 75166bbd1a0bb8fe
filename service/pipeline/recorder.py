"""Telemetry of the pipeline and the engine: interfaces of a metrics recorder and an audit log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from service.core.errors import CarryError
from service.core.values import Timing

if TYPE_CHECKING:
    from service.pipeline.comparison import Comparison


_closed = with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))
"""For types that the API document describes."""


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


class ShadowBatch(NamedTuple):
    """What a challenger did, or the champion where it is the shadow.

    Attributes:
        outcomes: chunks that were `computed`, `dropped` (no room, no time, or the state cannot be
            had) or `failed`.
        events, seconds: of inference calls, by side (`comparison.SIDES`).
        caught_up: events that were computed from histories.
        lags_s: of each chunk, from its answer until its state was stored.
    """

    outcomes: Mapping[str, int]
    events: Mapping[str, int] = MappingProxyType({})
    seconds: Mapping[str, float] = MappingProxyType({})
    caught_up: int = 0
    lags_s: Sequence[float] = ()
    comparison: Comparison | None = None


@_closed
class DifferenceReport(TypedDict):
    """Absolute differences of an output; quantiles to within a factor of 1.5."""

    mean: float
    p50: float
    p90: float
    p99: float


@_closed
class LossReport(TypedDict):
    """Mean losses of both versions on the same events."""

    champion: float
    challenger: float
    events: int


@_closed
class BinReport(TypedDict):
    """The mean of the predicted probabilities of one bin, and the share that came true."""

    events: int
    predicted: float
    true: float


@_closed
class CalibrationReport(TypedDict):
    """The expected calibration error of a head, and its bins by their lower bounds, or by the
    quantiles of a forecast."""

    error: float
    bins: dict[str, BinReport]


@_closed
class ShadowReport(TypedDict):
    """What is known of a challenger beside the champion, of all workers since they started."""

    challenger: str
    """Its version."""
    chunks: dict[str, int]
    """By outcome: `computed`, `dropped`, `failed`."""
    events: int
    """Events that the challenger computed, in the shadow or as an answer."""
    caught_up_events: int
    """Events that were computed from the histories of streams."""
    us_per_event: dict[str, float]
    """Inference time for each event, in microseconds, by `champion` and `challenger`."""
    lag_s: float | None
    """Mean time from the answer to a chunk until the challenger's state was stored."""
    differences: dict[str, DifferenceReport]
    """By output."""
    losses: dict[str, dict[str, LossReport]]
    """By head and loss: predictions of the next event, once it came."""
    calibration: dict[str, dict[str, CalibrationReport]]
    """By head and side."""


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

    def record_rewarmed(self, model: str, exact: int, inexact: int) -> None:
        """Record that streams were rewarmed, with exact or inexact states."""

    def record_cache_lookups(self, model: str, hits: int, misses: int) -> None:
        """Record how many states of a batch were in this worker's cache, and how many not."""

    def record_runtime_call(
        self, model: str, rows: int, steps: int, padded_steps: int, seconds: float
    ) -> None:
        """Record one call of the runtime: rows B, steps, B x T steps with padding, wall time."""

    def record_shadow(self, model: str, challenger: str, batch: ShadowBatch) -> None:
        """Record what the challenger of this version did."""

    def shadow_report(self, model: str, challenger: str) -> ShadowReport:
        """What was recorded of a challenger, in all workers; call it in a thread."""

    def record_drift(
        self,
        model: str,
        version: str,
        samples: int,
        outside: Mapping[str, int],
        ratios: Mapping[str, float],
    ) -> None:
        """Record sampled chunks of a version: by part of its inputs and states, how many norms were
        outside of their range in training, and the mean norm relative to the range's end."""

    def record_websockets(self, model: str, change: int) -> None:
        """Record that WebSockets of a model were opened, or with a negative number closed."""

    def record_watchers(self, model: str, change: int) -> None:
        """Record that watches of a model's streams began, or with a negative number ended."""


Audit = Callable[..., None]
"""Writes a line about a change of streams other than by their chunks, or of versions of models: the
member `model`, `stream` (or the prefix of several) if it is about streams, and further facts; never
raises."""


def no_audit(change: str, /, **facts: Any) -> None:
    """Record nothing."""
