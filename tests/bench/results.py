"""Results of a run: rows of rounds, figures made of them, the targets, and how they are shown.

A row is one server under one load, measured in several rounds; a figure is mostly the ratio of two
rows taken round by round, so that what the machine did meanwhile cancels out. Tables are in
Markdown, for docs/reference/performance.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import orjson
from scipy.stats import sem

from tests.bench.generator import Load
from tests.bench.workloads import FEW, MANY

MIB = 2**20
CPU_STEP_S = 0.01
"""Processor time is counted in steps: in a very short round a server has used less than one."""

MISSED = "not reached"
COLUMNS = {
    "chunks/s": "{:,.0f}",
    "events/s": "{:,.0f}",
    "CPU us/chunk": "{:,.0f}",
    "p50 ms": "{:.2f}",
    "p99 ms": "{:.2f}",
    "p999 ms": "{:.2f}",
    "MiB": "{:,.0f}",
    "gen %": "{:.0%}",
    "store %": "{:.0%}",
}
"""Head and format of each field of a sample. The last two show that the other core has room."""

TARGETS = (
    ("peak/carry-onnxruntime over fastapi", ">=", 0.8),
    ("peak/carry-onnxruntime over fastapi, by CPU", ">=", 0.8),
    # a stretch goal
    ("peak/carry-onnxruntime over fastapi", ">=", 1.0),
    ("peak/carry-onnxruntime over competent", ">=", 5),
    ("peak/carry-tensorflow over fastapi", ">=", 0.6),
    ("single/carry-onnxruntime over fastapi", ">=", 0.9),
    ("many/carry-onnxruntime over compute", ">=", 0.5),
    ("many/carry-tensorflow over compute", ">=", 0.5),
    ("peak/p50 at 1, carry-onnxruntime over fastapi", "<=", 4),
    ("latency/carry-onnxruntime p99 at 50 % over unloaded p50", "<=", 8),
    # where the machine pauses, no server reaches that; then the echo's own
    ("latency/carry-onnxruntime p99 at 50 % over unloaded p50, over the echo's", "<=", 1),
    ("latency/carry-onnxruntime p99 beside long chunks over without", "<=", 2),
    (f"curve-streams/{MANY} over {FEW}, cold", ">=", 0.9),
    ("curve-streams/bytes over bound", "<=", 1),
    ("curve-media/CPU of a chunk, v2 over json", "<=", 0.8),
    ("curve-media/CPU of a chunk, perf over json", "<=", 0.8),
    ("cold/carry-onnxruntime s", "<=", 2),
    ("peak/carry-onnxruntime MiB", "<=", 150),
    ("cold/carry-tensorflow s", "<=", 12),
    ("workers/carry-onnxruntime 2 over 1, 8 connections", ">=", 1.0),
    ("workers/carry-onnxruntime 2 over 1, 32 connections", ">=", 1.3),
    ("workers/carry-onnxruntime 2 over 1, 128 connections", ">=", 1.5),
    ("workers/carry-onnxruntime lost", "<=", 0),
    ("events/carry-onnxruntime events over inputs", ">=", 0.5),
    *((f"backfill/{name}: table over network", ">=", 0.6) for name in ("standard", "flights")),
    *((f"backfill/{name}: table over events", ">=", 10) for name in ("standard", "flights")),
    *((f"peer/http {n}: carry-onnxruntime over peer", ">=", 1.5) for n in (1, 16, 32, 64)),
    *((f"peer/grpc {n}: carry-onnxruntime over its HTTP", ">=", 1.0) for n in (1, 16, 32, 64)),
    ("overload/carry-onnxruntime goodput over peak", ">=", 0.9),
    ("overload/carry-onnxruntime p99 of accepted chunks, s", "<=", 1.0),
    ("overload/carry-onnxruntime rejected share", ">=", 0.1),
    ("consume/carry-onnxruntime 1 over http", ">=", 1.2),
    ("consume/carry-onnxruntime 1 over loop", ">=", 5),
    ("consume/rebalance: a consumer is killed, s", "<=", 5.5),
    ("consume/rebalance: a consumer is added, s", "<=", 1),
    ("overload/carry-onnxruntime memory, last over first", "<=", 1.1),
)
"""Figures and their bounds; docs/reference/performance.md explains them."""

COST_FILE, COST_SLACK, COST_PYTHON = Path(__file__).with_name("cost.jsonl"), 1.05, (3, 13)
"""The committed cost of a chunk, on this version of Python, and the largest share of it allowed."""


class Sample(NamedTuple):
    """One round of one row."""

    chunks_per_s: float
    events_per_s: float
    cpu_us_per_chunk: float  # of the server's processes
    p50_ms: float
    p99_ms: float
    p999_ms: float
    memory_mib: float  # memory of the server's processes, at the end
    generator_cpu: float  # the generator's processor time, as a share of one core
    store_cpu: float  # the store's

    @property
    def server_share(self) -> float:
        """The server's share of the processor time of a chunk; the rest is the generator's and the
        store's."""
        server = self.cpu_us_per_chunk * 1e-6 * self.chunks_per_s
        return server / (server + self.generator_cpu + self.store_cpu)

    @property
    def store_cpu_us_per_chunk(self) -> float:
        """The store's processor time of a chunk."""
        return max(self.store_cpu, CPU_STEP_S) / self.chunks_per_s * 1e6

    @classmethod
    def of(cls, load: Load, cpu_s: float, store_cpu_s: float, memory_bytes: int) -> Sample:
        """From a load and what the processes used meanwhile."""
        return cls(
            load.chunks_per_s,
            load.events / load.seconds,
            max(cpu_s, CPU_STEP_S) / load.chunks * 1e6,
            *(np.percentile(load.latencies_s, (50, 99, 99.9)) * 1000).tolist(),
            memory_bytes / MIB,
            load.cpu_s / load.seconds,
            store_cpu_s / load.seconds,
        )


