"""Settings of the pipeline: the models that it serves, their batches and states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

import models
from models.errors import ArtifactError
from models.spec.detection import parse_alarm_rates
from models.spec.history import (
    DEFAULT_SNAPSHOTS,
    MAX_SNAPSHOTS,
    MIN_SNAPSHOTS,
    HistorySpec,
    parse_history_events,
)
from models.spec.model import ModelSpec
from service.core.settings import MIB, settings_group


def _check_alarm_rates(value: str) -> str:
    parse_alarm_rates(value)
    return value


def _check_history_events(value: str) -> str:
    parse_history_events(value)
    return value


@settings_group
class ModelSettings:
    """The models to serve, and what runs them."""

    models_dir: Path = Path(models.__file__).parent / "pretrained"
    """Folder whose sub-folders are the artifacts to serve, one model each."""

    false_alarms_per_day: Annotated[str, AfterValidator(_check_alarm_rates)] = ""
    """Expected false alarms per stream and day of models with `detection`, instead of the rate in
    their specification: `MODEL=RATE`, several separated by commas. A request may set another rate
    for its chunk. All workers of a store need the same value."""

    history_events: Annotated[str, AfterValidator(_check_history_events)] = ""
    """Recent events of each stream that are kept in the store, as they came, instead of the number
    in the model's specification: `N` for all models, or `MODEL=N`, several separated by commas; 0
    keeps none. All workers of a store need the same value."""

    history_snapshots: Annotated[int, Field(ge=MIN_SNAPSHOTS, le=MAX_SNAPSHOTS)] | None = None
    """Earlier states of each stream that are kept beside these events, instead of the number in the
    model's specification (8 by default)."""

    runtime: Literal["auto", "onnxruntime", "tensorflow"] = "auto"
    """Library that runs the networks. `auto` chooses for each model: `onnxruntime`, which is faster
    and smaller, if it is installed and the model has a graph, otherwise `tensorflow`; the log line
    `runtime` of each model names it and the reason."""

    runtime_threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Threads that one step of the network may use. Small recurrent networks gain nothing
    from more than one; use workers instead."""

    def alarm_rates(self) -> dict[str, float]:
        """By model, the expected number of false alarms of one stream in a day."""
        return parse_alarm_rates(self.false_alarms_per_day)

    def check_history_models(self, names: Sequence[str]) -> None:
        """Check that the models whose numbers of events are given are among these.

        Raises:
            ArtifactError
        """
        for name in parse_history_events(self.history_events):
            if name is not None and name not in names:
                raise ArtifactError(
                    f"CARRY_HISTORY_EVENTS: expected models among {[*names]}, got {name!r}"
                )

    def history_of(self, spec: ModelSpec) -> HistorySpec | None:
        """What is kept of the history of a model's streams; None for nothing."""
        own, given = spec.history, parse_history_events(self.history_events)
        events = given.get(spec.name, given.get(None, own.events if own else 0))
        if not events:
            return None
        default = own.snapshots if own else DEFAULT_SNAPSHOTS
        return HistorySpec(events=events, snapshots=self.history_snapshots or default)


@settings_group
class BatchingSettings:
    """Queues, batches and cached states of a worker."""

    max_batch_rows: Annotated[int, Field(ge=1, le=4096)] = 128
    """Maximum streams in one inference call, if its runtime supports as many. More raises the
    throughput until the core is busy, and the duration of each call."""

    max_batch_steps: Annotated[int, Field(ge=1)] = 4_096
    """Maximum steps in one inference call, rows times the longest, padding included. It bounds
    the duration of a call, and so the wait of a new chunk for the previous call."""

    inference_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Longest inference call, in seconds. ONNX Runtime terminates a longer one between two
    operators, and its chunks fail with `inference_timeout`. The calls of other models wait
    meanwhile: choose little more than the largest call of the slowest model takes."""

    max_queue: Annotated[int, Field(ge=1)] = 4_096
    """Maximum chunks of one model that wait in a worker; beyond it the answer is `overloaded` at
    once. The chunks of one stream may take a quarter of the free places (`stream_overloaded`), the
    items of one request half of them, 256 at a time. It bounds the memory of waiting chunks."""

    max_queue_wait_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """Longest expected wait of a chunk in the queue, by the rate at which the queue drains, in
    seconds; beyond it, or beyond its own deadline, the answer is `overloaded` at once. The longest
    wait that is still useful to a client."""

    batches_in_flight: Annotated[int, Field(ge=1, le=16)] = 2
    """Concurrent batches between load and commit, so that the store's time is hidden behind the
    network's. More batches are smaller, which costs more per chunk; try three if the store has a
    high latency."""

    conflict_attempts: Annotated[int, Field(ge=1, le=100)] = 32
    """How often a chunk is evaluated again after a version conflict, before `conflict`. Each time
    another chunk of the stream was applied, so about as many attempts are enough as chunks of one
    stream are in flight."""

    on_model_change: Literal["rewarm", "keep", "reset", "refuse"] = "rewarm"
    """What to do with a stream whose state another version of its model wrote: compute its state
    from the recent events that the store keeps (`rewarm`; without `CARRY_HISTORY_EVENTS` as
    `refuse`), take the state as it is (`keep`, for new weights of the same network and the same
    encoding only), reset the stream to position 0 (`reset`), or reject its chunks with
    `state_incompatible` (`refuse`). Not `reset` while two versions are served at once: they would
    reset each other's streams."""

    shadow_budget: Annotated[float, Field(ge=0, le=10)] = 0.2
    """Time that a challenger may compute beside the champion, as a share of the time that the
    champion computes and that the worker is idle; 0 computes nothing. It waits for chunks of the
    champion in any case, and chunks beyond are dropped: their streams catch up from their
    history."""

    state_cache_bytes: Annotated[int, Field(ge=0)] = 64 * MIB
    """Size of each worker's cache of recent states, which saves their load; 0 disables it. About
    the number of live streams times the size of a state."""
