"""`python -m examples.labelling`: train the example from scratch and compare it.

Trains `spec.yaml` on the days from January to July 2013, chooses the epoch by August to October,
scores November and December beside baselines, and writes the artifact with report and plots to
`build/examples/labelling` (or to the path given).
"""

from __future__ import annotations

from pathlib import Path

from examples.command import BUILT, run_example
from examples.labelling.baselines import OneWay
from examples.labelling.data import labelled_days

SPEC = Path(__file__).parent / "spec.yaml"


def main() -> None:
    """Train, compare, write."""
    run_example(
        "labelling",
        SPEC,
        labelled_days,
        BUILT / "labelling",
        description=__doc__,
        further=OneWay(),
    )


if __name__ == "__main__":
    main()
