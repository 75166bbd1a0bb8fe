"""Implements `carry train`, `carry evaluate` and `carry plot`, without the command line.

All raise `ModelsError` if spec, table or artifact are rejected, and the first two print to a rich
console, which `quiet` silences. The artifact is written before its report; the checkpoint stays
until the report is written too, so that `resume` continues with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import polars as pl
from rich.console import Console

from models.artifact.artifact import Artifact, load_artifact, write_artifact
from models.artifact.files import replace_file
from models.errors import ArtifactError, DataError, SpecError
from models.spec.decoder import DECODER
from models.spec.model import ModelSpec
from models.spec.spec_file import add_line_number, read_spec
from models.training.data import labels_of, split_of, streams_of
from models.training.evaluate import evaluate, events_to_score
from models.training.files import read_data
from models.training.progress import Progress

if TYPE_CHECKING:
    from models.training.report import Further
    from models.training.trainer import TrainReport

REPORT = "report.json"
TREES_S = 60.0
"""Seconds that boosted trees may take in a report of `carry train`."""


def train_command(
    spec: Path,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trees: bool = True,
    trees_s: float | None = TREES_S,
    quiet: bool = False,
) -> Artifact:
    """Train a `SPEC.yaml` on a table; writes artifact, report and plots to `out`.

    Args:
        spec: the specification's file.
        data: `.csv`, `.jsonl`, `.ndjson` or `.parquet`, one row per event.
        out: the artifact's directory.
        resume: continue from the checkpoint of an interrupted run, with the training or with the
            report.
        overwrite: replace an artifact that is there.
        trees: compare with boosted trees too.
        trees_s: seconds that they may take; None is no limit.
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
            trees_s=trees_s,
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
    trees_s: float | None = None,
    quiet: bool = False,
    source: str = "data",
    further: Further | None = None,
) -> Artifact:
    """As `train_command`, for a table in memory; `further` is that of `make_report`.

    A table without events from `test_from` on gives an artifact without a report.
    """
    from models.training.trainer import checkpoint_path, train

    out = Path(out)
    progress = Progress(Console(quiet=quiet))
    if out.exists() and any(out.iterdir()) and not overwrite and not resume:
        raise ArtifactError(f"{out}: is not empty; expected a new path, or --overwrite")
    result = train(
        spec,
        frame,
        out,
        resume=resume,
        quiet=quiet,
        overwrite=overwrite,
        keep_checkpoint=True,
        source=source,
    )
    progress.say(
        f"kept epoch {', '.join(map(str, result.best_epochs))}; {result.seconds:.0f} s of "
        f"training; the model is in {out}"
    )
    artifact = result.artifact
    split = split_of(artifact.spec)
    if _has_events_from(artifact, frame, split.test):
        artifact = _write_report(result, frame, progress, trees, trees_s, source, further)
    else:
        progress.say(f"no events {split.test_range}: nothing held out, no report")
        for warning in result.warnings:
            progress.say(f"warning: {warning}", "yellow")
    checkpoint_path(out).unlink(missing_ok=True)
    return artifact


def _write_report(
    result: TrainReport,
    frame: pl.DataFrame,
    progress: Progress,
    trees: bool,
    trees_s: float | None,
    source: str,
    further: Further | None,
) -> Artifact:
    """Write report and plots into the artifact of a training."""
    from models.training.plots import plot_report
    from models.training.report import make_report, report_lines, verdict_lines

    artifact = result.artifact
    with progress.task("report", 1.0) as advance:
        report = make_report(
            artifact,
            frame,
            history=result.history,
            warnings=result.warnings,
            trees=trees,
            trees_s=trees_s,
            further=further,
            source=source,
            note=lambda text: advance(0.0, text),
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
    return write_artifact(
        artifact.path,
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
    held_out: bool = False,
    anomalies: str | None = None,
    plots: Path | None = None,
    baselines: bool = False,
    trees: bool = True,
    trees_s: float | None = TREES_S,
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
        held_out: score the events of the test set; with baselines it is always those.
        anomalies: boolean column that labels anomalous events, against which alarms are scored.
        plots: directory in which the streams of `detection.worst` are plotted; needs anomalies.
        baselines: compare with the baselines of a report, fitted to the table's events before
            the artifact's `test_from`.
        trees, trees_s: as for `train_command`.
        quiet: show no progress.

    Returns:
        What `models.training.evaluate.evaluate` gives; with baselines, what
        `models.training.report.make_report` does.
    """
    loaded = load_artifact(artifact)
    frame = read_data(data, loaded.spec)
    # The scores are on stdout.
    progress = Progress(Console(quiet=quiet, stderr=True))
    if baselines:
        from models.training.report import make_report

        with progress.task("report", 1.0) as advance:
            scores = make_report(
                loaded,
                frame,
                trees=trees,
                trees_s=trees_s,
                since=since,
                anomalies=anomalies,
                chunk=chunk,
                seed=seed,
                source=str(data),
                note=lambda text: advance(0.0, text),
            )
    else:
        done = 0
        with progress.task("events", max(1, frame.height)) as advance:

            def count(events: int) -> None:
                nonlocal done
                done += events
                advance(done, f"{done:,} of {frame.height:,}")

            scores = evaluate(
                loaded,
                frame,
                chunk=chunk,
                seed=seed,
                since=since,
                held_out=held_out,
                anomalies=anomalies,
                source=str(data),
                advance=count,
            )
    if plots is not None and anomalies is not None:
        from models.training.stream_plot import plot_streams

        worst = [each["stream"] for each in scores["detection"]["worst"]]
        plots.mkdir(parents=True, exist_ok=True)
        with progress.task("plots", max(1, len(worst))) as advance:
            drawn = plot_streams(
                loaded,
                frame,
                worst,
                since=since,
                held_out=held_out or baselines,
                anomalies=anomalies,
                source=str(data),
            )
            for number, content in enumerate(drawn, start=1):
                replace_file(plots / f"worst-{number:02d}.svg", content)
                advance(number, f"{number} of {len(worst)}")
    return scores


def plot_command(
    artifact: Path,
    data: Path,
    stream: str,
    out: Path,
    *,
    since: str | None = None,
    until: str | None = None,
    anomalies: str | None = None,
    overwrite: bool = False,
) -> None:
    """Plot one stream of a table into a file, see `models.training.stream_plot`.

    Args:
        artifact, data: as for `evaluate_command`.
        stream: its name.
        out: a `.svg`, `.png` or `.pdf` file.
        since, until: the time that is shown.
        anomalies: boolean column that labels anomalous events.
        overwrite: replace a file that is there.

    Raises:
        DataError: the suffix of `out` is another one, or there are no such events.
        ArtifactError: `out` exists.
    """
    from models.training.stream_plot import FORMATS, plot_stream

    kind = out.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise DataError(expected=f"OUT to end in .{', .'.join(FORMATS)}", got=str(out))
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out}: exists; expected a new path, or --overwrite")
    loaded = load_artifact(artifact)
    content = plot_stream(
        loaded,
        read_data(data, loaded.spec),
        stream,
        kind=kind,
        since=since,
        until=until,
        anomalies=anomalies,
        source=str(data),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, content)


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
