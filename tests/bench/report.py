"""Write docs/reference/performance.md from a run's JSON lines; nothing is measured here.

The page is `performance.template.md` with every figure filled in, so that no figure in it was
ever typed by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template

from tests.bench.cpu_split import STAGES
from tests.bench.results import COLUMNS, Results, format_row, verdicts
from tests.bench.workloads import PLAIN

TEMPLATE = Path(__file__).with_name("performance.template.md")
NOTHING = "Not measured in this run.\n"
SHOWN_SECTIONS = ("peak", "many", "latency", "streams", "workers", "events", "widths")


def write_report(results: Results, folder: Path) -> None:
    """Write `performance.md` into a folder."""
    filled = {
        **results.about,
        "targets": _table(
            ["target", "bound", "measured", "verdict"],
            [[target.text, target.limit, shown, word] for target, shown, word in verdicts(results)],
        ),
        "notes": "\n".join(f"- {note}" for note in results.notes) or NOTHING,
        "cold": _figures(results, "cold") or NOTHING,
        "kinds": _kinds(results),
        "split": _split(results),
    }
    for section in SHOWN_SECTIONS:
        names = [name for name in results.rows if name.startswith(f"{section}/")]
        rows = [[f"`{name.partition('/')[2]}`", *format_row(results, name)] for name in names]
        filled[section] = _table(["load/server", *(column[0] for column in COLUMNS)], rows)
        filled[f"{section}_figures"] = _figures(results, section)
    text = Template(TEMPLATE.read_text()).substitute(filled)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    (folder / "performance.md").write_text(text.rstrip() + "\n")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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
    return _table(["figure", "median", "over the rounds"], rows) if rows else ""


def _kinds(results: Results) -> str:
    """One line a kind and runtime: its row at 32 connections, over the plain one, p50 at one."""
    lead, rows = "kinds/32/", []
    for row in results.rows:
        if not row.startswith(lead):
            continue
        shown = row.removeprefix(lead)
        name, _, server = shown.partition("/")
        over = [f"kinds/{server} {name} over {PLAIN}{by}" for by in ("", ", by CPU")]
        one = f"kinds/1/{shown}"
        rows.append(
            [
                f"`{shown}`",
                *format_row(results, row, 3),
                *(str(results.figures.get(figure, "")) for figure in over),
                f"{results.median(one, 'p50_ms'):.2f}" if one in results.rows else "",
            ]
        )
    heads = [column[0] for column in COLUMNS[:3]]
    return _table(["kind/server", *heads, f"of `{PLAIN}`", "by CPU", "p50 ms at 1"], rows)


def _split(results: Results) -> str:
    """The CPU of a chunk by stage, one line a runtime."""
    values: dict[str, list[str]] = {}
    for name, figure in results.figures.items():
        if name.startswith("split/"):
            server = name.removeprefix("split/").partition(" ")[0]
            values.setdefault(server, []).append(f"{figure.value:.1f}")
    return _table(["us a chunk", *STAGES], [[server, *cells] for server, cells in values.items()])
