"""Writes the curves of a run into a page, as SVG pictures and tables, between two comments.

    make bench ARGS="--only curves --lines tests/bench/curves.jsonl"
    python -m tests.bench.pictures tests/bench/curves.jsonl docs/reference/performance.md

A picture shows the median CPU of a chunk, with the spread over the rounds; its axis is logarithmic
where the values differ by more than ten times.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import orjson
from matplotlib import figure as drawing
from matplotlib.ticker import NullFormatter

from tests.bench.curves import CURVE
from tests.bench.results import Figure, write_table

AXES = {
    "steps": "events of a chunk",
    "units": "units of each of two layers",
    "layers": "layers of 64 units",
    "streams": "streams in the store",
    "models": "models",
    "connections": "connections",
    "media": "protocol",
    "workers": "workers, 32 connections each",
}
SERVERS = {
    "carry-onnxruntime": ("Carry", "#1a7f37"),
    "fastapi": ("bare FastAPI route", "#8c959f"),
    "compute": ("network alone", "#0969da"),
    "cold": ("states in the store", "#1a7f37"),
    "warm": ("states in the cache", "#0969da"),
    "any": ("any stream on a connection", "#bc4c00"),
    "own": ("a stream for each connection", "#1a7f37"),
}
"""The legend and the colour of a row's server, in the order of the legend."""

WIDE = 10  # ratio of the largest to the smallest value from which an axis is logarithmic


class Place(NamedTuple):
    """A server at one place of a curve."""

    cpu_us: list[float]  # of a chunk: of each round, or their median, minimum and maximum
    rates: list[float]  # chunks per second; none of the network alone

    @property
    def spread(self) -> tuple[float, float, float]:
        """The median CPU of a chunk, the least and the most."""
        return median(self.cpu_us), min(self.cpu_us), max(self.cpu_us)


BEGIN, END = "<!-- curves, by tests.bench.pictures -->", "<!-- end of curves -->"
Curves = Mapping[str, Mapping[str, Mapping[str, Place]]]


def read_curves(lines: Iterable[Mapping[str, Any]]) -> Curves:
    """The places of each curve by server and place, in the order of a run's lines."""
    curves: dict[str, dict[str, dict[str, Place]]] = {}
    for line in lines:
        name, _, rest = line.get("row", line.get("figure", "")).partition("/")
        x, _, server = rest.partition("/")
        if name.startswith(CURVE) and server in SERVERS:
            servers = curves.setdefault(name.removeprefix(CURVE), {})
            place = servers.setdefault(server, {}).setdefault(x, Place([], []))
            if "row" in line:
                place.cpu_us.append(line["cpu_us_per_chunk"])
                place.rates.append(line["chunks_per_s"])
            else:
                place.cpu_us.extend(line[each] for each in ("value", "low", "high"))
    return curves


def draw(name: str, curve: Mapping[str, Mapping[str, Place]], path: Path) -> None:
    """Draw a curve: lines over numbers, or points over names."""
    figure = drawing.Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    places = list(next(iter(curve.values())))
    are_numbers = places[0].isdigit()
    at = {x: float(x) if are_numbers else float(n) for n, x in enumerate(places)}
    medians: list[float] = []
    for server, (label, color) in SERVERS.items():
        if points := curve.get(server):
            middles, low, high = np.array([place.spread for place in points.values()]).T
            style = {"color": color, "capsize": 2, "fmt": "o-" if are_numbers else "o"}
            errors = [middles - low, high - middles]
            axes.errorbar([at[x] for x in points], middles, errors, label=label, **style)
            medians += middles.tolist()
    if are_numbers:
        axes.set_xscale("log")
    if max(medians) > WIDE * min(medians):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks([at[x] for x in places], map(_format_place, places), minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set(xlabel=AXES[name], ylabel="CPU of a chunk, us")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def make_table(name: str, curve: Mapping[str, Mapping[str, Place]]) -> str:
    """A curve as a table in Markdown: medians of the chunks/s and of the CPU of a chunk."""
    head, columns = [AXES[name]], [list(next(iter(curve.values())))]
    for server, (label, _) in SERVERS.items():
        places = [curve.get(server, {}).get(x) for x in columns[0]]
        if any(place and place.rates for place in places):
            head.append(f"{label}: chunks/s")
            columns.append([f"{median(place.rates):,.0f}" if place else "" for place in places])
        if any(places):
            head.append(f"{label}: us")
            columns.append([_format(place.spread[0]) if place else "" for place in places])
    columns[0] = [_format_place(x) for x in columns[0]]
    return write_table(head, [*zip(*columns, strict=True)])


def _format(microseconds: float) -> str:
    return f"{microseconds:,.0f}" if microseconds >= WIDE else f"{microseconds:.1f}"


def _format_place(x: str) -> str:
    return f"{int(x):,}" if x.isdigit() else x


def make_figures(name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """What was computed from a curve, as a table in Markdown; empty if nothing was."""
    named = [(line["figure"].partition("/")[2], line) for line in lines if "figure" in line]
    rows = [
        [figure, str(Figure(*(line[each] for each in Figure._fields)))]
        for figure, line in named
        if line["figure"].startswith(f"{CURVE}{name}/") and not figure.endswith("/compute")
    ]
    return write_table(["figure", "median (over the rounds)"], rows)


def make_block(path: Path, folder: Path) -> str:
    """Draw every curve into a folder; the facts of the run, the pictures and tables in Markdown."""
    about, *lines = map(orjson.loads, path.read_bytes().splitlines())
    facts = [f"{name}: {text}" for name, text in about.items()]
    facts += [line["note"] for line in lines if "note" in line]
    parts = ["".join(f"- {fact}\n" for fact in facts)]
    for name, curve in read_curves(lines).items():
        draw(name, curve, folder / f"{name}.svg")
        picture = f"![CPU of a chunk by {AXES[name]}]({folder.name}/{name}.svg)\n"
        parts += [f"### By {AXES[name]}\n", picture, make_table(name, curve)]
        parts += filter(None, [make_figures(name, lines)])
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw every curve of a file beside a page, and write their tables into it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("lines", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args(arguments)
    page: Path = options.page
    head, begin, rest = page.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        parser.error(f"{page}: expected {BEGIN} and {END}")
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    style = {"svg.hashsalt": "carry", "svg.fonttype": "none", "font.size": 9}
    with mpl.rc_context(style):
        block = make_block(options.lines, folder)
    page.write_text(f"{head}{BEGIN}\n\n{block}\n{END}{tail}")


if __name__ == "__main__":
    main()
