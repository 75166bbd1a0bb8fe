"""Draws a dashboard: its panels, where Grafana places them, into one small PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, PercentFormatter
from PIL import Image

from tests.support.monitoring import Panel

WIDTH, COLUMNS = 13.0, 24
ROW_INCHES = 0.34
COLORS = 96
"""Of the palette: a picture has few, and so half the bytes."""

MAX_LEGEND, LONG_LABEL = 6, 32


def _format_number(value: float, _: object = None) -> str:
    return EngFormatter()(value) if value >= 1000 else f"{value:.3g}"


UNITS: dict[str, Formatter] = {
    "percentunit": PercentFormatter(1, 0),
    "s": EngFormatter("s"),
    "bytes": EngFormatter("B"),
}
PLAIN = FuncFormatter(_format_number)


class Curve(NamedTuple):
    """Points (seconds, value) and their legend."""

    label: str
    points: list[tuple[float, float]]


def draw(panels: Sequence[tuple[Panel, list[Curve]]], path: Path) -> None:
    """Draw the panels of a dashboard."""
    rows = max(panel.place[1] + panel.place[3] for panel, _ in panels)
    style = {"font.size": 8, "axes.titlesize": 9, "axes.grid": True, "grid.color": "#e0e0e0"}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with mpl.rc_context(style):
        size = (WIDTH, rows * ROW_INCHES)
        figure = Figure(size, dpi=100, facecolor="#f4f5f5")
        for panel, curves in panels:
            x, y, w, h = panel.place
            # within its place, with room for the title, the ticks and the legend
            left, bottom = x / COLUMNS + 0.045, 1 - (y + h - 1.8) / rows
            axes = figure.add_axes((left, bottom, w / COLUMNS - 0.055, (h - 2.7) / rows))
            axes.set_title(panel.title, loc="left", fontweight="bold")
            (_draw_number if panel.kind == "stat" else _draw_curves)(axes, panel, curves)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    picture = Image.open(buffer).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def _draw_number(axes: Any, panel: Panel, curves: list[Curve]) -> None:
    axes.set_axis_off()
    unit = UNITS.get(panel.unit, PLAIN)
    text = unit(curves[0].points[-1][1]) if curves else "no data"
    axes.text(0.5, 0.4, text, ha="center", va="center", fontsize=22, color="#1a7f37")


def _draw_curves(axes: Any, panel: Panel, curves: list[Curve]) -> None:
    axes.yaxis.set_major_formatter(UNITS.get(panel.unit, PLAIN))
    below: dict[float, float] = {}
    # of many codes of errors most are zero
    other_than_zero = [curve for curve in curves if any(value for _, value in curve.points)]
    for curve in other_than_zero or curves:
        seconds, values = zip(*curve.points, strict=True)
        if panel.is_stacked:
            bottoms = [below.get(at, 0.0) for at in seconds]
            values = [a + b for a, b in zip(values, bottoms, strict=True)]
            below.update(zip(seconds, values, strict=True))
            axes.fill_between(seconds, bottoms, values, alpha=0.25)
        axes.plot(seconds, values, linewidth=1.3, label=curve.label)
    axes.set_ylim(bottom=0)
    if panel.unit == "percentunit" or not other_than_zero:
        axes.set_ylim(0, 1)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(
            handles[:MAX_LEGEND],
            labels[:MAX_LEGEND],
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.1),
            ncols=1 if max(map(len, labels)) > LONG_LABEL else 2,
            fontsize=6.5,
            frameon=False,
        )
