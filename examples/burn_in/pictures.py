"""Draws the pictures of the page on burn-in as SVG, equal bytes for equal data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

COLORS = (
    *("tab:blue", "tab:orange", "tab:green", "tab:red"),
    *("tab:purple", "tab:brown", "tab:pink", "tab:gray"),
)
STYLE: dict[Any, Any] = {"svg.hashsalt": "carry", "svg.fonttype": "none"}


def save(path: Path, figure: Figure) -> None:
    """Write a figure as SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.savefig(path, format="svg", metadata={"Date": None})
    print(path)
