"""Trains a model on a table, and writes its artifact with report and plots.

The artifact is written before its report; the checkpoint stays until the report is written too, so
that `resume` continues with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import polars as pl
from rich.console import Console

from models.artifact.artifact import Artifact
from models.artifact.writing import add_measurements, write_artifact
from models.errors import ArtifactError, VerdictError
from models.spec.decoder import DECODER
from models.spec.model import ModelSpec
from models.training.burn_in import burn_in_lines
from models.training.data import split_of, streams_of
from models.training.evaluate import anomalous_events, events_to_score
from models.training.labels import labels_of
from models.training.measurements import measure
from models.training.progress import Progress

if TYPE_CHECKING:
    from models.training.report import Further
    from models.training.trainer import TrainReport

REPORT = "report.json"


def train_frame(
    spec: ModelSpec,
    frame: pl.DataFrame,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trees: bool = True,
    trees_s: float | None = None,
    quick: bool = False,
    quiet: bool = False,
    anomalies: str | None = None,
    source: str = "data",
    further: Further | None = None,
) -> Artifact:
    """Train a specification on a table in memory.

    A table without events from `test_from` on gives an artifact without a report.

    Args:
        frame: one row per event, as `models.training.files.read_data` gives it.
        out: the artifact's directory.
        resume: continue from the checkpoint of an interrupted run.
        overwrite: replace an artifact that is there.
        trees: compare with boosted trees too.
        trees_s: seconds that they may take; None is no limit.
        quick: a quarter of the epochs, and no trees: a first result, not the best.
        quiet: print nothing.
        anomalies: boolean column that labels anomalous events, to score the alarms of a model with
            detection in the report; training does not read it.
        source: what errors and the report call the table.
        further: as for `make_report`.

    Raises:
        ModelsError: specification, table or artifact are rejected.
    """
    from models.training.trainer import checkpoint_path, train

    out = Path(out)
    progress = Progress(Console(quiet=quiet))
    if out.exists() and any(out.iterdir()) and not overwrite and not resume:
        raise ArtifactError(f"{out}: is not empty; expected a new path, or --overwrite")
    if anomalies is not None:  # a label that cannot be read is an error before training
        anomalous_events(spec, streams_of(spec, frame, source), anomalies, source)
    result = train(
        spec,
        frame,
        out,
        resume=resume,
        quiet=quiet,
        overwrite=overwrite,
        keep_checkpoint=True,
        quick=quick,
        source=source,
    )
    artifact = result.artifact
    epochs = ", ".join(map(str, result.best_epochs))
    if result.networks:
        epochs += f" of seed {', '.join(map(str, artifact.manifest['training']['seeds']))}"
    progress.say(f"kept epoch {epochs}; {result.seconds:.0f} s of training; the model is in {out}")
    split = split_of(artifact.spec)
    report = None
    if _has_events_from(artifact, frame, split.test):
        report = _write_report(
            result,
            frame,
            progress,
            trees=trees and not quick,
            trees_s=trees_s,
            anomalies=anomalies,
            further=further,
            source=source,
        )
    else:
        progress.say(f"no events {split.test_range}: nothing held out, no report")
        for warning in result.warnings:
            progress.say(f"warning: {warning}", "yellow")
    measured = measure(artifact, frame, source, report)
    if report is None and "burn_in" in measured:
        for line in burn_in_lines(measured["burn_in"]):
            progress.say(line)
    artifact = add_measurements(artifact.path, measured)
    checkpoint_path(out).unlink(missing_ok=True)
    return artifact


def check_verdicts(out: Path) -> None:
    """Reject a trained artifact that its report says not to serve for one of its heads.

    Raises:
        VerdictError: it does, or there is no report, or none of its heads is scored.
    """
    from models.training.verdicts import verdict_lines

    path = Path(out) / REPORT
    if not path.is_file():
        raise VerdictError(f"{out}: expected a report, got no events held out")
    report = orjson.loads(path.read_bytes())
    if not report["verdicts"]:
        why = "; ".join(["got none", *report["warnings"]])
        raise VerdictError(f"{out}: expected a verdict on a head, {why}")
    lines = verdict_lines(report)
    if worse := [line for line, is_worse in lines if is_worse]:
        raise VerdictError(f"{out}: {'; '.join(worse)}")


def _write_report(
    result: TrainReport, frame: pl.DataFrame, progress: Progress, **options: Any
) -> dict[str, Any]:
    """Write report and plots into the artifact of a training; returns the report.

    Args:
        options: of `make_report`.
    """
    from models.training.plots import plot_report
    from models.training.report import make_report, report_lines
    from models.training.verdicts import verdict_lines

    artifact = result.artifact
    with progress.task("report", 1.0) as advance:
        report = make_report(
            artifact,
            frame,
            history=result.history,
            warnings=result.warnings,
            networks=result.networks,
            note=lambda text: advance(0.0, text),
            **options,
        )
    for line in report_lines(report):
        progress.say(line)
    progress.say("")
    for line, is_worse in verdict_lines(report):
        is_warning = line.startswith("warning")
        progress.say(line, "bold red" if is_worse else "yellow" if is_warning else None)
    files: dict[str, bytes | Path] = {
        REPORT: orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE),
        **plot_report(report),
    }
    write_artifact(
        artifact.path,
        artifact.spec,
        artifact.weights,
        metrics={**artifact.manifest["metrics"], "held_out": _values(report)},
        training=artifact.manifest["training"],
        files=files,
        overwrite=True,
    )
    return report


def _has_events_from(artifact: Artifact, frame: pl.DataFrame, key: int) -> bool:
    streams = streams_of(artifact.spec, frame)
    labels = labels_of(artifact.spec, streams.frame, rows=streams.table_rows)
    return events_to_score(artifact.spec, streams, labels, key) > 0


def _values(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    metrics = {
        name: {metric: score["value"] for metric, score in head["scores"]["model"].items()}
        for name, head in report["heads"].items()
    }
    for name, target in report.get("decoder", {}).get("targets", {}).items():
        scored = [value for value in target["mae"]["model"] if value is not None]
        metrics[f"{DECODER}.{name}"] = {"mae": float(np.mean(scored))} if scored else {}
    return metrics
