"""`python -m examples.scales`: one network for meters of different scales.

Trains `spec.yaml` on the first 60% of each of 40 generated meters, whose scales differ by five
orders of magnitude, chooses the epoch by the next 15% and scores the last 25%. Compares it with the
same network under other encodings: standardised by all training data, and by each stream's own
values without the season. All are scored on 40 other meters too, which no training has seen.
Writes the artifact to `build/examples/scales` (or to the path given), and the comparison beside it
as `scales.md`.
"""

from __future__ import annotations

from pathlib import Path

from examples.command import BUILT, run_example
from examples.scales.comparison import comparison_file
from examples.scales.data import meters

SPEC = Path(__file__).parent / "spec.yaml"
SEED = 1


def main() -> None:
    """Train, compare, write."""
    run_example(
        "scales",
        SPEC,
        lambda: meters(SEED),
        BUILT / "scales",
        description=__doc__,
        further_files=comparison_file,
        trees=False,
    )


if __name__ == "__main__":
    main()
