"""Trains a specification on a table and writes the artifact.

Options that the specification leaves open are derived from the table (`models.training.defaults`).
Keeps the best epoch by validation loss, and stops early after `patience` epochs without an
improvement, or once the time limit has passed. A checkpoint beside the artifact is replaced after
every epoch; `resume` continues from it to equal weights. `models.training.report` scores held-out
events.

The file holds the weights, their average, the optimiser's moments, the best weights so far, the
states in which segments ended, and as metadata the finished epochs. It belongs to one spec and one
table; others are rejected. Invariant: a run that is interrupted after any epoch and resumed ends
with the weights of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.fingerprint import canonical_json
from models.artifact.writing import write_artifact
from models.errors import ArtifactError
from models.spec.model import ModelSpec
from models.spec.stream_name import STREAM_NAME_RULE, is_stream_name
from models.spec.training import ResolvedTraining
from models.training.checkpoint import read_checkpoint, write_checkpoint
from models.training.data import fitted_spec, split_of, streams_of, training_of
from models.training.defaults import (
    calendar_warning,
    index_warning,
    quick_warning,
    resolve_detection,
    resolve_season,
    resolve_training,
    season_warning,
    zone_warning,
)
from models.training.detection import check_detection, fitted_detection
from models.training.ensemble import Networks, check_members, merge_members
from models.training.labels import Labels, labels_of
from models.training.loop import Loop
from models.training.plan import check_targets, plan_of, trained_network
from models.training.progress import Advance, Progress


def checkpoint_path(out: Path) -> Path:
    """Where training for the artifact `out` keeps its checkpoint."""
    return out.parent / f".{out.name}.checkpoint.safetensors"


def training_key(
    spec: ModelSpec,
    rows: NDArray[np.float32],
    spans: tuple[tuple[int, int], ...],
    labels: Labels,
) -> str:
    """A digest of all that determines a training run: the fitted spec, encoded data, labels."""
    digest = hashlib.sha256(canonical_json(spec.model_dump(mode="json")))
    digest.update(np.ascontiguousarray(rows).tobytes())
    digest.update(np.asarray(spans, np.int64).tobytes())
    for name, values in labels.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


Reason = Literal["epochs", "patience", "time"]
FALLING_SHARE = 0.05
FEW_UPDATES = 100
MEASURED_WINDOWS = 5
VALIDATION_SHARE = 0.4
"""A validation takes this share of the time of an epoch's training: it has no gradients."""


def best_epoch(history: list[dict[str, Any]]) -> int:
    """The first epoch, from 1, with the least validation loss."""
    losses = [record["validation"]["loss"] for record in history]
    return int(np.argmin(losses)) + 1


def _best_loss(history: list[dict[str, Any]]) -> float:
    return min(float(record["validation"]["loss"]) for record in history)


def reason_to_stop(history: list[dict[str, Any]], training: ResolvedTraining) -> Reason | None:
    """Why one network's training stops after these epochs; None if it goes on."""
    if not history:
        return None
    if len(history) >= training.epochs:
        return "epochs"
    if len(history) - best_epoch(history) >= training.patience:
        return "patience"
    limit_s = training.time_limit_s
    spent_s = sum(record["seconds"] for record in history)
    if limit_s is not None and spent_s >= limit_s / training.networks:
        return "time"
    return None


def stopping_warning(history: list[dict[str, Any]], training: ResolvedTraining) -> str | None:
    """A line about a training that stopped too early, with the option to change; or None."""
    validation = [float(record["validation"]["loss"]) for record in history]
    losses = [float(record["train_loss"]) for record in history]
    stopped = f"training stopped after epoch {len(history)} of {training.epochs}"
    match reason_to_stop(history, training):
        case "time":
            return (
                f"{stopped} at its time limit, before the learning rate had fallen: raise "
                f"`training.time_limit_s` (now {training.time_limit_s:g}), or set fewer `epochs`"
            )
        case "epochs" if _still_falls(validation):
            return (
                f"{stopped} while the validation loss still fell: raise `training.epochs` "
                f"(now {training.epochs})"
            )
        case "patience" if best_epoch(history) == 1:
            return (
                f"{stopped}, and no epoch was better than the first: lower "
                f"`training.learning_rate` (now {training.learning_rate:g}), or raise "
                f"`training.patience` (now {training.patience})"
            )
        case "patience" if _still_falls(losses) and not _has_risen(validation):
            return (
                f"{stopped} while the training loss still fell and the validation loss did not "
                f"rise: raise `training.patience` (now {training.patience})"
            )
    return None


