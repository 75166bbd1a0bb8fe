"""Results of a scenario: counts, latencies, thresholds, and their summary.

Latency is from the first attempt to the answer, with retries and the waits between them. Where a
chunk's time went in the service comes from the Server-Timing header of its reply; `rest` is what
remains of the last attempt: HTTP on both sides, the network and the generator itself.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from tests.load.feeds import Chunk
from tests.load.scenarios import Scenario
from tests.load.stream import Fault

STAGES = ("queue", "load", "infer", "commit")
EXAMPLES_PER_CODE, EXAMPLE_CHARS = 3, 500
BUSY_GENERATOR_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Compared:
    """Outputs compared with a second computation of the same events.

    Attributes:
        how: what computed them.
        excess: the largest |a-b| - 1e-5 |b|; correct up to 1e-5.
    """

    how: str
    streams: int = 0
    events: int = 0
    excess: float = 0.0


class Check(NamedTuple):
    """One threshold: its limit, the value (None: nothing was measured), and whether it passed."""

    name: str
    limit: float
    value: float | None
    passed: bool


@dataclass(slots=True)
class Results:
    """Results of one scenario.

    Attributes:
        wall_s: from the first chunk to the last answer.
        generator_cpu_s: processor time of this process meanwhile.
        latencies_ms: of answered chunks, by kind.
        stages_ms: of answered chunks, by stage of the service.
        answered, errors: chunks that were answered; rejected, abandoned or answered wrongly.
        skipped: chunks that were applied, and whose reply was no longer stored.
        problems: every other answer, by code.
        faults: wrong answers, by code.
        examples: the first errors and faults, by code.
        crashes: failures of the load test itself.
    """

    scenario: Scenario
    wall_s: float = 0.0
    generator_cpu_s: float = 0.0
    latencies_ms: dict[str, array[float]] = field(default_factory=dict)
    stages_ms: dict[str, array[float]] = field(default_factory=dict)
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
        self.latencies_ms = {kind.name: array("d") for kind in self.scenario.kinds}
        self.stages_ms = {stage: array("d") for stage in (*STAGES, "rest")}

    @property
    def chunks(self) -> int:
        """Chunks that were answered, skipped or given up."""
        return self.answered + self.errors + self.skipped

    def add_answer(
        self, chunk: Chunk, latency_s: float, attempt_s: float, timing: str | None
    ) -> None:
        """Count a correct answer."""
        self.answered += 1
        self.events += chunk.steps
        self.latencies_ms[self.scenario.kinds[chunk.kind].name].append(latency_s * 1000)
        durations = read_server_timing_ms(timing)
        if len(durations) == len(STAGES):
            durations["rest"] = attempt_s * 1000 - sum(durations.values())
            for stage, duration in durations.items():
                self.stages_ms[stage].append(duration)

    def add_error(self, code: str, detail: str) -> None:
        """Count a chunk that was rejected or abandoned."""
        self.errors += 1
        self._add_example(code, detail)

    def add_fault(self, fault: Fault) -> None:
        """Count a wrong answer."""
        self.faults[fault.code] += 1
        self._add_example(fault.code, fault.detail)

    def _add_example(self, code: str, detail: str) -> None:
        examples = self.examples.setdefault(code, [])
        if len(examples) < EXAMPLES_PER_CODE:
            examples.append(detail[:EXAMPLE_CHARS])

    def check(self, compared: Compared) -> list[Check]:
        """The result of every threshold; one without a measured value fails."""
        scheduled = self.scenario.scheduled_chunks
        latencies = self.latencies_ms[self.scenario.kinds[0].name]
        values: Mapping[str, float | None] = {
            "max_error_share": _ratio(self.errors, self.chunks),
            "max_retry_share": _ratio(self.retries, self.chunks),
            "max_p95_ms": _percentile(latencies, 95),
            "max_p99_ms": _percentile(latencies, 99),
            "min_chunks_per_s": _ratio(self.answered, self.wall_s),
            "min_rate_share": None if scheduled is None else self.answered / scheduled,
            "min_compared_events": compared.events,
        }
        wrong = self.faults.total()
        checks = [Check("max_wrong_answers", 0, wrong, wrong == 0)]
        for name in (each.name for each in fields(self.scenario.thresholds)):
            limit, value = getattr(self.scenario.thresholds, name), values[name]
            if limit is not None:
                passed = value is not None and (
                    value <= limit if name.startswith("max_") else value >= limit
                )
                checks.append(Check(name, limit, value, passed))
        return checks

    def as_document(self, compared: Compared) -> dict[str, Any]:
        """Everything as plain data."""
        checks = self.check(compared)
        scenario = self.scenario
        return {
            "scenario": scenario.name,
            "passed": not self.crashes and all(check.passed for check in checks),
            "users": scenario.users,
            "duration_s": scenario.duration_s,
            "delivery": "appends" if scenario.appends else "positions",
            "chunks_per_s_per_user": scenario.chunks_per_s_per_user,
            "wall_s": self.wall_s,
            "chunks": self.answered,
            "chunks_per_s": self.answered / self.wall_s,
            "events": self.events,
            "events_per_s": self.events / self.wall_s,
            "streams": self.streams,
            "errors": self.errors,
            "skipped": self.skipped,
            "retries": self.retries,
            "problems": dict(self.problems),
            "wrong_answers": dict(self.faults),
            "examples": self.examples,
            "crashes": self.crashes,
            "latency": {kind: _spread(values) for kind, values in self.latencies_ms.items()},
            "service": {stage: _spread(values) for stage, values in self.stages_ms.items()},
            "compared": asdict(compared),
            "generator_cpu_share": self.generator_cpu_s / self.wall_s,
            "thresholds": [check._asdict() for check in checks],
        }


def describe(document: Mapping[str, Any]) -> Iterator[str]:
    """A scenario's document in lines of text."""
    yield (
        f"{document['scenario']}: {document['users']} users, {document['streams']:,} streams, "
        f"{document['wall_s']:.1f} s"
    )
    yield (
        f"  {document['chunks']:,} chunks, {document['chunks_per_s']:,.0f}/s; "
        f"{document['events']:,} events, {document['events_per_s']:,.0f}/s; "
        f"errors {document['errors']:,}, retries {document['retries']:,}"
    )
    yield f"  {'ms':16} {'p50':>9} {'p95':>9} {'p99':>9} {'max':>9}"
    for name, values in (*document["latency"].items(), *document["service"].items()):
        label = f"latency {name}" if name in document["latency"] else f"  {name}"
        columns = ("p50_ms", "p95_ms", "p99_ms", "max_ms")
        figures = " ".join(f"{values[each]:9.2f}" for each in columns) if values else "none"
        yield f"  {label:16} {figures}"
    if document["generator_cpu_share"] > BUSY_GENERATOR_SHARE:
        yield (
            f"  the load generator used {document['generator_cpu_share']:.0%} of a core: its own "
            "waits are in the latencies, and the service may do more"
        )
    compared = document["compared"]
    yield (
        f"  compared {compared['events']:,} events of {compared['streams']} streams by "
        f"{compared['how']}: |a-b| - 1e-5|b| at most {compared['excess']:.1e}"
    )
    for code, count in {**document["problems"], **document["wrong_answers"]}.items():
        yield f"  {code}: {count:,}"
        yield from (f"    {example}" for example in document["examples"].get(code, ()))
    yield from (f"  the load test failed: {crash}" for crash in document["crashes"])
    for check in document["thresholds"]:
        value = "nothing measured" if check["value"] is None else f"{check['value']:,.6g}"
        verdict = "passed" if check["passed"] else "FAILED"
        yield f"  {check['name']:20} {check['limit']:>10,.6g}  {verdict:6}  {value}"
    yield f"  {'PASSED' if document['passed'] else 'FAILED'}"


def read_server_timing_ms(header: str | None) -> dict[str, float]:
    """The service's stages in a Server-Timing header, in milliseconds."""
    entries = (entry.strip().partition(";dur=") for entry in (header or "").split(","))
    return {name: float(duration) for name, _, duration in entries if name in STAGES and duration}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if len(values) else None


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    if not len(values):
        return None
    percentiles = {f"p{percent}_ms": _percentile(values, percent) for percent in (50, 95, 99)}
    mean_ms = float(np.mean(values))
    return {"count": len(values), "mean_ms": mean_ms, **percentiles, "max_ms": max(values)}