class Figure(NamedTuple):
    """A number with its spread over the rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (f"{each:,.0f}" if each >= 1000 else f"{each:.4g}" for each in self)
        return f"{value} ({low} to {high})"


@dataclass
class Results:
    """Everything of one run, in the order in which it was measured."""

    about: Mapping[str, str]  # commit, machine and date
    rows: dict[str, list[Sample]] = field(default_factory=dict)  # rounds by `section/load/server`
    figures: dict[str, Figure] = field(default_factory=dict)  # by `section/name`
    notes: list[str] = field(default_factory=list)  # what was left out and why, and remarks

    def figure(self, name: str, values: Sequence[float]) -> None:
        """Keep the median, minimum and maximum of some values."""
        self.figures[name] = Figure(median(values), min(values), max(values))

    def ratio(self, name: str, above: Sequence[Any], below: Sequence[Any], of: str) -> None:
        """Keep the ratio of a field of two rows, round by round."""
        pairs = [
            (getattr(one, of), getattr(other, of)) for one, other in zip(above, below, strict=True)
        ]
        self.figure(name, [one / other for one, other in pairs])

    def compare(self, name: str, ours: Sequence[Any], theirs: Sequence[Any]) -> None:
        """Keep the ratio of our chunks/s to theirs, and the same by CPU time of a chunk."""
        self.ratio(name, ours, theirs, "chunks_per_s")
        # Where others use the machine too, this one suffers less.
        self.ratio(f"{name}, by CPU", theirs, ours, "cpu_us_per_chunk")


def show_section(results: Results, section: str) -> str:
    """A section's rows as medians, and its figures with their spread over the rounds."""
    rows = []
    for name in (name for name in results.rows if name.startswith(f"{section}/")):
        medians = map(median, zip(*results.rows[name], strict=True))
        cells = map(str.format, COLUMNS.values(), medians)
        rows.append([f"`{name.partition('/')[2]}`", *cells])
    figures = [
        [name.partition("/")[2], str(figure)]
        for name, figure in results.figures.items()
        if name.startswith(f"{section}/")
    ]
    tables = (
        write_table(["load/server", *COLUMNS], rows),
        write_table(["figure", "median (over the rounds)"], figures),
    )
    return "\n".join(filter(None, tables))


def check_targets(results: Results) -> list[list[str]]:
    """Each target that was measured: its bound, its figure, and whether it is reached."""
    costs = read_figures(COST_FILE) if sys.version_info[:2] == COST_PYTHON else {}
    bounds = [(name, "<=", COST_SLACK * value) for name, value in costs.items()]
    rows = []
    for name, relation, bound in (*TARGETS, *bounds):
        if (figure := results.figures.get(name)) is not None:
            is_reached = figure.value >= bound if relation == ">=" else figure.value <= bound
            verdict = "reached" if is_reached else MISSED
            rows.append([name, f"{relation} {bound:,.4g}", str(figure), verdict])
    return rows


def write_lines(results: Results, path: Path) -> None:
    """Write the results as lines of JSON: what the run is, then its rows, figures and notes."""
    rows = [{"row": name, **_round(each)} for name, all in results.rows.items() for each in all]
    figures = [{"figure": name, **each._asdict()} for name, each in results.figures.items()]
    lines = [dict(results.about), *rows, *figures, *({"note": note} for note in results.notes)]
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def _round(sample: Sample) -> dict[str, float]:
    """A sample by its fields, in five digits."""
    return {name: float(f"{value:.5g}") for name, value in sample._asdict().items()}


def read_figures(path: Path) -> dict[str, float]:
    """The figures that `write_lines` wrote."""
    lines = map(orjson.loads, path.read_bytes().splitlines())
    return {line["figure"]: line["value"] for line in lines if "figure" in line}


def show(results: Results) -> str:
    """Every table, and the notes."""
    targets = write_table(["target", "bound", "measured", "verdict"], check_targets(results))
    sections = dict.fromkeys(name.partition("/")[0] for name in [*results.rows, *results.figures])
    tables = [f"{section}\n\n{show_section(results, section)}" for section in sections]
    about = "".join(f"- {name}: {text}\n" for name, text in results.about.items())
    notes = "".join(f"- {note}\n" for note in results.notes)
    return "\n".join(filter(None, [about, *tables, targets, notes]))


def write_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, in columns for the terminal; empty without rows."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in (head, rule, *rows)
    ]
    return "".join(f"| {line} |\n" for line in lines) if rows else ""


def geometric_mean(ratios: Sequence[float]) -> tuple[float, float]:
    """The geometric mean of ratios, and its relative standard error (0 of one alone)."""
    logs = np.log(ratios)
    return float(np.exp(logs.mean())), float(sem(logs)) if len(ratios) > 1 else 0.0
