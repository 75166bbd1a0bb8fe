"""Compares two artifacts on the same events.

Both run as the service runs them (`models.training.evaluate`). Heads of the same name and task are
scored on the same events; intervals are 95%, of paired differences, as in a report
(`models.training.scores`). If their vocabularies differ, these are the events with categories that
both know, since "unknown" is easier to predict the more categories it stands for. By default the
events are those that neither has been trained or chosen on: from the later `test_from` of both on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.decoding.losses import Floats, Scored, has_targets
from models.errors import DataError, SpecError
from models.events.schema import CategoricalField, NumericField
from models.spec.heads import AnomalyHead, ClassificationHead, Head, LabelHead
from models.spec.layout import event_field
from models.spec.model import ModelSpec, schema_of
from models.training.data import Streams, moment_ms, split_of, streams_of, training_of
from models.training.evaluate import run_chunks, score_heads
from models.training.horizon import table_lines
from models.training.labels import labels_of
from models.training.scores import (
    DRAWS,
    MODEL,
    DayDraws,
    add_scaled,
    compare_scored,
    resampled_units,
    score_cell,
    stream_scales,
)
from models.training.verdicts import direction, judge_difference

OTHER: Final = "other"
Scales = tuple[ModelSpec, Mapping[str, Floats]]
"""The spec of A, and its `stream_scales`."""
"""Of B: whether the interval of its difference to A is on one side of zero."""


def compare_artifacts(
    artifacts: tuple[Artifact, Artifact],
    frames: tuple[pl.DataFrame, pl.DataFrame],
    *,
    since: str | None = None,
    chunk: int = 64,
    seed: int = 0,
    source: str = "data",
) -> dict[str, Any]:
    """Score artifacts A and B on the same events.

    Args:
        artifacts: A and B, with events and training.
        frames: the table, read by the schema of each.
        since: RFC 3339 moment from which on events are scored, in the time zone of A if it has no
            offset; by default those held out by both.
        chunk, seed: how the runs are cut, and the resampling's seed.
        source: what errors call the table.

    Returns:
        `a` and `b` (`model` and `version`), `from`, `days`, `resampled`, `heads` (by head:
        `metric`, `events`, `scores` of `a` and `b`, `difference` of B minus A, and `verdict` on B;
        `unknown`, events left out because of a category that not both know),
        `verdict` (`worse` if B is for any head, otherwise `better` if it is for any), and
        `not_compared`, with reasons.

    Raises:
        SpecError: neither has a head of the other's name and task.
        DataError: the table does not fit both, or has no events to score.
    """
    specs = artifacts[0].spec, artifacts[1].spec
    streams = [streams_of(spec, frame, source) for spec, frame in zip(specs, frames, strict=True)]
    if not np.array_equal(streams[0].table_rows, streams[1].table_rows):
        raise DataError(
            expected=f"{source}: the same streams, in the same order, by `stream` and `order_by` "
            "of both artifacts",
            got=" and ".join(str(training_of(spec).stream) for spec in specs),
        )
    streams, from_key, scored_range = _select_scored(specs, streams, since)
    scored = []
    for artifact, own in zip(artifacts, streams, strict=True):
        labels = labels_of(artifact.spec, own.frame, source, own.table_rows)
        outputs = run_chunks(artifact, own, chunk=chunk, seed=seed)
        scored.append(score_heads(artifact.spec, outputs, own, labels, from_key))
    heads, not_compared = _common_heads(specs)
    for name in [name for name in heads if name not in scored[0] or name not in scored[1]]:
        heads.remove(name)
        not_compared[name] = f"no events with a value {scored_range}"
    unknown: dict[str, int] = {}
    for name in [*heads]:
        kept = _known_to_both(specs, name, streams[0], scored[0][name][1])
        unknown[name] = int((~kept).sum())
        for each in scored:
            each[name] = _select(each[name][0], kept), each[name][1][kept]
        if not kept.any():
            heads.remove(name)
            not_compared[name] = f"no events {scored_range} with a category that both know"
    if not heads:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in not_compared.items())
        raise SpecError(
            f"expected a head that both artifacts have and {source} scores, got {reasons}"
        )
    rows = [scored[0][name][1] for name in heads]
    units = resampled_units(specs[0], streams[0], rows, from_key)
    scale = specs[0], stream_scales(specs[0], streams[0])
    head_reports = {}
    for name, at in zip(heads, rows, strict=True):
        days = DayDraws.make(units.of_event[at], DRAWS, seed)
        head = next(each for each in specs[0].heads if each.name == name)
        of_a, of_b = (
            _rescale(spec, head, each[name][0], of, at, scale)
            for spec, each, of in zip(specs, scored, streams, strict=True)
        )
        compared = _add_verdict(compare_scored(of_a, {OTHER: of_b}, days))
        head_reports[name] = {"events": len(at), "unknown": unknown[name], **compared}
    verdicts = {head["verdict"] for head in head_reports.values()}
    verdict = next((each for each in ("worse", "better") if each in verdicts), "level")
    return {
        **{
            name: {"model": each.spec.name, "version": each.version}
            for name, each in zip("ab", artifacts, strict=True)
        },
        "from": scored_range,
        "days": units.days,
        "resampled": units.kind,
        "heads": head_reports,
        "not_compared": not_compared,
        "verdict": verdict,
    }


def _select_scored(
    specs: tuple[ModelSpec, ModelSpec], streams: list[Streams], since: str | None
) -> tuple[list[Streams], int, str]:
    """The streams, the key of the split from which on they are scored, and that in words."""
    if since is not None:
        key = moment_ms(schema_of(specs[0]), since, "--since")
        return [each.by_moment() for each in streams], key, f"from {since} on"
    if len({training_of(spec).is_split_by_share for spec in specs}) > 1:
        raise SpecError(
            "--since: expected a moment for artifacts of which one is split by time, and one by "
            "shares of each stream"
        )
    later = max((split_of(spec) for spec in specs), key=lambda split: split.test)
    return streams, later.test, later.test_range


def _common_heads(specs: tuple[ModelSpec, ModelSpec]) -> tuple[list[str], dict[str, str]]:
    """The heads of the same name and task, and why others are not compared."""
    tasks = [
        {head.name: _task(spec, head) for head in spec.heads if has_targets(head)} for spec in specs
    ]
    not_compared = {
        name: f"only {'A' if name in tasks[0] else 'B'} has it"
        for name in sorted(tasks[0].keys() ^ tasks[1].keys())
    }
    heads = []
    for name in tasks[0].keys() & tasks[1].keys():
        if tasks[0][name] == tasks[1][name]:
            heads.append(name)
        else:
            not_compared[name] = "it predicts something else in A than in B"
    if any(spec.decoder is not None for spec in specs):
        not_compared["decoder"] = "decoders are scored by `carry evaluate`"
    return [name for name in tasks[0] if name in heads], not_compared


def _task(spec: ModelSpec, head: Head) -> tuple[Any, ...]:
    """What two heads must have in common: targets, classes, and units of their losses."""
    options = head.model_dump(
        include={"kind", "target", "targets", "above", "quantiles", "classes"}
    )
    fields = [event_field(spec, name) for name in getattr(head, "targets", ())]
    numbers = [
        (each.transform, each.normalisation is not None, each.std if head.kind == "dense" else None)
        for each in fields
        if isinstance(each, NumericField)
    ]
    return options, numbers, head.source if isinstance(head, LabelHead) else None


def _known_to_both(
    specs: tuple[ModelSpec, ModelSpec], name: str, streams: Streams, at: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether each event, of those that a head is scored on, has categories that both know; always
    if their vocabularies have the same ones."""
    head = next(each for each in specs[0].heads if each.name == name)
    targets: tuple[str, ...] = ()
    if isinstance(head, ClassificationHead | AnomalyHead):
        targets = head.targets if isinstance(head, AnomalyHead) else (head.target,)
    kept = np.ones(len(at), np.bool_)
    for target in targets:
        fields = [event_field(spec, target) for spec in specs]
        known = [set(e.vocabulary or ()) for e in fields if isinstance(e, CategoricalField)]
        if known and known[0] != known[1]:
            values = streams.columns.values[target][at]
            both = np.isin(values, list(known[0] & known[1]))
            kept &= both | ~streams.columns.present[target][at]
    return kept


