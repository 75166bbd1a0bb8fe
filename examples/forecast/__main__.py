"""`python -m examples.forecast`: train the example from scratch and compare it.

Trains `spec.yaml` on January to September 2013, chooses the epoch by October, forecasts the
temperature of 24 hours from every seventh hour of November and December beside baselines, and
writes the artifact with reports and plots to `build/examples/forecast` (or to the path given).
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from examples.command import BUILT, run_example
from examples.forecast.horizon import MODEL, Comparison, compare, comparison_lines
from examples.weather.data import weather_events
from models.artifact.artifact import Artifact

SPEC = Path(__file__).parent / "spec.yaml"


def main() -> None:
    """Train, compare, write."""
    run_example(
        "forecast",
        SPEC,
        weather_events,
        BUILT / "forecast",
        description=__doc__,
        further_files=_by_horizon,
    )


def _by_horizon(artifact: Artifact, frame: pl.DataFrame) -> dict[str, bytes]:
    """The comparison by hours ahead, as text and as a plot."""
    comparison = compare(artifact, frame)
    text = "\n".join(comparison_lines(comparison)) + "\n"
    return {"horizon.md": text.encode(), "plots/baselines.png": _plot(comparison)}


def _plot(comparison: Comparison) -> bytes:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, loss in comparison.pinball.items():
        by_hour = np.nanmean(loss, axis=0)
        color = "tab:blue" if name == MODEL else None
        axes.plot(range(1, len(by_hour) + 1), by_hour, label=name, color=color)
    axes.set(xlabel="hours ahead", ylabel="pinball loss, degrees Celsius")
    axes.legend()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
