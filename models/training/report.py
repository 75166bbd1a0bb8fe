"""The report of a trained model: its skill on held-out events compared with baselines.

The model is run as the service runs it (`models.training.evaluate`), and everything is scored on
the same events: those of the test set. A model with blocks is compared with the same network
without them, which reads each stream to its end: the cost of the bounded lookahead.

Intervals are 95%, by resampling days of the schema's time zone, or blocks of time if the held-out
events span few days; differences to the model are paired. The report is plain data (`report.json`)
with everything that the plots show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.decoding.losses import Scored, has_targets
from models.errors import DataError, SpecError
from models.events.calendar import zone_table
from models.spec.heads import ForecastHead, Head
from models.spec.layout import output_spec
from models.spec.model import schema_of
from models.training.alarm_report import detection_lines, detection_report
from models.training.baselines import baselines_of
from models.training.burn_in import burn_in_lines, measure_burn_in
from models.training.data import (
    Streams,
    labels_of,
    moment_ms,
    split_of,
    streams_of,
    training_of,
    without_normalisation,
)
from models.training.evaluate import (
    anomalous_events,
    chunk_settings,
    distinct_rows,
    events_to_score,
    run_chunks,
    target_rows,
)
from models.training.horizon import horizon_lines, horizon_report, table_lines
from models.training.plan import trained_network
from models.training.scores import (
    DayDraws,
    add_scaled,
    deviations_of,
    interval,
    score_outputs,
    stream_scales,
)
from models.training.table import Baseline, Table
from models.training.trees import Note, TimeBudget

MODEL = "model"
HIGHER_IS_BETTER = frozenset({"auc", "vus_pr"})
NAIVE = ("last value", "base rate", "random")
"""Baselines that need no model: one that is worse than them is of no use."""


def direction(metric: str) -> str:
    """A metric with the direction in which it is better."""
    return f"{metric} ({'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better)"


def verdicts(report: dict[str, Any], detecting: str | None = None) -> list[dict[str, Any]]:
    """Baselines that the model is better and worse than, by head and by target of a decoder.

    Args:
        detecting: the head that detection reads, if there is one.

    Returns:
        Dicts with `head`, `metric` (the first of the head's), `better_than` and `worse_than`
        (names of baselines, by their mean), `worse_than_naive` (one of `NAIVE`, or None), and
        `is_for_detection`, whether the head's forecast serves detection. Detection that was scored
        against labels has one too, `HEAD.alarm`, by VUS-PR.
    """
    found = [
        _verdict(name, metric, {other: each[metric]["value"] for other, each in scores.items()})
        for name, head in report["heads"].items()
        for scores in (head["scores"],)
        for metric in (next(iter(scores[MODEL])),)
    ]
    for verdict in found:
        verdict["is_for_detection"] = verdict["head"] == detecting
    for name, target in report.get("decoder", {}).get("targets", {}).items():
        means = {other: _mean(steps) for other, steps in target["mae"].items()}
        known = {other: mean for other, mean in means.items() if mean is not None}
        if MODEL in known:
            found.append(_verdict(f"decoder.{name}", "mae", known))
    baselines = report.get("detection_baselines", {})
    areas = {name: each["vus_pr"] for name, each in baselines.items()}
    areas[MODEL] = report.get("detection", {}).get("vus_pr")
    if baselines and areas[MODEL] is not None:
        found.append(_verdict(f"{detecting}.alarm", "vus_pr", areas))
    return found


def verdict_line(verdict: dict[str, Any]) -> str:
    """One verdict as a line."""
    parts = []
    if verdict["better_than"]:
        parts.append(f"better than {_names(verdict['better_than'])}")
    if verdict["worse_than"]:
        parts.append(f"worse than {_names(verdict['worse_than'])}")
    head, naive = verdict["head"], verdict["worse_than_naive"]
    line = f"{head}: {'; '.join(parts) or 'no baseline to compare with'}"
    line += f", by {direction(verdict['metric'])}"
    if naive is None:
        return line
    if verdict["metric"] == "vus_pr":
        return f"{line}. These alarms are worse than {naive} ones: do not serve it for detection"
    line += f". This model is worse than the {naive}: do not serve it for "
    if verdict.get("is_for_detection"):
        return (
            f"{line}forecasts of {head}. That says nothing of its alarms, which compare each event "
            "with its stream's past in further ways: judge them by `carry evaluate --anomalies`"
        )
    return (
        f"{line}{head}. Let the head read the features besides the recurrent layers "
        "(`concatenate` both), or train on more data"
    )


def _verdict(head: str, metric: str, values: dict[str, float]) -> dict[str, Any]:
    own = values[MODEL]
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    worse = [name for name, value in values.items() if sign * (own - value) > 0]
    better = [name for name in values if name not in (MODEL, *worse)]
    naive = next((name for name in NAIVE if name in worse), None)
    return {
        "head": head,
        "metric": metric,
        "better_than": better,
        "worse_than": worse,
        "worse_than_naive": naive,
        "is_for_detection": False,
    }


def _mean(steps: list[float | None]) -> float | None:
    present = [step for step in steps if step is not None]
    return float(np.mean(present)) if present else None


def _names(names: list[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


DRAWS = 1000
CALIBRATION_BINS = 10
MIN_DAYS, BLOCKS = 8, 20
"""With fewer days, so many blocks of equally many events are resampled."""
WHOLE = "whole sequence"
"""The network of a model in blocks, without them."""

Further = Callable[[Table, Head], list[Baseline]]


def make_report(
    artifact: Artifact,
    frame: pl.DataFrame,
    *,
    history: tuple[dict[str, Any], ...] = (),
    warnings: tuple[str, ...] = (),
    trees: bool = True,
    trees_s: float | None = None,
    since: str | None = None,
    anomalies: str | None = None,
    further: Further | None = None,
    chunk: int = 64,
    seed: int = 0,
    draws: int = DRAWS,
    source: str = "data",
    note: Note | None = None,
) -> dict[str, Any]:
    """Score a trained model and its baselines on the held-out events.

    Args:
        artifact: the model; its spec's `training` names the split.
        frame: the table it was trained on, held-out events included.
        history, warnings: the epochs of training and what is to be known of them, to be kept in
            the report.
        trees: whether boosted trees are fitted too; they take longest.
        trees_s: seconds that they may take together; no limit by default.
        since: moment from which events are held out; `test_from` by default.
        anomalies: boolean column that labels anomalous events, to compare detection with its
            baselines.
        further: gives more baselines of a head, such as only these data allow.
        chunk, seed: how the model's run is cut.
        draws: resamples of days.
        source: what errors call the table.
        note: called with what is done now.

    Returns:
        Plain data: `data` (what was scored), `heads` (by head: `scores` by model, with
        `value` and `interval`, `difference` of each baseline minus the model, `settings`,
        `calibration`), `decoder` (what `horizon_report` gives, for a model that has one),
        for a model with detection what `detection_report` gives, `burn_in` (what `measure_burn_in`
        gives of the other events), `history`, `warnings`, `verdicts`.

    Raises:
        DataError: there are no held-out events, or none to fit the baselines to.
    """
    note_progress = note or (lambda text: None)
    spec = artifact.spec
    schema, training = schema_of(spec), training_of(spec)
    streams = streams_of(spec, frame, source)
    split = split_of(spec)
    test_key, test_range = split.test, split.test_range
    if since is not None:
        if training.is_split_by_share:
            raise SpecError(
                "--since: expected none for a model that is split by share of each stream, whose "
                f"events to hold out are those {split.test_range}"
            )
        test_key, test_range = moment_ms(schema, since, "--since"), f"from {since} on"
    labelled = None if anomalies is None else anomalous_events(spec, streams, anomalies, source)
    labels = labels_of(spec, streams.frame, source, streams.table_rows)
    heads = [head for head in spec.heads if has_targets(head)]
    rows = streams.encoded(schema)
    plain, plain_rows, scales = spec, rows, stream_scales(spec, streams)
    if scales:
        plain = without_normalisation(spec)
        plain_rows = streams.encoded(schema_of(plain))
    tables = {
        head.name: Table(
            plain,
            streams,
            plain_rows,
            target_rows(head, streams, labels, None, split.validate),
            target_rows(head, streams, labels, split.validate, split.test),
            target_rows(head, streams, labels, test_key),
            labels,
            deviations_of(spec, getattr(head, "targets", ()), scales),
        )
        for head in heads
    }
    held_out = events_to_score(spec, streams, labels, test_key)
    if held_out == 0:
        raise DataError(expected=f"{source}: events {test_range}", got="none")
    for name, table in tables.items():
        if len(table.train) == 0 or len(table.validate) == 0:
            raise DataError(
                expected=f"{source}: events {split.train_range} and {split.validation_range}, "
                f"to fit the baselines of {name!r} to",
                got=f"{len(table.train)} and {len(table.validate)}",
            )
    pieces = "chunk by chunk" if spec.blocks is None else "block by block"
    note_progress(f"running the model over all events, {pieces}")
    by_name = output_spec(spec).by_name
    packed = run_chunks(artifact, streams, chunk=chunk, seed=seed)
    outputs = by_name(packed)
    note_progress("measuring the burn-in")
    burn_in = measure_burn_in(artifact, streams, packed, test_key)
    whole_outputs = None
    if spec.blocks is not None:
        note_progress("running it over whole sequences, without blocks")
        whole_outputs = by_name(run_chunks(replace(artifact, spec=trained_network(spec)), streams))
    days = zone_table(schema.timezone).days(streams.moments_ms)
    held_out_days = len({day for table in tables.values() for day in days[table.test].tolist()})
    units = days if held_out_days >= MIN_DAYS else _blocks_of_time(streams, test_key)
    head_reports = {}
    remarks = list(warnings)
    budget = TimeBudget(trees_s, note_progress)
    for at, head in enumerate(heads):
        table = tables[head.name]

        def score(values: NDArray[np.float32], head: Head = head, table: Table = table) -> Scored:
            columns = streams.columns
            return score_outputs(spec, head, values, columns, labels, table.test, scales)

        scored = score(outputs[head.name])
        if not scored.has_losses:
            remarks.append(f"{head.name} is not scored: none of its targets {test_range}")
            continue
        note_progress(f"baselines of {head.name}")
        own = budget.part(len(heads) - at, f"trees for {head.name}")
        baselines = baselines_of(table, head, trees=trees, budget=own)
        if trees and own.is_expired and not any("trees" in each.name for each in baselines):
            remarks.append(
                f"{head.name} has no boosted trees beside it, which take more than their share of "
                f"{trees_s:g} s: give them more (`--trees-s`), or none (`--no-trees`)"
            )
        if further is not None:
            baselines += further(table, head)
        if whole_outputs is not None:
            baselines.insert(0, Baseline(WHOLE, score(whole_outputs[head.name]), {}))
        scored = add_scaled(spec, head, scored, scales, table.test)
        baselines = [
            replace(each, scored=add_scaled(spec, head, each.scored, scales, table.test))
            for each in baselines
        ]
        resampled = DayDraws.make(units[table.test], draws, seed)
        head_reports[head.name] = {
            "kind": head.kind,
            **_compare(scored, baselines, resampled),
            **_calibration(scored, getattr(head, "quantiles", ())),
        }
        if isinstance(head, ForecastHead):
            head_reports[head.name]["quantiles"] = list(head.quantiles)
    detection: dict[str, Any] = {}
    if spec.detection is not None:
        is_scored = streams.split_keys >= test_key
        detection = detection_report(
            spec, streams, outputs, is_scored, labelled, seed=seed, note=note_progress
        )
        remarks += detection["detection"]["warnings"]
    report = {
        "model": spec.name,
        "version": artifact.version,
        "data": {
            "events": streams.events,
            "streams": len(streams.names),
            "trained": distinct_rows(table.train for table in tables.values()),
            "validated": distinct_rows(table.validate for table in tables.values()),
            "held_out": held_out,
            "held_out_days": held_out_days,
            "validate_from": training.validate_from,
            "test_from": since or training.test_from,
            "validate_share": training.validate_share,
            "test_share": training.test_share,
            "test_range": test_range,
        },
        "run": {
            "seed": seed,
            "draws": draws,
            "resampled": "days" if units is days else f"{BLOCKS} blocks of time",
            **chunk_settings(spec, {"chunk": chunk, "seed": seed}),
        },
        "heads": head_reports,
        **detection,
        **_decoder_report(artifact, streams, rows, test_key, split.validate, note_progress),
        **({} if burn_in is None else {"burn_in": burn_in}),
        "history": list(history),
        "warnings": remarks,
    }
    detecting = None if spec.detection is None else spec.detection.head
    return {**report, "verdicts": verdicts(report, detecting)}


def _blocks_of_time(streams: Streams, from_key: int) -> NDArray[np.int64]:
    """The block of each event from a key of the split on, in order of time; -1 before it."""
    blocks = np.full(streams.events, -1)
    rows = np.flatnonzero(streams.split_keys >= from_key)
    order = rows[np.argsort(streams.moments_ms[rows], kind="stable")]
    blocks[order] = np.arange(len(order)) * BLOCKS // len(order)
    return blocks


def _decoder_report(
    artifact: Artifact,
    streams: Streams,
    rows: NDArray[np.float32],
    test_key: int,
    validate_key: int,
    note_progress: Note,
) -> dict[str, Any]:
    """The decoder's part, by step of its horizon; empty for a model without one."""
    if artifact.spec.decoder is None:
        return {}
    note_progress("forecasts of the decoder")
    return {"decoder": horizon_report(artifact, streams, rows, test_key, validate_key)}


def _compare(scored: Scored, baselines: list[Baseline], days: DayDraws) -> dict[str, Any]:
    draws = {MODEL: _resample(scored, days)}
    exact = {MODEL: scored.means()}
    for baseline in baselines:
        draws[baseline.name] = _resample(baseline.scored, days)
        exact[baseline.name] = baseline.scored.means()
    scores = {
        name: {
            metric: {"value": value, "interval": interval(draws[name][metric])}
            for metric, value in values.items()
        }
        for name, values in exact.items()
    }
    difference = {
        name: {
            metric: {
                "value": value - exact[MODEL][metric],
                "interval": interval(draws[name][metric] - draws[MODEL][metric]),
            }
            for metric, value in values.items()
            if metric in exact[MODEL]
        }
        for name, values in exact.items()
        if name != MODEL
    }
    settings = {baseline.name: baseline.settings for baseline in baselines}
    return {"scores": scores, "difference": difference, "settings": settings}


def _resample(scored: Scored, days: DayDraws) -> dict[str, NDArray[np.float64]]:
    draws = {name: days.means(loss) for name, loss in scored.losses.items()}
    if scored.probability is not None and scored.truth is not None and scored.has_both_classes:
        draws["auc"] = days.aucs(scored.probability, scored.truth)
    return draws


def _calibration(scored: Scored, quantiles: tuple[float, ...]) -> dict[str, Any]:
    """Tenths of the events by probability, or the share of values at or below each quantile."""
    if scored.probability is not None and scored.truth is not None:
        present = ~np.isnan(scored.truth)
        probability, truth = scored.probability[present], scored.truth[present]
        order = np.argsort(probability, kind="stable")
        bins = [part for part in np.array_split(order, CALIBRATION_BINS) if len(part)]
        return {
            "calibration": [
                {
                    "predicted": float(probability[part].mean()),
                    "observed": float(truth[part].mean()),
                    "events": len(part),
                }
                for part in bins
            ]
        }
    if quantiles and scored.values is not None and scored.truth is not None:
        below = np.nanmean(scored.truth[..., None] <= scored.values, axis=(0, 1))
        return {
            "calibration": [
                {"predicted": level, "observed": float(share), "events": len(scored.truth)}
                for level, share in zip(quantiles, below, strict=True)
            ]
        }
    return {}


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report's scores as a Markdown table per head; verdicts are `verdict_lines`."""
    data = report["data"]
    resampled = report["run"].get("resampled", "days")
    held_out = data.get("test_range", f"from {data['test_from']} on")
    lines = [
        f"{data['held_out']:,} held-out events {held_out} "
        f"({data['held_out_days']} days), {data['trained']:,} trained on; "
        f"95% intervals by resampling {resampled}",
    ]
    for name, head in report["heads"].items():
        metrics = list(head["scores"][MODEL])
        titles = list(map(direction, metrics))
        for kind, sign, headers in (("scores", "", titles), ("difference", "+", metrics)):
            title = f"{name} ({head['kind']})"
            if sign:
                title = f"baseline minus model; {_sign_that_is_better(metrics)}:"
            rows = {
                model: [_cell(scores.get(metric), sign) for metric in metrics]
                for model, scores in head[kind].items()
            }
            lines += table_lines(title, headers, rows)
    lines += horizon_lines(report.get("decoder", {})) + detection_lines(report)
    return lines + (["", *burn_in_lines(report["burn_in"])] if "burn_in" in report else [])


def verdict_lines(report: dict[str, Any]) -> list[tuple[str, bool]]:
    """Warnings and verdicts as lines, each with whether the model should not be served for that."""
    warnings = [(f"warning: {text}", False) for text in report.get("warnings", [])]
    lines = [
        (
            verdict_line(verdict),
            verdict["worse_than_naive"] is not None and not verdict.get("is_for_detection"),
        )
        for verdict in report.get("verdicts", [])
    ]
    return warnings + lines


def _sign_that_is_better(metrics: list[str]) -> str:
    """Which sign of a difference says that the model is better."""
    others = [metric for metric in metrics if metric in HIGHER_IS_BETTER]
    text = "the model is better where it is positive"
    return f"{text}, for {' and '.join(others)} where it is negative" if others else text


def _cell(score: dict[str, Any] | None, sign: str = "") -> str:
    if score is None:
        return ""
    low, high = score["interval"]
    return f"{score['value']:{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"
