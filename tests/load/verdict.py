"""Verdict on a scenario: limits, the values that they are compared with, and how both are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Limits = dict[str, float]
"""Limit by name: `max_...` or `min_...`."""

NAMES = (
    *("max_error_share", "max_retry_share", "max_p95_ms", "max_p99_ms"),
    *("min_chunks_per_s", "min_rate_share", "min_compared_events"),
)
STAGES = ("queue", "load", "infer", "commit")
DEFAULTS: Limits = {
    "max_error_share": 0.0,
    "max_retry_share": 0.01,
    "max_p95_ms": 250.0,
    "max_p99_ms": 500.0,
    "min_compared_events": 100.0,
}


def read_server_timing_ms(header: str | None) -> dict[str, float]:
    """The service's stages in a Server-Timing header, in milliseconds; empty unless it has all."""
    entries = (entry.strip().partition(";dur=") for entry in (header or "").split(","))
    stages = {name: float(ms) for name, _, ms in entries if name in STAGES and ms}
    return stages if len(stages) == len(STAGES) else {}


class LoadError(Exception):
    """The load cannot be run; the message is one sentence for the person who started it."""


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
    """The result of every threshold; a value that is missing fails."""
    checks = []
    for name, limit in limits.items():
        value = values[name]
        is_above = value is not None and value > limit
        is_below = value is not None and value < limit
        is_wrong = is_above if name.startswith("max_") else is_below
        checks.append(Check(name, limit, value, value is not None and not is_wrong))
    return checks


def format_scenario(document: Mapping[str, Any], checks: Sequence[Check]) -> str:
    """What the load sent, the first failures, and the thresholds."""
    compared = document["compared"]
    lines = [
        f"{document['scenario']}: {document['chunks']:,} chunks of {document['streams']:,} "
        f"streams; compared {compared['events']:,} events of {compared['streams']} by "
        f"{compared['how']}: |a-b| - 1e-5|b| at most {compared['excess']:.1e}"
    ]
    for code, examples in document["examples"].items():
        lines += [f"  {code}: {example}" for example in examples]
    return "\n".join([*lines, *(f"  {check}" for check in checks)])
