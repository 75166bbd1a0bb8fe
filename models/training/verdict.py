"""What the scores of a report say: which way is better, and what the model is better than."""

from __future__ import annotations

from typing import Any

import numpy as np

MODEL = "model"
HIGHER_IS_BETTER = frozenset({"auc"})
NAIVE = ("last value", "base rate")
"""Baselines that need no model: one that is worse than them is of no use."""


def direction(metric: str) -> str:
    """A metric with the direction in which it is better."""
    return f"{metric} ({'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better)"


def verdicts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """By head, and by target of a decoder, what the model is better and worse than.

    Returns:
        Dicts with `head`, `metric` (the first of the head's), `better_than` and `worse_than`
        (names of baselines, by their mean), and `worse_than_naive` (one of `NAIVE`, or None).
    """
    found = [
        _verdict(name, metric, {other: each[metric]["value"] for other, each in scores.items()})
        for name, head in report["heads"].items()
        for scores in (head["scores"],)
        for metric in (next(iter(scores[MODEL])),)
    ]
    for name, target in report.get("decoder", {}).get("targets", {}).items():
        means = {other: _mean(steps) for other, steps in target["mae"].items()}
        known = {other: mean for other, mean in means.items() if mean is not None}
        if MODEL in known:
            found.append(_verdict(f"decoder.{name}", "mae", known))
    return found


def verdict_line(verdict: dict[str, Any]) -> str:
    """One verdict as a line."""
    parts = []
    if verdict["better_than"]:
        parts.append(f"better than {_names(verdict['better_than'])}")
    if verdict["worse_than"]:
        parts.append(f"worse than {_names(verdict['worse_than'])}")
    line = f"{verdict['head']}: {'; '.join(parts) or 'no baseline to compare with'}"
    line += f", by {direction(verdict['metric'])}"
    if verdict["worse_than_naive"] is None:
        return line
    return (
        f"{line}. This model is worse than the {verdict['worse_than_naive']}: do not serve it for "
        f"{verdict['head']}. Let the head read the features besides the recurrent layers "
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
    }


def _mean(steps: list[float | None]) -> float | None:
    present = [step for step in steps if step is not None]
    return float(np.mean(present)) if present else None


def _names(names: list[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