def updates_warning(windows_per_epoch: int, training: ResolvedTraining) -> str | None:
    """A line about a training with few updates of the weights, with the options to change."""
    updates = windows_per_epoch * training.epochs
    if updates >= FEW_UPDATES:
        return None
    return (
        f"the weights are updated {updates} times, {windows_per_epoch} an epoch; expected "
        f"{FEW_UPDATES} or more: raise `training.epochs` (now {training.epochs}), or lower "
        f"`training.batch_streams` (now {training.batch_streams}) or `training.window_steps` "
        f"(now {training.window_steps})"
    )


def names_warning(names: Sequence[str]) -> str | None:
    """A line about streams whose names no request may have."""
    wrong = [name for name in names if not is_stream_name(name)]
    if not wrong:
        return None
    return (
        f"{len(wrong)} of {len(names)} streams have a name that no request may have, such as "
        f"{wrong[0][:100]!r}; expected {STREAM_NAME_RULE}: serve them by other names"
    )


def _cost_line(loop: Loop, training: ResolvedTraining) -> str:
    """What the training would take, measured on its first windows; the loop is to be restarted."""
    # the first one takes the time to trace the network
    moments = [time.monotonic() for _ in islice(loop.train_epoch(0), 1 + MEASURED_WINDOWS)]
    window_s = float(np.median(np.diff(moments))) if len(moments) > 1 else 0.0
    epoch_s = loop.windows_per_epoch * window_s * (1 + VALIDATION_SHARE)
    total_s = epoch_s * training.epochs * training.networks
    line = (
        f"training takes about {max(1, round(total_s)):,} s at most: {training.epochs} epochs of "
        f"{loop.windows_per_epoch} windows at {epoch_s:.2g} s an epoch"
    )
    unit = 2**30 if sys.platform == "darwin" else 2**20
    line += f", in {getrusage(RUSAGE_SELF).ru_maxrss / unit:.1f} GiB of memory"
    if training.networks > 1:
        line += f", {training.networks} networks"
    limit_s = training.time_limit_s
    if limit_s is not None and total_s > limit_s:
        line += (
            f". It stops at its time limit, {limit_s:g} s: set fewer `epochs` or a longer "
            "`time_limit_s`, or try `--quick` first"
        )
    return line


