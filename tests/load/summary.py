"""What a run is remembered by: one document, and the same for people.

The commit is that of the checkout the load ran from (CARRY_COMMIT where there is none, as in a
container), the machine is the one that made the load; the service may run elsewhere.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.load.description import Description
from tests.load.measures import Compared, Finding, Measures, spread
from tests.load.scenarios import Scenario

BUSY_GENERATOR_SHARE = 0.8


def document_of(
    scenario: Scenario, measures: Measures, compared: Compared, found: Sequence[Finding]
) -> dict[str, Any]:
    """One scenario's run as plain data."""
    wall_s = measures.wall_s
    return {
        "scenario": scenario.name,
        "passed": passed(measures, found),
        "users": scenario.users,
        "duration_s": scenario.duration_s,
        "delivery": scenario.delivery,
        "chunks_per_s_per_user": scenario.chunks_per_s_per_user,
        "wall_s": wall_s,
        "chunks": measures.answered,
        "chunks_per_s": measures.answered / wall_s,
        "events": measures.events,
        "events_per_s": measures.events / wall_s,
        "streams": measures.streams,
        "errors": measures.errors,
        "skipped": measures.skipped,
        "retries": measures.retries,
        "problems": dict(measures.problems),
        "wrong_answers": dict(measures.faults),
        "examples": measures.examples,
        "crashes": measures.crashes,
        "latency": {kind: spread(values) for kind, values in measures.latencies_ms.items()},
        "service": {part: spread(values) for part, values in measures.parts_ms.items()},
        "compared": asdict(compared),
        "generator_cpu_share": measures.generator_cpu_s / wall_s,
        "thresholds": [finding._asdict() for finding in found],
    }


def passed(measures: Measures, found: Sequence[Finding]) -> bool:
    """Whether every threshold held, and the load test itself did not fail."""
    return not measures.crashes and all(finding.holds for finding in found)


def run_of(url: str, model: Description, seed: int) -> dict[str, Any]:
    """What all scenarios of a run have in common."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "url": url,
        "model": {"name": model.name, "version": model.version, "runtimes": list(model.runtimes)},
        "seed": seed,
    }


def head_lines(run: Mapping[str, Any]) -> Iterator[str]:
    """Where and on what the load runs, for people."""
    model, machine = run["model"], run["machine"]
    yield (
        f"{run['date']}, commit {run['commit']}, {machine['cores']} cores of "
        f"{machine['processor']}, Python {machine['python']}"
    )
    runtimes = ", ".join(model["runtimes"])
    yield f"{run['url']}: model {model['name']} {model['version']} on {runtimes}"


def lines_of(document: Mapping[str, Any]) -> Iterator[str]:
    """One scenario's document, for people."""
    share = document["generator_cpu_share"]
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
        yield f"  {label:16} {_figures(values)}"
    if share > BUSY_GENERATOR_SHARE:
        yield (
            f"  the load generator was busy {share:.0%} of a core: its own waits are in the "
            "latencies, and the service may do more"
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
    for finding in document["thresholds"]:
        yield f"  {_judgement(finding)}"
    yield f"  {'PASSED' if document['passed'] else 'FAILED'}"


def _figures(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "none"
    return " ".join(f"{values[name]:9.2f}" for name in ("p50_ms", "p95_ms", "p99_ms", "max_ms"))


def _judgement(finding: Mapping[str, Any]) -> str:
    found = "nothing to judge" if finding["found"] is None else f"{finding['found']:,.6g}"
    verdict = "holds" if finding["holds"] else "BROKEN"
    return f"{finding['name']:20} {finding['limit']:>10,.6g}  {verdict:6}  {found}"


def _commit() -> str:
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CARRY_COMMIT") or "unknown"
    return head


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
