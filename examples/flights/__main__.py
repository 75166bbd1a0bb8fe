"""`python -m examples.flights`: train the example from scratch and compare it.

Prepares the departures, trains `spec.yaml` on January to September, chooses the epoch by
October, scores November and December beside three baselines, and writes the artifact with
report and plots to `models/pretrained/flights` (or to the path given). `--show` prints the
report's tables.
"""

from __future__ import annotations

from pathlib import Path

from examples.command import run_example
from models.pretrained.departures import flight_events

HERE = Path(__file__).parent
SPEC = HERE / "spec.yaml"
OUT = HERE.parents[1] / "pretrained" / "flights"


def main() -> None:
    """Train, compare, write."""
    run_example("flights", SPEC, flight_events, OUT, description=__doc__)


if __name__ == "__main__":
    main()
