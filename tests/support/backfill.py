"""Histories, and an engine in this process, for tests of backfills."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.writing import write_artifact
from models.events.schema import CategoricalField, EventSchema, NumericField, TimestampField
from models.spec.model import schema_of
from service.backfill.engines import Function, Result, Task, ThisProcess
from service.backfill.plan import Job
from service.backfill.run import BackfillOptions, open_job, plan_backfill
from tests.support.models import random_weights, small_spec

START_MS = 1_370_000_000_000

EVENTS = 400
"""Of the history of a test."""


class Recording(ThisProcess):
    """Runs tasks in this process, and notes them.

    Attributes:
        done: the tasks that were computed.
        stop_after: raises KeyboardInterrupt after so many; None: never.
    """

    def __init__(self, job: Job, stop_after: int | None = None, *, last_first: bool = False):
        super().__init__(job)
        self._last_first, self.stop_after = last_first, stop_after
        self.done: list[Any] = []

    def map(
        self, function: Function[Task, Result], tasks: Sequence[Task], what: str
    ) -> Iterator[tuple[Task, Result]]:
        for task in reversed(tasks) if self._last_first else tasks:
            if len(self.done) == self.stop_after:
                raise KeyboardInterrupt
            yield from super().map(function, [task], what)
            self.done.append(task)


def random_events(
    schema: EventSchema, count: int, seed: int = 1, *, streams: int = 3
) -> pl.DataFrame:
    """Events of a few streams, in order of time, some values absent; gaps of up to two hours."""
    random = np.random.default_rng(seed)
    times = START_MS + np.cumsum(random.integers(1, 7_200_000, count))
    columns: dict[str, Any] = {"stream": [f"s{at}" for at in random.integers(streams, size=count)]}
    for field in schema.fields:
        match field:
            case TimestampField():
                values: list[Any] = times.tolist()
            case NumericField():
                values = random.normal(field.mean or 0.0, 3, count).tolist()
            case CategoricalField():
                values = [*"new", *(field.vocabulary or ())]
                values = [values[at] for at in random.integers(len(values), size=count)]
            case _:
                values = random.integers(2, size=count).astype(bool).tolist()
        if field.optional:
            values = [None if random.random() < 0.2 else value for value in values]
        columns[field.name] = values
    return pl.DataFrame(columns)


def small_artifact(path: Path) -> Artifact:
    """A model with sessions, whose states and clocks matter."""
    spec = small_spec().model_copy(update={"session_gap_s": 5000.0, "training": None})
    write_artifact(path, spec, random_weights(spec))
    return load_artifact(path)


def time_column(artifact: Artifact) -> str:
    """The column with the time of an event."""
    timestamp = schema_of(artifact.spec).timestamp
    assert timestamp is not None
    return timestamp.name


def job_of(artifact: Artifact, history: Sequence[Path], out: Path, **changes: Any) -> Job:
    """The job of a backfill of files, with changes to its plan."""
    options = BackfillOptions(stream="stream")
    plan = plan_backfill(artifact, [str(file) for file in history], options)
    return open_job(artifact, msgspec.structs.replace(plan, **changes), out)


def files_of(out: Path) -> dict[str, bytes]:
    """The outputs and states of a backfill, by name."""
    return {
        str(file.relative_to(out)): file.read_bytes()
        for folder in ("outputs", "states")
        for file in sorted((out / folder).iterdir())
    }


def double(job: Job, task: int) -> int:
    return 2 * task


def kill_once(job: Job, task: int) -> int:
    """The double of a task; an odd one kills its process the first time."""
    mark = job.out / f"{task}.killed"
    if task % 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task


def kill_always(job: Job, task: int) -> int:
    """The double of a task; task 3 kills its process."""
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task


def fail(job: Job, task: int) -> int:
    """Fails with an error that cannot be pickled."""

    class LocalError(Exception):
        pass

    raise LocalError(f"no {task}")
