"""Trains a specification on a table and writes the artifact.

The best epoch by validation loss is kept; training stops when it has not been bettered for
`patience` epochs. A checkpoint beside the artifact is replaced after every epoch, and
`resume` goes on from it to the same weights. It scores nothing on held-out events: that is
`models.training.report`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.artifact import Artifact, write_artifact
from models.errors import SpecError
from models.spec import ModelSpec
from models.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    read_checkpoint,
    training_key,
    write_checkpoint,
)
from models.training.data import fitted_spec, moment_ms, schema_of, streams_of, training_of
from models.training.loop import Loop
from models.training.plan import plan_of

AfterEpoch = Callable[[dict[str, Any]], None]
BEST = "best/"


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What training did.

    Attributes:
        artifact: the model, as it was written.
        history: per epoch `epoch` (from 1), `train_loss`, `validation` (by head, and `loss`,
            their weighted sum), `seconds`.
        best_epoch: the epoch whose weights were kept.
        seconds: wall time of all epochs, those before a resume included.
    """

    artifact: Artifact
    history: tuple[dict[str, Any], ...]
    best_epoch: int
    seconds: float


def train(
    spec: ModelSpec,
    frame: pl.DataFrame,
    out: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    overwrite: bool = False,
    source: str = "data",
    after_epoch: AfterEpoch | None = None,
) -> TrainReport:
    """Fit the schema, train the network and write the artifact.

    Args:
        spec: with `events`, `training` and at least one head with targets.
        frame: one row per event, as `read_data` gives it.
        out: the artifact's directory.
        resume: go on from the checkpoint of a run that was stopped.
        quiet: no progress bar.
        overwrite: whether an artifact at `out` is replaced.
        source: what errors call the table.
        after_epoch: called with the record of each epoch, after its checkpoint is written.

    Raises:
        SpecError, DataError: spec or table cannot be trained on; ArtifactError: the path is
            occupied, or there is no fitting checkpoint to resume.
    """
    training = training_of(spec)
    schema = schema_of(spec)
    validate_ms = moment_ms(schema, training.validate_from, "training.validate_from")
    test_ms = moment_ms(schema, training.test_from, "training.test_from")
    if test_ms < validate_ms:
        raise SpecError(
            f"expected training.test_from at or after validate_from, got {training.test_from!r} "
            f"and {training.validate_from!r}"
        )
    streams = streams_of(spec, frame, source)
    spec = fitted_spec(spec, streams, validate_ms)
    plan = plan_of(spec, streams, validate_ms, test_ms)
    loop = Loop(spec, plan)
    path = checkpoint_path(Path(out))
    key = training_key(spec, plan.rows, streams.spans)
    history: list[dict[str, Any]] = []
    best: Mapping[str, NDArray[Any]] = {}
    if resume:
        checkpoint = read_checkpoint(path, key)
        history = list(checkpoint.history)
        best = {n: v for n, v in checkpoint.arrays.items() if n.startswith(BEST)}
        loop.restore({n: v for n, v in checkpoint.arrays.items() if not n.startswith(BEST)})
    with _progress(quiet) as progress:
        while not _finished(history, training.epochs, training.patience):
            record = _epoch(loop, len(history), training.epochs, history, progress)
            history.append(record)
            if best_epoch(history) == record["epoch"]:
                best = {f"{BEST}{name}": value for name, value in loop.averaged().items()}
            arrays = {**loop.arrays(), **best}
            write_checkpoint(path, key, Checkpoint(arrays, tuple(history)))
            if after_epoch is not None:
                after_epoch(record)
    artifact = write_artifact(
        Path(out),
        spec,
        {name.removeprefix(BEST): value for name, value in best.items()},
        metrics={"validation": history[best_epoch(history) - 1]["validation"]},
        training={
            "epochs": len(history),
            "best_epoch": best_epoch(history),
            "events": streams.events,
            "streams": len(streams.names),
            "trained_steps": int(plan.trained.sum()),
            "validated_steps": int(plan.validated.sum()),
        },
        overwrite=overwrite,
    )
    path.unlink(missing_ok=True)
    seconds = sum(record["seconds"] for record in history)
    return TrainReport(artifact, tuple(history), best_epoch(history), seconds)


def best_epoch(history: list[dict[str, Any]]) -> int:
    """The first epoch, from 1, with the least validation loss."""
    losses = [record["validation"]["loss"] for record in history]
    return int(np.argmin(losses)) + 1


def _finished(history: list[dict[str, Any]], epochs: int, patience: int) -> bool:
    if not history:
        return False
    return len(history) >= epochs or len(history) - best_epoch(history) >= patience


def _epoch(
    loop: Loop, epoch: int, epochs: int, history: list[dict[str, Any]], progress: Progress
) -> dict[str, Any]:
    start = time.monotonic()
    note = f"best {min(r['validation']['loss'] for r in history):.4f}" if history else ""
    task = progress.add_task(
        f"epoch {epoch + 1} of {epochs}", total=loop.windows_per_epoch, loss="", note=note
    )
    losses = []
    for loss in loop.train_epoch(epoch):
        losses.append(loss)
        progress.update(task, advance=1, loss=f"loss {loss:.4f}")
    validation = loop.validate()
    progress.update(
        task, loss=f"loss {np.mean(losses):.4f}", note=f"validation {validation['loss']:.4f}"
    )
    return {
        "epoch": epoch + 1,
        "train_loss": float(np.mean(losses)),
        "validation": validation,
        "seconds": time.monotonic() - start,
    }


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}  {task.fields[note]}"),
        disable=quiet,
    )
