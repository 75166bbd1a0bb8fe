"""Verdict on a scenario: its limits, and the values that they are compared with."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import NamedTuple

Limits = dict[str, float | None]  # limit by name: `max_...` or `min_...`; None disables it
DEFAULTS: Limits = {
    "max_error_share": 0.0,
    "max_retry_share": 0.01,
    "max_p95_ms": 250.0,
    "max_p99_ms": 500.0,
    "min_compared_events": 100.0,
}
NAMES = (*DEFAULTS, "min_chunks_per_s", "min_rate_share")


class Check(NamedTuple):
    """One threshold: its limit, the value (None: nothing was measured), and whether it passed."""

    name: str
    limit: float
    value: float | None
    passed: bool

    def __str__(self) -> str:
        value = "nothing measured" if self.value is None else f"{self.value:,.6g}"
        verdict = "passed" if self.passed else "FAILED"
        return f"{self.name:20} {self.limit:>10,.6g}  {verdict}  {value}"


def parse_threshold(text: str) -> tuple[str, str, float | None]:
    """Scenario (empty for all), name and limit of `NAME=VALUE` or `SCENARIO.NAME=VALUE`; the value
    `none` disables it."""
    left, _, value = text.partition("=")
    scenario, _, name = left.rpartition(".")
    if name not in NAMES:
        raise ArgumentTypeError(f"{text}: expected one of {', '.join(NAMES)}")
    try:
        return scenario, name, None if value == "none" else float(value)
    except ValueError:
        raise ArgumentTypeError(f"{text}: expected a number or none") from None


def check_limits(limits: Limits, values: Mapping[str, float | None]) -> list[Check]:
    """The result of every threshold; a value that is missing fails."""
    checks = []
    for name, limit in limits.items():
        value = values[name]
        if limit is not None:
            is_right = value is not None and (
                value <= limit if name[:3] == "max" else value >= limit
            )
            checks.append(Check(name, limit, value, is_right))
    return checks
