"""Verdict on a scenario: its limits, and the values that they are compared with."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

Limits = dict[str, float]
"""Limit by name: `max_...` or `min_...`."""

DEFAULTS: Limits = {
    "max_error_share": 0.0,
    "max_retry_share": 0.01,
    "max_p95_ms": 250.0,
    "max_p99_ms": 500.0,
    "min_compared_events": 100.0,
}
NAMES = (*DEFAULTS, "min_chunks_per_s", "min_rate_share")


class LoadError(Exception):
    """The load cannot be run; the message is one sentence for the person who started it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One threshold: its limit, the value (None: nothing was measured), and whether it passed."""

    name: str
    limit: float
    value: float | None
    passed: bool

    def __str__(self) -> str:
        value = "nothing measured" if self.value is None else f"{self.value:,.6g}"
        verdict = "passed" if self.passed else "FAILED"
        return f"{self.name:20} {self.limit:>10,.6g}  {verdict}  {value}"


class Threshold(NamedTuple):
    """A limit of the command line: for one scenario or all of them; None disables it."""

    scenario: str
    name: str
    limit: float | None

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """`NAME=VALUE` or `SCENARIO.NAME=VALUE`; the value `none` disables it."""
        left, _, value = text.partition("=")
        scenario, _, name = left.rpartition(".")
        if name not in NAMES:
            raise ArgumentTypeError(f"{text}: expected one of {', '.join(NAMES)}")
        try:
            return cls(scenario, name, None if value == "none" else float(value))
        except ValueError:
            raise ArgumentTypeError(f"{text}: expected a number or none") from None

    def change(self, scenario: str, limits: Limits) -> None:
        """Change the limits of a scenario."""
        if self.scenario in ("", scenario):
            limits.pop(self.name, None)
            if self.limit is not None:
                limits[self.name] = self.limit


def check_limits(limits: Limits, values: Mapping[str, float | None]) -> list[Check]:
    """The result of every threshold; a value that is missing fails."""
    checks = []
    for name, limit in limits.items():
        value = values[name]
        is_max = name.startswith("max_")
        is_right = value is not None and (value <= limit if is_max else value >= limit)
        checks.append(Check(name, limit, value, is_right))
    return checks
