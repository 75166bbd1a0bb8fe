"""Where the scores of alarms say less than they seem to: warnings, as sentences.

Recall and false alarms alone flatter an alarm that is always open, a hold that joins anomalies,
labels that cover most of the time, and a rate that is right on average and wrong for each stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.detection.scoring import ECHO_EVENTS, FAR_ABOVE, StreamScores
from models.detection.vus import runs
from models.training.data import Split, Streams
from models.training.tail_shares import MATERIAL

Bools = NDArray[np.bool_]

LONG_IN_ALARM: Final = 0.1
"""Alarms that are open for a larger share of the normal events tell little."""
BY_CHANCE: Final = 0.5
"""The share of the recall that alarms may have by chance."""
ALREADY_OPEN: Final = 0.2
"""The share of the found anomalies in which no alarm need open."""
FLICKER: Final = 2.0
ECHOES: Final = 0.5
"""Most openings in an anomaly, and echoes of an anomaly, that need no warning."""
LABELLED: Final = 1 / 3
UNLIKELY: Final = 0.025


def alarm_warnings(report: Mapping[str, Any], streams: Sequence[StreamScores]) -> list[str]:
    """Why the scores of alarms say less than they seem to, as sentences.

    Args:
        report: as `detection_report` gives it; None, or nothing, for what has no value.
    """
    found = []
    in_alarm = report.get("normal_time_in_alarm", report["time_in_alarm"])
    if in_alarm is not None and in_alarm > LONG_IN_ALARM:
        found.append(
            f"alarms are open for {report['time_in_alarm']:.0%} of the time, and at {in_alarm:.0%} "
            "of the normal events: such alarms find anomalies, and are seldom false, by being open"
        )
    recall = report.get("recall")
    if recall:
        chance, opened = report["recall_by_chance"], report["opening_recall"]
        if chance > BY_CHANCE * recall:
            found.append(
                f"the same alarms at any other time would find {chance:.0%} of the anomalies, "
                f"and these find {recall:.0%}"
            )
        if opened < (1 - ALREADY_OPEN) * recall:
            found.append(
                f"an alarm opens in {opened:.0%} of the anomalies: the others of the {recall:.0%} "
                "that are found have one that was open before"
            )
        if (report["openings_per_anomaly"] or 0) > FLICKER:
            count = report["openings_per_anomaly"]
            found.append(
                f"{count:.1f} alarms open in an anomaly in which one does: raise `hold_events`"
            )
        if report["echoes"] > max(ECHOES, 2 * _echoes_by_chance(streams)):
            found.append(
                f"{report['echoes']:.1f} alarms open within {report['echo_events']} events after "
                "each anomaly"
            )
    return found + _rate_warnings(report, streams)


def _echoes_by_chance(streams: Sequence[StreamScores]) -> float:
    """False alarms in as many events as count as soon after an anomaly, elsewhere."""
    elsewhere = sum(each.normal - ECHO_EVENTS * each.anomalies for each in streams)
    false = sum(each.alarms - each.true - each.echoes for each in streams)
    return ECHO_EVENTS * false / elsewhere if elsewhere > 0 else 0.0


def _rate_warnings(report: Mapping[str, Any], streams: Sequence[StreamScores]) -> list[str]:
    rate, specified = report["false_per_day"], report["specified"]
    if rate is None:
        return []
    found = []
    low, high = report["intervals"]["false_per_day"]
    if not (low <= specified <= high or specified / MATERIAL < rate < specified * MATERIAL):
        found.append(
            f"there are {rate:.3g} false alarms per stream and day ({low:.3g} to {high:.3g}), "
            f"{rate / specified:.2g} times the {specified:g} that the model specifies"
        )
    far = [stream for stream in streams if _is_far_above(stream, specified)]
    if far:
        worst = max(far, key=lambda stream: stream.false_per_day)
        found.append(
            f"{len(far)} of {len(streams)} streams have more than {FAR_ABOVE:g} times the false "
            f"alarms that the model specifies; the most has {worst.stream}, "
            f"{worst.false_per_day / specified:.0f} times as many"
        )
    return found


def _is_far_above(stream: StreamScores, specified: float) -> bool:
    """Whether a stream has so many false alarms that the specified rate does not explain them."""
    false, expected = stream.alarms - stream.true, specified * stream.normal_days
    if false <= FAR_ABOVE * expected:
        return False
    # Poisson: the probability of fewer; three times as many as 100 are unlikely enough
    expected = min(expected, 100.0)
    term = fewer = exp(-expected)
    for count in range(1, false):
        term *= expected / count
        fewer += term
    return 1.0 - fewer < UNLIKELY


def baseline_warnings(report: Mapping[str, Any], baselines: Mapping[str, Any]) -> list[str]:
    """Baselines that are better than the model by VUS-PR, beyond the interval, and missing ones."""
    found = []
    for name, each in baselines.items():
        value, interval = each["vus_pr_minus_model"].values()
        if interval is not None and interval[0] > 0:
            found.append(
                f"{name}: VUS-PR of {each['vus_pr']:.2f}, {value:.2f} more than the model's "
                f"{report['vus_pr']:.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})"
            )
    if not any(each["windows"] for each in baselines.values()):
        found.append(
            "no k nearest neighbours, PCA and isolation forest to compare with: they are fitted to "
            "numeric targets of events before validation, and there are too few"
        )
    return found


def label_warnings(
    streams: Streams, anomalous: Bools, scored: Bools, hold_events: int
) -> list[str]:
    """Labels that say little of alarms: none, close to each other, or of most events.

    Args:
        anomalous, scored: bool [rows], the labels, and the events that are scored.
    """
    close = total = wide = 0
    for start, stop in streams.spans:
        labels = anomalous[start:stop][scored[start:stop]]
        own = runs(labels)
        total += len(own)
        close += sum(start - stop <= hold_events for (_, stop), (start, _) in pairwise(own))
        wide += bool(len(labels) and labels.mean() > LABELLED)
    found = []
    if not total:
        found.append(
            "no anomaly is labelled in the scored events: there is no recall, and every alarm "
            "counts as false"
        )
    if close:
        found.append(
            f"{close} of {total} anomalies begin within `hold_events` ({hold_events}) of the one "
            "before: one alarm is held over both, and counts as having found both"
        )
    if wide:
        share = float(anomalous[scored].mean())
        found.append(
            f"labels cover {share:.0%} of the events, more than a third in {wide} streams: there "
            "almost any alarm is true"
        )
    return found


def split_warnings(streams: Streams, scored: Bools, split: Split) -> list[str]:
    """Events that are scored, bool [rows], although they are not held out."""
    fitted = int((scored & (streams.split_keys < split.test)).sum())
    if not fitted:
        return []
    return [
        f"{fitted:,} of {int(scored.sum()):,} scored events are not held out: the model was "
        "trained on them, or its alarms fitted to them. `--held-out` scores the others alone"
    ]
