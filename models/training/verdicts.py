"""Verdicts of a report: which baselines a model beats, and whether it is to be served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from models.training.scores import MODEL

Verdict = Literal["better", "worse", "level"]
HIGHER_IS_BETTER = frozenset({"auc", "vus_pr"})
NAIVE = ("last value", "base rate", "random")
"""Baselines without a model: a network that is worse than one of them is not to be served."""


def direction(metric: str) -> str:
    """A metric with the direction in which it is better."""
    return f"{metric} ({'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better)"


def judge_difference(metric: str, interval: Sequence[float]) -> Verdict:
    """What a model is that differs so from another: level with it if the interval contains zero.

    Args:
        interval: low and high end of the model's score minus the other's.
    """
    low, high = interval
    if not (low > 0 or high < 0):
        return "level"
    return "better" if (low > 0) == (metric in HIGHER_IS_BETTER) else "worse"


def verdicts(report: dict[str, Any], detecting: str | None = None) -> list[dict[str, Any]]:
    """Baselines that the model is better and worse than, by head and by target of a decoder.

    Args:
        detecting: the head that detection reads, if there is one.

    Returns:
        Dicts with `head`, `metric` (the first of the head's), `better_than`, `worse_than` and
        `level_with` (names of baselines, by the interval of their difference; of a decoder and of
        detection by their mean), `worse_than_naive` (one of `NAIVE`, or None), and
        `is_for_detection`, whether the head's forecast serves detection. Detection that was scored
        against labels has one too, `HEAD.alarm`, by VUS-PR.
    """
    found = []
    for name, head in report["heads"].items():
        metric = next(iter(head["scores"][MODEL]))
        intervals = {other: each[metric]["interval"] for other, each in head["difference"].items()}
        found.append(_verdict(name, metric, intervals))
    for verdict in found:
        verdict["is_for_detection"] = verdict["head"] == detecting
    for name, target in report.get("decoder", {}).get("targets", {}).items():
        means = {other: _mean(steps) for other, steps in target["mae"].items()}
        known = {other: mean for other, mean in means.items() if mean is not None}
        if MODEL in known:
            found.append(_verdict(f"decoder.{name}", "mae", _differences(known)))
    baselines = report.get("detection_baselines", {})
    areas = {name: each["vus_pr"] for name, each in baselines.items()}
    areas[MODEL] = report.get("detection", {}).get("vus_pr")
    if baselines and areas[MODEL] is not None:
        found.append(_verdict(f"{detecting}.alarm", "vus_pr", _differences(areas)))
    return found


def verdict_line(verdict: dict[str, Any]) -> str:
    """One verdict as a line."""
    kinds = ("better_than", "level_with", "worse_than")
    parts = [f"{kind.replace('_', ' ')} {_names(verdict[kind])}" for kind in kinds if verdict[kind]]
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
            "with its stream's past in further ways: score them by `carry evaluate --anomalies`"
        )
    return (
        f"{line}{head}. Let the head read the features besides the recurrent layers "
        "(`concatenate` both), or train on more data"
    )


def _verdict(head: str, metric: str, intervals: dict[str, Sequence[float]]) -> dict[str, Any]:
    """The verdict by the intervals of each baseline minus the model."""
    judged = {name: judge_difference(metric, each) for name, each in intervals.items()}
    worse = [name for name, baseline in judged.items() if baseline == "better"]
    return {
        "head": head,
        "metric": metric,
        "better_than": [name for name, baseline in judged.items() if baseline == "worse"],
        "level_with": [name for name, baseline in judged.items() if baseline == "level"],
        "worse_than": worse,
        "worse_than_naive": next((name for name in NAIVE if name in worse), None),
        "is_for_detection": False,
    }


def _differences(values: dict[str, float]) -> dict[str, Sequence[float]]:
    """Each baseline minus the model, where there are only means."""
    own = values[MODEL]
    return {name: (value - own,) * 2 for name, value in values.items() if name != MODEL}


def _mean(steps: list[float | None]) -> float | None:
    present = [step for step in steps if step is not None]
    return float(np.mean(present)) if present else None


def _names(names: list[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


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