def _still_falls(losses: list[float]) -> bool:
    recent = max(1, len(losses) // 5)
    if len(losses) <= recent:
        return False
    minimum = min(losses)
    return min(losses[:-recent]) - minimum > FALLING_SHARE * (losses[0] - minimum)


def _has_risen(losses: list[float]) -> bool:
    minimum = min(losses)
    return losses[-1] - minimum > FALLING_SHARE * (losses[0] - minimum)


AfterEpoch = Callable[[dict[str, Any]], None]
KEPT = "kept/"


@dataclass(frozen=True, slots=True)
class TrainReport:
    """The outcome of a training.

    Attributes:
        artifact: the model, as it was written.
        history: per epoch `member` (the network) and `epoch` (both from 1), `train_loss`,
            `validation` (by head, and `loss`, their weighted sum), `seconds`.
        best_epochs: of each network that was kept, the epoch whose weights were.
        networks: by seed, each network that was trained, if there are several.
        derived: the options of training, and `season_events`, that were derived from the table.
        warnings: what speaks against having stopped there, with the option to change.
        seconds: wall time of all epochs, those before a resume included.
    """

    artifact: Artifact
    history: tuple[dict[str, Any], ...]
    best_epochs: tuple[int, ...]
    networks: Networks
    derived: dict[str, Any]
    warnings: tuple[str, ...]
    seconds: float


def train(
    spec: ModelSpec,
    frame: pl.DataFrame,
    out: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    overwrite: bool = False,
    keep_checkpoint: bool = False,
    quick: bool = False,
    source: str = "data",
    after_epoch: AfterEpoch | None = None,
) -> TrainReport:
    """Fit the schema, train the network and write the artifact.

    Args:
        spec: with `events`, `training` and at least one head with targets. One with `blocks` is
            trained on whole sequences and packaged with them.
        frame: one row per event, as `read_data` gives it.
        out: the artifact's directory.
        resume: continue from the checkpoint of an interrupted run; if that run is complete, its
            artifact is left as it is.
        quiet: no progress.
        overwrite: whether an artifact at `out` is replaced.
        keep_checkpoint: whether the checkpoint stays, so that what follows can be resumed.
        quick: a quarter of the epochs, for a first result.
        source: what errors call the table.
        after_epoch: called with the record of each epoch, after its checkpoint is written.

    Raises:
        SpecError, DataError: spec or table cannot be trained on; ArtifactError: the path is
            occupied, or there is no fitting checkpoint to resume.
    """
    progress = Progress(Console(quiet=quiet))
    streams = streams_of(spec, frame, source)
    warnings: list[str | None] = [quick_warning(spec) if quick else None]
    spec, derived = resolve_training(spec, streams, source, quick=quick)
    training, split = training_of(spec), split_of(spec)
    spec, season = resolve_season(spec, streams, split.validate)
    spec, derived = resolve_detection(spec), derived | season
    if derived:
        values = {name: "null" if value is None else value for name, value in derived.items()}
        chosen = ", ".join(f"{name} {value}" for name, value in values.items())
        progress.say(f"training options from the data: {chosen}")
    warnings.append(zone_warning(spec, streams))
    spec = fitted_spec(spec, streams, split.validate)
    labels = labels_of(spec, streams.frame, source, streams.table_rows)
    network = trained_network(spec)
    plan = plan_of(network, streams, labels, split.validate, split.test)
    warnings += check_targets(spec, streams, labels, source)
    check_detection(spec, streams, split.validate, split.test)
    if training.members > 1:
        check_members(spec)
    key = training_key(spec, plan.rows, streams.spans, labels)
    run = _Run(checkpoint_path(Path(out)), key)
    if resume:
        run.resume()
    loop = Loop(network, plan, training.seed)
    warnings += [names_warning(streams.names), index_warning(spec, streams)]
    warnings.append(updates_warning(loop.windows_per_epoch, training))
    for warning in filter(None, warnings):
        progress.say(f"warning: {warning}", "yellow")
    if not quiet and not run.history:
        progress.say(_cost_line(loop, training))
    for number in range(training.networks):
        loop.restart(training.seed + number)
        run.train_network(loop, number, progress, after_epoch)
    networks = range(training.networks)
    ranked = sorted(networks, key=lambda number: _best_loss(run.of(number)))
    kept = sorted(ranked[: training.members])
    network_spec, weights = merge_members(spec, [run.best_weights(number) for number in kept])
    network_spec = fitted_detection(network_spec, weights, streams, split.validate, split.test)
    bests = [best_epoch(run.of(number)) for number in kept]
    complete = _artifact_of_run(Path(out), key) if resume else None
    artifact = complete or write_artifact(
        Path(out),
        network_spec,
        weights,
        metrics={
            "validation": [
                run.of(number)[best - 1]["validation"]
                for number, best in zip(kept, bests, strict=True)
            ]
        },
        training={
            "run": key,
            "spec": training.model_dump(mode="json"),
            "epochs": [len(run.of(number)) for number in kept],
            "best_epochs": bests,
            "seeds": [training.seed + number for number in kept],
            "events": streams.events,
            "streams": len(streams.names),
            "trained_steps": int(plan.trained.sum()),
            "validated_steps": int(plan.validated.sum()),
        },
        overwrite=overwrite,
    )
    if not keep_checkpoint:
        run.path.unlink(missing_ok=True)
    warnings += [stopping_warning(run.of(number), training) for number in networks]
    warnings.append(calendar_warning(spec, streams, split.validate))
    warnings.append(season_warning(spec, streams, split.validate))
    return TrainReport(
        artifact,
        tuple(run.history),
        tuple(bests),
        {
            training.seed + number: (spec, run.best_weights(number))
            for number in (networks if len(networks) > 1 else ())
        },
        derived,
        tuple(dict.fromkeys(warning for warning in warnings if warning)),
        sum(record["seconds"] for record in run.history),
    )


def _artifact_of_run(out: Path, key: str) -> Artifact | None:
    """The artifact that this run has written already; None if there is none."""
    try:
        artifact = load_artifact(out)
    except ArtifactError:
        return None
    return artifact if artifact.manifest["training"].get("run") == key else None


class _Run:
    """The epochs of all networks and the weights kept, in memory and in the checkpoint."""

    def __init__(self, path: Path, key: str):
        self.path, self._key = path, key
        self.history: list[dict[str, Any]] = []
        self._kept: dict[str, NDArray[Any]] = {}
        self._loop_arrays: dict[str, NDArray[Any]] = {}

    def resume(self) -> None:
        """Take over the checkpoint; ArtifactError if there is none that fits."""
        arrays, metadata = read_checkpoint(self.path, self._key)
        self.history = json.loads(metadata["history"])
        for name, value in arrays.items():
            (self._kept if name.startswith(KEPT) else self._loop_arrays)[name] = value

    def of(self, number: int) -> list[dict[str, Any]]:
        """The epochs of one network."""
        return [record for record in self.history if record["member"] == number + 1]

    def best_weights(self, number: int) -> dict[str, NDArray[np.float32]]:
        """The best weights of one network."""
        prefix = f"{KEPT}{number}/"
        return {n.removeprefix(prefix): v for n, v in self._kept.items() if n.startswith(prefix)}

    def train_network(
        self, loop: Loop, number: int, progress: Progress, after_epoch: AfterEpoch | None
    ) -> None:
        """Train one network to its end, with a checkpoint after every epoch."""
        training = training_of(loop.spec)
        records = self.of(number)
        if reason_to_stop(records, training):
            return
        if records:
            loop.restore(self._loop_arrays)
        title = f"training network {number + 1} of {training.networks}"
        with progress.task(title, training.epochs * loop.windows_per_epoch) as advance:
            while not reason_to_stop(records, training):
                record = {"member": number + 1, **_epoch(loop, records, advance)}
                self.history.append(record)
                records = self.of(number)
                if best_epoch(records) == record["epoch"]:
                    for name, value in loop.averaged_weights().items():
                        self._kept[f"{KEPT}{number}/{name}"] = value
                arrays = {**loop.arrays(), **self._kept}
                write_checkpoint(self.path, self._key, arrays, history=json.dumps(self.history))
                if after_epoch is not None:
                    after_epoch(record)


def _epoch(loop: Loop, history: list[dict[str, Any]], advance: Advance) -> dict[str, Any]:
    start = time.monotonic()
    epoch = len(history)
    best = f", best {min(r['validation']['loss'] for r in history):.4f}" if history else ""
    title = f"epoch {epoch + 1} of {training_of(loop.spec).epochs}"
    done = epoch * loop.windows_per_epoch
    losses = []
    for loss in loop.train_epoch(epoch):
        losses.append(loss)
        advance(done + len(losses), f"{title}, loss {loss:.4f}{best}")
    validation = loop.validate()
    advance(
        done + len(losses),
        f"{title}, loss {np.mean(losses):.4f}, validation {validation['loss']:.4f}{best}",
    )
    return {
        "epoch": epoch + 1,
        "train_loss": float(np.mean(losses)),
        "validation": validation,
        "seconds": time.monotonic() - start,
    }
