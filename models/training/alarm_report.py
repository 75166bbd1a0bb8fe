"""The report of a model's alarms: scores against labels, baselines, and warnings.

Without labels all events count as normal, and the report has what needs none: how often alarms open
and for how long, and the share of events with a small tail probability.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.detection.scoring import (
    ECHO_EVENTS,
    StreamScores,
    score_streams,
    vus_difference,
    with_intervals,
)
from models.detection.vus import runs
from models.spec.layout import detection_of
from models.spec.model import ModelSpec
from models.training.alarm_warnings import (
    alarm_warnings,
    baseline_warnings,
    label_warnings,
    split_warnings,
)
from models.training.data import Split, Streams, split_of
from models.training.detection import counted_events
from models.training.detection_baselines import Parts, Scored, detection_baselines
from models.training.evaluate import MS_PER_DAY
from models.training.horizon import table_lines
from models.training.tail_shares import tail_lines, tail_shares, tail_warnings
from models.training.trees import Note

Bools = NDArray[np.bool_]

UNLABELLED: Final = ("alarms", "false_per_day", "median_false_per_day", "time_in_alarm")
"""What needs no labels."""
UNALARMED: Final = ("anomalies", "average_precision", "vus_pr")
"""What needs no alarms."""
UNKNOWN: Final = "without labels, all events taken as normal"
LISTED: Final = 5
"""Most streams in a line."""


def detection_report(
    spec: ModelSpec,
    streams: Streams,
    outputs: Mapping[str, NDArray[np.float32]],
    scored: Bools,
    anomalous: Bools | None,
    *,
    seed: int = 0,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """Score a model's alarms, and with labels those of the baselines.

    Args:
        spec: a model with a fitted detection.
        streams: its data, split as the model is.
        outputs: by name, as `run_chunks` gives them.
        scored: bool [rows], the events to score.
        anomalous: bool [rows], the labels; None if there are none.
        seed: of the intervals.
        note: called with what is done now.

    Returns:
        `detection`: what `with_intervals` gives, without labels only what needs none; `specified`,
        the model's false alarms per stream and day; `echo_events`; `probabilities`, as from
        `tail_shares`; and `warnings`. With labels also `detection_baselines`: by name, the same
        scores with `vus_pr_minus_model` and `windows`, as in `Scored`; without a validation set,
        only those that need no alarms.
    """
    detection, head, _ = detection_of(spec)
    split = split_of(spec)
    labels = np.zeros(streams.events, np.bool_) if anomalous is None else anomalous
    own = scored_by(head.name, outputs)
    by_stream = scores_from(streams, own, labels, scored)
    report = with_intervals(by_stream, seed)
    if anomalous is None:
        report = _only_members(report, {*UNLABELLED, "most_false"})
    report["specified"] = detection.alarm.false_alarms_per_day
    report["echo_events"] = ECHO_EVENTS
    normal = normal_events(streams, labels) & scored
    held_out = normal & (streams.split_keys >= split.test)
    normal = held_out if held_out.any() else normal
    masks = [
        (name, _only(normal, span)) for name, span in zip(streams.names, streams.spans, strict=True)
    ]
    of = "normal events" if anomalous is not None else "events"
    report["probabilities"] = tail_shares(-own.score, masks, seed, of)
    found = alarm_warnings(report, by_stream)
    found += tail_warnings(report["probabilities"] or {"levels": []})
    report["warnings"] = split_warnings(streams, scored, split)
    if anomalous is None:
        report["warnings"] += [f"{UNKNOWN}: {text}" for text in found]
        return {"detection": report}
    report["warnings"] += label_warnings(streams, labels, scored, detection.alarm.hold_events)
    report["warnings"] += found
    compared = {}
    nats = outputs[head.name]
    for name, each in detection_baselines(spec, streams, nats, parts_of(streams, split), seed):
        note(f"detection by {name}")
        others = scores_from(streams, each, labels, scored)
        scores = with_intervals(others, seed)
        members = UNALARMED if each.alarm is None else scores.keys() - {"worst", "most_false"}
        scores = _only_members(scores, members)
        scores["vus_pr_minus_model"] = vus_difference(others, by_stream, seed)
        compared[name] = {**scores, "windows": each.windows}
    report["warnings"] += baseline_warnings(report, compared)
    return {"detection": report, "detection_baselines": compared}


def scored_by(head: str, outputs: Mapping[str, NDArray[np.float32]]) -> Scored:
    """Scores and alarms of a head with detection, from the outputs by name."""
    return Scored(
        -outputs[f"{head}.probability"].astype(np.float64),
        outputs[f"{head}.alarm"].astype(np.float64),
    )


def parts_of(streams: Streams, split: Split) -> Parts:
    """The training and the validation part of a model's data."""
    keys = streams.split_keys
    _, days = counted_events(streams, split.validate, split.test)
    is_validation = (keys >= split.validate) & (keys < split.test)
    return Parts(keys < split.validate, is_validation, sum(days))


