"""Verdicts of a report: which baselines a model beats, and whether it is to be served."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.training.scores import MODEL

HIGHER_IS_BETTER = frozenset({"auc", "vus_pr"})
NAIVE = ("last value", "base rate", "random")
"""Baselines without a model: a network that is worse than one of them is not to be served."""


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
            "with its stream's past in further ways: score them by `carry evaluate --anomalies`"
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
