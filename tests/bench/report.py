"""docs/reference/performance.md and its plots, out of a run's JSON lines; nothing is measured here.

The page is `performance.template.md` with every figure filled in, so that no figure in it was
ever typed by hand. Plots are SVG, drawn without a display, the same bytes for the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template

import matplotlib
from matplotlib.figure import Figure as Plot

from tests.bench.cpu_split import STAGES
from tests.bench.kinds import PLAIN
from tests.bench.results import COLUMNS, Figure, Results, Row, cells
from tests.bench.targets import verdicts

TEMPLATE = Path(__file__).with_name("performance.template.md")
FOLDER = "performance"
NOTHING = "Not measured in this run."

SHOWN_SECTIONS = ("peak", "many", "latency", "streams", "workers", "events", "widths")
CARRY = "tab:blue"
OTHERS = "tab:gray"


def write_report(results: Results, docs: Path) -> None:
    """Write `docs/reference/performance.md` and the plots that its sections have data for."""
    folder = docs / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    images: dict[str, str] = {}
    with matplotlib.rc_context({"svg.hashsalt": "carry", "font.size": 9}):
        for name, (draw, text) in PLOTS.items():
            plot = draw(results)
            if plot is not None:
                plot.savefig(folder / f"{name}.svg", metadata={"Date": None})
                images[name] = f"![{text}]({FOLDER}/{name}.svg)\n"
    (docs / "performance.md").write_text(page(results, images))


def page(results: Results, images: Mapping[str, str]) -> str:
    """The whole page; `images` has the plots' lines by name."""
    filled = {
        **results.about,
        "targets": _targets(results),
        "notes": "\n".join(f"- {note}" for note in results.notes) or NOTHING,
        "cold": _figures(results, "cold"),
        "kinds": _kinds(results),
        "split": _split(results),
    }
    for section in SHOWN_SECTIONS:
        rows = [row for row in results.rows.values() if row.section == section]
        filled[section] = _rows(rows) if rows else NOTHING + "\n"
        filled[f"{section}_figures"] = _figures(results, section) if _of(results, section) else ""
    for name in PLOTS:
        filled[f"plot_{name}"] = images.get(name, "")
    text = Template(TEMPLATE.read_text()).substitute(filled)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rows(rows: Sequence[Row]) -> str:
    body = [[f"`{row.name.partition('/')[2]}`", *cells(row)] for row in rows]
    return _markdown(["load/server", *(head for head, _, _ in COLUMNS)], body)


def _of(results: Results, section: str) -> list[Figure]:
    return [f for f in results.figures.values() if f.name.startswith(f"{section}/")]


def _figures(results: Results, section: str) -> str:
    found = _of(results, section)
    if not found:
        return NOTHING + "\n"
    body = [
        [figure.name.partition("/")[2], f"{figure.value:,.4g}", _spread(figure)] for figure in found
    ]
    return _markdown(["figure", "median", "over the rounds"], body)


def _spread(figure: Figure) -> str:
    return f"{figure.low:,.4g} to {figure.high:,.4g}"


def _targets(results: Results) -> str:
    body = [
        [target.text, f"{target.side} {target.bound:g}", shown, verdict]
        for target, shown, verdict in verdicts(results)
    ]
    return _markdown(["target", "bound", "found", "verdict"], body)


def _kinds(results: Results) -> str:
    """One line a kind and runtime: its row at 32 connections, over the plain one, p50 at one."""
    lead = "kinds/32/"
    rows = [row for name, row in results.rows.items() if name.startswith(lead)]
    if not rows:
        return NOTHING + "\n"
    body = []
    for row in rows:
        shown = row.name.removeprefix(lead)
        name, _, kind = shown.partition("/")
        over = [
            results.figures.get(f"kinds/{kind} {name} over {PLAIN}{by}") for by in ("", ", by CPU")
        ]
        one = results.rows.get(f"kinds/1/{shown}")
        body.append(
            [
                f"`{shown}`",
                *(form.format(row.median(of)) for _, of, form in COLUMNS[:3]),
                *("" if figure is None else _with_spread(figure) for figure in over),
                "" if one is None else f"{one.median('p50_ms'):.2f}",
            ]
        )
    ratios = (f"of `{PLAIN}`", "by CPU")
    return _markdown(
        ["kind/server", *(head for head, _, _ in COLUMNS[:3]), *ratios, "p50 ms at 1"], body
    )