def _select(scored: Scored, kept: NDArray[np.bool_]) -> Scored:
    """The scores of some of the events."""
    arrays = {
        name: None if values is None else values[kept]
        for name in ("probability", "truth", "values")
        for values in (getattr(scored, name),)
    }
    return Scored({name: loss[kept] for name, loss in scored.losses.items()}, **arrays)


def _rescale(
    spec: ModelSpec,
    head: Head,
    scored: Scored,
    streams: Streams,
    at: NDArray[np.int64],
    of_a: Scales,
) -> Scored:
    """The losses of A or B on a scale that both have.

    Those in deviations of a stream are in A's deviations; nats of an anomaly head are of values in
    the units of their fields.
    """
    losses = {name: loss for name, loss in scored.losses.items() if not name.startswith("scaled_")}
    if isinstance(head, AnomalyHead):
        for target in head.targets:
            field = event_field(spec, target)
            if isinstance(field, NumericField) and field.std is not None:
                present = streams.columns.present[target][at]
                losses["nll"] = losses["nll"] + np.where(present, np.log(field.std), 0.0)
    return add_scaled(of_a[0], head, replace(scored, losses=losses), of_a[1], at)


def _add_verdict(compared: dict[str, Any]) -> dict[str, Any]:
    """The comparison of one head, with its verdict by the first metric."""
    scores, difference = compared["scores"], compared["difference"][OTHER]
    metric = next(iter(scores[MODEL]))
    return {
        "metric": metric,
        "scores": {"a": scores[MODEL], "b": scores[OTHER]},
        "difference": difference,
        "verdict": judge_difference(metric, difference[metric]["interval"]),
    }


def comparison_lines(compared: dict[str, Any]) -> list[str]:
    """A comparison as tables and a verdict per head."""
    names = {each: f"{each.upper()}: {compared[each]['model']}" for each in "ab"}
    lines = [
        f"{names['a']} {compared['a']['version']}, {names['b']} {compared['b']['version']}; events "
        f"{compared['from']} ({compared['days']} days), 95% intervals by resampling "
        f"{compared['resampled']}"
    ]
    for name, head in compared["heads"].items():
        metrics = [each for each in head["scores"]["a"] if each in head["difference"]]
        rows = {
            each.upper(): [score_cell(head["scores"][each][metric]) for metric in metrics]
            for each in "ab"
        }
        rows["B minus A"] = [score_cell(head["difference"][metric], "+") for metric in metrics]
        title = f"{name}, {head['events']:,} events"
        lines += table_lines(title, [direction(metric) for metric in metrics], rows)
    lines += [
        "",
        *(f"{name} is not compared: {why}" for name, why in compared["not_compared"].items()),
    ]
    lines += [
        f"{name}: {head['unknown']:,} events whose category A and B do not both know are left out"
        for name, head in compared["heads"].items()
        if head["unknown"]
    ]
    for name, head in compared["heads"].items():
        verdict = {"level": "B is level with A", "better": "B is better than A"}
        text = verdict.get(head["verdict"], "B is worse than A")
        lines.append(f"{name}: {text}, by {direction(head['metric'])}")
    return lines
