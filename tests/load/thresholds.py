"""Thresholds of a scenario: their defaults, options, and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.load.target import LoadError

Limits = dict[str, float]
"""Limit by name: `max_...` or `min_...`."""

NAMES = (
    *("max_error_share", "max_retry_share", "max_p95_ms", "max_p99_ms"),
    *("min_chunks_per_s", "min_rate_share", "min_compared_events"),
)
DEFAULTS: Limits = {
    "max_error_share": 0.0,
    "max_retry_share": 0.01,
    "max_p95_ms": 250.0,
    "max_p99_ms": 500.0,
    "min_compared_events": 100.0,
}


class Check(NamedTuple):
    """One threshold: its limit, the value (None: nothing was measured), and whether it passed."""

    name: str
    limit: float
    value: float | None
    passed: bool


def change_limits(scenario: str, limits: Limits, texts: Sequence[str]) -> Limits:
    """The limits of a scenario with those of the command line.

    Args:
        texts: `NAME=VALUE` for every scenario, or `SCENARIO.NAME=VALUE` for one; the value `none`
            disables it.

    Raises:
        LoadError: no such threshold, or a value that is no number.
    """
    changed = dict(limits)
    for text in texts:
        left, _, value = text.partition("=")
        where, dot, name = left.rpartition(".")
        if name not in NAMES:
            raise LoadError(f"--threshold {text}: expected one of {', '.join(NAMES)}")
        try:
            limit = float("nan") if value == "none" else float(value)
        except ValueError as error:
            raise LoadError(f"--threshold {text}: expected a number or none") from error
        if not dot or where == scenario:
            changed[name] = limit
    return {name: limit for name, limit in changed.items() if limit == limit}


def check_limits(limits: Limits, values: Mapping[str, float | None]) -> list[Check]:
    """The result of every threshold; wrong answers are never allowed, nor a missing value."""
    checks = []
    for name, limit in {"max_wrong_answers": 0.0, **limits}.items():
        value = values[name]
        passed = value is not None and (
            value <= limit if name.startswith("max_") else value >= limit
        )
        checks.append(Check(name, limit, value, passed))
    return checks
