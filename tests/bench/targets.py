"""What the benchmark has to show: each target as data, judged by a figure of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tests.bench.results import Results


@dataclass(frozen=True, slots=True)
class Target:
    """One bound.

    Attributes:
        text: what it says.
        figure: the name of the figure that decides.
        side: whether the figure has to be at least or at most the bound.
    """

    text: str
    figure: str
    side: Literal["at least", "at most"]
    bound: float

    def reached(self, value: float) -> bool:
        """Whether a value satisfies it."""
        return value >= self.bound if self.side == "at least" else value <= self.bound


NOT_MEASURED = "not measured"
FEW, MANY = 1_000, 1_000_000
"""Streams in the store, in the comparison of few and many."""

TARGETS = (
    Target(
        "1. JSON, single chunks, onnxruntime: of the bare FastAPI echo",
        "peak/carry-onnxruntime over fastapi", "at least", 0.8,
    ),
    Target(
        "1. the same: the aim",
        "peak/carry-onnxruntime over fastapi", "at least", 1.0,
    ),
    Target(
        "1. onnxruntime: times the hand-written ONNX service",
        "peak/carry-onnxruntime over competent", "at least", 5,
    ),
    Target(
        "1. onnxruntime: times the naive Keras service",
        "peak/carry-onnxruntime over naive", "at least", 500,
    ),
    Target(
        "1. tensorflow: of the bare FastAPI echo",
        "peak/carry-tensorflow over fastapi", "at least", 0.6,
    ),
    Target(
        "2. MessagePack, 64 streams a request, onnxruntime: of its compute alone",
        "many/carry-onnxruntime over compute", "at least", 0.5,
    ),
    Target(
        "2. the same, tensorflow",
        "many/carry-tensorflow over compute", "at least", 0.5,
    ),
    Target(
        "3. one connection, onnxruntime: p50, times the FastAPI echo's",
        "peak/p50 at 1, carry-onnxruntime over fastapi", "at most", 4,
    ),
    Target(
        "3. open loop at 50 % of the peak: p99, times the unloaded p50",
        "latency/carry-onnxruntime p99 at 50 % over unloaded p50", "at most", 10,
    ),
    Target(
        "3. a stream with chunks of 10,000 events: p99 of the others, times that without it",
        "latency/carry-onnxruntime p99 beside long chunks over without", "at most", 2,
    ),
    Target(
        f"4. {MANY:,} streams without the state cache: of the chunks/s with {FEW:,}",
        f"streams/{MANY} over {FEW}", "at least", 0.9,
    ),
    Target(
        "4. bytes per stream, of 1.25 x the raw state + 200: the largest share",
        "streams/bytes over bound", "at most", 1,
    ),
    Target(
        "5. onnxruntime: seconds to the first correct answer",
        "cold/carry-onnxruntime s", "at most", 2,
    ),
    Target(
        "5. onnxruntime: MiB of a worker under load",
        "peak/carry-onnxruntime MiB", "at most", 150,
    ),
    Target(
        "5. tensorflow: seconds to the first correct answer",
        "cold/carry-tensorflow s", "at most", 12,
    ),
    Target(
        "6. two workers on two cores, 32 connections each: times one with as many",
        "workers/carry-onnxruntime 2 over 1, 64 connections", "at least", 1.0,
    ),
    Target(
        "6. same-stream race of 16 chunks, two workers: chunks lost",
        "workers/carry-onnxruntime lost", "at most", 0,
    ),
    Target(
        "7. events, ragged T of 1 to 64, onnxruntime: of the inputs path",
        "events/carry-onnxruntime events over inputs", "at least", 0.5,
    ),
)  # fmt: skip


def verdicts(results: Results) -> list[tuple[Target, str, str]]:
    """Each target with what was found, and `reached`, `not reached` or `not measured`."""
    found = []
    for target in TARGETS:
        figure = results.figures.get(target.figure)
        if figure is None:
            found.append((target, "-", NOT_MEASURED))
            continue
        shown = f"{figure.value:.3g} ({figure.low:.3g} to {figure.high:.3g})"
        found.append((target, shown, "reached" if target.reached(figure.value) else "not reached"))
    return found


def verdict_table(results: Results) -> str:
    """The targets as text, one a line; of those not measured, how many there are."""
    found = verdicts(results)
    lines = [
        f"{verdict:13} {target.text}: {shown}, {target.side} {target.bound:g}"
        for target, shown, verdict in found
        if verdict != NOT_MEASURED
    ]
    missing = len(found) - len(lines)
    if missing:
        lines.append(f"{NOT_MEASURED:13} {missing} of {len(found)} targets")
    return "\n".join(lines)