def _with_spread(figure: Figure) -> str:
    return f"{figure.value:.3g} ({figure.low:.3g} to {figure.high:.3g})"


def _split(results: Results) -> str:
    kinds = _split_kinds(results)
    if not kinds:
        return NOTHING + "\n"
    body = [
        [kind, *(f"{results.figures[_split_name(kind, stage)].value:.1f}" for stage in STAGES)]
        for kind in kinds
    ]
    return _markdown(["us a chunk", *STAGES], body)


def _split_name(kind: str, stage: str) -> str:
    return f"split/{kind} {stage}, us a chunk"


def _split_kinds(results: Results) -> list[str]:
    names = [figure.name for figure in _of(results, "split")]
    return list(dict.fromkeys(name.partition("/")[2].partition(" ")[0] for name in names))


def _plot_peak(results: Results) -> Plot | None:
    """Chunks per second of every server, with the spread over the rounds."""
    rows = [row for name, row in results.rows.items() if name.startswith("peak/32/")]
    if not rows:
        return None
    rows.sort(key=lambda row: row.median("chunks_per_s"))
    plot = Plot(figsize=(7, 0.7 + 0.35 * len(rows)), layout="constrained")
    axes = plot.subplots()
    for at, row in enumerate(rows):
        values = row.values("chunks_per_s")
        name = row.name.rpartition("/")[2]
        axes.barh(at, row.median("chunks_per_s"), color=CARRY if "carry" in name else OTHERS)
        axes.plot([min(values), max(values)], [at, at], color="black", linewidth=1)
        axes.text(max(values) * 1.05, at, f"{row.median('chunks_per_s'):,.0f}", va="center")
    axes.set_yticks(range(len(rows)), [row.name.rpartition("/")[2] for row in rows])
    axes.set(xscale="log", xlabel="chunks per second, one core, 32 connections")
    axes.margins(x=0.15)
    return plot


def _plot_latency(results: Results) -> Plot | None:
    """Percentiles by load."""
    loads = ("unloaded", "open-50", "open-80", "open-50-long")
    rows = [row for row in results.rows.values() if row.section == "latency"]
    kinds = list(dict.fromkeys(row.name.rpartition("/")[2] for row in rows))
    if not kinds:
        return None
    plot = Plot(figsize=(7, 2.8), layout="constrained")
    for axes, kind in zip(plot.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for of, head in (("p50_ms", "o"), ("p99_ms", "s"), ("p999_ms", "^")):
            values = [results.rows[f"latency/{load}/{kind}"].median(of) for load in loads]
            axes.plot(loads, values, head, label=of.removesuffix("_ms"))
        axes.set(yscale="log", ylabel="ms", title=kind)
        axes.tick_params(axis="x", rotation=20)
        axes.legend()
    return plot


def _plot_split(results: Results) -> Plot | None:
    """The CPU of a chunk by stage, one bar a runtime."""
    kinds = _split_kinds(results)
    if not kinds:
        return None
    plot = Plot(figsize=(7, 0.9 + 0.5 * len(kinds)), layout="constrained")
    axes = plot.subplots()
    left = [0.0] * len(kinds)
    for stage in STAGES:
        values = [results.figures[_split_name(kind, stage)].value for kind in kinds]
        axes.barh(kinds, values, left=left, label=stage)
        left = [at + value for at, value in zip(left, values, strict=True)]
    axes.set(xlabel="CPU of a chunk, us")
    plot.legend(loc="outside upper center", ncols=len(STAGES), columnspacing=1, handlelength=1)
    return plot


PLOTS: Mapping[str, tuple[Callable[[Results], Plot | None], str]] = {
    "peak": (_plot_peak, "Chunks per second of every server"),
    "latency": (_plot_latency, "Latency by load"),
    "split": (_plot_split, "The CPU of a chunk by stage"),
}
"""The plots by name: how each is drawn, and the text for who cannot see it."""
