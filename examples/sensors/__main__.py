"""`python -m examples.sensors`: train the example from scratch and compare its alarms.

Trains `spec.yaml` on the first 40 days of 40 sensors, without a label. Detection is fitted to the
next 20 days, and the last 40 are scored against the labelled anomalies: those of the kinds that
detection was developed with, and those of 40 other sensors with held-out kinds. Compares it with
itself without the season, and with other methods, all with a threshold for the same number of false
alarms on the same days. Writes the artifact to `build/examples/sensors` (or to
the path given), and the comparison beside it as `detection.md`.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from examples.command import BUILT, run_example
from examples.detection import comparison
from examples.sensors.data import sensors
from models.artifact.artifact import Artifact

SPEC = Path(__file__).parent / "spec.yaml"


def main() -> None:
    """Train, compare, write."""
    run_example(
        "sensors",
        SPEC,
        lambda: sensors("development"),
        BUILT / "sensors",
        description=__doc__,
        further_files=_comparison_file,
        trees=False,
    )


def _comparison_file(artifact: Artifact, frame: pl.DataFrame) -> dict[str, bytes]:
    tables = {"development": frame, "held out": sensors("held_out")}
    return {"detection.md": comparison(artifact, tables).encode()}


if __name__ == "__main__":
    main()
