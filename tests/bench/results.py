"""Results of a run: rows of rounds, figures made of them, targets, and their JSON lines.

A row is one server under one load, measured in several rounds; a figure is a number that the
page of performance shows, mostly the ratio of two rows taken round by round, so that what the
machine did meanwhile cancels out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.bench.generator import Load

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one row.

    Attributes:
        cpu_us_per_chunk: processor time of the server's processes.
        rss_mib: memory of the server's processes, at the end.
        generator_cpu: the generator's processor time, as a share of one core.
        store_cpu: the store's.
    """

    chunks_per_s: float
    events_per_s: float
    cpu_us_per_chunk: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    rss_mib: float
    generator_cpu: float
    store_cpu: float

    @classmethod
    def of(cls, load: Load, cpu_s: float, store_cpu_s: float, rss_bytes: int) -> Sample:
        """From a load and what the processes used meanwhile."""
        return cls(
            load.chunks_per_s,
            load.events / load.seconds,
            cpu_s / load.chunks * 1e6,
            *(load.percentile_ms(percent) for percent in (50, 99, 99.9)),
            rss_bytes / MIB,
            load.cpu_s / load.seconds,
            store_cpu_s / load.seconds,
        )


class Figure(NamedTuple):
    """A number with its spread over the rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass
class Results:
    """Everything of one run, in the order in which it was measured.

    Attributes:
        about: commit, machine and date; part of every line.
        rows: the rounds by `section/load/server`.
        notes: what was left out and why, and remarks.
    """

    about: Mapping[str, str]
    rows: dict[str, list[Sample]] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, row: str, sample: Sample) -> None:
        """Add a round to a row."""
        self.rows.setdefault(row, []).append(sample)

    def values(self, row: str, name: str) -> list[float]:
        """One field of a row, round by round."""
        return [getattr(sample, name) for sample in self.rows[row]]

    def median(self, row: str, name: str) -> float:
        """The median of a field over the rounds."""
        return median(self.values(row, name))

    def figure(self, name: str, values: Sequence[float]) -> None:
        """Keep the median, minimum and maximum of some values."""
        self.figures[name] = Figure(median(values), min(values), max(values))

    def ratios(self, name: str, above: Sequence[float], below: Sequence[float]) -> None:
        """Keep the ratio of two series, round by round."""
        self.figure(name, [one / other for one, other in zip(above, below, strict=True)])

    def ratio(self, name: str, above: str, below: str, of: str = "chunks_per_s") -> None:
        """Keep the ratio of two rows, where both were measured."""
        if above in self.rows and below in self.rows:
            self.ratios(name, self.values(above, of), self.values(below, of))

    def lines(self) -> list[dict[str, Any]]:
        """Rows, figures and notes as plain data."""
        lines: list[dict[str, Any]] = [
            {
                "kind": "row",
                "name": name,
                **{of.name: self.median(name, of.name) for of in fields(Sample)},
                "rounds": [asdict(sample) for sample in samples],
            }
            for name, samples in self.rows.items()
        ]
        lines += [
            {"kind": "figure", "name": name, **figure._asdict()}
            for name, figure in self.figures.items()
        ]
        lines += [{"kind": "note", "name": note} for note in self.notes]
        return [{**line, **self.about} for line in lines]

    def write(self, file: Path) -> None:
        """Append the lines to a file of JSON lines."""
        with file.open("a") as output:
            output.writelines(json.dumps(line) + "\n" for line in self.lines())


def read_results(file: Path) -> Results:
    """The results of the last commit and machine in a file of JSON lines.

    Sections may be run one after another into one file: lines of the same commit and machine are
    joined, and a later line of a name replaces an earlier one. The date is that of the last.

    Raises:
        ValueError: there is no line.
    """
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    if not lines:
        raise ValueError(f"{file}: expected lines of a run, got none")
    results = Results({name: lines[-1][name] for name in ("commit", "machine", "date")})
    for line in lines:
        if any(line[name] != lines[-1][name] for name in ("commit", "machine")):
            continue
        name = line["name"]
        if line["kind"] == "row":
            results.rows[name] = [Sample(**sample) for sample in line["rounds"]]
        elif line["kind"] == "figure":
            results.figures[name] = Figure(*(line[part] for part in Figure._fields))
        elif name not in results.notes:
            results.notes.append(name)
    return results


COLUMNS = (
    ("chunks/s", "chunks_per_s", "{:,.0f}"),
    ("events/s", "events_per_s", "{:,.0f}"),
    ("CPU us/chunk", "cpu_us_per_chunk", "{:,.0f}"),
    ("p50 ms", "p50_ms", "{:.2f}"),
    ("p99 ms", "p99_ms", "{:.2f}"),
    ("p999 ms", "p999_ms", "{:.2f}"),
    ("MiB", "rss_mib", "{:,.0f}"),
    ("gen %", "generator_cpu", "{:.0%}"),
    ("store %", "store_cpu", "{:.0%}"),
)
"""The table's columns: head, field, format. The last two show that the other core has room."""


