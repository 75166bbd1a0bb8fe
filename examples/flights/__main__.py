"""`python -m examples.flights`: train the example from scratch and compare it.

Prepares the departures, trains `spec.yaml` on January to September with three seeds, chooses epoch
and seed by October, scores November and December beside the last value and a running mean, and
writes the artifact with report and plots to `models/pretrained/flights` (or to the path given).
`--show` prints the report's tables. `python -m examples.flights.strong_trees` fits boosted trees.
"""

from __future__ import annotations

from pathlib import Path

import models
from examples.command import run_example
from models.pretrained.departures import flight_events

SPEC = Path(__file__).parent / "spec.yaml"
OUT = Path(models.__file__).parent / "pretrained" / "flights"


def main() -> None:
    """Train, compare, write."""
    run_example("flights", SPEC, flight_events, OUT, description=__doc__, trees=False)


if __name__ == "__main__":
    main()
