"""What a run's results look like: the printed table, the targets, and the page of performance.

The page is `performance.template.md` with every figure filled in, so that no figure in it was
ever typed by hand. Nothing is measured here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

from tests.bench.cpu_split import STAGES
from tests.bench.results import Results
from tests.bench.workloads import FEW, MANY, PLAIN

TEMPLATE = Path(__file__).with_name("performance.template.md")
NOTHING = "Not measured in this run.\n"
SHOWN_SECTIONS = ("peak", "many", "latency", "streams", "workers", "events", "widths")
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


class Target(NamedTuple):
    """A bound on a figure: `at least`, or else at most."""

    text: str
    figure: str
    bound: float
    at_least: bool = False


NOT_MEASURED = "not measured"
TARGETS = (
    Target("1. JSON, single chunks, onnxruntime: of the bare FastAPI echo",
           "peak/carry-onnxruntime over fastapi", 0.8, at_least=True),
    Target("1. stretch goal: as many as the bare FastAPI echo",
           "peak/carry-onnxruntime over fastapi", 1.0, at_least=True),
    Target("1. onnxruntime: times the hand-written ONNX service",
           "peak/carry-onnxruntime over competent", 5, at_least=True),
    Target("1. onnxruntime: times the naive Keras service",
           "peak/carry-onnxruntime over naive", 500, at_least=True),
    Target("1. tensorflow: of the bare FastAPI echo",
           "peak/carry-tensorflow over fastapi", 0.6, at_least=True),
    Target("2. MessagePack, 64 streams a request, onnxruntime: of its compute alone",
           "many/carry-onnxruntime over compute", 0.5, at_least=True),
    Target("2. tensorflow: of its compute alone, as above",
           "many/carry-tensorflow over compute", 0.5, at_least=True),
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


def verdicts(results: Results) -> list[tuple[str, str, str, str]]:
    """Each target: its text, its bound, its figure; `reached`, `not reached`, `not measured`."""
    verdicts = []
    for text, name, bound, at_least in TARGETS:
        figure, verdict = results.figures.get(name), NOT_MEASURED
        if figure is not None:
            is_reached = figure.value >= bound if at_least else figure.value <= bound
            verdict = "reached" if is_reached else "not reached"
        limit = f"{'at least' if at_least else 'at most'} {bound:g}"
        verdicts.append((text, limit, str(figure or "-"), verdict))
    return verdicts


def format_row(results: Results, row: str, columns: int = len(COLUMNS)) -> list[str]:
    """A row's medians as tables show them."""
    return [form.format(results.median(row, name)) for _, name, form in COLUMNS[:columns]]


def format_table(results: Results) -> str:
    """All rows, then the figures with their spread, the targets and the notes."""
    width = max((len(name) for name in [*results.rows, *results.figures]), default=20) + 2
    lines = {"": [head for head, _, _ in COLUMNS]}
    lines |= {row: format_row(results, row) for row in results.rows}
    blocks = [
        [name.ljust(width) + "".join(f"{c:>14}" for c in cells) for name, cells in lines.items()],
        [f"{name.ljust(width)}{figure}" for name, figure in results.figures.items()],
        [
            f"{verdict:13} {text}: {figure}, {limit}"
            for text, limit, figure, verdict in verdicts(results)
            if verdict != NOT_MEASURED
        ],
        [f"note: {note}" for note in results.notes],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def write_report(results: Results, folder: Path) -> None:
    """Write `performance.md` into a folder."""
    parts = {
        **results.about,
        "targets": _markdown(["target", "bound", "measured", "verdict"], verdicts(results)),
        "notes": "\n".join(f"- {note}" for note in results.notes) or NOTHING,
        "cold": _figures(results, "cold") or NOTHING,
        "kinds": _kinds(results),
        "split": _split(results),
    }
    for section in SHOWN_SECTIONS:
        names = [name for name in results.rows if name.startswith(f"{section}/")]
        rows = [[f"`{name.partition('/')[2]}`", *format_row(results, name)] for name in names]
        parts[section] = _markdown(["load/server", *(column[0] for column in COLUMNS)], rows)
        parts[f"{section}_figures"] = _figures(results, section)
    text = Template(TEMPLATE.read_text()).substitute(parts)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    (folder / "performance.md").write_text(text.rstrip() + "\n")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NOTHING
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figures(results: Results, section: str) -> str:
    """A section's figures with their spread; empty where it has none."""
    rows = [
        [name.partition("/")[2], f"{one.value:,.4g}", f"{one.low:,.4g} to {one.high:,.4g}"]
        for name, one in results.figures.items()
        if name.startswith(f"{section}/")
    ]
    return _markdown(["figure", "median", "over the rounds"], rows) if rows else ""


def _kinds(results: Results) -> str:
    """One line a kind and runtime: its row at 32 connections, over the plain one, p50 at one."""
    rows = []
    for row in results.rows:
        section, connections, *rest = row.split("/")
        if (section, connections) != ("kinds", "32"):
            continue
        name, server = rest
        ratio, alone = f"kinds/{server} {name} over {PLAIN}", f"kinds/1/{name}/{server}"
        rows.append(
            [
                f"`{name}/{server}`",
                *format_row(results, row, 3),
                *(str(results.figures.get(f"{ratio}{by}", "")) for by in ("", ", by CPU")),
                f"{results.median(alone, 'p50_ms'):.2f}" if alone in results.rows else "",
            ]
        )
    heads = [column[0] for column in COLUMNS[:3]]
    return _markdown(["kind/server", *heads, f"of `{PLAIN}`", "by CPU", "p50 ms at 1"], rows)


def _split(results: Results) -> str:
    """The CPU of a chunk by stage, one line a runtime."""
    values: dict[str, list[str]] = defaultdict(list)
    for name, figure in results.figures.items():
        if name.startswith("split/"):
            values[name.removeprefix("split/").partition(" ")[0]].append(f"{figure.value:.1f}")
    rows = [[server, *cells] for server, cells in values.items()]
    return _markdown(["us a chunk", *STAGES], rows)
