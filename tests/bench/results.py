"""What a run found: rows of rounds, figures made of them, and the lines they are written as.

A row is one server under one load, measured in several rounds; a figure is a number that the
issue of speed asks for, mostly the ratio of two rows taken round by round, so that what the
machine did meanwhile falls out of it. Both are kept as JSON lines: `Row.line`, `Figure.line`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

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
            load.percentile_ms(50),
            load.percentile_ms(99),
            load.percentile_ms(99.9),
            rss_bytes / MIB,
            load.cpu_s / load.seconds,
            store_cpu_s / load.seconds,
        )


FIELDS = tuple(Sample.__dataclass_fields__)


@dataclass
class Row:
    """One server under one load.

    Attributes:
        name: `section/load/server`.
    """

    name: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def section(self) -> str:
        """The first part of the name."""
        return self.name.partition("/")[0]

    def values(self, of: str) -> list[float]:
        """One field, round by round."""
        return [getattr(sample, of) for sample in self.samples]

    def median(self, of: str) -> float:
        """The median of a field over the rounds."""
        return median(self.values(of))

    def line(self) -> dict[str, Any]:
        """The row as plain data: its medians, and every round."""
        return {
            "kind": "row",
            "name": self.name,
            **{name: self.median(name) for name in FIELDS},
            "rounds": [asdict(sample) for sample in self.samples],
        }


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its spread over the rounds."""

    name: str
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, name: str, values: Sequence[float]) -> Figure:
        """The median, least and largest of some values."""
        return cls(name, median(values), min(values), max(values))

    def line(self) -> dict[str, Any]:
        """The figure as plain data."""
        return {"kind": "figure", **asdict(self)}


@dataclass
class Results:
    """Everything of one run, in the order in which it was found.

    Attributes:
        about: commit, machine and date; stands in every line.
        notes: what was left out and why, and remarks, by section.
    """

    about: Mapping[str, str]
    rows: dict[str, Row] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, sample: Sample) -> None:
        """One more round of a row."""
        self.rows.setdefault(name, Row(name)).samples.append(sample)

    def figure(self, name: str, values: Sequence[float]) -> None:
        """Keep a figure."""
        self.figures[name] = Figure.of(name, values)

    def ratio(self, name: str, above: str, below: str, of: str = "chunks_per_s") -> None:
        """Keep the ratio of two rows, round by round, where both were measured."""
        if above in self.rows and below in self.rows:
            pairs = zip(self.rows[above].values(of), self.rows[below].values(of), strict=True)
            self.figure(name, [one / other for one, other in pairs])

    def lines(self) -> list[dict[str, Any]]:
        """Rows, figures and notes as plain data."""
        found = [row.line() for row in self.rows.values()]
        found += [figure.line() for figure in self.figures.values()]
        found += [{"kind": "note", "name": note} for note in self.notes]
        return [{**line, **self.about} for line in found]

    def write(self, file: Path) -> None:
        """Append the lines to a file of JSON lines."""
        with file.open("a") as output:
            for line in self.lines():
                output.write(json.dumps(line) + "\n")


def read_results(file: Path) -> Results:
    """What a file of JSON lines says of its last commit and machine.

    A run of all sections takes most of an hour, so it may be made of several: those of the same
    commit on the same machine are joined, and a later line of a name stands for an earlier one.
    The date is that of the last.

    Raises:
        ValueError: there is no line.
    """
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    if not lines:
        raise ValueError(f"{file}: expected lines of a run, got none")
    results = Results({name: lines[-1][name] for name in ("commit", "machine", "date")})
    same = {name: lines[-1][name] for name in ("commit", "machine")}
    for line in lines:
        if {name: line[name] for name in same} != same:
            continue
        match line["kind"]:
            case "row":
                samples = [Sample(**sample) for sample in line["rounds"]]
                results.rows[line["name"]] = Row(line["name"], samples)
            case "figure":
                values = (line[name] for name in ("name", "value", "low", "high"))
                results.figures[line["name"]] = Figure(*values)
            case "note" if line["name"] not in results.notes:
                results.notes.append(line["name"])
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


def cells(row: Row) -> list[str]:
    """A row's medians as the table shows them."""
    return [form.format(row.median(name)) for _, name, form in COLUMNS]


def table(results: Results) -> str:
    """The whole table as text, then the figures with their spread, then the notes."""
    wide = max((len(name) for name in [*results.rows, *results.figures]), default=20) + 2
    out = [" " * wide + "".join(f"{head:>14}" for head, _, _ in COLUMNS)]
    section = ""
    for row in results.rows.values():
        if row.section != section:
            section = row.section
            out.append("")
        out.append(row.name.ljust(wide) + "".join(f"{cell:>14}" for cell in cells(row)))
    out.append("")
    out += [
        f"{figure.name.ljust(wide)}{figure.value:>12.4g}   ({figure.low:.4g} to {figure.high:.4g})"
        for figure in results.figures.values()
    ]
    out += ["", *(f"note: {note}" for note in results.notes)]
    return "\n".join(out).rstrip()
