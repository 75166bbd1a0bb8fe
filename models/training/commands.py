"""Implements `carry train` and `carry evaluate`, without the command line.

Both print to a rich console, which `quiet` silences, and raise `ModelsError` if spec, table
or artifact are refused. An artifact that is written is complete: weights, report and plots.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import polars as pl
from rich.console import Console
from rich.progress import Progress

from models.artifact.artifact import Artifact, load_artifact, write_artifact
from models.errors import ArtifactError, SpecError
from models.spec.decoder import DECODER
from models.spec.model import ModelSpec
from models.spec.spec_file import add_line_number, read_spec
from models.training.data import moment_ms, schema_of, streams_of, training_of
from models.training.evaluate import evaluate, events_to_score
from models.training.files import read_data
from models.training.labels import labels_of

if TYPE_CHECKING:
    from models.training.report import Further

REPORT = "report.json"


def train_command(
    spec: Path,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trees: bool = True,
    quiet: bool = False,
) -> Artifact:
    """Train a `SPEC.yaml` on a table; writes artifact, report and plots to `out`.

    Args:
        spec: the specification's file.
        data: `.csv`, `.jsonl`, `.ndjson` or `.parquet`, one row per event.
        out: the artifact's directory.
        resume: continue from the checkpoint of an interrupted run.
        overwrite: replace an artifact that is there.
        trees: compare with boosted trees too, which takes minutes on large tables.
        quiet: print nothing.

    Raises:
        SpecError: with the line of what cannot be trained, as for what cannot be read.
    """
    parsed = read_spec(spec)
    try:
        return train_frame(
            parsed,
            read_data(data, parsed),
            out,
            resume=resume,
            overwrite=overwrite,
            trees=trees,
            quiet=quiet,
            source=str(data),
        )
    except SpecError as error:
        raise add_line_number(spec, error) from error


def train_frame(
    spec: ModelSpec,
    frame: pl.DataFrame,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trees: bool = True,
    quiet: bool = False,
    source: str = "data",
    further: Further | None = None,
) -> Artifact:
    """As `train_command`, for a table in memory; `further` is that of `make_report`.

    A table without events from `test_from` on gives an artifact without a report.
    """
    from models.training.plots import plot_report
    from models.training.report import make_report, report_lines
    from models.training.trainer import train

    console = Console(quiet=quiet)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ArtifactError(f"{out}: is not empty; expected a new path, or --overwrite")
    result = train(spec, frame, out, resume=resume, quiet=quiet, overwrite=overwrite, source=source)
    console.print(
        f"kept epoch {', '.join(map(str, result.best_epochs))}; {result.seconds:.0f} s of training"
    )
    artifact = result.artifact
    training, schema = training_of(artifact.spec), schema_of(artifact.spec)
    if not _has_events_from(artifact, frame, moment_ms(schema, training.test_from, "test_from")):
        console.print(f"no events from {training.test_from} on: nothing held out, no report")
        return artifact
    report = make_report(
        artifact,
        frame,
        history=result.history,
        trees=trees,
        further=further,
        source=source,
        say=console.print,
    )
    for line in report_lines(report):
        console.print(line, markup=False, soft_wrap=True)
    files: dict[str, bytes | Path] = {
        REPORT: orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE),
        **plot_report(report),
    }
    return write_artifact(
        out,
        artifact.spec,
        artifact.weights,
        metrics={**artifact.manifest["metrics"], "held_out": _values(report)},
        training=artifact.manifest["training"],
        files=files,
        overwrite=True,
    )


def evaluate_command(
    artifact: Path,
    data: Path,
    *,
    chunk: int = 64,
    seed: int = 0,
    since: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score an artifact on a table, chunk by chunk as the service would run it.

    Args:
        artifact: the artifact's directory.
        data: a table, as for `train_command`; the artifact's `training.stream` names its
            column of streams.
        chunk: most events in a chunk.
        seed: of the chunks' lengths.
        since: score events from this moment on; earlier ones only move the states.
        quiet: show no progress.

    Returns:
        What `models.training.evaluate.evaluate` gives.
    """
    loaded = load_artifact(artifact)
    frame = read_data(data, loaded.spec)
    with Progress(disable=quiet, transient=True) as progress:
        task = progress.add_task("events", total=frame.height)
        return evaluate(
            loaded,
            frame,
            chunk=chunk,
            seed=seed,
            since=since,
            source=str(data),
            advance=lambda events: progress.update(task, advance=events),
        )


def _has_events_from(artifact: Artifact, frame: pl.DataFrame, moment: int) -> bool:
    streams = streams_of(artifact.spec, frame)
    labels = labels_of(artifact.spec, streams.frame, rows=streams.table_rows)
    return events_to_score(artifact.spec, streams, labels, moment) > 0


def _values(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    metrics = {
        name: {metric: score["value"] for metric, score in head["scores"]["model"].items()}
        for name, head in report["heads"].items()
    }
    for name, target in report.get("decoder", {}).get("targets", {}).items():
        scored = [value for value in target["mae"]["model"] if value is not None]
        metrics[f"{DECODER}.{name}"] = {"mae": float(np.mean(scored))} if scored else {}
    return metrics