def format_row(results: Results, row: str, columns: int = len(COLUMNS)) -> list[str]:
    """A row's medians as tables show them."""
    return [form.format(results.median(row, name)) for _, name, form in COLUMNS[:columns]]


def format_table(results: Results) -> str:
    """All rows, then the figures with their spread, the targets and the notes."""
    width = max((len(name) for name in [*results.rows, *results.figures]), default=20) + 2
    rows = [" " * width + "".join(f"{head:>14}" for head, _, _ in COLUMNS)]
    for row in results.rows:
        cells = "".join(f"{cell:>14}" for cell in format_row(results, row))
        rows.append(row.ljust(width) + cells)
    blocks = [
        rows,
        [f"{name.ljust(width)}{figure}" for name, figure in results.figures.items()],
        [
            f"{word:13} {target.text}: {shown}, {target.limit}"
            for target, shown, word in verdicts(results)
            if word != NOT_MEASURED
        ],
        [f"note: {note}" for note in results.notes],
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


class Target(NamedTuple):
    """A bound on a figure: `at least`, or else at most."""

    text: str
    figure: str
    bound: float
    at_least: bool = False

    @property
    def limit(self) -> str:
        """The bound as text."""
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"


NOT_MEASURED = "not measured"
FEW, MANY = 1_000, 1_000_000
"""Streams in the store, in the comparison of few and many."""

TARGETS = (
    Target("1. JSON, single chunks, onnxruntime: of the bare FastAPI echo",
           "peak/carry-onnxruntime over fastapi", 0.8, at_least=True),
    Target("1. the same: the aim", "peak/carry-onnxruntime over fastapi", 1.0, at_least=True),
    Target("1. onnxruntime: times the hand-written ONNX service",
           "peak/carry-onnxruntime over competent", 5, at_least=True),
    Target("1. onnxruntime: times the naive Keras service",
           "peak/carry-onnxruntime over naive", 500, at_least=True),
    Target("1. tensorflow: of the bare FastAPI echo",
           "peak/carry-tensorflow over fastapi", 0.6, at_least=True),
    Target("2. MessagePack, 64 streams a request, onnxruntime: of its compute alone",
           "many/carry-onnxruntime over compute", 0.5, at_least=True),
    Target("2. the same, tensorflow", "many/carry-tensorflow over compute", 0.5, at_least=True),
    Target("3. one connection, onnxruntime: p50, times the FastAPI echo's",
           "peak/p50 at 1, carry-onnxruntime over fastapi", 4),
    Target("3. open loop at 50 % of the peak: p99, times the unloaded p50",
           "latency/carry-onnxruntime p99 at 50 % over unloaded p50", 10),
    Target("3. a stream with chunks of 10,000 events: p99 of the others, times that without it",
           "latency/carry-onnxruntime p99 beside long chunks over without", 2),
    Target(f"4. {MANY:,} streams without the state cache: of the chunks/s with {FEW:,}",
           f"streams/{MANY} over {FEW}", 0.9, at_least=True),
    Target("4. bytes per stream, of 1.25 x the raw state + 200: the largest share",
           "streams/bytes over bound", 1),
    Target("5. onnxruntime: seconds to the first correct answer", "cold/carry-onnxruntime s", 2),
    Target("5. onnxruntime: MiB of a worker under load", "peak/carry-onnxruntime MiB", 150),
    Target("5. tensorflow: seconds to the first correct answer", "cold/carry-tensorflow s", 12),
    Target("6. two workers on two cores, 32 connections each: times one with as many",
           "workers/carry-onnxruntime 2 over 1, 64 connections", 1.0, at_least=True),
    Target("6. same-stream race of 16 chunks, two workers: chunks lost",
           "workers/carry-onnxruntime lost", 0),
    Target("7. events, ragged T of 1 to 64, onnxruntime: of the inputs path",
           "events/carry-onnxruntime events over inputs", 0.5, at_least=True),
)  # fmt: skip


def verdicts(results: Results) -> list[tuple[Target, str, str]]:
    """Each target with its figure, and `reached`, `not reached` or `not measured`."""
    words = []
    for target in TARGETS:
        figure = results.figures.get(target.figure)
        if figure is None:
            words.append((target, "-", NOT_MEASURED))
            continue
        value, bound = figure.value, target.bound
        is_reached = value >= bound if target.at_least else value <= bound
        words.append((target, str(figure), "reached" if is_reached else "not reached"))
    return words
