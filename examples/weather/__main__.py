"""`python -m examples.weather`: train the example from scratch and compare it.

Trains `spec.yaml` on January to September 2013, chooses the epoch by October, scores November
and December beside baselines, and writes the artifact with report and plots to
`build/examples/weather` (or to the path given).
"""

from __future__ import annotations

from pathlib import Path

from examples.command import BUILT, run_example
from examples.weather.baselines import weather_baselines
from examples.weather.data import weather_events

SPEC = Path(__file__).parent / "spec.yaml"


def main() -> None:
    """Train, compare, write."""
    run_example(
        "weather",
        SPEC,
        weather_events,
        BUILT / "weather",
        description=__doc__,
        further=weather_baselines,
    )


if __name__ == "__main__":
    main()
