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
from warnings import catch_warnings, simplefilter

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.decoding.losses import Scored, has_targets
from models.errors import DataError, SpecError
from models.spec.heads import ForecastHead, Head
from models.spec.layout import network_outputs, output_spec
from models.spec.model import schema_of
from models.training.alarm_report import detection_lines, detection_report
from models.training.baselines import baselines_of
from models.training.burn_in import burn_in_lines, measure_burn_in
from models.training.data import (
    Streams,
    moment_ms,
    split_of,
    streams_of,
    training_of,
    without_normalisation,
)
from models.training.ensemble import Networks
from models.training.evaluate import (
    anomalous_events,
    chunk_settings,
    distinct_rows,
    events_to_score,
    run_chunks,
    run_network,
    target_rows,
)
from models.training.horizon import horizon_lines, horizon_report, table_lines
from models.training.labels import labels_of
from models.training.plan import trained_network
from models.training.scores import (
    DRAWS,
    MODEL,
    DayDraws,
    add_scaled,
    compare_scored,
    deviations_of,
    resampled_units,
    score_cell,
    score_outputs,
    stream_scales,
    values_of,
)
from models.training.table import Baseline, Table
from models.training.trees import Note, TimeBudget
from models.training.verdicts import HIGHER_IS_BETTER, direction, verdicts

CALIBRATION_BINS = 10
WHOLE = "whole sequence"
"""The network of a model in blocks, without them."""

Further = Callable[[Table, Head], list[Baseline]]


def make_report(
    artifact: Artifact,
    frame: pl.DataFrame,
    *,
    history: tuple[dict[str, Any], ...] = (),
    warnings: tuple[str, ...] = (),
    networks: Networks | None = None,
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
        networks: by seed, the spec and weights of each network of the training, to score it alone.
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
        `calibration`, `seeds`: the scores of each of `networks`), `decoder` (what
        `horizon_report` gives, for a model that has one),
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
    units = resampled_units(spec, streams, (table.test for table in tables.values()), test_key)
    alone = {}
    for of_seed, (network, weights) in (networks or {}).items():
        note_progress(f"running the network of seed {of_seed}")
        alone[of_seed] = network_outputs(network).by_name(run_network(network, weights, streams))
    head_reports = {}
    remarks = list(warnings)
    budget = TimeBudget(trees_s, note_progress)
    for at, head in enumerate(heads):
        table = tables[head.name]

        def score(values: NDArray[np.float32], head: Head = head, table: Table = table) -> Scored:
            columns = streams.columns
            return score_outputs(spec, head, values, columns, labels, table.test, scales)

        scored = score(values_of(head, outputs))
        if not scored.has_losses:
            remarks.append(f"{head.name} is not scored: none of its targets {test_range}")
            continue
        note_progress(f"baselines of {head.name}")
        own = budget.part(len(heads) - at, f"trees for {head.name}")
        with catch_warnings():
            # scikit-learn's, of fits that no reader of the report has chosen
            simplefilter("ignore", UserWarning)
            baselines = baselines_of(table, head, trees=trees, budget=own)
        if trees and own.is_expired and not any("trees" in each.name for each in baselines):
            remarks.append(
                f"{head.name} has no boosted trees beside it, which take more than their share of "
                f"{trees_s:g} s: give them more (`--trees-s`), or none (`--no-trees`)"
            )
        if further is not None:
            baselines += further(table, head)
        if whole_outputs is not None:
            baselines.insert(0, Baseline(WHOLE, score(values_of(head, whole_outputs)), {}))
        scored = add_scaled(spec, head, scored, scales, table.test)
        baselines = [
            replace(each, scored=add_scaled(spec, head, each.scored, scales, table.test))
            for each in baselines
        ]
        resampled = DayDraws.make(units.of_event[table.test], draws, seed)
        head_reports[head.name] = {
            "kind": head.kind,
            **compare_scored(scored, {each.name: each.scored for each in baselines}, resampled),
            "settings": {each.name: each.settings for each in baselines},
            **_calibration(scored, getattr(head, "quantiles", ())),
        }
        if alone:
            own_scores = {
                of_seed: add_scaled(spec, head, score(values_of(head, each)), scales, table.test)
                for of_seed, each in alone.items()
            }
            head_reports[head.name]["seeds"] = {
                str(of_seed): each.means() for of_seed, each in own_scores.items()
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
            "held_out_days": units.days,
            "validate_from": training.validate_from,
            "test_from": since or training.test_from,
            "validate_share": training.validate_share,
            "test_share": training.test_share,
            "test_range": test_range,
        },
        "run": {
            "seed": seed,
            "draws": draws,
            "resampled": units.kind,
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
                model: [score_cell(scores.get(metric), sign) for metric in metrics]
                for model, scores in head[kind].items()
            }
            lines += table_lines(title, headers, rows)
        lines += _seed_lines(name, head.get("seeds", {}), metrics)
    lines += horizon_lines(report.get("decoder", {})) + detection_lines(report)
    return lines + (["", *burn_in_lines(report["burn_in"])] if "burn_in" in report else [])


def _seed_lines(name: str, seeds: dict[str, dict[str, float]], metrics: list[str]) -> list[str]:
    """The scores of each network of a training, and how far they differ by chance."""
    if not seeds:
        return []
    rows = {
        f"seed {seed}": [f"{each[metric]:.4f}" for metric in metrics]
        for seed, each in seeds.items()
    }
    columns = [[each[metric] for each in seeds.values()] for metric in metrics]
    rows["mean and deviation"] = [
        f"{np.mean(column):.4f} +- {np.std(column, ddof=1):.4f}" for column in columns
    ]
    return table_lines(f"{name}, each network alone:", metrics, rows)


def _sign_that_is_better(metrics: list[str]) -> str:
    """Which sign of a difference says that the model is better."""
    others = [metric for metric in metrics if metric in HIGHER_IS_BETTER]
    text = "the model is better where it is positive"
    return f"{text}, for {' and '.join(others)} where it is negative" if others else text
