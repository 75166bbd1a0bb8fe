"""`python -m examples.customers`: train the example from scratch and compare it.

Trains `spec.yaml` on the purchases up to September 1997, chooses the epoch by October to
December, scores January to June 1998 beside baselines, and writes the artifact with report and
plots to `build/examples/customers` (or to the path given).
"""

from __future__ import annotations

from pathlib import Path

from examples.command import BUILT, run_example
from examples.customers.baselines import customer_baselines
from examples.customers.data import purchase_events

SPEC = Path(__file__).parent / "spec.yaml"


def main() -> None:
    """Train, compare, write."""
    run_example(
        "customers",
        SPEC,
        purchase_events,
        BUILT / "customers",
        description=__doc__,
        further=customer_baselines,
    )


if __name__ == "__main__":
    main()