def scores_from(
    streams: Streams, found: Scored, anomalous: Bools, scored: Bools
) -> list[StreamScores]:
    """The scores of any alarms [rows] on some of the events, of each stream that has such events.

    Alarms that are None are scored as none.
    """
    names, spans, days, at = [], [], [], 0
    for name, (start, stop) in zip(streams.names, streams.spans, strict=True):
        moments = streams.moments_ms[start:stop][scored[start:stop]]
        if len(moments):
            names.append(name)
            spans.append((at, at + len(moments)))
            days.append(float(np.ptp(moments)) / MS_PER_DAY)
            at += len(moments)
    alarm = np.zeros(at) if found.alarm is None else found.alarm[scored]
    return score_streams(alarm, found.score[scored], anomalous[scored], spans, days, names)


def normal_events(streams: Streams, anomalous: Bools) -> Bools:
    """The events in no anomaly, and not within `ECHO_EVENTS` after one."""
    normal = ~anomalous
    for start, stop in streams.spans:
        for _, end in runs(anomalous[start:stop]):
            normal[start + end : min(start + end + ECHO_EVENTS, stop)] = False
    return normal


def _only_members(scores: dict[str, Any], members: Collection[str]) -> dict[str, Any]:
    """Some members of scores, with their intervals."""
    intervals = {name: each for name, each in scores["intervals"].items() if name in members}
    return {name: each for name, each in scores.items() if name in members} | {
        "intervals": intervals
    }


def _only(rows: Bools, span: tuple[int, int]) -> NDArray[np.int64]:
    """The rows within a span, int64 [n]."""
    return span[0] + np.flatnonzero(rows[slice(*span)])


SCORES: Final = {
    "recall": "recall",
    "recall_by_chance": "recall of the same alarms at any other time",
    "opening_recall": "anomalies in which an alarm opens",
    "openings_per_anomaly": "openings in such an anomaly",
    "echoes": "echoes per anomaly",
    "precision": "precision",
    "merged": "true alarms that overlap several anomalies",
    "false_per_day": "false alarms per stream and day",
    "median_false_per_day": "their median over streams",
    "time_in_alarm": "time in alarm",
    "normal_time_in_alarm": "normal events in alarm",
    "delay_events": "delay in events",
    "average_precision": "average precision",
    "vus_pr": "VUS-PR",
}
COMPARED: Final = ("vus_pr", "recall", "opening_recall", "false_per_day", "time_in_alarm")


def detection_lines(report: Mapping[str, Any]) -> list[str]:
    """The report of alarms as lines: Markdown tables, and the streams with most false alarms."""
    scores = report.get("detection")
    if scores is None:
        return []
    count = f"{scores['anomalies']:,} anomalies" if "anomalies" in scores else UNKNOWN
    rows = {
        title: [_cell(scores, name)]
        for name, title in SCORES.items()
        if scores.get(name) is not None
    }
    title = f"{scores['alarms']:,} alarms, {count}; {scores['specified']:g} false alarms specified"
    lines = table_lines(title, ["value"], rows)
    if scores["most_false"]:
        worst = scores["most_false"][:LISTED]
        most = (f"{each['stream']} {each['false_per_day']:.3g}" for each in worst)
        lines += ["", f"most false alarms a day: {', '.join(most)}"]
    if scores["probabilities"] is not None:
        lines += ["", f"share of {scores['probabilities']['of']} with a tail probability"]
        lines += [f"- {line}" for line in tail_lines(scores["probabilities"])]
    baselines = report.get("detection_baselines", {})
    if baselines:
        rows = {"model": [_cell(scores, name) for name in COMPARED] + [""]}
        for name, each in baselines.items():
            difference = _with_interval(**each["vus_pr_minus_model"], sign="+")
            rows[name] = [_cell(each, member) for member in COMPARED] + [difference]
        headers = [*(SCORES[name] for name in COMPARED), "VUS-PR minus the model's"]
        lines += table_lines("detection and its baselines", headers, rows)
        fitted = {name: each["windows"] for name, each in baselines.items() if each["windows"]}
        most = (f"{name} {windows:,}" for name, windows in fitted.items())
        lines += ["", f"most windows that were fitted to: {', '.join(most)}"] if fitted else []
    return lines


def _cell(scores: Mapping[str, Any], name: str) -> str:
    return _with_interval(scores.get(name), scores["intervals"].get(name))


def _with_interval(value: float | None, interval: list[float] | None, sign: str = "") -> str:
    if value is None or interval is None:
        return ""
    low, high = interval
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
