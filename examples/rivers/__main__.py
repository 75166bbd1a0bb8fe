"""`python -m examples.rivers`: train the example from scratch and score it.

Trains `spec.yaml` on the days before 2011, chooses the epoch by those up to 2013, scores those from
2014, and writes the artifact with report and plots to `models/pretrained/rivers` (or to the path
given). `python -m examples.rivers.comparison` compares it with trees and other seeds.
"""

from __future__ import annotations

from examples.command import run_example
from examples.rivers.comparison import PRETRAINED
from examples.rivers.data import SPEC, river_days


def main() -> None:
    """Train, score, write."""
    run_example("rivers", SPEC, river_days, PRETRAINED, description=__doc__, trees=False)


if __name__ == "__main__":
    main()
