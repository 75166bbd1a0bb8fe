"""Results of a run: rows of rounds, figures made of them, and their JSON lines.

A row is one server under one load, measured in several rounds; a figure is a number that the
page of performance shows, mostly the ratio of two rows taken round by round, so that what the
machine did meanwhile cancels out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from tests.bench.generator import Load

MIB = 2**20


class Sample(NamedTuple):
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
            *(np.percentile(load.latencies_s, (50, 99, 99.9)) * 1000).tolist(),
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
        pairs = zip(above, below, strict=True)
        # Processor time is counted in steps of 10 ms: in a very short round it can be zero.
        self.figure(name, [one / other if other else math.inf for one, other in pairs])

    def ratio(self, name: str, above: str, below: str, of: str = "chunks_per_s") -> None:
        """Keep the ratio of two rows, where both were measured."""
        if above in self.rows and below in self.rows:
            self.ratios(name, self.values(above, of), self.values(below, of))

    def compare(self, name: str, ours: Sequence[Any], theirs: Sequence[Any]) -> None:
        """Keep the ratio of our chunks/s to theirs, and the same by CPU time of a chunk."""
        if not theirs:
            return
        for by, above, below, of in (
            ("", ours, theirs, "chunks_per_s"),
            # Where others use the machine too, this one suffers less.
            (", by CPU", theirs, ours, "cpu_us_per_chunk"),
        ):
            series = ([getattr(sample, of) for sample in side] for side in (above, below))
            self.ratios(f"{name}{by}", *series)

    def write(self, file: Path) -> None:
        """Append rows, figures and notes to a file of JSON lines."""
        lines: list[dict[str, Any]] = [
            {
                "kind": "row",
                "name": name,
                **{of: self.median(name, of) for of in Sample._fields},
                "rounds": [sample._asdict() for sample in samples],
            }
            for name, samples in self.rows.items()
        ]
        lines += [
            {"kind": "figure", "name": name, **figure._asdict()}
            for name, figure in self.figures.items()
        ]
        lines += [{"kind": "note", "name": note} for note in self.notes]
        with file.open("a") as output:
            output.writelines(json.dumps({**line, **self.about}) + "\n" for line in lines)


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
