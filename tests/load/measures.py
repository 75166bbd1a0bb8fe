"""What a scenario's run counted and measured, and whether the thresholds hold.

Latency is from the first attempt to the answer, retries and waits between them included. Where
a chunk's time went in the service comes from the Server-Timing header of its reply, each part
apart; `rest` is what remains of the last attempt: HTTP on both sides, the network and the
generator itself.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from tests.load.scenarios import Scenario, Thresholds
from tests.load.streams import Fault

PARTS = ("queue", "load", "infer", "commit")
EXAMPLES_PER_CODE, EXAMPLE_CHARS = 3, 500
PERCENTS = (50, 95, 99)


def _parts() -> dict[str, array[float]]:
    return {part: array("d") for part in (*PARTS, "rest")}


@dataclass(slots=True)
class Measures:
    """One run of one scenario; one greenlet at a time.

    Attributes:
        wall_s: from the first chunk to the last answer.
        generator_cpu_s: processor time of this process meanwhile.
        latencies_ms: of answered chunks, by kind.
        parts_ms: of answered chunks, by part of the service.
        events: of answered chunks.
        answered, errors: chunks that were answered, or refused or given up.
        retries: attempts that had to be made again.
        skipped: chunks that were applied, while their outputs were gone.
        problems: everything else than a reply, by code.
        faults: wrong answers, by code.
        examples: the first few errors and faults, by code.
        crashes: failures of the load test itself.
    """

    kinds: Sequence[str]
    wall_s: float = 0.0
    generator_cpu_s: float = 0.0
    latencies_ms: dict[str, array[float]] = field(default_factory=dict)
    parts_ms: dict[str, array[float]] = field(default_factory=_parts)
    events: int = 0
    answered: int = 0
    errors: int = 0
    retries: int = 0
    skipped: int = 0
    streams: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    crashes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.latencies_ms = {kind: array("d") for kind in self.kinds}

    @property
    def chunks(self) -> int:
        """Chunks that were settled in one way or another."""
        return self.answered + self.errors + self.skipped

    def answer(
        self, kind: int, steps: int, latency_s: float, attempt_s: float, timing: str | None
    ) -> None:
        """A chunk was answered rightly."""
        self.answered += 1
        self.events += steps
        self.latencies_ms[self.kinds[kind]].append(latency_s * 1000)
        durations = server_timing_ms(timing)
        if len(durations) == len(PARTS):
            for part in PARTS:
                self.parts_ms[part].append(durations[part])
            self.parts_ms["rest"].append(attempt_s * 1000 - sum(durations.values()))

    def error(self, code: str, detail: str) -> None:
        """A chunk was refused or given up."""
        self.errors += 1
        self._show(code, detail)

    def fault(self, fault: Fault) -> None:
        """An answer was wrong."""
        self.faults[fault.code] += 1
        self._show(fault.code, fault.detail)

    def _show(self, code: str, detail: str) -> None:
        shown = self.examples.setdefault(code, [])
        if len(shown) < EXAMPLES_PER_CODE:
            shown.append(detail[:EXAMPLE_CHARS])


def server_timing_ms(header: str | None) -> dict[str, float]:
    """The known parts of a Server-Timing header, in milliseconds; what is unknown is left out."""
    found = {}
    for entry in (header or "").split(","):
        name, _, duration = entry.strip().partition(";dur=")
        if name in PARTS and duration:
            found[name] = float(duration)
    return found


@dataclass(frozen=True, slots=True)
class Compared:
    """Outputs against a second computation of the same events.

    Attributes:
        how: what computed them.
        excess: the largest |a-b| - 1e-5 |b|; at most 1e-5 is right.
    """

    how: str
    streams: int = 0
    events: int = 0
    excess: float = 0.0


class Finding(NamedTuple):
    """One threshold: the limit, what was found (None: nothing to judge), and whether it holds."""

    name: str
    limit: float
    found: float | None
    holds: bool


def findings(scenario: Scenario, measures: Measures, compared: Compared) -> list[Finding]:
    """Every threshold that is asked, judged; one without anything to judge does not hold."""
    latencies = measures.latencies_ms[scenario.kinds[0].name]
    asked = scenario.asked_chunks
    found: Mapping[str, float | None] = {
        "max_error_share": _share(measures.errors, measures.chunks),
        "max_retry_share": _share(measures.retries, measures.chunks),
        "max_p95_ms": percentile(latencies, 95),
        "max_p99_ms": percentile(latencies, 99),
        "min_chunks_per_s": _share(measures.answered, measures.wall_s),
        "min_rate_share": None if asked is None else measures.answered / asked,
        "min_compared_events": compared.events,
    }
    return [
        Finding("max_wrong_answers", 0, wrong := measures.faults.total(), wrong == 0),
        *(_finding(name, limit, found[name]) for name, limit in _asked(scenario.thresholds)),
    ]


def _asked(thresholds: Thresholds) -> Iterator[tuple[str, float]]:
    for each in fields(thresholds):
        limit = getattr(thresholds, each.name)
        if limit is not None:
            yield each.name, limit


def _finding(name: str, limit: float, found: float | None) -> Finding:
    if found is None:
        return Finding(name, limit, None, False)
    return Finding(
        name, limit, found, found <= limit if name.startswith("max_") else found >= limit
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """A percentile; None of nothing."""
    return float(np.percentile(values, percent)) if len(values) else None


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, percentiles and maximum of milliseconds; None of nothing."""
    if not len(values):
        return None
    return {
        "count": len(values),
        "mean_ms": float(np.mean(values)),
        **{f"p{percent}_ms": percentile(values, percent) for percent in PERCENTS},
        "max_ms": max(values),
    }
