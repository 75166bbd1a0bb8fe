"""Draws a dashboard: its panels, where Grafana places them, into one small PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from tests.support.monitoring import Panel

WIDTH, COLUMNS = 13.0, 24
ROW_INCHES = 0.34
DPI = 100
COLORS = 96
"""Of the palette: a picture has few, and so half the bytes."""

MAX_LEGEND = 6
LONG_LABEL = 32


class Curve(NamedTuple):
    """Points (seconds, value) and their legend."""

    label: str
    points: list[tuple[float, float]]


def draw(panels: Sequence[tuple[Panel, list[Curve]]], path: Path) -> None:
    """Draw the panels of a dashboard."""
    rows = max(panel.place[1] + panel.place[3] for panel, _ in panels)
    height = rows * ROW_INCHES
    with mpl.rc_context({"font.size": 8, "axes.titlesize": 9, "axes.grid": True}):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="#f4f5f5")
        for panel, curves in panels:
            x, y, w, h = panel.place
            left, bottom = x / COLUMNS, 1 - (y + h) / rows
            inside = (
                left + 0.6 / WIDTH,
                bottom + 0.62 / height,
                w / COLUMNS - 0.75 / WIDTH,
                h / rows - 0.95 / height,
            )
            axes = figure.add_axes(inside)
            axes.set_title(panel.title, loc="left", fontweight="bold")
            (_draw_number if panel.kind == "stat" else _draw_curves)(axes, panel, curves)
    _save(figure, path)


def _draw_number(axes: Any, panel: Panel, curves: list[Curve]) -> None:
    axes.set_axis_off()
    value = curves[0].points[-1][1] if curves else None
    text = "no data" if value is None else _text(panel.unit, value)
    axes.text(0.5, 0.4, text, ha="center", va="center", fontsize=22, color="#1a7f37")


def _draw_curves(axes: Any, panel: Panel, curves: list[Curve]) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _text(panel.unit, value)))
    axes.grid(color="#e0e0e0", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    below: dict[float, float] = {}
    # of many codes of errors most are zero
    shown = [curve for curve in curves if _is_not_zero(curve)] or curves
    for curve in shown:
        seconds = [at for at, _ in curve.points]
        values = [value for _, value in curve.points]
        if panel.is_stacked:
            bottoms = [below.get(at, 0.0) for at in seconds]
            values = [a + b for a, b in zip(values, bottoms, strict=True)]
            below.update(zip(seconds, values, strict=True))
            axes.fill_between(seconds, bottoms, values, alpha=0.25)
        axes.plot(seconds, values, linewidth=1.3, label=curve.label)
    axes.set_ylim(bottom=0)
    if panel.unit == "percentunit" or not any(map(_is_not_zero, shown)):
        axes.set_ylim(0, 1)
    if shown:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[:MAX_LEGEND],
            labels[:MAX_LEGEND],
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.1),
            ncols=1 if max(map(len, labels)) > LONG_LABEL else 2,
            fontsize=6.5,
            frameon=False,
        )


def _is_not_zero(curve: Curve) -> bool:
    return any(value for _, value in curve.points)


def _text(unit: str, value: float) -> str:
    """A value in its unit, as Grafana writes it."""
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "s":
        for factor, name in ((1, "s"), (1e3, "ms")):
            if value * factor >= 1 or not value:
                return f"{value * factor:.3g} {name}"
        return f"{value * 1e6:.3g} us"
    steps = ["", "Ki", "Mi", "Gi"] if unit == "bytes" else ["", "k", "M", "G"]
    base = 1024 if unit == "bytes" else 1000
    for step in steps:
        if abs(value) < base or step == steps[-1]:
            return f"{value:.3g} {step}{'B' if unit == 'bytes' else ''}".strip()
        value /= base
    raise RuntimeError("unreachable")


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG with a palette."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
